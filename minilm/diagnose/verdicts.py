"""What a training curve says: rules from curves to findings, causes before their consequences.

The limits were set on the even seeds of the bank of labelled runs (`benchmarks/curve_bank.py`),
between what the runs with and without a cause show; docs/diagnosis.md reports the odd seeds.
"""

import math
from typing import NamedTuple

import numpy as np

from minilm.diagnose import fits
from minilm.diagnose.curves import Curve, Curves
from minilm.diagnose.frame import Evidence, Finding, Rule, above, below

VANISHED = 1e-6  # gradient norm; healthy language models have 0.1 to 10
UNMOVED = 0.9  # last loss over the first, above which a vanished gradient has taught nothing
EXPLODED = 2.0  # median gradient norm over the largest loss; below 0.7 in all other runs
OVERSHOOT = 0.08  # of the first loss, by which too high a rate throws it up before it falls
DIVERGED = 0.2  # of the fall, that has been lost again at the end
SPIKE, SPIKE_NOISE = 0.1, 8.0  # of the fall, and standard deviations of the noise
MISMATCH = 0.2  # of the fall, between validation and training at the first evaluation
FIRST = 0.35  # share of the run by which that evaluation has to be over
RATIO, STEADY = 1.2, 1.3  # validation over training: at least, and its own largest over smallest
PERIODIC = 0.6  # autocorrelation of the training loss's changes
SEEN = 0.25  # of the training loss, by which validation lies above it at the end
RISEN = 0.04  # of its own fall, that the validation loss has risen from its best
PATIENCE = 2  # evaluations without a better one
CREEP, HALF_WAY, STEADILY = 0.62, 0.2, 0.7  # last over first loss; share of the run; see too_low
FLAT, KINK = 0.5, 0.15  # share of the run without progress; of the fall, in the tenth before it
UNDERFIT = 0.1  # of the fall, between the last training loss and the floor
NOISY = 0.1  # of the fall, by which single records scatter: then no kink can be told
UNFINISHED = 0.2  # of the last loss, that twice the steps would save
WORTH = 0.02  # ... and of the fall: near a loss of 0, a large share of it is nothing


class Loss(NamedTuple):
    """A loss curve in the figures that the rules compare.

    Attributes:
      smooth: running median.
      start: the first value.
      best, best_step: of the smoothed curve.
      last: median of the last tenth.
      fall: start − best, but never 0.
    """

    curve: Curve
    smooth: Curve
    start: float
    best: float
    best_step: float
    last: float
    fall: float

    @property
    def end(self) -> float:
        return float(self.curve.steps[-1])

    def at(self, step: float) -> float:
        """The smoothed loss between the steps it was logged at."""
        return float(np.interp(step, *self.smooth))


def loss_of(curves: Curves) -> Loss | None:
    """The training loss, validation's where there is none; None where neither is long enough."""
    curve = curves.get("train") or curves.get("validation")
    if curve is None:
        return None
    smooth = Curve(curve.steps, fits.smooth(curve.values))
    start, best = float(curve.values[0]), float(smooth.values.min())
    fall = max(start - best, 1e-3 * abs(start), 1e-9)
    best_step = fits.best_step(smooth.steps, smooth.values)
    return Loss(curve, smooth, start, best, best_step, smooth.late, fall)


def nonfinite(curves: Curves) -> Finding | None:
    """A figure that was not a number, or an update that was skipped for that reason."""
    found = [Evidence(f"{name} not finite", math.nan, step) for step, name in curves.nonfinite[:3]]
    skipped = curves.series.get("skipped")
    if skipped is not None and skipped.values.max() > 0:
        where = int(np.argmax(skipped.values > 0))
        most, first = float(skipped.values.max()), float(skipped.steps[where])
        found.append(Evidence("updates skipped in a row, at most (first seen)", most, first))
    return Finding(1.0, tuple(found)) if found else None


def vanishing_gradients(curves: Curves) -> Finding | None:
    """The gradient is as good as zero, and nothing has been learned."""
    loss, norms = loss_of(curves), curves.get("grad_norm")
    if loss is None or norms is None:
        return None
    middle = float(np.median(norms.values))
    if middle > VANISHED or loss.last < UNMOVED * loss.start:
        return None
    told = (Evidence("median grad_norm", middle), Evidence("loss", loss.start, loss.curve.steps[0]),
            Evidence("loss", loss.last, loss.end))  # fmt: skip
    return Finding(below(middle, VANISHED), told)


