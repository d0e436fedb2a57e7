import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.errors import UserError
from minilm.losses.regression import (
    absolute_error,
    asymmetric,
    expectile_loss,
    gaussian_nll,
    huber,
    linex,
    log_cosh,
    quantile_loss,
    squared_error,
)

seeds = st.integers(0, 2**32 - 1)


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _huber(e, delta):
    return e * e / 2 if abs(e) <= delta else delta * (abs(e) - delta / 2)


# Formulas of one miss, prediction − target, in float64.
FORMULAS = {
    "squared": (squared_error, lambda e: e * e),
    "absolute": (absolute_error, lambda e: math.fabs(e)),
    "huber, 1": (huber, lambda e: _huber(e, 1.0)),
    "huber, 0.3": (partial(huber, delta=0.3), lambda e: _huber(e, 0.3)),
    "log-cosh": (log_cosh, lambda e: math.log(math.cosh(e))),
    "quantile, 0.9": (
        partial(quantile_loss, quantile=0.9),
        lambda e: 0.1 * e if e > 0 else -0.9 * e,
    ),
    "expectile, 0.2": (
        partial(expectile_loss, expectile=0.2),
        lambda e: (0.8 if e > 0 else 0.2) * e**2,
    ),
    "linex, 1": (linex, lambda e: math.exp(e) - e - 1),
    "linex, -0.5": (partial(linex, a=-0.5), lambda e: math.exp(-e / 2) + e / 2 - 1),
    "asymmetric": (asymmetric(absolute_error, 3.0), lambda e: e if e > 0 else -3 * e),
}
every_loss = pytest.mark.parametrize(("loss", "formula"), FORMULAS.values(), ids=FORMULAS)


@every_loss
def test_value_against_float64(loss, formula):
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 8.0):
        predictions, targets = rng.standard_normal((2, 50)) * scale
        predictions, targets = np.float32(predictions), np.float32(targets)
        expected = [formula(float(p) - float(t)) for p, t in zip(predictions, targets, strict=True)]
        out = loss(jnp.asarray(predictions), jnp.asarray(targets))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-7)


@every_loss
def test_gradient_against_differences_of_the_formula_in_float64(loss, formula):
    # No point lies within the difference of a kink: 0, ±0.3 or ±1.
    misses = np.array([-6.0, -1.1, -0.9, -0.35, -0.2, -0.01, 0.01, 0.2, 0.35, 0.9, 1.1, 6.0])
    step = 1e-6
    expected = [(formula(e + step) - formula(e - step)) / (2 * step) for e in misses]
    targets = jnp.full(len(misses), 0.0, jnp.float32)
    gradient = jax.grad(lambda p: jnp.sum(loss(p, targets)))(_f32(misses))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_predictions_and_targets_may_move_together(loss, formula):
    rng = np.random.default_rng(1)
    # Eighths, so that adding 8 to them is exact in float32.
    predictions, targets = jnp.asarray(rng.integers(-20, 20, (2, 30)) / 8, jnp.float32)
    np.testing.assert_array_equal(loss(predictions + 8, targets + 8), loss(predictions, targets))


def _best_constant(loss, sample, candidates):
    """The constant prediction of least mean loss."""
    grid = jnp.broadcast_to(_f32(candidates)[:, None], (len(candidates), len(sample)))
    targets = jnp.broadcast_to(_f32(sample)[None, :], grid.shape)
    return candidates[int(jnp.argmin(jnp.mean(loss(grid, targets), axis=1)))]


SAMPLE = np.random.default_rng(2).lognormal(0.0, 0.8, 301)  # skewed: mean 1.4, median 1.0
GRID = np.linspace(0.0, 6.0, 3001)


def _expectile(sample, tau):
    """By bisection of its first-order condition."""
    low, high = sample.min(), sample.max()
    for _ in range(60):
        middle = (low + high) / 2
        short = np.maximum(sample - middle, 0).sum()
        over = np.maximum(middle - sample, 0).sum()
        low, high = (middle, high) if tau * short > (1 - tau) * over else (low, middle)
    return low


