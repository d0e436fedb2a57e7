"""Loans: accuracy against fairness, as a weighted sum of two terms.

The process (synthetic): an applicant repays with log-odds 1 + 1.5 income + history, both about
standard normal. Of two groups, equally many, the second has a lower income by 1. The model sees
income, history and a district that tells the group roughly, not the group itself; it grants the
loan where it thinks repayment likelier than not.

Two terms: cross-entropy pays for knowing who repays. `group_gap`, of the probabilities that the
model gives, pays for the difference between the groups' means: demographic parity (Calders, Kamiran
and Pechenizkiy 2009), made smooth. No weight is right by itself: the study prints what each costs,
and where two automatic balances end, which know of losses and gradients and nothing of fairness.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    Interval,
    command,
    console,
    each,
    first,
    interval,
    outputs,
    picture,
    show_card,
    starts,
    term,
    train_seeds,
)
from rich.table import Table

from minilm.config import BalanceConfig
from minilm.losses.classification import binary_cross_entropy
from minilm.losses.regularization import group_gap
from minilm.objective import Objective, Term, Weight

BALANCES = {
    "uncertainty weighting": BalanceConfig(method="uncertainty"),
    "GradNorm": BalanceConfig(method="gradnorm"),
}


class Applicants(NamedTuple):
    features: Any  # [B, 3]: income, history, district
    target: Any  # [B], 1 where the loan was repaid
    group: Any  # [B], 0 or 1


class Sizes(NamedTuple):
    seeds: int = 5
    applicants: int = 20_000
    test_applicants: int = 50_000
    steps: int = 600
    batch_size: int = 1024
    weights: tuple[float, ...] = (0.0, 0.2, 0.4, 0.7, 1.0, 2.0, 5.0)
    balances: tuple[str, ...] = tuple(BALANCES)


QUICK = Sizes(3, 4000, 10_000, 200, 512, (0.0, 0.5, 2.0), ())


class Point(NamedTuple):
    """Figures of one weight, an array over the seeds each."""

    weight: np.ndarray  # of the gap, in units of the cross-entropy's, in the last tenth
    accuracy: np.ndarray
    gap: np.ndarray  # share of loans granted, first group less second


class Figures(NamedTuple):
    frontier: list[Point]  # by the weights that were set
    balanced: dict[str, Point]
    best_accuracy: float  # of who knows the process
    model: Any  # of the weight in the middle, and that weight
    weight: float


def objective(weight: Weight) -> Objective:
    def gap(logits, batch):
        # One number for the batch, given to each example: their mean is that number.
        return jnp.full(logits.shape, group_gap(jax.nn.sigmoid(logits), batch.group))

    known = term("binary_cross_entropy", binary_cross_entropy)
    return Objective((known, Term("group_gap", weight, gap, each)))


def draw(seed: int, applicants: int) -> tuple[Applicants, np.ndarray]:
    """Applicants, and the true probability that each repays."""
    random = np.random.default_rng((seed, applicants))
    group = random.integers(2, size=applicants)
    income = random.normal(0.5 - group, 1)
    history = random.normal(size=applicants)
    district = random.normal(group - 0.5, 0.5)
    truth = 1 / (1 + np.exp(-(1 + 1.5 * income + history)))
    repaid = (random.random(applicants) < truth).astype(np.float32)
    features = np.stack([income, history, district], axis=-1).astype(np.float32)
    return Applicants(features, repaid, group.astype(np.int32)), truth


def judged(weight: Any, logits: np.ndarray, test: Applicants, truth: np.ndarray) -> Point:
    """Expected accuracy over who may repay, and the difference in loans granted."""
    granted = logits > 0
    rates = [granted[:, test.group == g].mean(-1) for g in (0, 1)]
    accuracy = np.where(granted, truth, 1 - truth).mean(-1)
    return Point(np.asarray(weight), accuracy, rates[0] - rates[1])


def figures(sizes: Sizes = Sizes()) -> Figures:  # noqa: B008  immutable
    draws = [draw(seed, sizes.applicants)[0] for seed in range(sizes.seeds)]
    begin = starts(draws, sizes.steps, sizes.batch_size)
    test, truth = draw(10_000, sizes.test_applicants)

    def weighted(weight):
        """A weight that is a schedule may be a traced value, so all weights train at once."""
        return train_seeds(objective(lambda step: weight), begin)

    weights = jnp.array(sizes.weights)
    grid = jax.jit(jax.vmap(weighted))(weights)
    models = [jax.tree.map(lambda x: x[i], grid.model) for i in range(len(weights))]  # noqa: B023
    frontier = [
        judged(np.full(sizes.seeds, w), outputs(m, test), test, truth)
        for w, m in zip(sizes.weights, models, strict=True)
    ]
    balanced = {}
    for name in sizes.balances:
        trained = train_seeds(objective(1.0), begin, BALANCES[name])
        late = slice(-max(sizes.steps // 10, 1), None)
        gap, own = (
            np.asarray(trained.metrics[f"weight/{t}"])[:, late].mean(-1)
            for t in ("group_gap", "binary_cross_entropy")
        )
        balanced[name] = judged(gap / own, outputs(trained.model, test), test, truth)
    middle = len(weights) // 2
    best = float(np.maximum(truth, 1 - truth).mean())
    return Figures(frontier, balanced, best, first(models[middle]), sizes.weights[middle])


def _rows(found: Figures) -> dict[str, Point]:
    set_by_hand = {f"weight {p.weight[0]:g}": p for p in found.frontier}
    return set_by_hand | found.balanced


def table(found: Figures) -> Table:
    out = Table(
        "balance", "weight of the gap", "accuracy", "gap in loans granted",
        title=f"loans, mean of seeds ± 95 %; best possible accuracy {found.best_accuracy:.1%}",
    )  # fmt: skip
    for name, point in _rows(found).items():
        shares = [interval(100 * x).text(".1f") + " %" for x in (point.accuracy, point.gap)]
        out.add_row(name, f"{point.weight.mean():.3g}", *shares)
    return out


def drawing(found: Figures, path: Path) -> None:
    """The frontier, and where the balances end."""
    with picture(path, 5.5, 3.6) as figure:
        ax = figure.subplots()
        spots = [(interval(100 * p.gap), interval(100 * p.accuracy)) for p in found.frontier]
        _points(ax, spots, "o-", "weights set by hand")
        for (gap, accuracy), p in zip(spots, found.frontier, strict=True):
            place = {"xytext": (5, -10), "textcoords": "offset points", "fontsize": 7}
            ax.annotate(f"{p.weight[0]:g}", (gap.mean, accuracy.mean), **place)
        for mark, (name, p) in zip("*D", found.balanced.items(), strict=False):
            _points(ax, [(interval(100 * p.gap), interval(100 * p.accuracy))], mark, name)
        ax.axhline(100 * found.best_accuracy, color="0.3", ls="--", lw=1, label="best possible")
        ax.set(xlabel="gap in loans granted between the groups, %", ylabel="accuracy, %")
        ax.legend(loc="lower right")


def _points(ax: Any, spots: list[tuple[Interval, Interval]], mark: str, label: str) -> None:
    x, y = zip(*spots, strict=True)
    errors = ([v.half for v in y], [v.half for v in x])
    centres = ([v.mean for v in x], [v.mean for v in y])
    ax.errorbar(*centres, *errors, fmt=mark, ms=8 if mark == "*" else 4, lw=1, label=label)


def study(out: Path, quick: bool) -> Figures:
    """Loans: what each weight of fairness costs, and the one that an automatic balance picks."""
    found = figures(QUICK if quick else Sizes())
    applicants = draw(0, QUICK.applicants)[0]
    groups = {f"group {g}": applicants.group == g for g in (0, 1)}
    show_card("loans", found.model, objective(found.weight), applicants, groups)
    drawing(found, out / "loans.svg")
    console.print(table(found))
    return found


if __name__ == "__main__":
    command(study)
