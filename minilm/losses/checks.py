"""Checks of what a user hands to a loss, before broadcasting or NaN hides what was wrong with it.

Shapes are always checked. Values are checked only where there are any: under `jax.jit` an array has
none yet, and a loss then does what its docstring says.
"""

import jax
import numpy as np
from jax.core import Tracer

from minilm.errors import UserError

type Values = jax.Array | np.ndarray


def check_option(name: str, value: float, holds: bool, allowed: str) -> None:
    """Refuses an option for which `holds` is false.

    >>> check_option("quantile", 1.5, 0 < 1.5 < 1, "between 0 and 1")
    Traceback (most recent call last):
        ...
    minilm.errors.UserError: quantile: out of range
      value: 1.5
      allowed: between 0 and 1
    """
    if not holds:
        raise UserError("out of range", where=name, value=value, allowed=allowed)


def check_shape(name: str, values: Values, shape: tuple[int, ...], of: str) -> None:
    """Refuses an array of another shape than `shape`, which `of` asks for.

    (3,) against (3, 1) would otherwise give nine losses in silence.

    >>> check_shape("targets", np.zeros((3, 1)), (3,), "predictions")
    Traceback (most recent call last):
        ...
    minilm.errors.UserError: targets: shape does not fit that of predictions
      value: (3, 1)
      allowed: (3,)
    """
    if values.shape != shape:
        problem = f"shape does not fit that of {of}"
        raise UserError(problem, where=name, value=values.shape, allowed=str(shape))


def check_finite(values: Values, name: str) -> None:
    """Refuses NaN and infinity.

    Raises:
      UserError: how many there are, and the index of the first.

    >>> check_finite(np.array([1.0, np.nan]), "targets")
    Traceback (most recent call last):
        ...
    minilm.errors.UserError: targets: 1 of 2 values not finite, the first at index (1,)
      value: nan
      hint: what does not count needs a valid value too, and the weight 0
    """
    if known(values):
        _refuse(values, ~np.isfinite(np.asarray(values)), name, "not finite")


def check_labels(labels: Values, classes: int, name: str = "labels") -> None:
    """Refuses class indices outside [0, classes).

    Raises:
      UserError: how many there are, and the index of the first.

    >>> check_labels(np.array([0, 3, 2]), 3)
    Traceback (most recent call last):
        ...
    minilm.errors.UserError: labels: 1 of 3 values not in 0 … 2, the first at index (1,)
      value: 3
      hint: what does not count needs a valid value too, and the weight 0
    """
    if known(labels):
        x = np.asarray(labels)
        _refuse(labels, (x < 0) | (x >= classes), name, f"not in 0 … {classes - 1}")


def check_shares(values: Values, name: str) -> None:
    """Refuses what is not between 0 and 1, such as labels of −1 and 1."""
    if known(values):
        x = np.asarray(values, np.float64)
        _refuse(values, ~((x >= 0) & (x <= 1)), name, "not between 0 and 1")


def check_distributions(values: Values, name: str) -> None:
    """Refuses rows along the last axis that are no distributions: negative, or not of sum 1.

    The sum may be off by as much as bfloat16 rounds.
    """
    check_shares(values, name)
    if known(values):
        sums = np.asarray(values, np.float64).sum(-1)
        _refuse(np.asarray(sums), abs(sums - 1) > 0.02, f"sum of {name}", "not 1")


def check_nonnegative(values: Values, name: str) -> None:
    """Refuses NaN, infinity and what is below 0."""
    check_finite(values, name)
    if known(values):
        _refuse(values, np.asarray(values) < 0, name, "negative")


def check_weights(weights: Values, name: str = "weights") -> None:
    """Refuses weights that are negative or not finite, and those that weigh nothing at all.

    >>> check_weights(np.zeros(3))
    Traceback (most recent call last):
        ...
    minilm.errors.UserError: weights: sum to zero, so nothing would count
    """
    check_nonnegative(weights, name)
    if known(weights) and not np.asarray(weights).any():
        raise UserError("sum to zero, so nothing would count", where=name)


def known(values: Values) -> bool:
    """Whether values can be read: not under `jax.jit`, nor where their gradient is taken."""
    return not isinstance(values, Tracer)


def _refuse(values: Values, wrong: np.ndarray | np.bool, name: str, what: str) -> None:
    """Raises where any element is wrong."""
    if not wrong.any():
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    value = np.asarray(values)[first]
    raise UserError(
        f"{wrong.sum()} of {wrong.size} values {what}, the first at index {first}",
        where=name,
        value=int(value) if value.dtype.kind in "iu" else float(value),
        hint="what does not count needs a valid value too, and the weight 0",
    )
