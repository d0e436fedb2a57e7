"""Each verdict on a curve drawn by hand that has its cause and nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.diagnose import diagnose, healthy, verdicts

N = 60
STEPS = [5 * (k + 1) for k in range(N)]


def fall(n: int = N, start: float = 6.0, floor: float = 0.5, pace: float = 4.0) -> np.ndarray:
    """A steep fall to the floor, with a little noise."""
    rng = np.random.default_rng(0)
    return floor + (start - floor) * np.exp(-np.arange(n) / pace) + rng.normal(0, 0.004, n)


def records(train, *, validation=None, grad=None, rate=None, floor=None, every=6) -> list[dict]:
    """Records as minilm logs them: an evaluation at step 0 and after every sixth record."""
    rows = []
    for k, value in enumerate(train):
        row = {"step": STEPS[k], "loss": float(value)}
        row |= {"grad_norm": float(grad[k])} if grad is not None else {"grad_norm": 1.0}
        if rate is not None:
            row["learning_rate"] = float(rate[k])
        rows.append(row)
    if validation is not None:
        rows.append({"step": 0, "validation_loss": float(validation[0])})
        for k in range(every - 1, len(train), every):
            row = {"step": STEPS[k], "validation_loss": float(validation[k])}
            rows.append(row if floor is None else row | {"entropy_floor": floor})
    return rows


def names(rows: list[dict]) -> list[str]:
    return [verdict.name for verdict in diagnose(rows)]


def the(rows: list[dict]):
    """The first verdict, and its evidence by name."""
    first = diagnose(rows)[0]
    return first.name, {told.figure: told for told in first.evidence}, first


def test_a_plain_fall_is_healthy():
    assert names(records(fall(), validation=fall())) == ["converged"]
    assert healthy(diagnose(records(fall(), validation=fall(), floor=0.48)))


def test_a_slow_end_is_improving_and_says_what_more_steps_would_bring():
    train = 1.0 + 3.0 * np.array(STEPS) ** -0.4
    name, told, _ = the(records(train))
    assert name == "improving"
    gain = told["expected gain of as many steps again"].value
    assert gain == pytest.approx(3 * (300**-0.4 - 600**-0.4), rel=0.05)


def test_not_a_number_is_told_with_its_step():
    train = fall()
    train[40] = math.nan
    name, told, verdict = the(records(train))
    assert name == "nonfinite"
    assert told["loss not finite"].step == STEPS[40]
    assert verdict.confidence == 1.0


def test_the_whole_loss_is_looked_at_where_a_term_of_it_is_judged():
    rows = [row | {"cross_entropy": row["loss"]} for row in records(fall())]
    rows[40]["loss"] = math.nan
    name, told, _ = the(rows)
    assert (name, told["loss not finite"].step) == ("nonfinite", STEPS[40])


def test_no_gain_is_promised_below_the_floor():
    train = 1.0 + 3.0 * np.array(STEPS) ** -0.4
    floor = float(train[-1]) - 0.01
    _, told, _ = the(records(train, validation=train, floor=floor))
    assert told["expected gain of as many steps again"].value <= 0.02


def test_a_skipped_update_is_not_a_number_that_was_caught():
    rows = records(fall())
    rows[30]["skipped_in_a_row"] = 2.0
    assert names(rows) == ["nonfinite"]


def test_a_gradient_of_nothing_and_a_loss_that_stays():
    rows = records(np.full(N, 5.9), grad=np.full(N, 1e-9))
    assert names(rows) == ["vanishing_gradients"]
    # The same gradient at the end of a fall, as of squares that are fitted exactly, is no fault.
    assert "vanishing_gradients" not in names(records(fall(), grad=np.full(N, 1e-9)))


def test_a_gradient_out_of_proportion_to_the_loss():
    name, told, _ = the(records(fall(), grad=np.full(N, 500.0)))
    assert name == "exploding_gradients"
    assert told["median grad_norm"].value == 500
    # One large first gradient is how a run begins.
    assert healthy(diagnose(records(fall(), grad=np.r_[1e6, np.full(N - 1, 0.5)])))


def test_a_loss_thrown_above_its_start_had_too_high_a_rate():
    train = np.r_[5.9, 9.0, 12.0, 11.0, 8.0, 6.5, fall(N - 6, start=6.0, floor=3.0, pace=10)]
    rate = np.linspace(1.0, 0.0, N)
    name, told, _ = the(records(train, rate=rate))
    assert name == "learning_rate_too_high"
    assert told["highest learning_rate"].value == 1.0


def test_a_loss_that_comes_back_up_diverges_from_its_best_step_on():
    train = np.r_[fall(30), np.linspace(0.5, 6, 30)]
    name, told, _ = the(records(train))
    assert name == "diverging"
    assert STEPS[20] <= told["lowest smoothed loss"].step <= STEPS[33]


def test_spikes_are_told_by_step_and_the_first_fall_is_none():
    train = fall()
    train[[25, 44]] += 2.0
    name, _, verdict = the(records(train))
    assert name == "spikes"
    assert [told.step for told in verdict.evidence] == [STEPS[25], STEPS[44]]
    assert "spikes" not in names(records(fall(pace=1.5)))


def test_a_fall_that_slows_within_a_few_records_has_no_spike():
    """Losses of a real run of 120 steps: each is lower than the one before."""
    losses = [5.65, 4.04, 2.09, 0.93, 0.59, 0.50, 0.47, 0.453, 0.445, 0.441, 0.440, 0.438]
    rows = [{"step": 10 * (k + 1), "loss": x, "grad_norm": 1.0} for k, x in enumerate(losses)]
    assert "spikes" not in names(rows)


def test_validation_apart_from_the_start_is_another_text_or_another_unit():
    other = 4.0 + 0.3 * fall()
    assert the(records(fall(), validation=other))[0] == "validation_mismatch"
    bits = fall() / math.log(2)
    name, told, _ = the(records(fall(), validation=bits))
    assert name == "validation_mismatch"
    assert told["validation over training, all along"].value == pytest.approx(1.44, abs=0.05)


def test_overfitting_is_told_with_the_step_to_stop_at():
    turn = fall() + np.r_[np.zeros(24), 0.03 * np.arange(N - 24)]
    name, told, verdict = the(records(fall(floor=0.1), validation=turn))
    assert name == "overfitting"
    assert told["lowest validation loss"].step == STEPS[23]
    assert f"--pretrain.steps {STEPS[23]}" in verdict.command
    # Validation that trembles about its end has not turned.
    tremble = fall() + 0.01 * np.random.default_rng(2).normal(0, 1, N)
    assert healthy(diagnose(records(fall(), validation=tremble)))


def test_batches_that_come_again_in_the_same_order_show_in_the_loss():
    train = fall() + np.tile([0.03, -0.02, 0.01, -0.03, 0.04], N)[:N]
    name, told, _ = the(records(train))
    assert name == "repeated_data"
    assert told["steps until the loss repeats itself"].value == 25


def test_training_far_below_a_validation_that_stays_has_seen_its_text_before():
    gap = np.r_[np.zeros(18), np.linspace(0, 0.35, N - 18)]
    train = fall(floor=0.55) - gap
    assert names(records(train, validation=fall(floor=0.55))) == ["repeated_data"]


def test_a_creeping_even_fall_had_too_low_a_rate():
    train = np.linspace(5.9, 5.2, N)
    name, told, verdict = the(records(train, rate=np.full(N, 1e-6), floor=0.3, validation=train))
    assert name == "learning_rate_too_low"
    assert told["highest learning_rate"].value == 1e-6
    assert verdict.command.startswith("minilm lr-range")


def test_progress_that_stops_at_once_is_a_plateau_and_says_where_the_rate_was():
    train = np.r_[np.linspace(6, 1.5, 12), np.full(N - 12, 1.5)]
    train += np.random.default_rng(4).normal(0, 0.003, N)
    rate = np.r_[np.full(11, 1e-2), np.full(N - 11, 1e-6)]
    name, told, _ = the(records(train, rate=rate))
    assert name == "plateau"
    assert STEPS[9] <= told["loss, flat since"].step <= STEPS[14]


def test_a_floor_far_below_a_flat_loss_is_underfitting_and_without_one_nothing_is_said():
    train = fall(floor=2.0)
    assert names(records(train, validation=train, floor=0.5)) == ["underfitting"]
    assert names(records(train, validation=train)) == ["converged"]


def test_a_run_that_ends_in_the_fall_is_too_short():
    train = 8.0 * np.array(STEPS) ** -0.5
    name, told, verdict = the(records(train))
    assert name == "too_short"
    assert "--pretrain.steps 600" in verdict.command
    low, high = (told[f"of that, {end} end of 90 %"].value for end in ("low", "high"))
    assert low <= 8 * (300**-0.5 - 600**-0.5) * 1.01 and high >= 8 * (300**-0.5 - 600**-0.5) * 0.99


@pytest.mark.parametrize("seed", range(8))
def test_a_kink_within_the_noise_is_none(seed):
    noise = np.random.default_rng(seed).normal(0, 0.3, N)
    assert healthy(diagnose(records(1 + 2 * np.exp(-np.arange(1, N + 1) / 5) + noise)))


def test_a_large_share_of_almost_nothing_is_no_reason_to_go_on():
    rng = np.random.default_rng(0)
    falling = 2 * np.exp(-np.arange(1, N + 1) / 6) * (1 + 0.1 * rng.normal(size=N))
    assert names(records(np.maximum(falling, 1e-5))) == ["improving"]


def test_what_a_cause_explains_is_not_said_again():
    train = np.r_[fall(30), np.linspace(0.5, 60, 30)]
    said = names(records(train, validation=train, floor=0.5))
    assert said == ["diverging"]


def test_a_validation_loss_alone_is_enough():
    rows = [{"step": s, "val_loss": float(v)} for s, v in zip(STEPS, fall(), strict=True)]
    assert names(rows) == ["converged"]


CASES = {
    "converged": records(fall(), validation=fall()),
    "diverging": records(np.r_[fall(30), np.linspace(0.5, 6, 30)]),
    "plateau": records(np.r_[np.linspace(6, 1.5, 12), np.full(N - 12, 1.5)]),
    "too_short": records(8.0 * np.array(STEPS) ** -0.5),
}


@pytest.mark.parametrize("name", CASES)
@given(st.sampled_from([0.1, 10.0, 1000.0]), st.sampled_from([0.01, 1.0, 100.0]), st.randoms())
def test_units_of_step_and_loss_and_the_order_of_records_change_no_verdict(
    name, stretch, scale, random
):
    rows = [
        {k: v * (stretch if k == "step" else scale) for k, v in row.items()} for row in CASES[name]
    ]
    random.shuffle(rows)
    assert names(rows) == [name]


def test_confidence_is_a_half_at_the_limit_and_grows_with_the_distance():
    found = [
        diagnose(records(fall(), grad=np.full(N, size)))[0].confidence
        for size in (2.001 * 6, 30.0, 300.0)
    ]
    assert found[0] == pytest.approx(0.5, abs=0.01)
    assert found == sorted(found)
    assert set(verdicts.EXPLAINED_BY) <= set(verdicts.RULES)
