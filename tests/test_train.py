"""The step's gradient, what a bad gradient may not do, and runs that are interrupted."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm import checkpoint, metrics
from minilm.checkpoint import flatten
from minilm.config import LoopConfig, ModelConfig, OptimizerConfig
from minilm.errors import UserError
from minilm.losses.language import next_token_cross_entropy
from minilm.losses.reduce import Mean
from minilm.model import Transformer, hidden_states, logits
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer, schedule
from minilm.text.batches import Batch, batch_of
from minilm.train import Interrupted, TrainState, fit, init_state, make_train_step

VOCAB = 11
CONFIG = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=0.03, weight_decay=0.1, clip_norm=1.0)
LOOP = LoopConfig(
    optimizer=OPTIMIZER, log_every=2, evaluate_every=4, checkpoint_every=4, keep_checkpoints=2
)  # fmt: skip
LANGUAGE = Objective(
    (
        Term(
            "cross_entropy", 1.0,
            lambda o, b: next_token_cross_entropy(o, b.targets), lambda b: b.weights,
        ),
    )
)  # fmt: skip
STEPS = 12


def forward(model, batch):
    return logits(model, hidden_states(model, batch.tokens, batch.segments))


def new_model() -> Transformer:
    shape = jax.eval_shape(lambda: Transformer(CONFIG, VOCAB, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape).astype(x.dtype)), shape)


def ragged_batch(seed: int = 0, *, weight: float = 1.0) -> Batch:
    """Rows with 12, 1, 7 and no real targets, each token one more than the one before."""
    rng = np.random.default_rng(seed)
    rows = (2 + (rng.integers(0, 9, (4, 1)) + np.arange(13)) % 9).astype(np.int32)
    for row, length in zip(rows, (12, 1, 7, 0), strict=True):
        row[length + 1 :] = 0
    batch = batch_of(rows)
    return batch._replace(weights=np.where(batch.weights > 0, np.float32(weight), np.float32(0)))


OPTIMIZE = make_optimizer(OPTIMIZER, STEPS)
STEP = make_train_step(forward, LANGUAGE, OPTIMIZE)


def fresh() -> TrainState:
    return init_state(new_model(), OPTIMIZE)


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def assert_equal(a, b) -> None:
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """maxtext#3040, trl#3021: with ragged rows a mean of micro-batch means is another objective."""
    batch = ragged_batch()
    split = make_train_step(forward, LANGUAGE, OPTIMIZE, accumulation=4)
    (whole, of_whole), (parts, of_parts) = STEP(fresh(), batch), split(fresh(), batch)
    assert float(of_whole["loss"].value) == pytest.approx(float(of_parts["loss"].value), rel=1e-6)
    assert float(of_whole["grad_norm"].value) == pytest.approx(
        float(of_parts["grad_norm"].value), rel=1e-5
    )
    assert float(of_parts["cross_entropy"].count) == 12 + 1 + 7
    # Adam's first moment is a tenth of the (clipped) gradient: compared leaf by leaf.
    for name, found in arrays(parts.opt_state).items():
        np.testing.assert_allclose(
            found, arrays(whole.opt_state)[name], rtol=1e-3, atol=1e-7, err_msg=name
        )


def test_loss_and_gradient_norm_are_those_of_the_mean_over_real_tokens():
    model = new_model()

    def plain(model, batch):
        scores = forward(model, batch)
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), batch.targets[..., None], 2)
        return -jnp.sum(picked[..., 0] * batch.weights) / 20

    value, gradient = jax.jit(jax.value_and_grad(plain))(model, ragged_batch())
    _, found = STEP(fresh(), ragged_batch())
    assert float(found["loss"].value) == pytest.approx(float(value), rel=1e-5)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in arrays(gradient).values()))
    assert float(found["grad_norm"].value) == pytest.approx(norm, rel=1e-5)


def test_an_empty_mask_is_a_loss_of_zero_and_no_nan():
    batch = ragged_batch()._replace(weights=np.zeros((4, 12), np.float32))
    state, found = STEP(fresh(), batch)
    assert (float(found["loss"].value), float(found["grad_norm"].value)) == (0, 0)
    assert float(found["cross_entropy"].count) == 0  # and it is reported
    assert all(np.isfinite(x).all() for x in arrays(state).values())


