"""One optimizer step as a function: state and batch to state and metrics, jitted and donated."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from minilm import backend, balance, parallel
from minilm.balance import balance_of
from minilm.config import BalanceConfig
from minilm.losses.reduce import Mean
from minilm.model import Transformer
from minilm.objective import Objective
from minilm.optim import global_norm, moving_average, norms_by_layer, relative_norms

AVERAGE = "average"  # its name in a state's `extra`, and so in checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that must resume.

    Attributes:
      step: updates made so far.
      extra: counters and coefficients that outlive a step: `skipped` (non-finite updates so far),
        `skipped_in_a_row`; the `average` of the model over its past, where one is asked for.
    """

    step: Any  # int32 []
    model: Any  # an nnx.Module
    opt_state: Any
    extra: dict[str, Any]

    @property
    def averaged(self) -> Any:
        """The model to judge and to keep: the average of its past, where one is kept."""
        return self.extra.get(AVERAGE, self.model)


def init_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    objective: Objective | None = None,
    balancing: BalanceConfig = BalanceConfig(),  # noqa: B008  frozen
    *,
    ema_decay: float = 0.0,
) -> TrainState:
    """A state that owns its arrays: the step donates them, so a shared model must be copied."""
    model = jax.tree.map(jnp.copy, model)
    extra: dict[str, Any] = {"skipped": jnp.int32(0), "skipped_in_a_row": jnp.int32(0)}
    if ema_decay:
        extra[AVERAGE] = jax.tree.map(jnp.copy, model)
    if objective is not None:
        extra |= balance.initial(balancing, len(objective.trained))
    opt_state = optimizer.init(cast(Any, model))  # Optax takes the Module as any pytree
    return TrainState(jnp.int32(0), model, opt_state, extra)


def make_gradients(
    forward: Callable[[Any, Any], Any], objective: Objective, accumulation: int = 1
) -> Callable[[Transformer, Any, Any], tuple[Array, dict, dict, list]]:
    """Gradients of weighted sums of an objective's terms.

    Args:
      accumulation: micro-batches, split off the leading axis; the gradient is that of the whole
        batch, since the terms' denominators are the whole batch's.
    Returns:
      (model, batch, directions [K, N]) -> (losses [N] of the trained terms, totals, counts, a
      gradient a direction); one row of weights a direction, so an identity matrix gives each
      term's own gradient. One forward pass, K backward ones.
    """

    def gradients(model, batch, directions):
        counts = objective.counts(batch)

        def part_of(part):
            def losses(model):
                totals = objective.totals(forward(model, part), part)
                penalties = objective.penalty_totals(model).items()
                totals |= {name: value / accumulation for name, value in penalties}
                return objective.losses(totals, counts), totals

            values, pull_back, totals = jax.vjp(losses, model, has_aux=True)
            return values, totals, [pull_back(direction)[0] for direction in directions]

        if accumulation == 1:
            values, totals, grads = part_of(batch)
            return values, totals, counts, grads
        # Part i has rows i, i + accumulation, …: each device keeps its own rows in each part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch
        )
        shapes = jax.eval_shape(part_of, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, part_of(part)), None

        (values, totals, grads), _ = jax.lax.scan(add, zeros, parts)
        return values, totals, counts, grads

    return gradients


