"""Runs that are interrupted, and what they log."""

import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from toy import LOOP, OPTIMIZER, STEP, STEPS, arrays, assert_equal, fresh, ragged_batch

from minilm import checkpoint, metrics
from minilm.errors import UserError
from minilm.losses.reduce import Mean
from minilm.optim import schedule
from minilm.step import TrainState
from minilm.train import Interrupted, fit


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
        tokens_before=lambda k: 48 * k,
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


def test_a_reward_that_is_not_finite_is_not_blamed_on_the_rate(tmp_path):
    """No learning rate mends a reward model that pays NaN."""
    loop = LOOP.model_copy(update={"optimizer": OPTIMIZER.model_copy(update={"max_skipped": 3})})

    def step(state, batch):
        state, metrics = STEP(state, ragged_batch(weight=np.inf))
        return state, metrics | {"objective/scores": Mean(jnp.float32(np.nan), jnp.float32(1))}

    with pytest.raises(UserError, match="what it is paid is not finite") as caught:
        run(tmp_path, step=step, loop=loop)
    assert caught.value.where == "reward"


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
