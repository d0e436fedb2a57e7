"""What a curve's shape is: best step, early stopping, noise, slope, period, power law."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from minilm.diagnose.curves import Curve, Values

type Points = Sequence[float | int] | Values

# Early stopping


def best_step(steps: Points, losses: Points) -> float:
    """The step of the smallest validation loss, the first of equals; what is not finite never wins.

    Raises:
      ValueError: no finite loss.

    >>> best_step([0, 10, 20, 30], [3.0, 1.0, 1.0, 2.0])
    10.0
    """
    values = np.asarray(losses, np.float64)
    if not np.isfinite(values).any():
        raise ValueError("no finite loss")
    return float(
        np.asarray(steps, np.float64)[np.argmin(np.where(np.isfinite(values), values, np.inf))]
    )


def should_stop(steps: Points, losses: Points, patience: int, *, least: float = 0.0) -> bool:
    """Whether the last `patience` evaluations have brought nothing: early stopping.

    Args:
      losses: the validation losses so far; one that is not finite brings nothing.
      patience: evaluations, at least 1.
      least: by which a loss has to be lower to count as better.
    Reference:
      Prechelt (1998), Early Stopping, but When?, the criterion UP_s; `patience` as Keras and
      Lightning count it.

    >>> should_stop([0, 1, 2, 3], [3.0, 1.0, 1.1, 1.2], 2)
    True
    >>> should_stop([0, 1, 2, 3], [3.0, 1.0, 1.1, 0.9], 2)
    False
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    values = np.asarray(losses, np.float64)
    if len(steps) != len(values):
        raise ValueError(f"{len(steps)} steps for {len(values)} losses")
    best, waited = math.inf, 0
    for value in values:
        better = bool(value < best - least)
        best, waited = (float(value), 0) if better else (best, waited + 1)
    return waited >= patience and math.isfinite(best)


# Shape


def smooth(values: Values, width: int = 5) -> Values:
    """Running median over `width` points (odd), fewer at the ends: a spike leaves no trace.

    >>> smooth(np.array([1.0, 1.0, 9.0, 1.0, 1.0]), 3).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    half = width // 2
    padded = np.pad(values, half, constant_values=np.nan)
    return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def height(values: Values, width: int = 3) -> Values:
    """How far each value stands above the median around it and above that of those before it.

    Of both, since on a steep fall each point is above the median of its two sides.
    """
    before = [np.median(values[max(i - width, 0) : max(i, 1)]) for i in range(len(values))]
    return values - np.maximum(smooth(values, 2 * width + 1), before)


def noise(values: Values) -> float:
    """Standard deviation of single points about a smooth course, robust to spikes and to slope.

    From second differences, which a straight line does not have: their variance is 6 σ² (Gasser,
    Sroka and Jennen-Steinmetz 1986); 1.4826 makes a median absolute deviation a Gaussian's σ.
    """
    second = np.diff(values, 2)
    if len(second) == 0:
        return 0.0
    return float(1.4826 * np.median(np.abs(second)) / math.sqrt(6))


def slope(curve: Curve) -> tuple[float, float]:
    """Least-squares slope a step, and its standard error."""
    x = curve.steps - curve.steps.mean()
    y = curve.values - curve.values.mean()
    total = float(x @ x)
    if len(x) < 3 or total == 0:
        return 0.0, math.inf
    rise = float(x @ y) / total
    rest = y - rise * x
    return rise, math.sqrt(float(rest @ rest) / (len(x) - 2) / total)


def period(values: Values) -> tuple[int, float]:
    """The lag at which a curve resembles itself best, and the autocorrelation there.

    The trend is taken off by first differences. What repeats after a lag repeats after twice the
    lag too, and noise hardly ever does: the lower of both counts, less what the shorter lags show
    on average, as they do where a trend is left. Lags below 3 are left out, being the zigzag of any
    differenced noise. (0, 0.0) where the curve is too short.

    >>> period(np.tile([0.0, 1.0, 5.0, 2.0], 10))
    (4, 1.0)
    """
    x = np.diff(values)
    x = x - x.mean()
    lags = range(3, len(x) // 4 + 1)  # the doubled lag leaves half of the points to compare
    if not lags or np.abs(x).max() <= 1e-9 * np.abs(values).max():  # else rounding would repeat
        return 0, 0.0
    at = [_likeness(x, lag) for lag in range(1, 2 * lags[-1] + 1)]
    found = [
        min(at[lag - 1], at[2 * lag - 1]) - max(float(np.mean(at[: lag - 1])), 0.0) for lag in lags
    ]
    best = max(found)
    # Of a period and its multiples, which come near, the shortest is meant.
    near = next(n for n, value in enumerate(found) if value >= best - 0.1 * abs(best))
    return lags[near], round(found[near], 12)


def _likeness(x: Values, lag: int) -> float:
    """Autocorrelation, by the overlap's own power: else long lags would look weaker."""
    a, b = x[:-lag], x[lag:]
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


