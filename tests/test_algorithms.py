"""Rows of ALGORITHMS: what a token is paid, what an update pushes up, what is averaged over."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm.algorithms import (
    ALGORITHMS,
    Algorithm,
    algorithm_of,
    next_kl_scale,
    objective,
    price,
    token_rewards,
)
from minilm.config import ModelConfig, RLHFConfig
from minilm.errors import UserError
from minilm.generate import generate, left_pad
from minilm.losses.policy import kl_estimate
from minilm.model import Transformer
from minilm.rollout import Outputs, Rollout, complete_rollout, completion_outputs
from minilm.stages.policy import exact_kl

VOCAB, PAD, EOS = 5, 0, 1
TINY = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
CONFIG = RLHFConfig(group_size=2, kl_coef=0.5, clip=0.2, value_clip=0.3, value_coef=0.1)


def random_model(seed: int, *, scalar_head: bool = False) -> Transformer:
    shape = jax.eval_shape(
        lambda: Transformer(TINY, VOCAB, scalar_head=scalar_head, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape).astype(x.dtype)), shape)


def rollout_of(logprobs, ref_logprobs, mask, values=None) -> Rollout:
    """A rollout of which only what is priced matters."""
    logprobs, ref_logprobs = (jnp.asarray(x, jnp.float32) for x in (logprobs, ref_logprobs))
    mask = jnp.asarray(mask, bool)
    tokens = jnp.pad(mask.astype(jnp.int32), ((0, 0), (2, 0)))
    values = None if values is None else jnp.asarray(values, jnp.float32)
    finished = jnp.ones(len(mask), bool)
    return Rollout(tokens, tokens, mask, logprobs, ref_logprobs, values, finished)


LOGPROBS = [[-1.0, -2.0, -0.5], [-1.0, -9.0, -9.0]]
REFERENCE = [[-1.5, -1.0, -0.5], [-3.0, -9.5, -8.0]]
MASK = [[True, True, True], [True, False, False]]
SCORE = jnp.array([2.0, -1.0])


def test_token_rewards_by_hand():
    """k1 at every real token, the score at the last; nothing on padding, whatever stands there."""
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK)
    found = token_rewards(ALGORITHMS["rloo"], rollout, SCORE, 0.5)
    np.testing.assert_allclose(found, [[-0.25, 0.5, 2.0], [-1.0 - 1.0, 0.0, 0.0]], atol=1e-6)
    free = token_rewards(ALGORITHMS["grpo"], rollout, SCORE, 0.5)  # its KL is a loss
    np.testing.assert_allclose(free, [[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0]])


def test_rloo_is_paid_by_the_others_of_its_group():
    batch = price(ALGORITHMS["rloo"], rollout_of(LOGPROBS, REFERENCE, MASK), SCORE, CONFIG)
    first, second = -0.25 + 0.5 + 2.0, -2.0
    gap = first - second
    np.testing.assert_allclose(batch.advantages, [[gap] * 3, [-gap, 0, 0]], atol=1e-5)
    assert (batch.returns, batch.old_values) == (None, None)


def test_grpo_is_paid_in_standard_deviations_of_its_group():
    batch = price(ALGORITHMS["grpo"], rollout_of(LOGPROBS, REFERENCE, MASK), SCORE, CONFIG)
    z = 1.5 / (3 / np.sqrt(2) + 1e-4)
    np.testing.assert_allclose(batch.advantages, [[z] * 3, [-z, 0, 0]], atol=1e-5)


def test_ppo_is_paid_what_its_critic_did_not_expect():
    values = [[0.1, 0.2, 0.3], [0.4, 9.0, 9.0]]
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK, values)
    config = CONFIG.model_copy(update={"gamma": 0.9, "lam": 0.8})
    batch = price(ALGORITHMS["ppo"], rollout, SCORE, config)
    # GAE backwards, by hand: rewards as in rloo's row.
    third = 2.0 - 0.3
    second = 0.5 + 0.9 * 0.3 - 0.2 + 0.72 * third
    first = -0.25 + 0.9 * 0.2 - 0.1 + 0.72 * second
    other = -2.0 - 0.4
    raw = np.array([first, second, third, other])
    white = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(
        batch.advantages, [white[:3], [white[3], 0, 0]], atol=1e-4
    )  # fmt: skip
    np.testing.assert_allclose(
        batch.returns, [[first + 0.1, second + 0.2, third + 0.3], [-2.0, 0, 0]], atol=1e-5
    )


def loss_of(algorithm: Algorithm, outputs: Outputs, batch, config=CONFIG) -> float:
    aim = objective(algorithm, config)
    return float(aim.loss(aim.totals(outputs, batch), aim.counts(batch)))


def test_losses_by_hand():
    """A token weighs the same under "token", a completion under "sequence" (trl#2995)."""
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK, np.zeros((2, 3)))
    moved = jnp.asarray(LOGPROBS) + jnp.asarray([[0.1, -0.1, 0.5], [-0.5, 0.0, 0.0]])
    outputs = Outputs(moved, jnp.ones((2, 3)), jnp.full((2, 3), 0.1))
    ratio = np.exp([0.1, -0.1, 0.5, -0.5])

    batch = price(ALGORITHMS["rloo"], rollout, SCORE, CONFIG)
    gap = 4.25
    expected = -(ratio * [gap, gap, gap, -gap]).sum() / 4
    assert loss_of(ALGORITHMS["rloo"], outputs, batch) == pytest.approx(expected, rel=1e-5)

    batch = price(ALGORITHMS["grpo"], rollout, SCORE, CONFIG)
    z = 1.5 / (3 / np.sqrt(2) + 1e-4)
    clipped = -np.array([ratio[0] * z, ratio[1] * z, 1.2 * z, -0.8 * z])  # min: the worse of both
    log_r = np.array([-0.5, 1.0, 0.0, -2.0]) - [0.1, -0.1, 0.5, -0.5]
    per_token = clipped + 0.5 * (np.exp(log_r) - 1 - log_r)
    expected = (per_token[:3].mean() + per_token[3]) / 2
    assert loss_of(ALGORITHMS["grpo"], outputs, batch) == pytest.approx(expected, rel=1e-5)

    batch = price(ALGORITHMS["ppo"], rollout, SCORE, CONFIG)
    gain = np.asarray(batch.advantages)[np.asarray(MASK)]
    returns = np.asarray(batch.returns)[np.asarray(MASK)]
    surrogate = -np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
    expected = (surrogate + 0.1 * 0.5 * (0.1 - returns) ** 2).mean()
    assert loss_of(ALGORITHMS["ppo"], outputs, batch) == pytest.approx(expected, rel=1e-5)


