"""Policy-gradient losses, one per sampled token, to be minimised.

Argument order: (logprobs, old_logprobs, advantages): log-probabilities of the sampled tokens under
the policy that is trained and at the rollout, and how much better than expected these were.
Gradients reach the first argument only: what was recorded at the rollout is a constant.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

PerToken = Float[Array, "*batch"]
Loss = Float32[Array, "*batch"]

# exp of a larger log-ratio would overflow to infinity, and infinity times 0 to NaN. A token whose
# probability rose e^20-fold says that the update is broken, not how far to step; verl bounds it at
# the same place.
MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, *, clip: float = 0.2
) -> Loss:
    """PPO: pays for likelier tokens of positive advantage, but no further than the clip.

    L = −min(r A, clip(r, 1 − ε, 1 + ε) A), r = exp(logprobs − old_logprobs). A token that has
    already moved past the clip in the direction of its advantage has no gradient.

    Args:
      clip: ε, above 0.
    Returns:
      Loss per token, in the unit of the advantages.
    Reference:
      Schulman et al. (2017), Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7.

    >>> logprobs = jnp.array([1.0, 0.0])
    >>> print(clipped_surrogate(logprobs, jnp.zeros(2), jnp.ones(2), clip=0.5))
    [-1.5 -1. ]
    """
    ratio = _ratio(logprobs, old_logprobs)
    gain = _constant(advantages)
    return -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)


def policy_gradient(logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken) -> Loss:
    """REINFORCE: pays for likelier tokens of positive advantage, weighted by importance.

    L = −r A, r = exp(logprobs − old_logprobs). At r = 1 its gradient is −A ∇ log π, that of
    REINFORCE; the ratio corrects for a policy that has moved since the rollout.

    Args:
      logprobs, old_logprobs, advantages: per sampled token.
    Returns:
      Loss per token, in the unit of the advantages.
    Reference:
      Williams (1992), Simple Statistical Gradient-Following Algorithms, Machine Learning 8;
      for language models Ahmadian et al. (2024), arXiv:2402.14740.

    >>> policy_gradient(jnp.zeros(2), jnp.zeros(2), jnp.array([2.0, -1.0])).tolist()
    [-2.0, 1.0]
    """
    return -_ratio(logprobs, old_logprobs) * _constant(advantages)


def kl_estimate(
    logprobs: PerToken, ref_logprobs: PerToken, *, estimator: Literal["k1", "k2", "k3"]
) -> Loss:
    """KL(policy ‖ reference) from sampled tokens alone: pays for leaving the reference.

    With log r = ref_logprobs − logprobs, on tokens sampled from the policy:
    k1 = −log r, unbiased, of either sign, large variance;
    k2 = (log r)² / 2, biased, at least 0, and its gradient is the KL's on average;
    k3 = r − 1 − log r, unbiased, at least 0, small variance near the reference.
    The gradient of k1 is 0 on average, so it is a penalty inside a reward, never a loss.

    Args:
      ref_logprobs: of the same tokens under the reference; a constant.
    Returns:
      Nats per token (k3 bounds r at e^20).
    Reference:
      Schulman (2020), Approximating KL Divergence, joschu.net/blog/kl-approx.html; k3 as a loss
      in Shao et al. (2024), arXiv:2402.03300, eq. 4.

    >>> kl_estimate(jnp.array([-1.0]), jnp.array([-2.0]), estimator="k1").tolist()
    [1.0]
    """
    log_ratio = _constant(ref_logprobs) - logprobs.astype(jnp.float32)
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio**2
        case "k3":
            log_ratio = jnp.minimum(log_ratio, MAX_LOG_RATIO)
            # expm1, since r − 1 cancels near the reference, where k3 is used.
            return jnp.expm1(log_ratio) - log_ratio
    raise ValueError(f"estimator must be one of 'k1', 'k2', 'k3', got {estimator!r}")


def clipped_value_loss(
    values: PerToken, old_values: PerToken, returns: PerToken, *, clip: float = 0.2
) -> Loss:
    """Value regression: pays the squared error, and grants no gain from a step past the clip.

    L = ½ max((v − R)², (v_c − R)²), v_c = v_old + clip(v − v_old, −ε, ε).

    Args:
      values, old_values: the critic's predictions, now and at the rollout.
      returns: what it should have predicted.
      clip: ε, in the unit of the returns, above 0.
    Returns:
      Loss per token, in the squared unit of the returns.
    Reference:
      Huang et al. (2022), The 37 Implementation Details of PPO, detail 9, after OpenAI Baselines.

    >>> print(clipped_value_loss(jnp.array([1.0]), jnp.zeros(1), jnp.ones(1), clip=0.5))
    [0.125]
    """
    values, old_values, returns = values.astype(jnp.float32), *map(_constant, (old_values, returns))
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (near - returns) ** 2)


def clip_fraction(logprobs: PerToken, old_logprobs: PerToken, *, clip: float = 0.2) -> Loss:
    """1 where the ratio has left [1 − clip, 1 + clip], else 0; its mean is the clip fraction.

    >>> clip_fraction(jnp.array([0.0, 1.0]), jnp.zeros(2)).tolist()
    [0.0, 1.0]
    """
    return (jnp.abs(_ratio(logprobs, old_logprobs) - 1) > clip).astype(jnp.float32)


def approx_kl(logprobs: PerToken, old_logprobs: PerToken) -> Loss:
    """How far the update has moved from the rollout: k2 in nats, TRL's `policy/approxkl_avg`.

    >>> approx_kl(jnp.array([2.0]), jnp.array([0.0])).tolist()
    [2.0]
    """
    return kl_estimate(logprobs, old_logprobs, estimator="k2")


def _ratio(logprobs: PerToken, old_logprobs: PerToken) -> Loss:
    """π / π_old, bounded at e^20."""
    log_ratio = logprobs.astype(jnp.float32) - _constant(old_logprobs)
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _constant(x: PerToken) -> Loss:
    return jax.lax.stop_gradient(x.astype(jnp.float32))
