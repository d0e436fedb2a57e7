"""Figures of matrices against closed forms and NumPy, and what must not change them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import spectra
from minilm.spectra import (
    active_shares,
    as_matrix,
    contributions,
    effective_rank,
    histogram,
    nearest_rows,
    sparkline,
    spectrum,
    stable_rank,
)

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (1, 5), (5, 1), (6, 6)])
def test_singular_values_are_those_of_the_gram_matrix(shape, dtype):
    matrix = np.random.default_rng(0).normal(size=shape).astype(dtype)
    wide = matrix.astype(np.float64)
    gram = wide @ wide.T if shape[0] <= shape[1] else wide.T @ wide
    eigenvalues = np.linalg.eigvalsh(gram)
    figures = spectrum(matrix)
    assert (figures.rows, figures.columns) == shape
    assert figures.largest == pytest.approx(math.sqrt(eigenvalues[-1]))
    assert figures.smallest == pytest.approx(math.sqrt(eigenvalues[0]))
    norms = np.linalg.norm(wide) ** 2 / np.linalg.norm(wide, 2) ** 2
    assert figures.stable_rank == pytest.approx(norms)


@pytest.mark.parametrize(
    ("values", "stable", "effective"),
    [
        ([1, 1, 1, 1], 4, 4),
        ([3, 0, 0], 1, 1),
        ([2, 2, 0], 2, 2),
        ([2, 1, 1], 1.5, 2 * math.sqrt(2)),  # entropy of (1/2, 1/4, 1/4): 1.5 log 2
        ([0, 0], 0, 0),
        ([1e-200, 1e-200], 2, 2),
        ([1e200], 1, 1),
    ],
)
def test_ranks_of_known_singular_values(values, stable, effective):
    values = np.array(values, np.float64)
    assert stable_rank(values) == pytest.approx(stable)
    assert effective_rank(values) == pytest.approx(effective)
    assert spectrum(np.diag(values)).effective_rank == pytest.approx(effective)


@given(sides, sides, seeds)
def test_turning_rows_and_columns_changes_no_singular_value(rows, columns, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns))
    turned = orthogonal(rng, rows) @ matrix @ orthogonal(rng, columns)
    for found, expected in zip(spectrum(turned)[2:6], spectrum(matrix)[2:6], strict=True):
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)


@given(sides, sides, seeds, st.floats(-30, 30))
def test_scale_changes_singular_values_and_nothing_else(rows, columns, seed, exponent):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    before, after = spectrum(matrix), spectrum(matrix * 10.0**exponent)
    assert after.largest == pytest.approx(before.largest * 10.0**exponent)
    assert after[4:6] == pytest.approx(before[4:6])


@given(sides, sides, seeds)
def test_ranks_are_in_order(rows, columns, seed):
    figures = spectrum(np.random.default_rng(seed).normal(size=(rows, columns)))
    limits = [1, figures.stable_rank, figures.effective_rank, min(rows, columns)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(limits))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_matrix_that_is_not_finite_has_no_figures(bad):
    figures = spectrum(np.array([[1.0, bad]]))
    assert figures[:2] == (1, 2)
    assert all(map(math.isnan, figures[2:6]))
    assert figures.histogram == ()


def test_a_histogram_counts_every_weight_by_its_distance_in_rms():
    # RMS sqrt((4 * 1 + 96 * 0) / 100) = 0.2: a weight of ±1 is 5 RMS away, in an outermost bin.
    counts = histogram(np.array([1.0, 1.0, 1.0, -1.0] + [0.0] * 96))
    assert len(counts) == spectra.BINS
    assert (counts[0], counts[spectra.BINS // 2], counts[-1], sum(counts)) == (1, 96, 3, 100)


def test_a_histogram_of_a_normal_is_its_density():
    counts = histogram(np.random.default_rng(0).normal(0, 0.02, 200_000))
    edges = np.linspace(-spectra.REACH, spectra.REACH, spectra.BINS + 1)
    cumulative = np.array([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
    cumulative[[0, -1]] = 0, 1  # the tails
    # A share's standard error is at most 0.0007; six of them.
    np.testing.assert_allclose(np.array(counts) / 200_000, np.diff(cumulative), atol=0.004)


def test_zeros_lie_in_the_middle_of_a_histogram():
    counts = histogram(np.zeros((2, 3)))
    assert counts[spectra.BINS // 2] == sum(counts) == 6


def test_a_sparkline_adds_neighbours_up_and_tells_few_from_none():
    assert sparkline([0, 0, 1, 0, 400, 400, 100, 100], width=4) == " ▁█▂"
    assert sparkline((0,) * 39) == " " * 13
    assert sparkline(()) == " "


@given(st.integers(2, 9), sides, seeds)
def test_nearest_rows_are_those_of_the_plain_formula(rows, width, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, width))
    row = int(rng.integers(rows))
    found = nearest_rows(matrix, row, rows)
    for number, cosine in found:
        product = float(matrix[number] @ matrix[row])
        lengths = math.sqrt(sum(matrix[number] ** 2)) * math.sqrt(sum(matrix[row] ** 2))
        assert cosine == pytest.approx(product / lengths, abs=1e-12)
    assert sorted(number for number, _ in found) == [i for i in range(rows) if i != row]
    assert [c for _, c in found] == sorted((c for _, c in found), reverse=True)


@given(st.integers(2, 9), sides, seeds)
def test_nearness_is_unmoved_by_rotation_and_by_lengths_of_rows(rows, width, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, width))
    moved = (matrix * rng.uniform(0.1, 10, (rows, 1))) @ orthogonal(rng, width)
    before, after = dict(nearest_rows(matrix, 0, rows)), dict(nearest_rows(moved, 0, rows))
    assert after == pytest.approx(before, abs=1e-9)


def test_rows_of_zeros_are_at_right_angles_and_broken_ones_left_out():
    matrix = np.array([[1.0, 0.0], [0.0, 0.0], [np.nan, 1.0], [-1.0, 0.0], [2.0, 0.0]])
    assert nearest_rows(matrix, 0, 9) == [(4, 1.0), (1, 0.0), (3, -1.0)]
    assert nearest_rows(matrix, 1, 9) == [(0, 0.0), (3, 0.0), (4, 0.0)]
    assert nearest_rows(matrix, 2, 9) == []
    assert nearest_rows(matrix, 0, 1) == [(4, 1.0)]


def layer(seed: int, positions: int = 40, width: int = 5, units: int = 7):
    rng = np.random.default_rng(seed)
    shapes = [(positions, width), (width, units), (width, units), (units, width)]
    return [rng.normal(size=shape) for shape in shapes]


def test_contributions_are_the_lengths_of_each_units_own_output():
    x, gate, up, down = layer(0)
    lengths = contributions(x, gate, up, down)
    for r, j in [(0, 0), (3, 6), (39, 2)]:
        g, u = sum(x[r] * gate[:, j]), sum(x[r] * up[:, j])
        output = g / (1 + math.exp(-g)) * u * down[j]
        assert lengths[r, j] == pytest.approx(math.sqrt(sum(output**2)))


def test_gates_that_are_far_from_zero_do_not_overflow():
    lengths = contributions(*(np.array([[v]]) for v in (1000.0, -5.0, 1.0, 1.0)))
    assert lengths.tolist() == [[0.0]]


@given(seeds, st.floats(0.01, 100))
def test_what_a_layer_does_not_notice_changes_no_share(seed, factor):
    x, gate, up, down = layer(seed)
    shares = active_shares(contributions(x, gate, up, down))
    unnoticed = active_shares(contributions(x, gate, up * factor, down / factor))
    np.testing.assert_array_equal(unnoticed, shares)
    turn = orthogonal(np.random.default_rng(seed), x.shape[1])
    turned = contributions(x @ turn, turn.T @ gate, turn.T @ up, down @ turn)
    np.testing.assert_allclose(active_shares(turned), shares, atol=0.026)  # one position of 40


def test_a_share_counts_positions_above_a_hundredth_of_the_rms():
    # RMS over all eight: 1. A hundredth itself is negligible.
    lengths = np.array([[2.0, 0.0], [2.0, 0.0099], [0.0, 0.01001], [0.0, 0.0]])
    shares = active_shares(lengths)
    assert shares.tolist() == [0.5, 0.25]


def test_dead_and_always_allow_one_exception_in_a_hundred():
    shares = np.array([0.0, 0.01, 0.011, 0.5, 0.989, 0.99, 1.0])
    assert spectra.dead(shares).tolist() == [True, True, *[False] * 5]
    assert spectra.always(shares).tolist() == [*[False] * 5, True, True]


def test_a_layer_of_zeros_is_dead_and_a_broken_one_neither():
    zero, broken = active_shares(np.zeros((3, 2))), active_shares(np.array([[1.0, np.nan]]))
    assert zero.tolist() == [0.0, 0.0]
    assert np.isnan(broken).all()
    assert not spectra.dead(broken).any() and not spectra.always(broken).any()


def test_a_parameter_is_read_as_its_layer_uses_it():
    array = np.arange(24).reshape(2, 3, 4)
    assert as_matrix("layers.0.q_proj", array).tolist() == array.reshape(2, 12).tolist()
    assert as_matrix("layers.0.o_proj", array).tolist() == array.reshape(6, 4).tolist()
    assert as_matrix("embed_tokens", array[0]).tolist() == array[0].tolist()
    assert as_matrix("score", array[0, 0]) is None
    assert as_matrix("step", np.array(1)) is None