def test_dr_grpo_divides_neither_by_the_spread_nor_by_the_length():
    """All slots of the batch, padding too, are the denominator: two rows of three."""
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK)
    batch = price(ALGORITHMS["dr_grpo"], rollout, SCORE, CONFIG)
    np.testing.assert_allclose(batch.advantages, [[1.5] * 3, [-1.5, 0, 0]])
    outputs = Outputs(jnp.asarray(LOGPROBS), jnp.ones((2, 3)), None)
    log_r = np.array([-0.5, 1.0, 0.0, -2.0])
    kl = 0.5 * (np.exp(log_r) - 1 - log_r).sum()
    expected = (-(3 * 1.5 - 1.5) + kl) / 6
    assert loss_of(ALGORITHMS["dr_grpo"], outputs, batch) == pytest.approx(expected, rel=1e-5)


def test_dapo_lets_rare_tokens_gain_more_and_leaves_out_groups_of_equal_scores():
    rollout = rollout_of(2 * LOGPROBS, 2 * REFERENCE, 2 * MASK)
    batch = price(ALGORITHMS["dapo"], rollout, jnp.array([2.0, -1.0, 1.0, 1.0]), CONFIG)
    gain = np.log(1.5)
    outputs = Outputs(jnp.asarray(2 * LOGPROBS) + gain, jnp.ones((4, 3)), None)
    z = 1.5 / (3 / np.sqrt(2) + 1e-4)
    expected = (-3 * 1.28 * z + 1.5 * z) / 4  # three tokens gain up to the clip; one pays in full
    assert loss_of(ALGORITHMS["dapo"], outputs, batch) == pytest.approx(expected, rel=1e-5)


