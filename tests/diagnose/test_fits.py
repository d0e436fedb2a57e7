"""Early stopping by definition; noise, slope, period and power laws against what was put in."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.diagnose import fits
from minilm.diagnose.curves import Curve

losses = st.lists(
    st.one_of(st.floats(-5, 5, width=16), st.just(math.nan), st.just(math.inf)), max_size=12
)


def law(floor: float, scale: float, exponent: float, steps: np.ndarray) -> Curve:
    return Curve(steps, floor + scale * steps**-exponent)


@given(losses.filter(lambda x: any(map(math.isfinite, x))))
def test_the_best_step_is_the_first_of_the_smallest(values):
    steps = [10.0 * n for n in range(len(values))]
    finite = [(v, s) for v, s in zip(values, steps, strict=True) if math.isfinite(v)]
    assert fits.best_step(steps, values) == min(finite)[1]


@given(losses, st.integers(1, 5))
def test_it_stops_when_the_last_evaluations_all_are_no_better_than_one_before(values, patience):
    steps = [float(n) for n in range(len(values))]
    before, last = values[:-patience], values[-patience:]
    finite = [v for v in before if math.isfinite(v)]
    expected = bool(finite) and not any(v < min(finite) for v in last)
    # A NaN before a first finite loss counts as waiting, but there is no best to go back to.
    assert fits.should_stop(steps, values, patience) == expected


def test_a_gain_smaller_than_the_least_is_none():
    steps, values = [0, 1, 2, 3], [1.0, 0.99, 0.98, 0.97]
    assert not fits.should_stop(steps, values, 3)
    assert fits.should_stop(steps, values, 3, least=0.1)


def test_early_stopping_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="at least 1"):
        fits.should_stop([0], [1.0], 0)
    with pytest.raises(ValueError, match="2 steps for 1 losses"):
        fits.should_stop([0, 1], [1.0], 1)
    with pytest.raises(ValueError, match="no finite loss"):
        fits.best_step([0], [math.nan])


@given(st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=20), st.sampled_from([3, 5, 7]))
def test_the_running_median_is_the_median_of_the_window(values, width):
    half = width // 2
    expected = [np.median(values[max(n - half, 0) : n + half + 1]) for n in range(len(values))]
    np.testing.assert_allclose(fits.smooth(np.array(values), width), expected)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_noise_is_the_standard_deviation_whatever_the_slope_and_the_spikes(slope):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.1, 2000) + slope * np.arange(2000)
    values[::100] += 50
    assert fits.noise(values) == pytest.approx(0.1, rel=0.15)
    assert fits.noise(np.array([1.0, 2.0])) == 0.0


def test_slope_and_its_error_are_least_squares():
    rng = np.random.default_rng(1)
    x = np.arange(30.0)
    y = 3 - 0.5 * x + rng.normal(0, 1, 30)
    (expected, _), covariance = np.polyfit(x, y, 1, cov=True)
    assert fits.slope(Curve(x, y)) == pytest.approx((expected, math.sqrt(covariance[0, 0])))
    assert fits.slope(Curve(x[:2], y[:2])) == (0.0, math.inf)


@pytest.mark.parametrize("lag", [3, 4, 7])
def test_a_period_is_found_on_a_falling_curve(lag):
    rng = np.random.default_rng(lag)
    pattern = np.tile(rng.normal(0, 1, lag), 60)[:60]
    found, likeness = fits.period(pattern + rng.normal(0, 0.05, 60) - 0.2 * np.arange(60))
    assert found == lag
    assert likeness > 0.9


def test_noise_has_no_period():
    # The largest of 200 such figures is below 0.6, the limit of `repeated_data`.
    found = [fits.period(np.random.default_rng(s).normal(0, 1, 41))[1] for s in range(200)]
    assert max(found) < 0.6
    assert fits.period(np.arange(5.0)) == (0, 0.0)
    assert fits.period(np.ones(50)) == (0, 0.0)


@pytest.mark.parametrize(
    ("floor", "scale", "exponent"), [(0.5, 3.0, 0.5), (0.0, 2.0, 0.1), (1.5, 40.0, 1.2)]
)
def test_an_exact_power_law_is_found(floor, scale, exponent):
    curve = law(floor, scale, exponent, np.arange(20.0, 400, 5))
    found = fits.fit_power_law(curve)
    np.testing.assert_allclose([found.at(s) for s in curve.steps], curve.values, rtol=2e-3)
    ahead = floor + scale * 800.0**-exponent
    assert found.at(800.0) == pytest.approx(ahead, rel=0.01)


def test_the_fit_is_the_best_that_a_search_of_all_three_finds():
    rng = np.random.default_rng(3)
    clean = law(0.7, 5.0, 0.6, np.arange(10.0, 200, 10))
    curve = Curve(clean.steps, clean.values + rng.normal(0, 0.02, len(clean.steps)))
    found = fits.fit_power_law(curve)
    ours = sum((found.at(s) - v) ** 2 for s, v in zip(*curve, strict=True))
    tries = [
        float(np.sum((floor + scale * curve.steps**-b - curve.values) ** 2))
        for floor in np.linspace(0, 1.2, 40)
        for scale in np.linspace(0.5, 15, 60)
        for b in np.linspace(0.1, 2.0, 40)
    ]
    assert ours <= 1.02 * min(tries)


def test_the_expected_gain_is_the_laws_and_its_interval_covers_it():
    """Of 40 noisy copies of one law, at least 32 intervals of 90 % hold the true gain."""
    clean = law(0.5, 4.0, 0.5, np.arange(50.0, 500, 10))
    true = 4.0 * (490**-0.5 - 980**-0.5)
    exact = fits.expected_gain(clean)
    assert exact.estimate == pytest.approx(true, rel=0.02)
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        noisy = Curve(clean.steps, clean.values + rng.normal(0, 0.01, len(clean.steps)))
        gain = fits.expected_gain(noisy)
        assert gain.low <= gain.high
        held += gain.low <= true <= gain.high
    assert held >= 32


def test_a_rising_or_flat_curve_promises_nothing():
    steps = np.arange(10.0, 200, 10)
    for values in (np.ones(19), np.linspace(1, 2, 19)):
        gain = fits.expected_gain(Curve(steps, values))
        assert gain.estimate == pytest.approx(0.0, abs=1e-9)
