"""Losses on pairs of which one was preferred. Argument order: (chosen, rejected)."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from minilm.losses.checks import check_shape, check_shares


def bradley_terry(
    chosen: Float[Array, "*batch"],
    rejected: Float[Array, "*batch"],
    *,
    label: Float[Array, "*batch"] | float = 1.0,
) -> Float32[Array, "*batch"]:
    """Pairwise logistic: pays for scoring the rejected completion near or above the chosen one.

    L = −y log σ(Δ) − (1 − y) log σ(−Δ);  Δ = chosen − rejected

    Its minimiser is the Δ with σ(Δ) = y, its minimum the entropy of y: a vote shared 4 to 1 asks
    for a margin of log 4, not for as much as there is. A constant added to both scores costs
    nothing. Convex in the scores.

    Use: to learn a reward from comparisons.
    Rewards: margins that equal the log-odds of the votes.
    Ignores: the level of the scores; why raters prefer: length or form will do, where it predicts
      their votes.

    Args:
      chosen, rejected: scores, in nats of log-odds.
      label: share of the votes that went to `chosen`, in [0, 1].
    Returns:
      Nats per pair; at least 0.
    Raises:
      UserError: shapes differ.
    Reference:
      Bradley and Terry (1952), Rank Analysis of Incomplete Block Designs, Biometrika 39; as a
      reward model's loss in Ouyang et al. (2022), arXiv:2203.02155, eq. 1.

    >>> print(bradley_terry(jnp.array([0.0, 1e4]), jnp.array([0.0, 0.0])).round(4))
    [0.6931 0.    ]
    """
    check_shape("rejected", rejected, chosen.shape, "chosen")
    label = jnp.asarray(label)
    if label.ndim:
        check_shape("label", label, chosen.shape, "chosen")
    check_shares(label, "label")
    margins = chosen.astype(jnp.float32) - rejected.astype(jnp.float32)
    return optax.sigmoid_binary_cross_entropy(margins, jnp.asarray(label, jnp.float32))
