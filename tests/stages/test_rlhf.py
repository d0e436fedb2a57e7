"""One RLHF step: the first ratio, what moves and what is frozen, and who is asked when."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from minilm import metrics
from minilm.algorithms import ALGORITHMS, PolicyBatch
from minilm.checkpoint import flatten
from minilm.config import Config, ModelConfig, OptimizerConfig, RLHFConfig, TokenizerConfig
from minilm.losses.reduce import Mean
from minilm.model import Transformer, hidden_states, logits
from minilm.optim import make_optimizer
from minilm.rewards import Normalization, RewardModel
from minilm.stages import rlhf as s
from minilm.stages.workspace import Workspace
from minilm.text.batches import batch_of
from minilm.text.tokenizer import train_tokenizer

VOCAB, PAD, EOS = 9, 0, 1
TINY = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
PROMPTS = np.array(
    [[0, 1, 5, 3], [0, 0, 1, 4], [1, 8, 2, 6], [0, 0, 0, 1], [0, 1, 7, 7]], np.int32
)  # fmt: skip
PLAIN = OptimizerConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.0)
# Two passes in two halves: four updates a step, of which the first must find a ratio of 1.
CONFIG = RLHFConfig(
    prompts_per_step=4, group_size=4, epochs=2, minibatches=2, kl_coef=0.02, optimizer=PLAIN
)  # fmt: skip
TEMPERATURES = {"rloo": 1.0, "grpo": 0.7, "ppo": 1.0}


def random_model(seed: int, *, scalar_head: bool = False, scale: float = 0.3) -> Transformer:
    shape = jax.eval_shape(
        lambda: Transformer(TINY, VOCAB, scalar_head=scalar_head, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape).astype(x.dtype)), shape)


def arrays(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(model).items()}


def payer(model) -> RewardModel:
    return RewardModel((model,), (Normalization(0.0, 1.0),))


def make(name: str, config: RLHFConfig = CONFIG, head: float | None = None):
    """What makes a state whose policy is the reference; a step; the frozen models."""
    algorithm = ALGORITHMS[name]
    reference, reward_model = random_model(0), random_model(1, scalar_head=True, scale=0.6)
    if head is not None:
        reward_model.score[...] = np.full(16, head, np.float32)
    policy = reference
    if algorithm.critic:
        policy = random_model(0, scalar_head=True)
        policy.score[...] = np.zeros(16, np.float32)
    optimizer = make_optimizer(config.optimizer, 100)
    collect = s.make_collect(
        config, algorithm, reference, payer(reward_model), PROMPTS,
        key=jax.random.key(0), max_new_tokens=6, eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    step = s.make_step(config, s.objective(algorithm, config), optimizer, collect, 6)
    return lambda: s.start_state(policy, optimizer), step, (reference, reward_model)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_of_steps(name, caplog):
    """The life of each algorithm: one compilation, some thirty steps, several observations.

    trl#4159, #6789: ratio off 1 at the first update. torchforge#571: ratio 1 for ever.
    """
    temperature = TEMPERATURES.get(name, 1.0)
    config = CONFIG.model_copy(update={"temperature": temperature})
    start, step, frozen = make(name, config)
    state = start()
    before = [arrays(model) for model in frozen]
    seen = []
    for k in range(30):
        with jax.log_compiles(k > 0), caplog.at_level("WARNING" if k else "CRITICAL"):
            state, metrics = step(state, k)
        seen.append({key: float(mean.value) for key, mean in metrics.items()})
    first = seen[0]
    # The rollout's log-probabilities and the first update's are the same numbers to rounding.
    assert first["val/ratio_deviation"] < 1e-4
    assert all(values["val/ratio_deviation"] < 1e-4 for values in seen)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    # By the fourth update of the step the policy has moved away from the rollout.
    assert all(values["policy/approxkl_avg"] > 1e-7 for values in seen)
    assert int(state.step) == 30 * 4
    assert "XLA compilation" not in caplog.text
    # It learns what it is paid for, and goes away from the reference in doing so.
    score = np.array([values["objective/scores"] for values in seen])
    assert score[-5:].mean() > score[:5].mean() + 0.3
    assert np.mean([values["objective/kl"] for values in seen[-5:]]) > 0.05
    # Reference and reward model are where they were.
    for model, old in zip(frozen, before, strict=True):
        for key, array in arrays(model).items():
            np.testing.assert_array_equal(array, old[key], err_msg=key)
    assert all(np.isfinite(list(values.values())).all() for values in seen)
    # A step is a function of state and number alone: a resumed run needs nothing else.
    _, again = step(start(), 0)
    _, other = step(start(), 1)
    assert {key: float(mean.value) for key, mean in again.items()} == first
    assert float(other["objective/scores"].value) != first["objective/scores"]


def test_a_reward_that_is_not_a_number_moves_nothing_and_is_counted():
    """`fit` stops with a message after `optimizer.max_skipped` such updates in a row."""
    start, step, _ = make("rloo", CONFIG, head=np.nan)
    before = arrays(start().model)
    state, metrics = step(start(), 0)
    for key, array in arrays(state.model).items():
        np.testing.assert_array_equal(array, before[key], err_msg=key)
    assert int(state.extra["skipped_in_a_row"]) == int(state.extra["skipped"]) > 0
    assert np.isnan(float(metrics["objective/scores"].value))


def test_a_group_of_one_has_no_spread_to_log():
    """A spread of 0 at every step would be read as groups that teach nothing."""
    start, step, _ = make("reinforce", CONFIG.model_copy(update={"group_size": 1}))
    _, metrics = step(start(), 0)
    assert not {"reward_std", "frac_reward_zero_std"} & set(metrics)
    assert np.isfinite(float(metrics["loss"].value))


def test_the_price_of_a_nat_moves_towards_its_target_and_is_kept_in_the_state():
    """KL starts at 0, below the target: the price falls by 0.2 · 16 / 100 a step."""
    config = CONFIG.model_copy(update={"kl_target": 5.0, "kl_horizon": 100.0})
    start, step, _ = make("rloo", config)
    state, first = step(start(), 0)
    state, second = step(state, 1)
    assert float(first["objective/kl_coef"].value) == pytest.approx(0.02)
    assert float(second["objective/kl_coef"].value) == pytest.approx(0.02 * 0.968)
    assert float(state.extra["kl_scale"]) == pytest.approx(0.968**2, rel=1e-3)


def test_a_reward_may_be_a_sum_and_its_parts_are_logged():
    """The score is the weighted sum; the parts are logged unweighted."""

    def judged(rows, samples):
        return np.arange(len(rows), dtype=np.float32)

    config = CONFIG.model_copy(update={"learned_weight": 0.5, "judge_weight": 2.0})
    reference, reward_model = random_model(0), random_model(1, scalar_head=True, scale=0.6)
    frozen = (ALGORITHMS["rloo"], reference, payer(reward_model), PROMPTS)
    ids = {"key": jax.random.key(0), "max_new_tokens": 6, "eos_id": EOS, "pad_id": PAD}
    both = s.make_collect(config, *frozen, **ids, judged=judged)(reference, 0)
    alone = s.make_collect(CONFIG, *frozen, **ids)(reference, 0)
    np.testing.assert_allclose(both.scores, 0.5 * alone.scores + 2.0 * np.arange(16), rtol=1e-5)
    found = {name: float(mean.value) for name, mean in both.metrics.items()}
    assert found["reward/judge"] == 7.5
    assert found["reward/learned"] == pytest.approx(float(alone.scores.mean()), rel=1e-5)
    assert float(alone.metrics["reward/judge"].value) == 0


def test_figures_of_a_rollout_are_means_over_its_updates_but_the_ratio_is_the_firsts():
    """A NaN, or a clip fraction, of one update in sixteen must not get lost."""
    one = np.float32(1)
    metrics = s._joined({"reward_std": Mean(one, one)}, {"loss": Mean(one, one)})
    metrics |= {"val/ratio": Mean(one, one)}
    latest = {"loss": Mean(3 * one, one), "val/ratio": Mean(2 * one, one)}
    joined = s._joined(metrics, latest)
    assert {name: float(mean.value) for name, mean in joined.items()} == {
        "reward_std": 1.0, "loss": 2.0, "val/ratio": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("count", "per_step"), [(5, 4), (7, 7), (3, 8), (12, 4)])
def test_every_prompt_comes_once_before_any_comes_again(count, per_step):
    steps = 3 * count
    places = np.concatenate([s._prompt_order(count, per_step, 1, k) for k in range(steps)])
    rounds = places[: len(places) // count * count].reshape(-1, count)
    np.testing.assert_array_equal(
        np.sort(rounds, axis=1), np.tile(np.arange(count), (len(rounds), 1))
    )
    assert len({tuple(r) for r in rounds.tolist()}) > 1  # shuffled anew
    other = np.concatenate([s._prompt_order(count, per_step, 2, k) for k in range(steps)])
    assert (places != other).any()


def test_minibatches_partition_the_batch():
    batch = PolicyBatch(*(jnp.arange(16) for _ in range(6)), None, None, jnp.arange(16))
    parts = [s._minibatches(batch, 16, CONFIG, k=0, epoch=e) for e in (0, 1)]
    for halves in parts:
        assert [len(half.tokens) for half in halves] == [8, 8]
        assert sorted(np.concatenate([half.tokens for half in halves]).tolist()) == list(range(16))
        for half in halves:  # all fields of a row go together
            np.testing.assert_array_equal(half.tokens, half.advantages)
            assert half.returns is None
    assert set(parts[0][0].tokens.tolist()) != set(parts[1][0].tokens.tolist())
    whole = s._minibatches(batch, 16, CONFIG.model_copy(update={"minibatches": 1}), 0, 0)
    np.testing.assert_array_equal(whole[0].tokens, np.arange(16))


def test_updates_counts_every_one():
    assert s.updates(CONFIG.model_copy(update={"steps": 10})) == 10 * 2 * 2


def test_prompt_rows_begin_with_the_start_token_and_are_padded_on_the_left():
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), ["abc"])
    rows = s.prompt_rows(["ab", ""], tokenizer, 4)
    a, b = tokenizer.encode("ab")
    assert rows.tolist() == [[PAD, EOS, a, b], [PAD, PAD, PAD, EOS]]


ROWS = np.array(
    [[1, 5, 3, 1, 2, 1, 0], [1, 8, 2, 6, 4, 1, 0], [1, 7, 7, 1, 0, 0, 0], [1, 2] + [0] * 5]
)


@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_pretraining_rows_add_their_gradient_clipped_apart(clip):
    """One update by plain descent against both gradients, computed without the library's losses."""
    dials = {"epochs": 1, "minibatches": 1, "accumulation": 2, "temperature": 0.7}
    dials |= {"ptx_coef": 1e-3 if clip == 1.0 else 1.0, "ptx_clip": clip, "ptx_rows": 4}
    config, plain = CONFIG.model_copy(update=dials), optax.sgd(1.0)
    algorithm, reference = ALGORITHMS["rloo"], random_model(0)
    payers = payer(random_model(1, scalar_head=True, scale=0.6))
    collect = s.make_collect(
        config, algorithm, reference, payers, PROMPTS,
        key=jax.random.key(0), max_new_tokens=6, eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    batch, policy = collect(reference, 0).batch, random_model(0)

    def said(model, tokens, segments, temperature):
        scores = logits(model, hidden_states(model, tokens[:, :-1], segments[:, :-1]))
        every = jax.nn.log_softmax(scores / temperature)
        return jnp.take_along_axis(every, tokens[:, 1:, None], 2)[..., 0]

    def reward(model):
        own = said(model, batch.tokens, batch.segments, 0.7)[:, -6:]
        gained = jnp.exp(own - batch.old_logprobs) * batch.advantages
        return -jnp.sum(jnp.where(batch.mask, gained, 0.0)) / jnp.sum(batch.mask).astype(
            jnp.float32
        )

    def text(model):
        segments = np.cumsum(ROWS == EOS, axis=1, dtype=np.int32)
        own = said(model, jnp.asarray(ROWS, jnp.int32), jnp.asarray(segments), 1.0)
        return -config.ptx_coef * jnp.sum(jnp.where(ROWS[:, 1:] != PAD, own, 0.0)) / 14

    first, second = (arrays(jax.jit(jax.grad(f))(policy)) for f in (reward, text))
    a, b = (np.sqrt(sum((x.astype(float) ** 2).sum() for x in g.values())) for g in (first, second))
    share = min(1.0, clip * a / b)
    assert (share == 1.0) == (clip == 1.0)  # whole in the one case, cut in the other
    asked = []

    def rows(n):
        asked.append(n)
        return batch_of(ROWS)

    aim = s.objective(algorithm, config)
    step = s.make_step(config, aim, plain, collect, 6, rows)
    state, found = step(s.start_state(policy, plain), 0)
    before = arrays(policy)
    for name, moved in arrays(state.model).items():
        expected = before[name] - first[name] - share * second[name]
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=3e-5, err_msg=name)
    assert float(found["kept/loss/ptx"].value) == pytest.approx(share, rel=1e-3)
    assert float(found["loss/ptx"].count) == 14
    step(state, 3)
    assert asked == [0, 3]