def exploding_gradients(curves: Curves) -> Finding | None:
    """The gradient is large beside the loss itself, over most of the run."""
    loss, norms = loss_of(curves), curves.get("grad_norm")
    if loss is None or norms is None:
        return None
    middle, most = float(np.median(norms.values)), int(np.argmax(norms.values))
    ratio = middle / max(float(np.abs(loss.curve.values).max()), 1e-12)
    if ratio < EXPLODED:
        return None
    told = (
        Evidence("median grad_norm", middle),
        Evidence("largest grad_norm", float(norms.values[most]), float(norms.steps[most])),
        Evidence("median grad_norm over the largest loss", ratio),
    )
    return Finding(above(ratio, EXPLODED), told)


def learning_rate_too_high(curves: Curves) -> Finding | None:
    """The loss is thrown above its first value before it falls: the first steps were too long."""
    loss = loss_of(curves)
    if loss is None:
        return None
    early = loss.curve.between(0.0, 0.4)
    middle = fits.smooth(early.values, 3)
    most = int(np.argmax(middle))
    over = float(middle[most]) / loss.start - 1 if loss.start > 0 else 0.0
    if over < OVERSHOOT:
        return None
    told = [
        Evidence("loss", loss.start, float(early.steps[0])),
        Evidence("largest smoothed loss", float(middle[most]), float(early.steps[most])),
    ]
    rates = curves.series.get("learning_rate")
    if rates is not None:
        told.append(Evidence("highest learning_rate", float(rates.values.max())))
    return Finding(above(over, OVERSHOOT), tuple(told))


def diverging(curves: Curves) -> Finding | None:
    """The loss fell, rose again and has stayed up."""
    loss = loss_of(curves)
    if loss is None:
        return None
    lost = (loss.last - loss.best) / loss.fall
    if lost < DIVERGED or loss.last - loss.best < 4 * fits.noise(loss.curve.values):
        return None
    told = (
        Evidence("lowest smoothed loss", loss.best, loss.best_step),
        Evidence("smoothed loss", loss.last, loss.end),
        Evidence("share of the fall lost again", lost),
    )
    return Finding(above(lost, DIVERGED), told)


def spikes(curves: Curves) -> Finding | None:
    """Single points stand far above both sides of the curve, which goes on as before."""
    loss = loss_of(curves)
    if loss is None or len(loss.curve.steps) < 10:
        return None
    steps, values = loss.curve
    # What stands in the first steep fall is that fall.
    height = np.where(steps > 0.1 * loss.end, fits.height(values), 0.0)
    limit = max(SPIKE * loss.fall, SPIKE_NOISE * fits.noise(loss.curve.between(0.1, 1.0).values))
    where = np.flatnonzero(height > limit)
    if len(where) == 0:
        return None
    name = "loss stands above both sides by"
    told = tuple(Evidence(name, float(height[i]), float(steps[i])) for i in where[:4])
    return Finding(above(float(height.max()), limit), told)


def _gaps(curves: Curves, loss: Loss) -> Curve | None:
    """Validation less training at the evaluations after the first training record."""
    held_out = curves.get("validation", 2)
    if held_out is None or curves.get("train") is None:
        return None
    later = held_out.steps >= max(loss.curve.steps[0], 1e-9)
    steps = held_out.steps[later]
    gaps = held_out.values[later] - np.interp(steps, *loss.smooth)
    return Curve(steps, gaps) if len(steps) else None


def validation_mismatch(curves: Curves) -> Finding | None:
    """Training and validation part at the first evaluation already, or differ by a fixed factor."""
    loss = loss_of(curves)
    gaps = None if loss is None else _gaps(curves, loss)
    if loss is None or gaps is None:
        return None
    ours = np.array([loss.at(step) for step in gaps.steps])
    first, step = float(gaps.values[0]), float(gaps.steps[0])
    told = (Evidence("validation less training", first, step),
            Evidence("validation less training", float(gaps.values[-1]), loss.end))  # fmt: skip
    if step <= FIRST * loss.end and abs(first) > MISMATCH * loss.fall:
        return Finding(above(abs(first) / loss.fall, MISMATCH), told)
    if len(gaps.steps) < 3 or ours.min() <= 0 or (gaps.values + ours).min() <= 0:
        return None
    ratios = (gaps.values + ours) / ours
    ratio = float(np.median(ratios))
    size = max(ratio, 1 / ratio)
    if size < RATIO or ratios.max() > STEADY * ratios.min():
        return None
    told = (Evidence("validation over training, all along", ratio), *told)
    return Finding(above(size - 1, RATIO - 1), told)