def test_a_non_finite_gradient_changes_nothing_but_the_counters():
    before = arrays(fresh())
    state, found = STEP(fresh(), ragged_batch(weight=np.inf))
    assert not np.isfinite(float(found["loss"].value))
    counters = {"step": 1, "extra.skipped": 1, "extra.skipped_in_a_row": 1}
    for name, array in arrays(state).items():
        np.testing.assert_array_equal(array, counters.get(name, before[name]), err_msg=name)
    state, _ = STEP(state, ragged_batch())
    assert (int(state.extra["skipped"]), int(state.extra["skipped_in_a_row"])) == (1, 0)
    assert_equal(state.model, STEP(fresh(), ragged_batch())[0].model)  # as if it had not been


def test_one_compilation_serves_all_steps_and_the_loss_goes_down():
    state, losses = fresh(), []
    for _ in range(STEPS):
        state, found = STEP(state, ragged_batch())
        losses.append(float(found["loss"].value))
    assert int(state.step) == STEPS
    assert STEP._cache_size() == 1
    assert losses[-1] < 0.7 * losses[0]


def test_donation_leaves_the_model_a_state_was_made_from():
    """The reference policy is a copy: a donated one would be deleted under its user."""
    model = new_model()
    state, before = init_state(model, OPTIMIZE), arrays(model)
    old = state.model.embed_tokens[...]
    STEP(state, ragged_batch())
    assert old.is_deleted()  # the state's own arrays are given away
    np.testing.assert_array_equal(arrays(model)["embed_tokens"], before["embed_tokens"])


def test_the_average_of_the_weights_follows_them_and_a_bad_update_leaves_it():
    averaging = make_train_step(forward, LANGUAGE, OPTIMIZE, ema_decay=0.5, log_layers=True)
    state = init_state(new_model(), OPTIMIZE, ema_decay=0.5)
    assert_equal(state.averaged, state.model)
    expected = arrays(state.model)
    for k in range(3):
        before = arrays(state.model)
        state, found = averaging(state, ragged_batch())
        kept = min(0.5, (1 + k) / (10 + k))
        expected = {n: kept * expected[n] + (1 - kept) * x for n, x in arrays(state.model).items()}
    for name, array in arrays(state.averaged).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)
    plain, three = fresh(), None
    for _ in range(3):
        plain, three = STEP(plain, ragged_batch())
    assert_equal(state.model, plain.model)  # averaging watches, it does not steer
    # What is logged of the third step, layer by layer.
    moved = np.linalg.norm(arrays(state.model)["embed_tokens"] - before["embed_tokens"])
    ratio = moved / np.linalg.norm(before["embed_tokens"])
    assert float(found["update_ratio/embed_tokens"].value) == pytest.approx(ratio, rel=1e-3)
    parts = [float(x.value) for n, x in found.items() if n.startswith("grad_norm/")]
    assert np.hypot.reduce(parts) == pytest.approx(float(three["grad_norm"].value), rel=1e-5)
    average = arrays(state.averaged)
    state, found = averaging(state, ragged_batch(weight=np.inf))
    for name, array in arrays(state.averaged).items():
        np.testing.assert_array_equal(array, average[name], err_msg=name)
    assert float(found["update_ratio/layers.0"].value) == 0


class Killed(Exception):
    pass


def run(folder, *, kill_at=None, step=None, evaluate=None, steps=STEPS, loop=LOOP, **options):
    """`fit` on ragged batches; `kill_at` raises in place of that step."""
    rate = schedule(OPTIMIZER, steps, OPTIMIZER.learning_rate)

    def one(state, k):
        if k == kill_at:
            raise Killed
        return (step or STEP)(state, ragged_batch(k))

    return fit(
        fresh(),
        one,
        title="test",
        steps=steps,
        loop=loop,
        folder=folder,
        metadata={},
        files={},
        learning_rate=rate,
        tokens_per_step=48,
        evaluate=evaluate,
        **options,
    )