def test_reinforces_baseline_is_the_rest_of_the_batch():
    rollout = rollout_of(2 * LOGPROBS, 2 * LOGPROBS, 2 * MASK)  # no KL
    batch = price(ALGORITHMS["reinforce"], rollout, jnp.array([1.0, 2.0, 3.0, 6.0]), CONFIG)
    np.testing.assert_allclose(
        batch.advantages[:, 0], [1 - 11 / 3, 2 - 10 / 3, 3 - 3.0, 6 - 2.0], atol=1e-5
    )


def test_reinforce_plus_plus_pays_a_token_for_what_comes_after_it():
    """KL of earlier tokens is not its doing; normalised over the real tokens of the batch."""
    batch = price(ALGORITHMS["reinforce++"], rollout_of(LOGPROBS, REFERENCE, MASK), SCORE, CONFIG)
    raw = np.array([2.25, 2.5, 2.0, -2.0])
    white = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(batch.advantages, [white[:3], [white[3], 0, 0]], atol=1e-4)


def test_expert_iteration_learns_the_best_of_each_group_by_heart():
    batch = price(
        ALGORITHMS["expert_iteration"], rollout_of(LOGPROBS, REFERENCE, MASK), SCORE, CONFIG
    )
    outputs = Outputs(jnp.asarray(LOGPROBS), jnp.ones((2, 3)), None)
    found = loss_of(ALGORITHMS["expert_iteration"], outputs, batch)
    assert found == pytest.approx(3.5 / 3, rel=1e-5)  # the mean surprise of the first's tokens


@pytest.mark.parametrize(("kl", "factor"), [(9.0, 1.02), (2.2, 1.01), (2.0, 1.0), (0.0, 0.98)])
def test_the_price_of_a_nat_follows_its_target(kl, factor):
    """Ziegler et al.: the relative error, at most 0.2 either way, times n / horizon = 0.1."""
    config = CONFIG.model_copy(update={"kl_target": 2.0, "kl_horizon": 640.0})
    found = next_kl_scale(jnp.float32(3.0), jnp.float32(kl), 64, config)
    assert float(found) == pytest.approx(3.0 * factor)
    assert float(next_kl_scale(jnp.float32(3.0), jnp.float32(kl), 64, CONFIG)) == 3.0


def test_the_price_enters_where_the_row_has_its_kl():
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK)
    outputs = Outputs(jnp.asarray(LOGPROBS), jnp.ones((2, 3)), None)
    config = CONFIG.model_copy(update={"kl_coef": 1.5})
    for name in ("rloo", "grpo"):  # in the reward, and in the loss
        row = ALGORITHMS[name]
        moved = price(row, rollout, SCORE, CONFIG, 3.0)
        fixed = price(row, rollout, SCORE, config)
        expected = loss_of(row, outputs, fixed, config)
        assert loss_of(row, outputs, moved) == pytest.approx(expected, rel=1e-5)


def chosen(name: str, **keys) -> Algorithm:
    return algorithm_of(RLHFConfig(algorithm=name, **keys))


def test_the_config_says_where_kl_is_paid_and_by_which_estimator():
    """Paid off the reward like RLOO's, or k2 added to GRPO's loss; other rows follow suit."""
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK)
    outputs = Outputs(jnp.asarray(LOGPROBS), jnp.ones((2, 3)), None)
    gap = np.array([0.5, -1.0, 0.0, 2.0])  # log π / π_ref

    row = chosen("grpo", kl_in="reward")
    paid = token_rewards(row, rollout, SCORE, 0.5)
    np.testing.assert_allclose(paid, [[-0.25, 0.5, 2.0], [-2.0, 0, 0]], atol=1e-6)
    assert "loss/kl" not in objective(row, CONFIG).trained

    free = loss_of(chosen("grpo"), outputs, price(chosen("grpo"), rollout, SCORE, CONFIG))
    k3 = np.expm1(-gap) + gap
    for keys in ({"kl_estimator": "k2"}, {"kl_in": "loss", "kl_estimator": "k2"}):
        row = chosen("grpo", **keys)
        found = loss_of(row, outputs, price(row, rollout, SCORE, CONFIG))
        more = [x[:3].mean() / 2 + x[3] / 2 for x in (gap**2 / 2, k3)]
        assert found - free == pytest.approx(0.5 * (more[0] - more[1]), rel=1e-5)

    row = chosen("rloo", kl_in="loss")
    assert row.kl == ("loss", "k2")
    np.testing.assert_allclose(token_rewards(row, rollout, SCORE, 0.5)[:, -1], [2.0, 0.0])
    assert "loss/kl" in objective(row, CONFIG).trained
    assert chosen("dapo").kl is None
    assert chosen("dapo", kl_in="reward").kl == ("reward", "k1")
    assert chosen("ppo", kl_estimator="k3").kl == ("reward", "k3")


