"""Optimizers and schedules from a config section; who gets Muon, who gets weight decay."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from minilm.choices import choose
from minilm.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then the named decay to `final_fraction * peak` at `steps`."""
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    final = config.final_fraction * peak
    last = max(round(rest * config.decay_fraction), 1)  # "wsd": steps of decay
    decays = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, last)], [rest - last]
        ),
    }
    decay = choose(decays, config.schedule, "optimizer.schedule")()
    if warmup == 0:
        return decay
    # The first step already moves: rate (k + 1) / (warmup + 1), never zero.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW or Muon. The tree may be an NNX Module itself.

    Weight decay and Muon are for the layers' matrices; embedding, heads and norms take Adam
    (Jordan et al. 2024), with Nesterov momentum as in `optax.contrib.muon`.
    """
    rate = schedule(config, steps, config.learning_rate)
    muon_rate = schedule(config, steps, config.muon_learning_rate)
    rows = {
        "adamw": lambda: optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_layer_matrix,
        ),
        "muon": lambda: optax.partition(
            {
                "muon": optax.chain(
                    optax.trace(0.95, nesterov=True),
                    optax.stateless(lambda trace, _: jax.tree.map(orthogonalized, trace)),
                    optax.add_decayed_weights(config.weight_decay),
                    optax.scale_by_learning_rate(muon_rate),
                ),
                "adam": optax.adamw(
                    rate,
                    b1=config.beta1,
                    b2=config.beta2,
                    eps=config.eps,
                    weight_decay=0.0,
                    nesterov=True,
                ),
            },
            lambda params: jax.tree.map(
                lambda matrix: "muon" if matrix else "adam", is_layer_matrix(params)
            ),
        ),
    }
    optimizer = choose(rows, config.name, "optimizer.name")()
    return _standard_promotion(optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer))


def is_layer_matrix(params):
    """A tree of booleans: True at the kernels of the layers (two dimensions, under `layers`)."""

    def decide(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return x.ndim == 2 and name.startswith("layers.")

    return jax.tree_util.tree_map_with_path(decide, params)


def orthogonalized(momentum: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Muon's update: nearly the nearest semi-orthogonal matrix, 0.2 √max(m, n) long in every
    direction, so that its entries are of the size that Adam's have.

    Five Newton-Schulz steps with the coefficients of Jordan et al. (2024), which end with singular
    values between 0.7 and 1.2; the length is eq. 4 of Liu et al. (2025), arXiv:2502.16982. Unrolled
    in float32: `optax.contrib.muon`, which loops, takes 1.7 times as long on CPU, and bfloat16 is
    no faster there (docs/log.md).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    rows, columns = momentum.shape
    x = momentum.T if rows > columns else momentum  # the smaller products
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return 0.2 * max(rows, columns) ** 0.5 * (x.T if rows > columns else x)


def _standard_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Optax's own updates mix weak types, which strict promotion (our tests) refuses."""

    def init(params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return inner.init(params)

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def global_norm(tree) -> jax.Array:
    """Euclidean norm of all leaves together, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def norms_by_layer(tree) -> dict[str, jax.Array]:
    """Euclidean norms, float32, of `embed_tokens`, `layers.0`, … , `norm` and the heads."""
    groups: dict[str, list[jax.Array]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        groups.setdefault(".".join(parts[: 2 if parts[0] == "layers" else 1]), []).append(x)
    return {name: global_norm(leaves) for name, leaves in groups.items()}


def relative_norms(updates, params) -> dict[str, jax.Array]:
    """‖update‖ / ‖parameters‖, layer by layer; 0 where the parameters are zero."""
    moved, sizes = norms_by_layer(updates), norms_by_layer(params)
    return {
        name: jnp.where(size > 0, moved[name] / jnp.maximum(size, 1e-30), 0.0)
        for name, size in sizes.items()
    }


def moving_average(average, params, decay: float, step):
    """The exponential moving average of the parameters after update number `step` (from 0).

    A decay of min(decay, (1 + k) / (10 + k)) at update k forgets the start: the rule of
    TensorFlow's ExponentialMovingAverage. Polyak and Juditsky (1992) is the reason to average.
    """
    k = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1 + k) / (10 + k))
    return jax.tree.map(lambda a, x: (kept * a + (1 - kept) * x).astype(a.dtype), average, params)