def evaluator(calls: list):
    def evaluate(state: TrainState) -> dict:
        calls.append(int(state.step))
        return {"validation_loss": float(state.step), "absent": None}

    return evaluate


def timeless(folder) -> list[dict]:
    """The metrics, without what depends on the clock."""
    rows = metrics.read(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    state, record = run(folder, evaluate=evaluator([]))
    return arrays(state), timeless(folder), record


@pytest.mark.parametrize("kill_at", [3, 4, 7, 11])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted, kill_at):
    """Before the first checkpoint, at a boundary, between two, and at the last step.

    nanochat#808, open-r1#450: data replayed or skipped, an optimizer that began anew.
    """
    calls = []
    with pytest.raises(Killed):
        run(tmp_path, kill_at=kill_at, evaluate=evaluator(calls))
    state, _ = run(tmp_path, evaluate=evaluator(calls))
    expected, rows, _ = uninterrupted
    for name, array in arrays(state).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert timeless(tmp_path) == rows  # cut back to the checkpoint: no step twice, none lost
    assert sorted(set(calls)) == [0, 4, 8, 12]
    assert len(calls) == 4 + (kill_at == 3)  # step 0 again, where nothing had been saved
    assert STEP._cache_size() == 1  # a restored state is not compiled for anew


def test_killed_between_save_and_evaluation_the_evaluation_is_made_up(tmp_path, uninterrupted):
    """nanochat#446: an evaluation that failed before the save lost a finished run."""

    def fails_at_8(state):
        if int(state.step) == 8:
            raise Killed
        return evaluator([])(state)

    with pytest.raises(Killed):
        run(tmp_path, evaluate=fails_at_8)
    calls = []
    run(tmp_path, evaluate=evaluator(calls))
    assert calls == [8, 12]
    assert timeless(tmp_path) == uninterrupted[1]


def test_a_finished_run_is_not_run_again(tmp_path):
    run(tmp_path, evaluate=evaluator([]))
    calls = []
    state, record = run(tmp_path, kill_at=0, evaluate=evaluator(calls))  # no step is taken
    assert (int(state.step), calls) == (STEPS, [])
    assert record["validation_loss"] == STEPS


def test_the_record_is_of_stepping_and_the_last_evaluation(uninterrupted):
    _, rows, record = uninterrupted
    assert record["validation_loss"] == STEPS
    assert record["tokens_per_second"] == pytest.approx(STEPS * 48 / record["seconds"])
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [0, 4, 8, 12]
    train = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in train] == [2, 4, 6, 8, 10, 12]
    rate = schedule(OPTIMIZER, STEPS, OPTIMIZER.learning_rate)
    assert train[1]["learning_rate"] == pytest.approx(float(rate(3)))
    assert {"loss", "grad_norm", "cross_entropy", "skipped_in_a_row"} <= train[0].keys()


def test_logged_values_are_means_over_the_window_weighted_by_their_counts(tmp_path):
    def step(state, batch):
        del batch
        k = int(state.step)
        state = TrainState(state.step + 1, state.model, state.opt_state, state.extra)
        return state, {"loss": Mean(jnp.float32(k), jnp.float32(1 + k)), "plain": float(k)}

    run(tmp_path, step=step, steps=4)
    rows = timeless(tmp_path)
    assert rows[1]["loss"] == pytest.approx((2 + 3) / (3 + 4))
    assert rows[1]["plain"] == pytest.approx(2.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_then_interrupts(tmp_path, uninterrupted, number):
    def step(state, batch):
        if int(state.step) == 5:
            os.kill(os.getpid(), number)
        return STEP(state, batch)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="step 6"):
        run(tmp_path, step=step, evaluate=evaluator([]))
    assert signal.getsignal(number) is before
    assert (tmp_path / "checkpoints" / "step_00000006").is_dir()
    state, _ = run(tmp_path, evaluate=evaluator([]))
    for name, array in arrays(state).items():
        np.testing.assert_array_equal(array, uninterrupted[0][name], err_msg=name)
    assert timeless(tmp_path) == uninterrupted[1]


