"""An objective is a weighted sum of named terms; counts come from the batch alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm.losses.reduce import Mean

type Weight = float | Callable[[Any], Any]  # a number, or a schedule: optimizer step -> number


class Term(NamedTuple):
    """One loss applied to a model's outputs.

    Attributes:
      weight: in the objective; a term of weight 0 is only watched.
      values: (outputs, batch) -> per-element loss.
      over: (batch) -> the elements' weights, of the same shape. They depend on the batch alone, so
        accumulation, sharding and padding leave the objective as it is.
    """

    name: str
    weight: Weight
    values: Callable[[Any, Any], Float[Array, "..."]]
    over: Callable[[Any], Float[Array, "..."]]


class Penalty(NamedTuple):
    """A loss of the parameters alone, the same for every batch."""

    name: str
    weight: Weight
    value: Callable[[Any], Float[Array, ""]]  # (model) -> loss


class Objective(NamedTuple):
    """Σ weight · total / count over the terms that are trained; an empty term is 0."""

    terms: tuple[Term, ...]
    penalties: tuple[Penalty, ...] = ()

    @property
    def trained(self) -> dict[str, Weight]:
        """Names and weights of what the gradient sees, in order."""
        parts = (*self.terms, *self.penalties)
        return {p.name: p.weight for p in parts if callable(p.weight) or p.weight != 0}

    def weights(self, step: Any) -> Float[Array, "N"]:
        """The trained terms' weights at an optimizer step, float32."""
        found = [w(step) if callable(w) else w for w in self.trained.values()]
        return jnp.stack([jnp.asarray(w, jnp.float32) for w in found])

    def counts(self, batch) -> dict[str, Float[Array, ""]]:
        """The denominators, over the whole batch."""
        found = {t.name: jnp.sum(t.over(batch).astype(jnp.float32)) for t in self.terms}
        return found | {p.name: jnp.float32(1) for p in self.penalties}

    def totals(self, outputs, batch) -> dict[str, Float[Array, ""]]:
        """The numerators of the terms, over a batch or a part of one."""
        return {
            t.name: jnp.sum(jnp.where(w > 0, t.values(outputs, batch).astype(jnp.float32) * w, 0.0))
            for t in self.terms
            for w in [t.over(batch).astype(jnp.float32)]
        }

    def penalty_totals(self, model) -> dict[str, Float[Array, ""]]:
        """The numerators of the penalties."""
        return {p.name: p.value(model).astype(jnp.float32) for p in self.penalties}

    def losses(self, totals: dict, counts: dict) -> Float[Array, "N"]:
        """What each trained term pays, unweighted, in the order of `trained`."""
        return jnp.stack([totals[n] / jnp.maximum(counts[n], 1e-6) for n in self.trained])

    def loss(self, totals: dict, counts: dict, step: Any = 0) -> Float[Array, ""]:
        """The weighted sum."""
        return jnp.sum(self.weights(step) * self.losses(totals, counts))

    def means(self, totals: dict, counts: dict) -> dict[str, Mean]:
        return {name: Mean(total, counts[name]) for name, total in totals.items()}
