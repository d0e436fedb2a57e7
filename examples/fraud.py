"""Fraud: 0.2 % of payments are fraudulent, and one missed costs as much as 1000 false alarms.

The process (synthetic) of a payment: its log-odds of fraud are INTERCEPT + 1.3 amount + night +
1.2 foreign + 2.5 night · foreign + 0.6 pace. The amount is standard normal (a logarithm), a fifth
of the payments are made by night and a tenth abroad, the pace of payments before is exponential. So
every payment's true probability is known: costs, recall and precision are expectations over it, and
the least possible cost is that of the rule "alarm where 1000 p > 1 − p".

Every model raises the alarm where its output says that fraud is likelier than not: that is what the
loss by itself makes it do. The last row is the plain model with the threshold moved to 1 / 1001.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from common import (
    Examples,
    bars,
    command,
    console,
    interval,
    outputs,
    picture,
    show_card,
    start,
    starts,
    term,
    train_seeds,
)
from rich.table import Table

from minilm.losses.classification import binary_cross_entropy, class_weights, focal
from minilm.objective import Objective, Term

MISS = 1000.0  # in false alarms
INTERCEPT = -9.06  # makes 0.2 % of the payments fraudulent


def _class_weighted(batch: Examples):
    """Inverse frequency: both classes weigh the same as a whole."""
    return class_weights(jnp.array([998.0, 2.0]))[batch.target.astype(jnp.int32)]


PLAIN, MATCHED = "plain cross-entropy", "cost-matched, k = 1000"
plain = term("binary_cross_entropy", binary_cross_entropy)
matched = functools.partial(binary_cross_entropy, positive_weight=MISS)
# A positive weighed k times moves the even odds to p = 1 / (1 + k): Elkan (2001), theorem 1.
TERMS: dict[str, Term] = {
    PLAIN: plain,
    "focal, γ = 2": term("focal", focal),
    # A class's weight belongs to the average.
    "class-weighted": plain._replace(over=_class_weighted),
    MATCHED: term("binary_cross_entropy", matched),
}
MOVED = "plain, threshold 1 / 1001"


class Sizes(NamedTuple):
    seeds: int = 5
    payments: int = 100_000
    test_payments: int = 50_000
    steps: int = 800
    batch_size: int = 2048
    arms: tuple[str, ...] = tuple(TERMS)


QUICK = Sizes(3, 30_000, 10_000, 150, 2048, (PLAIN, MATCHED))


class Arm(NamedTuple):
    """Figures of one loss, an array over the seeds each."""

    recall: np.ndarray  # share of the fraud that raised the alarm
    precision: np.ndarray  # share of fraud among the alarms; not a number where there are none
    cost: np.ndarray  # of a thousand payments, in false alarms
    says: np.ndarray  # mean predicted probability over the true share of fraud
    calibration: list[tuple[float, float]]  # of the first seed: (predicted, true), by prediction


class Figures(NamedTuple):
    arms: dict[str, Arm]
    least_cost: float
    prevalence: float
    models: dict[str, Any]


def draw(seed: int, payments: int) -> tuple[Examples, np.ndarray]:
    """Payments, and the true probability of fraud of each."""
    random = np.random.default_rng((seed, payments))
    amount, pace = random.normal(size=payments), random.exponential(size=payments)
    night, foreign = random.random(payments) < 0.2, random.random(payments) < 0.1
    logits = INTERCEPT + 1.3 * amount + night + 1.2 * foreign + 2.5 * night * foreign + 0.6 * pace
    truth = _sigmoid(logits)
    features = np.stack([amount, night, foreign, pace], axis=-1).astype(np.float32)
    return Examples(features, (random.random(payments) < truth).astype(np.float32)), truth


def judged(logits: np.ndarray, truth: np.ndarray, threshold: float = 0.5) -> Arm:
    """Expectations over what each payment may be, for alarms above a threshold."""
    predicted = _sigmoid(logits)
    alarm = predicted > threshold
    caught, alarms = (alarm * truth).sum(-1), alarm.sum(-1)
    cost = 1000 * (MISS * (~alarm * truth) + alarm * (1 - truth)).mean(-1)
    says = predicted.mean(-1) / truth.mean()
    order = np.array_split(np.argsort(predicted[0]), 20)
    calibration = [(float(predicted[0][i].mean()), float(truth[i].mean())) for i in order]
    precision = np.where(alarms > 0, caught / np.maximum(alarms, 1), np.nan)
    return Arm(caught / truth.sum(), precision, cost, says, calibration)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def figures(sizes: Sizes = Sizes()) -> Figures:  # noqa: B008  immutable
    draws = [draw(seed, sizes.payments)[0] for seed in range(sizes.seeds)]
    begin = starts(draws, sizes.steps, sizes.batch_size)
    test, truth = draw(10_000, sizes.test_payments)
    arms, models = {}, {}
    for name in sizes.arms:
        models[name] = train_seeds(Objective((TERMS[name],)), begin).model
        arms[name] = judged(outputs(models[name], test), truth)
    arms[MOVED] = judged(outputs(models[PLAIN], test), truth, 1 / (1 + MISS))
    best = judged(np.log(truth / (1 - truth))[None], truth, 1 / (1 + MISS))
    return Figures(arms, float(best.cost[0]), float(truth.mean()), models)


def table(found: Figures) -> Table:
    out = Table(
        "loss", "recall", "precision", "cost of 1000 payments", "says, times the truth",
        title=f"fraud ({found.prevalence:.2%} of payments), mean of seeds ± 95 %; least possible "
        f"cost {found.least_cost:.0f} false alarms",
    )  # fmt: skip
    for name, arm in found.arms.items():
        alarms = arm.precision[np.isfinite(arm.precision)]
        precision = f"{alarms.mean():.1%}" if alarms.size else "no alarm"
        out.add_row(
            name,
            f"{arm.recall.mean():.1%}",
            precision,
            interval(arm.cost).text(".0f"),
            f"{arm.says.mean():.3g}",
        )
    return out


def drawing(found: Figures, path: Path) -> None:
    """Costs, and what each model says against what is so."""
    with picture(path) as figure:
        left, right = figure.subplots(1, 2)
        bars(left, {name: interval(arm.cost) for name, arm in found.arms.items()},
             "cost of 1000 payments, in false alarms")  # fmt: skip
        left.axvline(found.least_cost, color="0.3", ls="--", lw=1, label="least possible")
        left.legend(loc="lower right")
        for name in found.models:
            right.plot(*zip(*found.arms[name].calibration, strict=True), "o-", ms=3, label=name)
        ends = (1e-5, 1)
        right.plot(ends, ends, color="0.3", ls="--", lw=1)
        right.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        right.set(xlabel="predicted probability of fraud", ylabel="true share")
        right.minorticks_off()
        right.legend(fontsize=7)


def study(out: Path, quick: bool) -> Figures:
    """Fraud: what a rare class weighs in the gradient, and what an alarm should cost."""
    found = figures(QUICK if quick else Sizes())
    data = draw(0, QUICK.payments)[0]
    fraud = data.target == 1
    groups = {"fraud": fraud, "honest payments": ~fraud}
    for name in (PLAIN, MATCHED):
        console.print(f"{name}, before training:")
        untrained = start(0, data, steps=0, batch_size=1).model
        show_card("fraud", untrained, Objective((TERMS[name],)), data, groups)
    drawing(found, out / "fraud.svg")
    console.print(table(found))
    return found


if __name__ == "__main__":
    command(study)