MINIMISERS = {
    "the mean of the squared error": (squared_error, SAMPLE.mean()),
    "the median of the absolute error": (absolute_error, np.median(SAMPLE)),
    **{
        f"the {q}-quantile of the pinball loss": (
            partial(quantile_loss, quantile=q),
            np.quantile(SAMPLE, q),
        )
        for q in (0.1, 0.5, 0.75, 0.9)
    },
    **{
        f"the {t}-expectile of the expectile loss": (
            partial(expectile_loss, expectile=t),
            _expectile(SAMPLE, t),
        )
        for t in (0.1, 0.5, 0.9)
    },
    **{
        f"the exponential mean of LINEX, {a}": (
            partial(linex, a=a),
            -np.log(np.mean(np.exp(-a * SAMPLE))) / a,
        )
        for a in (-0.5, 1.0, 2.0)
    },
    "the 4/5-quantile where shortfall costs 4 times as much": (
        asymmetric(absolute_error, 4.0),
        np.quantile(SAMPLE, 0.8),
    ),
    "the mean of Huber's loss with a large delta": (partial(huber, delta=1e3), SAMPLE.mean()),
    "the median of Huber's loss with a small delta": (
        partial(huber, delta=1e-2),
        np.median(SAMPLE),
    ),
}


@pytest.mark.parametrize(("loss", "expected"), MINIMISERS.values(), ids=MINIMISERS)
def test_the_minimiser_is(loss, expected):
    # 0.01 of 6: five steps of the grid, where a float32 mean of 301 losses is flat.
    assert abs(_best_constant(loss, SAMPLE, GRID) - expected) < 0.01


@pytest.mark.parametrize("loss", [huber, log_cosh])
def test_robust_losses_settle_between_the_median_and_the_mean(loss):
    best = _best_constant(loss, SAMPLE, GRID)
    assert np.median(SAMPLE) + 0.02 < best < SAMPLE.mean() - 0.02


@given(seeds, st.sampled_from([0.1, 0.3, 0.5, 0.8]), st.sampled_from([0.25, 4.0]))
def test_what_a_change_of_unit_does(seed, q, k):
    predictions, targets = _f32(np.random.default_rng(seed).standard_normal((2, 20)))
    scaled = k * predictions, k * targets
    for loss, factor in (
        (squared_error, k**2),
        (absolute_error, k),
        (partial(quantile_loss, quantile=q), k),
        (partial(expectile_loss, expectile=q), k**2),
    ):
        np.testing.assert_allclose(loss(*scaled), factor * loss(predictions, targets), rtol=1e-5)
    np.testing.assert_allclose(
        huber(*scaled, delta=k * q), k**2 * huber(predictions, targets, delta=q), rtol=1e-5
    )
    np.testing.assert_allclose(
        linex(*scaled, a=q / k), linex(predictions, targets, a=q), rtol=1e-4, atol=1e-6
    )


@given(seeds, st.sampled_from([0.1, 0.3, 0.8]))
def test_the_mirror_image_has_the_other_side_dear(seed, q):
    predictions, targets = _f32(np.random.default_rng(seed).standard_normal((2, 20)))
    for loss, mirrored in (
        (partial(quantile_loss, quantile=q), partial(quantile_loss, quantile=1 - q)),
        (partial(expectile_loss, expectile=q), partial(expectile_loss, expectile=1 - q)),
        (partial(linex, a=q), partial(linex, a=-q)),
    ):
        np.testing.assert_allclose(
            mirrored(-predictions, -targets), loss(predictions, targets), rtol=1e-5, atol=1e-7
        )


@given(seeds, st.floats(0.25, 20.0))
def test_asymmetric_costs_are_the_pinball_and_the_expectile_loss(seed, k):
    predictions, targets = _f32(np.random.default_rng(seed).standard_normal((2, 20)))
    share = k / (k + 1)
    pinball = quantile_loss(predictions, targets, quantile=share)
    np.testing.assert_allclose(
        asymmetric(absolute_error, k)(predictions, targets), (k + 1) * pinball, rtol=1e-4, atol=1e-6
    )
    squares = expectile_loss(predictions, targets, expectile=share)
    np.testing.assert_allclose(
        asymmetric(squared_error, k)(predictions, targets), (k + 1) * squares, rtol=1e-4, atol=1e-6
    )