def test_a_price_without_effect_is_refused():
    with pytest.raises(UserError, match="no gradient on average"):
        chosen("grpo", kl_estimator="k1")
    with pytest.raises(UserError, match="no price of KL"):
        chosen("dapo", kl_estimator="k2")


def test_diagnostics_are_watched_and_at_the_first_update_say_that_nothing_moved():
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK, np.zeros((2, 3)))
    for algorithm in ALGORITHMS.values():
        batch = price(algorithm, rollout, SCORE, CONFIG)
        outputs = Outputs(jnp.asarray(LOGPROBS), jnp.full((2, 3), 0.7), jnp.zeros((2, 3)))
        aim = objective(algorithm, CONFIG)
        means = aim.means(aim.totals(outputs, batch), aim.counts(batch))
        found = {name: float(mean.value) for name, mean in means.items()}
        assert found["val/ratio"] == pytest.approx(1)
        assert found["val/ratio_deviation"] == pytest.approx(0)
        assert found["policy/approxkl_avg"] == found["policy/clipfrac_avg"] == 0
        assert found["policy/entropy_avg"] == pytest.approx(0.7)
        trained = {t.name for t in aim.terms if t.weight}
        priced = {"loss/kl"} if algorithm.kl and algorithm.kl.place == "loss" else set()
        assert trained == {f"loss/{name}" for name in algorithm.terms} | priced


completion = [[2, 3, EOS, PAD], [4, 4, 4, EOS], [3, EOS, PAD, PAD], [2, 2, EOS, PAD]]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_raises_what_was_rewarded_and_lowers_what_was_not(name):
    """One small step down the gradient, from the reference itself, with scores +1 and −1."""
    algorithm = ALGORITHMS[name]
    model = random_model(0, scalar_head=algorithm.critic)
    prompts = np.array([[1, 3], [1, 3], [0, 1], [0, 1]], np.int32)
    tokens = np.concatenate([prompts, np.array(completion, np.int32)], axis=1)
    segments = np.concatenate([prompts != PAD, np.array(completion) != PAD], axis=1)
    score = np.array([1.0, -1.0, 1.0, -1.0], np.float32)
    aim = objective(algorithm, CONFIG)

    @jax.jit
    def step(model, tokens, segments, score):
        mask = segments[:, 2:] == 1
        finished = jnp.ones(4, bool)
        old = completion_outputs(model, tokens, segments, 4, 1.0)
        rollout = Rollout(
            tokens, segments, mask, old.logprobs, old.logprobs, old.values, finished
        )  # fmt: skip
        batch = price(algorithm, rollout, score, CONFIG)

        def loss(model):
            outputs = completion_outputs(model, batch.tokens, batch.segments, 4, 1.0)
            return aim.loss(aim.totals(outputs, batch), aim.counts(batch))

        value, gradient = jax.value_and_grad(loss)(model)
        moved = jax.tree.map(lambda p, g: p - 1e-3 * g, model, gradient)
        new = completion_outputs(moved, tokens, segments, 4, 1.0)
        change = jnp.sum(jnp.where(mask, new.logprobs - old.logprobs, 0.0), axis=1)
        return value, gradient, change

    value, gradient, change = step(
        model, tokens, segments.astype(np.int32), score
    )  # fmt: skip
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    better, worse = np.asarray(change)[::2], np.asarray(change)[1::2]
    assert (better > 0).all()
    assert (better > worse).all()
    if name != "expert_iteration":  # which has no example of what not to do
        assert (worse < 0).all()