def test_updates_skipped_too_often_in_a_row_stop_with_a_diagnosis(tmp_path):
    optimizer = OPTIMIZER.model_copy(update={"max_skipped": 3})
    loop = LOOP.model_copy(update={"optimizer": optimizer})

    def step(state, batch):
        return STEP(state, ragged_batch(weight=np.inf) if int(state.step) >= 4 else batch)

    with pytest.raises(UserError, match=r"4 updates in a row were not finite by step 8") as caught:
        run(tmp_path, step=step, loop=loop)
    assert caught.value.where == "test.optimizer.learning_rate"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004"]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    assert "loss" in row["nonfinite"]  # what was seen is in the log


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    def evaluate(state):
        return {"validation_loss": abs(float(state.step) - 4)}

    loop = LOOP.model_copy(update={"keep_checkpoints": 1})
    run(tmp_path, evaluate=evaluate, best="validation_loss", loop=loop)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000012"]


def rising_after_four(state):
    return {"validation_loss": abs(float(state.step) - 4)}


EARLY = {"evaluate": rising_after_four, "best": "validation_loss", "patience": 2}


def test_early_stopping_ends_with_the_best(tmp_path):
    state, record = run(tmp_path / "early", steps=16, **EARLY)
    assert int(state.step) == 4 and record["validation_loss"] == 0
    rows = metrics.read(tmp_path / "early" / "metrics.jsonl")
    assert max(row["step"] for row in rows) == 12  # two evaluations later; the curve stays whole
    newest = checkpoint.latest(tmp_path / "early" / "checkpoints")
    assert newest is not None
    found = checkpoint.metadata(newest)
    assert (found["step"], found["steps"], found["stopped_at"]) == (4, 4, 12)


@pytest.mark.parametrize("place", ["_write_metadata", "_remove"])
def test_killed_while_going_back_to_the_best_the_same_end_is_reached(tmp_path, monkeypatch, place):
    expected, _ = run(tmp_path / "whole", steps=16, **EARLY)
    stopping = []
    original = vars(checkpoint)[place]

    def dying(path, *rest):
        if stopping:
            raise Killed
        return original(path, *rest)

    def keep_best(folder, stopped):
        stopping.append(stopped)
        return kept(folder, stopped)

    kept = checkpoint.keep_best
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, place, dying)
        patch.setattr(checkpoint, "keep_best", keep_best)
        with pytest.raises(Killed):
            run(tmp_path / "killed", steps=16, **EARLY)
    state, _ = run(tmp_path / "killed", steps=16, **EARLY)
    assert_equal(arrays(state.model), arrays(expected.model))
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")


def test_what_goes_wrong_is_said_while_it_does(tmp_path, capsys):
    loop = LOOP.model_copy(update={"log_every": 1, "evaluate_every": 10})

    def turning(state, batch):
        state, values = STEP(state, batch)
        return state, values | {"cross_entropy": abs(10.0 - int(state.step))}

    run(tmp_path, step=turning, evaluate=lambda state: {}, steps=20, loop=loop)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("diverging? lowest smoothed loss:") == 1
    assert said.index("test 10/20") < said.index("test 20/20: diverging?")


def test_a_sample_is_shown_at_a_quarter_half_and_the_end(tmp_path):
    shown = []
    run(tmp_path, sample=lambda state: shown.append(int(state.step)) or "a story")
    assert shown == [4, 6, 12]  # a quarter is 3, read at the next time the log is written


def test_evaluation_and_checkpoints_come_when_due_whatever_log_every_is(tmp_path):
    """A boundary that is no multiple of `log_every` must not be passed over."""
    loop = LOOP.model_copy(
        update={"log_every": 5, "evaluate_every": 4, "checkpoint_every": 3, "keep_checkpoints": 9}
    )
    calls = []
    run(tmp_path, evaluate=evaluator(calls), loop=loop)
    assert calls == [0, 4, 8, 12]
    saved = [int(p.name[5:]) for p in sorted((tmp_path / "checkpoints").iterdir())]
    assert saved == [3, 4, 6, 8, 9, 12]