# Extrapolation


class PowerLaw(NamedTuple):
    """L(t) = floor + scale · t^−exponent, t in steps."""

    floor: float
    scale: float
    exponent: float

    def at(self, step: float) -> float:
        return self.floor + self.scale * step**-self.exponent


class Gain(NamedTuple):
    """What more steps would bring, in units of the loss: an estimate and a 90 % interval."""

    law: PowerLaw
    estimate: float
    low: float
    high: float


_EXPONENTS = np.geomspace(0.05, 3.0, 100)


def fit_power_law(curve: Curve) -> PowerLaw:
    """The power law with the least squared error, its floor and its scale at least 0.

    Given the exponent the law is linear, so the exponent is searched and the rest solved
    (variable projection, Golub and Pereyra 1973).

    Reference:
      Hestness et al. (2017), Deep Learning Scaling is Predictable, Empirically, arXiv:1712.00409,
      eq. 1; of training time in Kaplan et al. (2020), arXiv:2001.08361, eq. 1.6.
    """
    floors, scales, exponents = _fit(curve.steps, curve.values[None, :])
    return PowerLaw(float(floors[0]), float(scales[0]), float(exponents[0]))


def expected_gain(
    curve: Curve,
    *,
    horizon: float = 2.0,
    most: float = math.inf,
    resamples: int = 200,
    seed: int = 0,
) -> Gain:
    """How much lower the loss would be after `horizon` times as many steps, by a fitted power law.

    The interval is a bootstrap of residuals (Efron and Tibshirani 1993, section 9.4): the law is
    fitted anew to itself plus residuals drawn with replacement. It holds the noise of the points
    and the doubt about floor and exponent, not the doubt whether the course is a power law.

    Args:
      curve: from where the first steep fall is over; steps above 0.
      most: what there is to gain, down to a known floor.
    """
    law, end = fit_power_law(curve), float(curve.steps[-1])
    fitted = np.array([law.at(step) for step in curve.steps])
    rest = curve.values - fitted
    draws = np.random.default_rng(seed).integers(len(rest), size=(resamples, len(rest)))
    _, scales, exponents = _fit(curve.steps, fitted[None, :] + (rest - rest.mean())[draws])
    gains = scales * (end**-exponents - (horizon * end) ** -exponents)
    low, high = np.quantile(gains, [0.05, 0.95])
    gain = law.at(end) - law.at(horizon * end)
    return Gain(law, *(min(float(x), most) for x in (gain, low, high)))


def _fit(
    steps: Values, values: Float[np.ndarray, "R n"]
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Floors, scales and exponents, one of each a row of values."""
    middle = float(np.exp(np.mean(np.log(steps))))  # t / middle is near 1: no power overflows
    best = np.full(len(values), np.inf)
    out = np.zeros((3, len(values)))
    for exponent in _EXPONENTS:
        x = (steps / middle) ** -exponent
        centred = x - x.mean()
        scale = np.maximum(values @ centred / (centred @ centred), 0.0)
        floor = values.mean(axis=1) - scale * x.mean()
        below = floor < 0  # then the best law with floor 0
        scale = np.where(below, values @ x / (x @ x), scale)
        floor = np.where(below, 0.0, floor)
        error = ((values - floor[:, None] - scale[:, None] * x[None, :]) ** 2).sum(axis=1)
        better = error < best
        best = np.where(better, error, best)
        rows = (floor, scale * middle**exponent, np.full(len(values), exponent))
        out = np.where(better[None, :], np.stack(rows), out)
    return out[0], out[1], out[2]