def make_train_step(
    forward: Callable[[Any, Any], Any],
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    balancing: BalanceConfig = BalanceConfig(),  # noqa: B008  frozen
    ema_decay: float = 0.0,
    log_layers: bool = False,
    apart: Mapping[str, float] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Mean]]]:
    """One optimizer step as a jitted function that donates the state.

    Args:
      forward: (model, batch) -> outputs that the objective's terms read.
      accumulation: see `make_gradients`.
      balancing: a rule that adapts the terms' weights; its state is the one `init_state` made.
      ema_decay: of the average that `init_state` began, if not 0: see `moving_average`.
      log_layers: whether metrics hold the gradient's and the update's size, layer by layer.
      apart: trained terms whose gradients are taken by themselves, each clipped to so many times
        the length of the others' together; a single one at 1 or less never turns a step against
        those. Not with a `balancing` rule that reads norms.
      mesh: that the state lies on: see `minilm.parallel`.
    Returns:
      (state, batch) -> (state, metrics). A non-finite gradient changes nothing but the counters
      `skipped`; metrics hold every term, `loss`, `grad_norm`, `skipped_in_a_row`, `weight/TERM`
      where a weight moves, and `kept/TERM`, what clipping left of a gradient taken apart.
    Raises:
      ValueError: `apart` names what is not trained, or all that is, or comes with such a rule.
    """
    names = list(objective.trained)
    if apart and not set(apart) < set(names):
        raise ValueError(f"apart: {', '.join(apart)}, of the trained terms {', '.join(names)}")
    gradients, rule = make_gradients(forward, objective, accumulation), balance_of(balancing)
    if apart and rule.needs_norms:
        raise ValueError("a rule that reads each term's gradient does not go with `apart`")
    moving = balancing.method != "none" or any(map(callable, objective.trained.values()))

    def step(state: TrainState, batch):
        balanced = balance.stored(state.extra)
        weights = objective.weights(state.step) * rule.factors(balanced)
        directions = weights[None]
        if rule.needs_norms:  # then each term's own gradient too
            directions = jnp.concatenate([directions, jnp.diag(objective.weights(state.step))])
        if apart:  # the others' gradient first, then one for each of these
            own = jnp.asarray([[n == name for n in names] for name in apart], jnp.float32)
            others = 1 - jnp.sum(own, axis=0, keepdims=True)
            directions = weights[None] * jnp.concatenate([others, own])
        losses, totals, counts, (grads, *each) = gradients(state.model, batch, directions)
        kept_shares = {}
        if apart:
            grads, kept_shares = _joined(grads, dict(zip(apart, each, strict=True)), apart)
            each = []
        value, norm = jnp.sum(weights * losses), global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        kept = {AVERAGE: state.extra[AVERAGE]} if ema_decay else {}

        def update(model, opt_state, kept, grads):
            updates, opt_state = optimizer.update(grads, opt_state, model)
            moved = cast(Any, optax.apply_updates(model, updates))
            new = {n: moving_average(old, moved, ema_decay, state.step) for n, old in kept.items()}
            ratios = relative_norms(updates, model) if log_layers else {}
            return moved, opt_state, new, ratios

        def skip(model, opt_state, kept, grads):
            still = jax.tree.map(jnp.zeros_like, grads)
            return model, opt_state, kept, relative_norms(still, model) if log_layers else {}

        model, opt_state, kept, ratios = jax.lax.cond(
            finite, update, skip, state.model, state.opt_state, kept, grads
        )
        norms = jnp.stack([global_norm(g) for g in each]) if each else losses
        balanced_next = rule.update(balanced, losses, norms, balancing)
        missed = jnp.where(finite, 0, 1).astype(jnp.int32)
        in_a_row = jnp.where(finite, 0, state.extra["skipped_in_a_row"] + 1).astype(jnp.int32)
        extra = state.extra | {
            "skipped": state.extra["skipped"] + missed,
            "skipped_in_a_row": in_a_row,
            **kept,
        }
        for name, new in balanced_next.items():
            extra[f"balance/{name}"] = jnp.where(finite, new, balanced[name])
        one = jnp.float32(1)
        metrics = objective.means(totals, counts) | {
            "loss": Mean(value, one),
            "grad_norm": Mean(norm, one),
            "skipped_in_a_row": Mean(in_a_row.astype(jnp.float32), one),
        }
        if moving:
            named = zip(objective.trained, weights, strict=True)
            metrics |= {f"weight/{name}": Mean(weight, one) for name, weight in named}
        metrics |= {f"kept/{name}": Mean(share, one) for name, share in kept_shares.items()}
        if log_layers:
            sizes = {f"grad_norm/{n}": x for n, x in norms_by_layer(grads).items()}
            sizes |= {f"update_ratio/{n}": x for n, x in ratios.items()}
            metrics |= {name: Mean(size, one) for name, size in sizes.items()}
        after = TrainState(state.step + 1, model, opt_state, extra)
        return parallel.constrain(mesh, after), metrics

    return backend.keep(jax.jit(step, donate_argnums=0))


def _joined(grads: Any, each: Mapping[str, Any], longest: Mapping[str, float]) -> tuple[Any, dict]:
    """The sum of gradients, each of `each` cut to a multiple of the first's length; what is kept.

    A first of length 0 leaves nothing of the others.
    """
    limit, shares = global_norm(grads), {}
    for name, grad in each.items():
        share = jnp.minimum(1.0, longest[name] * limit / jnp.maximum(global_norm(grad), 1e-30))
        shares[name] = share
        grads = jax.tree.map(lambda g, x, s=share: g + s.astype(x.dtype) * x, grads, grad)
    return grads, shares
