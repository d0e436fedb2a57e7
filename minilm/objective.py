"""An objective is a weighted sum of named terms; counts come from the batch alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm.losses.reduce import Mean


class Term(NamedTuple):
    """One loss applied to a model's outputs.

    Attributes:
      weight: in the objective; a term of weight 0 is only watched.
      values: (outputs, batch) -> per-element loss.
      over: (batch) -> the elements' weights, of the same shape. They depend on the batch alone, so
        accumulation, sharding and padding leave the objective as it is.
    """

    name: str
    weight: float
    values: Callable[[Any, Any], Float[Array, "..."]]
    over: Callable[[Any], Float[Array, "..."]]


class Objective(NamedTuple):
    terms: tuple[Term, ...]

    def counts(self, batch) -> dict[str, Float[Array, ""]]:
        """The denominators, over the whole batch."""
        return {t.name: jnp.sum(t.over(batch).astype(jnp.float32)) for t in self.terms}

    def totals(self, outputs, batch) -> dict[str, Float[Array, ""]]:
        """The numerators, over a batch or a part of one."""
        return {
            t.name: jnp.sum(jnp.where(w > 0, t.values(outputs, batch).astype(jnp.float32) * w, 0.0))
            for t in self.terms
            for w in [t.over(batch).astype(jnp.float32)]
        }

    def loss(self, totals: dict, counts: dict) -> Float[Array, ""]:
        """Σ weight · total / count over the terms that are trained; an empty term is 0."""
        return sum(
            (
                t.weight * totals[t.name] / jnp.maximum(counts[t.name], 1e-6)
                for t in self.terms
                if t.weight
            ),
            start=jnp.float32(0),
        )

    def means(self, totals: dict, counts: dict) -> dict[str, Mean]:
        return {t.name: Mean(totals[t.name], counts[t.name]) for t in self.terms}
