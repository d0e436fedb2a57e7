"""Policies compared: win rates over prompts and seeds, and what KL each reward cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from minilm.config import Config
from minilm.studies import plots
from minilm.studies.curves import Curve, Interval, best_of_n, column

RESAMPLES = 2000


def wins(ours: Float[np.ndarray, "*n"], theirs: Float[np.ndarray, "*n"]) -> np.ndarray:
    """1 where gold is higher, 1/2 at a tie.

    >>> wins(np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return (ours > theirs) + 0.5 * (ours == theirs)


def two_way_interval(table: Float[np.ndarray, "S P"], *, resamples: int = RESAMPLES) -> Interval:
    """Mean of [seeds, prompts] with a 95 % bootstrap interval that draws both anew.

    With one seed, whose spread nobody knows, only prompts are drawn.

    Reference:
      Owen and Eckles (2012), Bootstrapping data arrays of arbitrary order, for the product form.
    """
    rng = np.random.default_rng(0)
    seeds, prompts = table.shape
    means = [
        table[np.ix_(rng.integers(seeds, size=seeds), rng.integers(prompts, size=prompts))].mean()
        for _ in range(resamples)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(table.mean()), float(low), float(high))


def against_reference(
    gold: Float[np.ndarray, "S P"], reference: Float[np.ndarray, "S P R"]
) -> Interval:
    """Win rate of an arm's seeds against R completions of the reference a prompt."""
    return two_way_interval(wins(gold[..., None] + 0 * reference, reference).mean(axis=2))


def between(ours: Float[np.ndarray, "S P"], theirs: Float[np.ndarray, "Z Q"]) -> Interval:
    """Win rate between two arms on the same prompts, over all pairs of their seeds.

    Raises:
      ValueError: other prompts.
    """
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} prompts against {theirs.shape[1]}")
    shape = (len(ours), len(theirs), ours.shape[1])
    table = wins(np.broadcast_to(ours[:, None], shape), np.broadcast_to(theirs[None], shape))
    rng, draws = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        a, b, p = (rng.integers(size, size=size) for size in shape)
        draws.append(table[np.ix_(a, b, p)].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(table.mean()), float(low), float(high))


def best_of_n_wins(
    proxy: Float[np.ndarray, "P N"],
    gold: Float[np.ndarray, "P N"],
    theirs: Float[np.ndarray, "P R"],
    n: int,
) -> Float[np.ndarray, " P"]:
    """How often the best of n by proxy has higher gold than R others of its prompt; a tie is 1/2.

    >>> proxy, gold, theirs = np.array([[0.0, 1.0]]), np.array([[5.0, 7.0]]), np.array([[6.0]])
    >>> best_of_n_wins(proxy, gold, theirs, 2).tolist()
    [1.0]
    """
    pairs = np.broadcast_arrays(gold[:, :, None], theirs[:, None, :])
    return best_of_n(proxy, wins(*pairs).mean(axis=2), n)


def arms(configs: Mapping[Path, Config]) -> dict[str, list[Path]]:
    """Runs that differ in seeds alone belong together; the key names what tells arms apart.

    Where algorithm and KL price do not, the first run's folder does, or its whole path.
    """
    grouped: dict[str, list[Path]] = {}
    for path, config in configs.items():
        rlhf = config.rlhf.model_copy(update={"seed": 0})
        same = config.model_copy(update={"seed": 0, "rlhf": rlhf}).model_dump_json()
        grouped.setdefault(same, []).append(path)
    names = {}
    for paths in grouped.values():
        first = configs[paths[0]].rlhf
        plain = f"{first.algorithm}, kl_coef {first.kl_coef:g}"
        longer = (plain, f"{plain} ({paths[0].name})", f"{plain} ({paths[0]})")
        names[next(name for name in longer if name not in names)] = paths
    return names


def frontier(curves: Mapping[str, Sequence[Curve]]) -> bytes:
    """PNG: gold and proxy against KL, a colour an arm, a line a seed."""
    made, axes = plots.figure(9.6, 3.8, 1, 2)
    colours: Any = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
    for ax, name in zip(axes[0], ("gold", "proxy"), strict=True):
        for number, (arm, seeds) in enumerate(curves.items()):
            for n, curve in enumerate(seeds):
                label = arm if n == 0 else None
                colour = colours[number % len(colours)]
                values = column(curve, name)
                ax.plot(curve.kl, values, "o-", ms=3, color=colour, alpha=0.8, label=label)
        ax.set(xlabel="KL to the reference, nats a completion", ylabel=name)
        ax.legend()
    return plots.png(made)
