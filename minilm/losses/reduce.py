"""Reduction: everything averaged travels as a pair (total, count) until it is logged."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32


class Mean(NamedTuple):
    """A weighted sum and the sum of its weights.

    Pairs add exactly, so micro-batches, shards and padding change nothing; a mean of means would
    weigh a short batch like a long one.

    >>> a, b = Mean(jnp.array(6.0), jnp.array(2.0)), Mean(jnp.array(0.0), jnp.array(4.0))
    >>> float((a + b).value)
    1.0
    """

    total: Float[Array, ""]
    count: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """total / count; 0 where nothing was counted. A count of 0 wants reporting, not a NaN."""
        empty = self.count == 0
        # The inner `where` keeps 0 / 0 out of the gradient too.
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.count))

    def __add__(self, other: "Mean") -> "Mean":  # pyright: ignore[reportIncompatibleMethodOverride]
        """The mean over both; without this `+` would concatenate the tuples in silence."""
        return Mean(self.total + other.total, self.count + other.count)


def mean(
    values: Float[Array, "*batch"], weights: Float[Array, "*batch"] | Bool[Array, "*batch"]
) -> Mean:
    """Sum of `values` by `weights`, and the sum of the weights, both in float32.

    An element of weight 0 does not count, whatever it holds: an infinity computed on padding
    does not reach the total. `weights` may be a boolean mask.

    >>> mean(jnp.array([1.0, 3.0, jnp.inf]), jnp.array([1.0, 1.0, 0.0])).value.tolist()
    2.0
    """
    weights = weights.astype(jnp.float32)
    counted: Float32[Array, "*batch"] = jnp.where(weights == 0, 0.0, values.astype(jnp.float32))
    return Mean(jnp.sum(counted * weights), jnp.sum(weights))
