"""Houses: three losses on prices of which some are wild, by mistake or in truth.

The process (synthetic), in units of 100,000 €: a price is (0.6 + 0.02 area) · (1 − 0.003 age) ·
0.9, 1.0 or 1.1 by district, times log-normal noise of 10 %. Two districts have a peculiarity that
no feature tells:

- in the *mistyped* one, a clerk added a zero to 5 % of the prices on record: outliers that are
  wrong. They stand in the training data only; the test data have the true price;
- in the one *by the lake*, 15 % of the houses have the view, and sell for 1.8 times as much:
  outliers that are right, and part of every total.

A loss cannot tell the one from the other. It only says what a far-off price is worth.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import (
    Examples,
    Interval,
    command,
    console,
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

from minilm.losses.regression import absolute_error, huber, squared_error
from minilm.objective import Objective, Term

DELTA = 0.3  # 30,000 €, an ordinary miss
TERMS: dict[str, Term] = {
    "squared": term("squared_error", squared_error),
    "absolute": term("absolute_error", absolute_error),
    "Huber, δ = 30,000 €": term("huber", functools.partial(huber, delta=DELTA)),
}
DISTRICTS = ("ordinary", "mistyped", "by the lake")
BANDS = 5  # of the true prices, equally many houses each


class Sizes(NamedTuple):
    seeds: int = 8
    houses: int = 4000
    test_houses: int = 20_000
    steps: int = 1000
    arms: tuple[str, ...] = tuple(TERMS)


QUICK = Sizes(seeds=3, houses=3000, test_houses=5000, steps=300, arms=("squared", "absolute"))


class Houses(NamedTuple):
    examples: Examples
    district: np.ndarray  # [N], an index into DISTRICTS
    wild: np.ndarray  # [N], mistyped or with the view


class Arm(NamedTuple):
    """Figures of one loss, [seeds, districts] or [seeds, bands]; in units of 100,000 €.

    Attributes:
      bias: mean of prediction less price: what is wrong with a district's total.
      miss: median of |prediction − price|: what is wrong with the middle house.
    """

    bias: np.ndarray
    miss: np.ndarray
    band_bias: np.ndarray


class Figures(NamedTuple):
    arms: dict[str, Arm]
    mean_price: np.ndarray  # by district
    band_price: np.ndarray  # by band
    models: dict[str, Any]

    def bias(self, name: str, district: str) -> Interval:
        """Of a district's total, as a share of it."""
        d = DISTRICTS.index(district)
        return interval(self.arms[name].bias[:, d] / self.mean_price[d])


def draw(seed: int, houses: int, *, clerk: bool) -> Houses:
    """Houses with the prices on record, or, without the clerk, the true ones."""
    random = np.random.default_rng((seed, houses))
    area, age = random.uniform(40, 200, houses), random.uniform(0, 80, houses)
    district, lot = random.integers(3, size=houses), random.random(houses)
    price = (0.6 + 0.02 * area) * (1 - 0.003 * age) * np.array([0.9, 1.0, 1.1])[district]
    price = price * np.exp(0.1 * random.normal(size=houses))
    mistyped = (district == 1) & (lot < 0.05) & clerk
    view = (district == 2) & (lot < 0.15)
    price = price * np.where(mistyped, 10, 1) * np.where(view, 1.8, 1)
    columns = [(area - 120) / 46, (age - 40) / 23, district == 1, district == 2]
    features = np.stack(columns, axis=-1).astype(np.float32)
    return Houses(Examples(features, price.astype(np.float32)), district, mistyped | view)


def figures(sizes: Sizes = Sizes()) -> Figures:  # noqa: B008  immutable
    draws = [draw(seed, sizes.houses, clerk=True).examples for seed in range(sizes.seeds)]
    begin = starts(draws, sizes.steps, batch_size=256)
    test = draw(10_000, sizes.test_houses, clerk=False)
    price = np.asarray(test.examples.target, np.float64)
    districts = [test.district == d for d in range(len(DISTRICTS))]
    band = np.argsort(np.argsort(price)) * BANDS // len(price)
    bands = [band == b for b in range(BANDS)]
    arms, models = {}, {}
    for name in sizes.arms:
        models[name] = train_seeds(Objective((TERMS[name],)), begin).model
        wrong = outputs(models[name], test.examples) - price
        arms[name] = Arm(
            np.stack([wrong[:, d].mean(-1) for d in districts], -1),
            np.stack([np.median(abs(wrong[:, d]), -1) for d in districts], -1),
            np.stack([wrong[:, b].mean(-1) for b in bands], -1),
        )
    by_district, by_band = (
        np.array([price[i].mean() for i in inside]) for inside in (districts, bands)
    )
    return Figures(arms, by_district, by_band, models)


def table(found: Figures) -> Table:
    out = Table(
        "loss", "district", "its total is wrong by, %", "median miss, €",
        title="houses: predictions of true prices, mean of seeds ± 95 %",
    )  # fmt: skip
    for name, arm in found.arms.items():
        for d, district in enumerate(DISTRICTS):
            bias, miss = found.bias(name, district), interval(1e5 * arm.miss[:, d])
            shown = Interval(100 * bias.mean, 100 * bias.half).text("+.1f")
            out.add_row(name, district, shown, miss.text(",.0f"), end_section=d == 2)
    return out


def drawing(found: Figures, path: Path) -> None:
    """What is wrong, by district and by price."""
    with picture(path) as figure:
        left, right = figure.subplots(1, 2)
        for place, (name, arm) in enumerate(found.arms.items()):
            shares = [found.bias(name, d) for d in DISTRICTS]
            at = np.arange(len(DISTRICTS)) + 0.27 * (place - 1)
            left.bar(at, [100 * s.mean for s in shares], 0.25, yerr=[100 * s.half for s in shares])
            share = 100 * arm.band_bias.mean(0) / found.band_price
            right.plot(1e2 * found.band_price, share, "o-", ms=3, label=name)
        left.set_xticks(range(len(DISTRICTS)), DISTRICTS)
        left.set(ylabel="a district's total is wrong by, %")
        right.set(
            xlabel="true price, 1000 € (fifths of the houses)", ylabel="predicted above it, %"
        )
        for ax in (left, right):
            ax.axhline(0, color="0.3", lw=0.8)
        right.legend(fontsize=7)


def study(out: Path, quick: bool) -> Figures:
    """House prices: what a loss makes of outliers that are wrong, and of those that are right."""
    found = figures(QUICK if quick else Sizes())
    houses = draw(0, QUICK.houses, clerk=True)
    groups = {
        "mistyped prices": houses.wild & (houses.district == 1),
        "houses with the view": houses.wild & (houses.district == 2),
        "all others": ~houses.wild,
    }
    for name, models in found.models.items():
        console.print(f"{name}:")
        objective = Objective((TERMS[name],))
        show_card("houses", first(models), objective, houses.examples, groups)
    drawing(found, out / "houses.svg")
    console.print(table(found))
    return found


if __name__ == "__main__":
    command(study)