def overfitting(curves: Curves) -> Finding | None:
    """Validation has turned round and rises while training falls."""
    held_out, ours = curves.get("validation"), curves.get("train")
    if held_out is None or not fits.should_stop(*held_out, PATIENCE):
        return None
    best = fits.best_step(*held_out)
    lowest, last = float(held_out.values.min()), float(held_out.values[-1])
    risen = _risen(held_out)
    if risen < RISEN or last - lowest < 3 * fits.noise(held_out.values):
        return None
    told = [Evidence("lowest validation loss", lowest, best),
            Evidence("validation loss", last, float(held_out.steps[-1]))]  # fmt: skip
    if ours is not None:
        if ours.late > np.interp(best, *ours):
            return None  # both rise: that is another matter
        told.append(Evidence("training loss", ours.late, float(ours.steps[-1])))
    return Finding(above(risen, RISEN), tuple(told))


def repeated_data(curves: Curves) -> Finding | None:
    """The training loss repeats itself, or it falls far below a validation that does not rise.

    The first is the same batches in the same order; the second any text that is read many times.
    """
    ours, held_out = curves.get("train", 24), curves.get("validation")
    if ours is None:
        return None
    later = ours.between(1 / 3, 1.0)
    lag, likeness = fits.period(later.values)
    if likeness > PERIODIC:
        every = lag * float(np.median(np.diff(later.steps)))
        told = (Evidence("steps until the loss repeats itself", every),
                Evidence("autocorrelation of its changes", likeness))  # fmt: skip
        odds = likeness / max(1 - likeness, 1e-3)
        return Finding(above(odds, PERIODIC / (1 - PERIODIC)), told)
    if held_out is None or ours.late <= 0 or _risen(held_out) >= RISEN:
        return None
    last, step = float(held_out.values[-1]), float(held_out.steps[-1])
    gap = last / ours.late - 1
    if gap < SEEN:
        return None
    told = (Evidence("training loss", ours.late, float(ours.steps[-1])),
            Evidence("validation loss", last, step))  # fmt: skip
    return Finding(above(gap, SEEN), told)


def _risen(held_out: Curve) -> float:
    """How far a validation loss has risen from its best, as a share of its fall."""
    lowest = float(held_out.values.min())
    fallen = max(float(held_out.values[0]) - lowest, 1e-9)
    return (float(held_out.values[-1]) - lowest) / fallen


def learning_rate_too_low(curves: Curves) -> Finding | None:
    """Little has been learned, evenly and without noise: the curve is the beginning of one."""
    loss = loss_of(curves)
    if loss is None or loss.start <= 0 or len(loss.curve.steps) < 12:
        return None
    values = loss.curve.values
    left = loss.last / loss.start
    half = loss.curve.steps[int(np.argmax(loss.smooth.values < loss.start - 0.5 * loss.fall))]
    walked = float(np.abs(np.diff(values)).sum())
    evenly = float(values[0] - values[-1]) / max(walked, 1e-12)
    if left < CREEP or half < HALF_WAY * loss.end or evenly < STEADILY:
        return None
    told = [
        Evidence("loss", loss.start, float(loss.curve.steps[0])),
        Evidence("loss", loss.last, loss.end),
        Evidence("net fall over the way walked", evenly),
    ]
    rates = curves.series.get("learning_rate")
    if rates is not None:
        told.append(Evidence("highest learning_rate", float(rates.values.max())))
    return Finding(below(1 - left, 1 - CREEP), tuple(told))


def plateau(curves: Curves) -> Finding | None:
    """It fell fast, and then at once no more."""
    loss = loss_of(curves)
    if loss is None:
        return None
    noise = fits.noise(loss.curve.values)
    if noise > NOISY * loss.fall:
        return None
    band = max(3 * noise, 0.02 * abs(loss.last))
    outside = np.flatnonzero(np.abs(loss.smooth.values - loss.last) > band)
    if len(outside) == 0 or outside[-1] + 1 == len(loss.curve.steps):
        return None
    since = float(loss.curve.steps[outside[-1] + 1])
    flat = 1 - since / loss.end
    before = (loss.at(since - 0.1 * loss.end) - loss.at(since)) / loss.fall
    pace, error = fits.slope(loss.curve.between(since / loss.end, 1.0))
    creeps = pace < -2 * error and -pace * (loss.end - since) > 0.02 * abs(loss.last)
    if flat < FLAT or before < KINK or creeps:
        return None
    told = [Evidence("loss, flat since", loss.last, since),
            Evidence("share of the fall in the tenth before", before)]  # fmt: skip
    rates = curves.series.get("learning_rate")
    if rates is not None:
        share = float(np.interp(since, *rates)) / max(float(rates.values.max()), 1e-30)
        told.append(Evidence("learning_rate over its peak", share, since))
    return Finding(above(before, KINK), tuple(told))