def test_every_update_reads_pretraining_rows_of_its_own():
    config = CONFIG.model_copy(update={"ptx_coef": 0.05, "ptx_rows": 2})
    start, _, (reference, reward_model) = make("rloo", config)
    asked = []

    def rows(n):
        asked.append(n)
        return batch_of(ROWS[:2])

    collect = s.make_collect(
        config, ALGORITHMS["rloo"], reference, payer(reward_model), PROMPTS,
        key=jax.random.key(0), max_new_tokens=6, eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    aim, optimizer = s.objective(ALGORITHMS["rloo"], config), make_optimizer(config.optimizer, 100)
    step = s.make_step(config, aim, optimizer, collect, 6, rows)
    state, _ = step(start(), 0)
    step(state, 1)
    assert asked == list(range(8))  # two passes in two halves, twice


def test_without_a_coefficient_there_is_no_such_term_and_no_rows_are_read(tmp_path):
    names = {t.name for t in s.objective(ALGORITHMS["ppo"], CONFIG).terms}
    assert "loss/ptx" not in names
    ws = Workspace(Config(), tmp_path, None, "float32")
    assert s.pretraining_rows(ws, 8) is None


PTX = ["--rlhf.ptx-coef", 0.05, "--rlhf.ptx-rows", 2]


def test_a_run_with_pretraining_rows_is_killed_and_ends_the_same(
    tiny, tiny_run, tmp_path, processes, assert_same
):
    words = ["rlhf", tiny, "--init", tiny_run, *PTX]
    done = processes(*words, "--out", tmp_path / "whole")
    assert done.code == 0, done.output
    records = metrics.read(tmp_path / "whole" / "rlhf" / "metrics.jsonl")
    kept = [r["kept/loss/ptx"] for r in records if r["kind"] == "train"]
    assert len(kept) == 6 and all(0 <= share <= 1 for share in kept) and max(kept) > 0
    stop = ("*/rlhf/checkpoints/.tmp-step_00000004/*", 1, signal.SIGKILL)
    assert processes(*words, "--out", tmp_path / "killed", at=stop).code == -signal.SIGKILL
    assert processes(*words, "--out", tmp_path / "killed").code == 0
    assert_same(tmp_path / "killed", tmp_path / "whole", ("rlhf",))
