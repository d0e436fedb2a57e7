"""Matrices in figures: singular values, ranks, histograms, nearest rows, units that do nothing.

NumPy in float64: arrays in, figures out, no model.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

BINS = 39  # of a histogram of weights: odd, so that zero has a bin of its own
REACH = 4.0  # RMS at which a histogram ends: a normal has 6e-5 of its mass beyond
NEGLIGIBLE = 0.01  # of the layer's RMS: a unit that adds no more does nothing at that position
NEARLY = 0.01  # of the positions: as many exceptions "nearly never" and "nearly always" allow
_BARS = "▁▂▃▄▅▆▇█"


class Spectrum(NamedTuple):
    """A matrix in figures; NaN, and no histogram, where it is not finite.

    The ranks lie between 1 and min(rows, columns), stable below effective: the first counts
    directions as large as the largest, the second also smaller ones. Of a zero matrix both are 0.
    """

    rows: int
    columns: int
    largest: float  # singular value
    smallest: float  # the last of min(rows, columns)
    stable_rank: float  # |W|_F² / |W|₂², Rudelson and Vershynin (2007), arXiv:math/0503442
    effective_rank: float  # exp of the entropy of σ / Σσ, Roy and Vetterli (2007), EUSIPCO
    histogram: tuple[int, ...]  # weights in each of BINS bins, see `histogram`


def spectrum(matrix: Float[np.ndarray, "M N"]) -> Spectrum:
    """Figures of a matrix, of any float dtype; computed in float64.

    >>> s = spectrum(np.diag([4.0, 4.0, 0.0]))
    >>> s.largest, s.smallest, s.stable_rank, round(s.effective_rank, 12)
    (4.0, 0.0, 2.0, 2.0)
    """
    wide = np.asarray(matrix, np.float64)
    rows, columns = wide.shape
    if not np.isfinite(wide).all():
        return Spectrum(rows, columns, math.nan, math.nan, math.nan, math.nan, ())
    values = np.linalg.svd(wide, compute_uv=False)
    return Spectrum(
        rows,
        columns,
        largest=float(values[0]),
        smallest=float(values[-1]),
        stable_rank=stable_rank(values),
        effective_rank=effective_rank(values),
        histogram=histogram(wide),
    )


def stable_rank(values: Float[np.ndarray, "K"]) -> float:
    """Σσ² / max σ² of singular values, 0 where all are zero."""
    # Divided first: squares of small values would vanish.
    return float(np.sum((values / values.max()) ** 2)) if values.any() else 0.0


def effective_rank(values: Float[np.ndarray, "K"]) -> float:
    """exp(−Σ p log p) with p = σ / Σσ, of singular values; 0 where all are zero."""
    if not values.any():
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def histogram(weights: Float[np.ndarray, "*shape"]) -> tuple[int, ...]:
    """How many weights lie in each of BINS equal bins from −REACH to REACH, in units of their RMS.

    What lies beyond is counted in the outermost bins. Weights that are all zero lie in the middle.
    """
    wide = np.asarray(weights, np.float64).ravel()
    scale = np.abs(wide).max(initial=0.0)
    if scale:
        wide = wide / scale  # squares of small values would vanish
        wide = wide / np.sqrt(np.mean(wide**2))
    counts, _ = np.histogram(np.clip(wide, -REACH, REACH), BINS, (-REACH, REACH))
    return tuple(counts.tolist())


def sparkline(counts: Sequence[int], width: int = 13) -> str:
    """A histogram as a line of text: bars up to the highest, a space where nothing is.

    Args:
      counts: a multiple of `width` of them; neighbours are added up.

    >>> sparkline([0, 1, 2, 8, 4, 1], width=6)
    ' ▁▂█▄▁'
    """
    sums = np.asarray(counts, np.int64).reshape(width, -1).sum(axis=1) if counts else np.zeros(1)
    top = sums.max() or 1
    return "".join(_BARS[-int(-8 * s // top) - 1] if s else " " for s in sums)


def nearest_rows(matrix: Float[np.ndarray, "V D"], row: int, count: int) -> list[tuple[int, float]]:
    """The rows that point most nearly where one does: (number, cosine), the nearest first.

    Without the row itself, and without rows that are not finite. A row of zeros is at right angles
    to all. Of equally near rows the first comes first.

    >>> nearest_rows(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), 0, 2)
    [(2, 1.0), (1, 0.0)]
    """
    wide = np.asarray(matrix, np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        unit = np.where(norms == 0, 0.0, wide / np.where(norms == 0, 1.0, norms))
        cosines = np.clip(unit @ unit[row], -1.0, 1.0)
    order = [int(i) for i in np.argsort(-cosines, kind="stable") if i != row]
    return [(i, float(cosines[i])) for i in order[:count] if np.isfinite(cosines[i])]


def contributions(
    inputs: Float[np.ndarray, "R D"],
    gate: Float[np.ndarray, "D F"],
    up: Float[np.ndarray, "D F"],
    down: Float[np.ndarray, "F D"],
) -> Float[np.ndarray, "R F"]:
    """What each hidden unit of a SwiGLU layer adds to the residual stream at each position.

    |silu(x · gate_j) (x · up_j)| · ‖down_j‖, a length in the residual's unit. The activation alone
    has no scale: doubling `up_j` and halving `down_j` changes nothing that the layer does.

    Args:
      inputs: what the layer's projections read, a position a row.
    """
    x, gate, up, down = (np.asarray(array, np.float64) for array in (inputs, gate, up, down))
    gated = x @ gate
    silu = gated * 0.5 * (1 + np.tanh(gated / 2))  # gated · sigmoid, which does not overflow
    return np.abs(silu * (x @ up)) * np.linalg.norm(down, axis=1)[None]


def active_shares(lengths: Float[np.ndarray, "R F"]) -> Float[np.ndarray, "F"]:
    """The share of positions at which each unit does something.

    A unit does something at a position where its length there (see `contributions`) is above
    NEGLIGIBLE times the root mean square of all lengths, over positions and units. NaN where they
    are not all finite; 0 for every unit where all are zero.
    """
    if not np.isfinite(lengths).all():
        return np.full(lengths.shape[1], np.nan)
    # Scaled first: squares of small values would vanish.
    scaled = lengths / (lengths.max() or 1.0)
    return np.mean(scaled > NEGLIGIBLE * np.sqrt(np.mean(scaled**2)), axis=0)


def dead(shares: Float[np.ndarray, "F"]) -> Bool[np.ndarray, "F"]:
    """Units that (nearly) never do something: at no more than NEARLY of the positions."""
    return shares <= NEARLY


def always(shares: Float[np.ndarray, "F"]) -> Bool[np.ndarray, "F"]:
    """Units that (nearly) always do something: at 1 − NEARLY of the positions or more."""
    return shares >= 1 - NEARLY


def as_matrix(name: str, array: Shaped[np.ndarray, "*shape"]) -> np.ndarray | None:
    """A parameter as the matrix that its layer multiplies by; None for vectors and scalars.

    Kernels are [in, out]. Axes of heads belong to the side that they widen: [D, N, H] is read as
    D × NH, and `o_proj`, [N, H, D], as NH × D.
    """
    if array.ndim < 2:
        return None
    if name.rpartition(".")[2] == "o_proj":
        return array.reshape(-1, array.shape[-1])
    return array.reshape(len(array), -1)
