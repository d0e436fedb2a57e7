"""An objective is a weighted sum of named terms; counts come from the batch alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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


class Chunked(NamedTuple):
    """Outputs that are too large to be there at once, such as a large vocabulary's logits.

    They are made, read by the terms and forgotten `size` positions at a time, and made again in
    the backward pass; so the terms have to be losses of single positions.

    Attributes:
      inputs: what they are made of, the positions first: [B, T, ...].
      head: (inputs [size, ...]) -> outputs [size, ...]
    """

    inputs: Float[Array, "B T *rest"]
    head: Callable[[Any], Any]
    size: int

    def totals(self, of: Callable[[Any, Any], dict], batch: Any) -> dict[str, Float[Array, ""]]:
        """Σ over chunks of `of(outputs, batch)`; the last is filled with positions of weight 0."""
        count = self.inputs.shape[0] * self.inputs.shape[1]
        chunks = -(-count // self.size)

        def cut(x):
            flat = jnp.asarray(x).reshape(count, *x.shape[2:])
            room = [(0, chunks * self.size - count)] + [(0, 0)] * (flat.ndim - 1)
            # Chunk i has positions i, i + chunks, …: each device keeps its own in each chunk.
            return jnp.pad(flat, room).reshape(self.size, chunks, *flat.shape[1:]).swapaxes(0, 1)

        @jax.checkpoint
        def one(inputs, part):
            return of(self.head(inputs), part)

        parts = jax.tree.map(cut, (self.inputs, batch))
        shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, one(*part)), None), zeros, parts
        )[0]


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
        if isinstance(outputs, Chunked):
            return outputs.totals(self.totals, batch)
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