def every_completion(length: int) -> list[list[int]]:
    """All that can be sampled within `length` tokens: ended, or not ended and full."""
    tokens = [t for t in range(VOCAB) if t != EOS]
    ended = [
        [*start, EOS] for n in range(length) for start in itertools.product(tokens, repeat=n)
    ]  # fmt: skip
    return ended + [list(start) for start in itertools.product(tokens, repeat=length)]


def test_logged_kl_is_the_exact_kl_in_expectation():
    """trl#1161, #925: the KL that was logged was another than the one that was paid.

    The exact KL of completions of up to three tokens is a sum over all of them. The logged k1,
    k3 and the sum of exact per-token KLs are means over samples: each within 4.5 standard errors
    (a false alarm in 50,000 for the three).
    """
    width, count = 3, 2048
    policy, reference = random_model(3), random_model(4)
    every = every_completion(width)
    prompt = [1, 3]
    tokens = np.array([prompt + c + [PAD] * (width - len(c)) for c in every], np.int32)
    mask = np.array([[i < len(c) for i in range(width)] for c in every])
    segments = np.concatenate([np.ones((len(every), 2), bool), mask], axis=1).astype(np.int32)
    says = jax.jit(completion_outputs, static_argnums=(3, 4))
    log_p, log_q = (
        np.where(mask, np.asarray(says(m, tokens, segments, width, 1.0).logprobs, np.float64), 0)
        .sum(axis=1)
        for m in (policy, reference)
    )  # fmt: skip
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-5)  # all completions are there
    exact = np.sum(np.exp(log_p) * (log_p - log_q))
    assert exact > 0.1

    rows = left_pad([prompt] * count, PAD, 2)
    samples = generate(
        policy, jnp.asarray(rows), jax.random.key(0), max_new_tokens=width, eos_id=EOS,
        pad_id=PAD, microbatch=count,
    )  # fmt: skip
    rollout = jax.jit(complete_rollout, static_argnames=("pad_id", "temperature"))(
        policy, reference, rows, samples, pad_id=PAD, temperature=1.0
    )
    per_token, _ = exact_kl(
        policy, reference, rows, jax.tree.map(np.asarray, samples), PAD, batch_size=count
    )
    estimates = {"exact per token": per_token}
    for name in ("k1", "k3"):
        kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator=name)
        estimates[name] = np.where(rollout.mask, kl, 0).sum(axis=1)
    for name, values in estimates.items():
        error = values.std() / np.sqrt(count)
        assert abs(values.mean() - exact) < 4.5 * error, name
    assert estimates["exact per token"].std() < estimates["k1"].std()  # why evaluation uses it


def test_whitened_rewards_have_spread_one_and_their_mean():
    rollout = rollout_of(LOGPROBS, REFERENCE, MASK, values=[[0.0] * 3] * 2)
    plain = token_rewards(ALGORITHMS["ppo"], rollout, SCORE, CONFIG.kl_coef)
    config = CONFIG.model_copy(update={"whiten_rewards": True, "lam": 1.0})
    rewards = np.asarray(plain, np.float64)[np.array(MASK)]
    white = np.zeros((2, 3))
    white[np.array(MASK)] = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    returns = price(ALGORITHMS["ppo"], rollout, SCORE, config).returns
    expected = np.cumsum(white[:, ::-1], axis=1)[:, ::-1] * np.array(MASK)
    np.testing.assert_allclose(returns, expected, atol=1e-4)


def test_the_value_is_warmed_up_alone():
    config = CONFIG.model_copy(update={"value_warmup_steps": 3, "minibatches": 2, "epochs": 2})
    aim = objective(ALGORITHMS["ppo"], config)
    names = list(aim.trained)
    before, after = (dict(zip(names, aim.weights(k).tolist(), strict=True)) for k in (11, 12))
    assert before["loss/clipped_surrogate"] == 0.0
    assert after["loss/clipped_surrogate"] == 1.0
    assert before["loss/value"] == after["loss/value"] == pytest.approx(0.1)
