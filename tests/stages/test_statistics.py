"""The report card's statistics by hand."""

import math

import numpy as np
import pytest

from minilm.stages.statistics import cluster_interval, reliability, spearman


def test_the_interval_draws_whole_prompts():
    """Pairs of one prompt agree: as if they were independent, the interval would be too narrow.

    Ten prompts of 20 equal pairs: the standard error is that of ten numbers, not of 200.
    """
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, 10)
    clusters = [f"prompt {i}" for i in range(10) for _ in range(20)]
    low, high = cluster_interval(np.repeat(values, 20), clusters)
    expected = 1.96 * values.std() / np.sqrt(10)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert low < values.mean() < high


def test_reliability_by_hand():
    predicted = np.array([0.05, 0.07, 0.55, 1.0])
    observed = np.array([0.0, 1.0, 0.5, 1.0])
    expected = [(0.06, 0.5, 2), (0.55, 0.5, 1), (1.0, 1.0, 1)]
    for found, row in zip(reliability(predicted, observed), expected, strict=True):
        assert found == pytest.approx(row)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 90], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # 1 − 6 Σd² / (n (n² − 1))
        ([1, 1, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # mid-ranks 1.5 1.5 3 4
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_spearman_by_hand(a, b, expected):
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected)