def test_a_half_quantile_is_half_the_absolute_error_and_a_half_expectile_half_the_square():
    predictions, targets = _f32(np.random.default_rng(3).standard_normal((2, 20)))
    halves = quantile_loss(predictions, targets), expectile_loss(predictions, targets)
    np.testing.assert_allclose(2 * halves[0], absolute_error(predictions, targets), rtol=1e-6)
    np.testing.assert_allclose(2 * halves[1], squared_error(predictions, targets), rtol=1e-6)


def _density(t, mean, variance):
    return math.exp(-((t - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_gaussian_nll_is_minus_the_log_of_the_density(mean, log_variance, target):
    expected = -math.log(_density(target, mean, math.exp(log_variance)))
    out = gaussian_nll(_f32([mean]), _f32([log_variance]), _f32([target]))
    np.testing.assert_allclose(out, [expected], rtol=1e-5, atol=1e-5)


def test_gaussian_nll_is_least_at_the_mean_and_the_variance_of_the_sample():
    sample = _f32(SAMPLE)

    def loss(both):
        mean, log_variance = (jnp.broadcast_to(x, sample.shape) for x in both)
        return jnp.mean(gaussian_nll(mean, log_variance, sample))

    best = _f32([SAMPLE.mean(), math.log(SAMPLE.var())])
    np.testing.assert_allclose(jax.grad(loss)(best), [0.0, 0.0], atol=1e-5)
    assert (np.linalg.eigvalsh(jax.hessian(loss)(best)) > 0.1).all()


def test_past_the_bound_linex_and_gaussian_nll_go_on_along_the_tangent():
    # exp(40) is still float32's; there slope and value must meet, or an optimizer sees a cliff.
    near, far = _f32([39.999, 40.001, 45.0]), jnp.zeros(3)
    slopes = jax.grad(lambda p: jnp.sum(linex(p, far)))(near)
    np.testing.assert_allclose(slopes, np.exp([39.999, 40.0, 40.0]), rtol=1e-5)
    np.testing.assert_allclose(linex(near, far)[2], math.exp(40) * 6, rtol=1e-5)
    narrow = _f32([-39.999, -40.001, -45.0])
    out = gaussian_nll(jnp.ones(3), narrow, jnp.zeros(3))
    np.testing.assert_allclose(out, np.exp([39.999, 40.001, 40.0]) * [0.5, 0.5, 3.0], rtol=1e-5)


def test_log_cosh_and_linex_of_a_small_miss_are_half_its_square():
    miss, zero = _f32([1e-2]), jnp.zeros(1)
    np.testing.assert_allclose(log_cosh(miss, zero), [5e-5], rtol=2e-3)
    np.testing.assert_allclose(linex(miss, zero), [5e-5], rtol=5e-3)


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        (lambda: huber(jnp.zeros(1), jnp.zeros(1), delta=0.0), "delta"),
        (lambda: huber(jnp.zeros(1), jnp.zeros(1), delta=math.inf), "delta"),
        (lambda: quantile_loss(jnp.zeros(1), jnp.zeros(1), quantile=1.0), "quantile"),
        (lambda: quantile_loss(jnp.zeros(1), jnp.zeros(1), quantile=math.nan), "quantile"),
        (lambda: expectile_loss(jnp.zeros(1), jnp.zeros(1), expectile=0.0), "expectile"),
        (lambda: linex(jnp.zeros(1), jnp.zeros(1), a=0.0), "a"),
        (lambda: asymmetric(squared_error, -1.0), "shortfall_cost"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(loss, option):
    with pytest.raises(UserError, match=f"^{option}: out of range"):
        loss()


@every_loss
def test_a_target_that_is_not_finite_is_refused_outside_jit(loss, formula):
    targets = jnp.array([0.0, 1.0, jnp.nan, jnp.inf])
    with pytest.raises(UserError, match=r"targets: 2 of 4 values not finite, the first at.*\(2,\)"):
        loss(jnp.zeros(4), targets)
    # Inside there is nothing to look at; the guard of the training loop sees what comes of it.
    assert np.isnan(jax.jit(loss)(jnp.zeros(4), targets)[2])