def _gain(curves: Curves, loss: Loss) -> fits.Gain | None:
    """From a quarter of the run on, to the floor at most; None where too few points are left."""
    later, floor = loss.curve.between(0.25, 1.0), curves.series.get("floor")
    if len(later.steps) < 6 or later.steps[0] <= 0:
        return None
    room = math.inf if floor is None else max(loss.last - float(floor.values[-1]), 0.0)
    return fits.expected_gain(later, most=room)


def underfitting(curves: Curves) -> Finding | None:
    """Training itself stays far above the floor, and more steps would not bring it there."""
    loss, floor = loss_of(curves), curves.series.get("floor")
    if loss is None or floor is None:
        return None
    least = float(floor.values[-1])
    excess, gain = loss.last - least, _gain(curves, loss)
    if excess < UNDERFIT * loss.fall or (gain is not None and gain.estimate > excess / 4):
        return None
    told = (Evidence("training loss", loss.last, loss.end), Evidence("floor", least))
    return Finding(above(excess / loss.fall, UNDERFIT), told)


def too_short(curves: Curves) -> Finding | None:
    """A power law through the curve promises much for twice the steps."""
    loss = loss_of(curves)
    gain = None if loss is None else _gain(curves, loss)
    if loss is None or gain is None or loss.last <= 0:
        return None
    share = gain.estimate / loss.last
    small = gain.estimate < WORTH * loss.fall
    if small or share < UNFINISHED or gain.low < 0.5 * UNFINISHED * loss.last:
        return None
    return Finding(above(share, UNFINISHED), _told(loss, gain))


def _told(loss: Loss, gain: fits.Gain) -> tuple[Evidence, ...]:
    return (
        Evidence("loss", loss.last, loss.end),
        Evidence("expected gain of as many steps again", gain.estimate),
        Evidence("of that, low end of 90 %", gain.low),
        Evidence("of that, high end of 90 %", gain.high),
        Evidence("exponent of the power law", gain.law.exponent),
    )


def course(curves: Curves) -> tuple[str, Finding] | None:
    """`improving` or `converged`: what is left to say when nothing is wrong."""
    loss = loss_of(curves)
    if loss is None:
        return None
    gain = _gain(curves, loss)
    if gain is None or loss.last <= 0:  # no law can be fitted
        scatter = fits.noise(loss.curve.values)
        flat = loss.smooth.values[-1] >= np.median(loss.smooth.values) - scatter
        told = (Evidence("loss", loss.start, loss.curve.steps[0]),
                Evidence("loss", loss.last, loss.end))  # fmt: skip
        return "converged" if flat else "improving", Finding(0.5, told)
    share, told = gain.estimate / loss.last, _told(loss, gain)
    if share > UNFINISHED / 10:
        return "improving", Finding(above(share, UNFINISHED / 10), told)
    return "converged", Finding(below(share, UNFINISHED / 10), told)


RULES: dict[str, Rule] = {  # causes before their consequences: the first that fires is the verdict
    "nonfinite": nonfinite,
    "vanishing_gradients": vanishing_gradients,
    "exploding_gradients": exploding_gradients,
    "learning_rate_too_high": learning_rate_too_high,
    "diverging": diverging,
    "spikes": spikes,
    "validation_mismatch": validation_mismatch,
    "repeated_data": repeated_data,
    "overfitting": overfitting,
    "learning_rate_too_low": learning_rate_too_low,
    "plateau": plateau,
    "underfitting": underfitting,
    "too_short": too_short,
}
# What a verdict explains is not said again. `*`: said only where nothing else is.
EXPLAINED_BY: dict[str, frozenset[str]] = {
    "spikes": frozenset({"exploding_gradients", "learning_rate_too_high", "diverging"}),
    "diverging": frozenset({"learning_rate_too_high"}),
    "validation_mismatch": frozenset(
        {"vanishing_gradients", "learning_rate_too_high", "diverging"}
    ),
    "repeated_data": frozenset({"diverging", "validation_mismatch"}),
    "overfitting": frozenset({"validation_mismatch", "repeated_data"}),
    **dict.fromkeys(
        ("learning_rate_too_low", "plateau", "underfitting", "too_short"), frozenset("*")
    ),
}
