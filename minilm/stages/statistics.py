"""What a report card is made of: reliability, rank correlation, an interval over prompts."""

from collections.abc import Sequence

import numpy as np


def reliability(predicted: np.ndarray, observed: np.ndarray, bins: int = 10) -> list[tuple]:
    """(mean prediction, mean outcome, count) of each equal-width bin that is not empty."""
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    inside = [places == b for b in range(bins) if (places == b).any()]
    return [(float(predicted[i].mean()), float(observed[i].mean()), int(i.sum())) for i in inside]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation with mid-ranks for ties."""

    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    a, b = ranks(a), ranks(b)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def cluster_interval(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; whole prompts are drawn, since their pairs agree."""
    names, index = np.unique(clusters, return_inverse=True)
    totals = np.bincount(index, values)
    counts = np.bincount(index)
    draws = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
    low, high = np.quantile(totals[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)
