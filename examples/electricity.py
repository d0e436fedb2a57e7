"""Electricity: how much to buy a day ahead, when a shortfall costs nine times what a surplus does.

The process (synthetic) of an hour's demand, in GW: d = m + s (G − γ), with G standard Gumbel noise
of mean γ. The level m has a daily course, a weekend and heating and cooling; the spread s is larger
by day and in the cold. A forecaster sees hour, weekend and temperature. The utility's books say
that a GWh bought too much costs 10 k€, one bought too late 90 k€. So the cheapest forecast is the
conditional 0.9-quantile, which the process tells: the least possible cost is known.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from common import (
    Examples,
    Interval,
    bars,
    command,
    console,
    first,
    forward,
    interval,
    outputs,
    picture,
    show_card,
    starts,
    term,
    train_seeds,
)
from rich.table import Table

from minilm.losses.regression import absolute_error, asymmetric, quantile_loss, squared_error
from minilm.objective import Objective, Term

SURPLUS = 10.0  # k€ a GWh
K = 9.0  # a GWh of shortfall costs so many times as much
QUANTILE = K / (K + 1)


MATCHED = "asymmetric absolute, k = 9"
# asymmetric(absolute_error, k) is k + 1 times the quantile loss with q = k / (k + 1), and
# asymmetric(squared_error, k) k + 1 times the expectile loss.
TERMS: dict[str, Term] = {
    "squared": term("squared_error", squared_error),
    "quantile 0.75": term("quantile_loss", functools.partial(quantile_loss, quantile=0.75)),
    "asymmetric squared, k = 9": term("expectile_loss", asymmetric(squared_error, K)),
    MATCHED: term("quantile_loss", asymmetric(absolute_error, K)),
}


class Sizes(NamedTuple):
    seeds: int = 10
    hours: int = 8760  # a year, of each seed its own
    test_hours: int = 20_000
    steps: int = 1000
    arms: tuple[str, ...] = tuple(TERMS)


QUICK = Sizes(seeds=3, hours=2000, test_hours=4000, steps=300, arms=("squared", MATCHED))


class Arm(NamedTuple):
    """Figures of one loss, an array over the seeds each."""

    shortfall_rate: np.ndarray  # share of the hours
    shortfall: np.ndarray  # GW, in those hours
    cost: np.ndarray  # k€ an hour
    rmse: np.ndarray  # GW


class Figures(NamedTuple):
    arms: dict[str, Arm]
    least_cost: float  # k€ an hour, of the true quantile
    models: dict[str, Any]

    def dearer(self, name: str) -> Interval:
        """Cost above the matched loss, paired by seed."""
        return interval(self.arms[name].cost - self.arms[MATCHED].cost)


def process(hour, weekend, temperature) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Level and spread of demand, in GW, and the features."""
    day = 2 * np.pi * hour / 24
    cold, hot = np.maximum(16 - temperature, 0), np.maximum(temperature - 22, 0)
    level = 5 - 0.8 * np.cos(day - 0.6) + 0.3 * np.sin(2 * day) - 0.5 * weekend
    level = level + 0.05 * cold + 0.06 * hot
    spread = 0.2 - 0.1 * np.cos(day) + 0.012 * cold
    waves = [f(n * day) for n in (1, 2) for f in (np.sin, np.cos)]
    features = np.stack([*waves, weekend, (temperature - 12) / 8], axis=-1)
    return level, spread, features.astype(np.float32)


def quantile_of(level, spread, quantile: float):
    """The process's own quantile of demand."""
    return level + spread * (-np.log(-np.log(quantile)) - np.euler_gamma)


def draw(seed: int, hours: int) -> tuple[Examples, np.ndarray]:
    """Examples, and the cheapest forecast of each."""
    random = np.random.default_rng((seed, hours))
    when = (random.integers(24, size=hours), random.random(hours) < 2 / 7)
    level, spread, features = process(*when, random.normal(12, 8, hours))
    demand = level + spread * (random.gumbel(size=hours) - np.euler_gamma)
    return Examples(features, demand.astype(np.float32)), quantile_of(level, spread, QUANTILE)


def cost(forecast: np.ndarray, demand: np.ndarray) -> np.ndarray:
    """k€ an hour, the mean over the last axis."""
    short = np.maximum(demand - forecast, 0)
    return SURPLUS * (K * short + np.maximum(forecast - demand, 0)).mean(-1)


def figures(sizes: Sizes = Sizes()) -> Figures:  # noqa: B008  immutable
    draws = [draw(seed, sizes.hours)[0] for seed in range(sizes.seeds)]
    begin = starts(draws, sizes.steps, batch_size=256)
    test, best = draw(10_000, sizes.test_hours)
    demand = np.asarray(test.target, np.float64)
    arms, models = {}, {}
    for name in sizes.arms:
        trained = train_seeds(Objective((TERMS[name],)), begin)
        forecast = outputs(trained.model, test)
        short = np.maximum(demand - forecast, 0)
        rate = (short > 0).mean(-1)
        rmse = np.sqrt(((forecast - demand) ** 2).mean(-1))
        arms[name] = Arm(rate, short.mean(-1) / rate, cost(forecast, demand), rmse)
        models[name] = trained.model
    return Figures(arms, float(cost(best, demand)), models)


def table(found: Figures) -> Table:
    out = Table(
        "loss", "hours short", "by, MW", "cost, k€/h", "above the matched", "RMSE, MW",
        title=f"electricity: mean of seeds ± 95 %; least possible cost {found.least_cost:.2f} k€/h",
    )  # fmt: skip
    for name, arm in found.arms.items():
        above = "" if name == MATCHED else found.dearer(name).text("+.2f")
        cells = (f"{1e3 * arm.shortfall.mean():.0f}", interval(arm.cost).text(), above)
        out.add_row(
            name, f"{arm.shortfall_rate.mean():.1%}", *cells, f"{1e3 * arm.rmse.mean():.0f}"
        )
    return out


def drawing(found: Figures, path: Path) -> None:
    """Costs, and the forecasts of a cold weekday."""
    with picture(path) as figure:
        left, right = figure.subplots(1, 2)
        bars(left, {name: interval(arm.cost) for name, arm in found.arms.items()}, "cost, k€/h")
        left.axvline(found.least_cost, color="0.3", ls="--", lw=1, label="least possible")
        left.legend(loc="lower right")
        hours = np.arange(25)
        level, spread, features = process(hours % 24, np.zeros(25), np.zeros(25))
        band = [quantile_of(level, spread, q) for q in (0.1, 0.9)]
        right.fill_between(hours, *band, color="0.85", label="80 % of demands")
        for name, models in found.models.items():
            forecast = forward(first(models), Examples(features, None))
            right.plot(hours, forecast, lw=1.3, label=name)
        right.set(xlabel="hour of a weekday at 0 °C", ylabel="GW", xticks=range(0, 25, 6))
        right.set_ylim(3.4)
        right.legend(fontsize=7, loc="lower center")


def study(out: Path, quick: bool) -> Figures:
    """Electricity demand: the loss that has the utility's prices costs it least."""
    found = figures(QUICK if quick else Sizes())
    batch = jax.tree.map(lambda x: x[:2000], draw(0, QUICK.hours)[0])
    model = first(found.models[MATCHED])
    short = np.asarray(forward(model, batch)) < batch.target
    groups = {"hours that fell short": short, "hours with a surplus": ~short}
    show_card("electricity", model, Objective((TERMS[MATCHED],)), batch, groups)
    drawing(found, out / "electricity.svg")
    console.print(table(found))
    return found


if __name__ == "__main__":
    command(study)
