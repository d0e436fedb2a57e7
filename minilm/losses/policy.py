"""Policy-gradient losses, one per sampled token, to be minimised.

Argument order: (logprobs, old_logprobs, advantages): log-probabilities of the sampled tokens under
the policy that is trained and at the rollout, and how much better than expected these were.
Gradients reach the first argument only: what was recorded at the rollout is a constant.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from minilm.losses.checks import check_shape

PerToken = Float[Array, "*batch"]
Loss = Float32[Array, "*batch"]

# exp of a larger log-ratio would overflow to infinity, and infinity times 0 to NaN. A token whose
# probability rose e^20-fold says that the update is broken, not how far to step; verl bounds it at
# the same place.
MAX_LOG_RATIO = 20.0


def clipped_surrogate(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Loss:
    """PPO: pays for likelier tokens of positive advantage, but no further than the clip.

    L = −min(r A, clip(r, 1 − ε, 1 + ε') A);  r = exp(logprobs − old_logprobs)

    A token that has already moved past the clip in the direction of its advantage has no gradient.

    Use: to take several updates from one rollout (PPO, GRPO).
    Rewards: likelier tokens of positive advantage, unlikelier ones of negative, by a bounded step.
    Ignores: what the advantage leaves out: a flaw of the reward is learned like a virtue; how far
      the policy is from the reference.

    Args:
      logprobs, old_logprobs, advantages: per sampled token.
      clip: ε, above 0.
      clip_high: ε', how far a token may become likelier; None: ε. A larger one lets rare tokens
        gain, whose probability a ratio of 1 + ε hardly moves.
    Returns:
      Loss per token, in the unit of the advantages.
    Raises:
      UserError: shapes differ.
    Reference:
      Schulman et al. (2017), Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7;
      ε' in Yu et al. (2025), DAPO, arXiv:2503.14476, section 3.1.

    >>> logprobs = jnp.array([1.0, 0.0])
    >>> print(clipped_surrogate(logprobs, jnp.zeros(2), jnp.ones(2), clip=0.5))
    [-1.5 -1. ]
    """
    ratio, gain = _ratio(logprobs, old_logprobs), _constant(advantages, "advantages", logprobs)
    high = clip if clip_high is None else clip_high
    return -jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + high) * gain)


def policy_gradient(logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken) -> Loss:
    """REINFORCE: pays for likelier tokens of positive advantage, weighted by importance.

    L = −r A;  r = exp(logprobs − old_logprobs)

    At r = 1 its gradient is −A ∇ log π, that of REINFORCE; the ratio corrects for a policy that has
    moved since the rollout.

    Use: for one update a rollout (RLOO).
    Rewards: likelier tokens of positive advantage, unlikelier ones of negative.
    Ignores: what the advantage leaves out: a flaw of the reward is learned like a virtue; how far
      a step goes.

    Args:
      logprobs, old_logprobs, advantages: per sampled token.
    Returns:
      Loss per token, in the unit of the advantages.
    Raises:
      UserError: shapes differ.
    Reference:
      Williams (1992), Simple Statistical Gradient-Following Algorithms, Machine Learning 8;
      for language models Ahmadian et al. (2024), arXiv:2402.14740.

    >>> policy_gradient(jnp.zeros(2), jnp.zeros(2), jnp.array([2.0, -1.0])).tolist()
    [-2.0, 1.0]
    """
    return -_ratio(logprobs, old_logprobs) * _constant(advantages, "advantages", logprobs)


def kl_estimate(
    logprobs: PerToken, ref_logprobs: PerToken, *, estimator: Literal["k1", "k2", "k3"]
) -> Loss:
    """KL(policy ‖ reference) from sampled tokens alone: pays for leaving the reference.

    k1 = −log r,  k2 = (log r)² / 2,  k3 = r − 1 − log r;  log r = ref_logprobs − logprobs

    On tokens sampled from the policy:
    k1 is unbiased, of either sign, of large variance;
    k2 is biased, never negative, and its gradient that of the KL between next tokens;
    k3 is unbiased, never negative, of small variance near the reference; its gradient is that of
    KL(reference ‖ policy) between next tokens, at most 1 in a token's log-probability.
    The gradient of k1 is 0 on average, so it is a penalty inside a reward, never a loss.

    Use: as a leash to a reference model of which only the sampled tokens' log-probabilities are
      known; k3 as a loss, k1 inside a reward.
    Rewards: staying near the reference on the tokens that the policy samples.
    Ignores: tokens that were not sampled; whether leaving the reference would be better.

    Args:
      logprobs: of the sampled tokens under the policy.
      ref_logprobs: of the same tokens under the reference; a constant.
      estimator: which of the three.
    Returns:
      Nats per token (k3 bounds r at e^20).
    Raises:
      UserError: shapes differ.
      ValueError: an unknown estimator.
    Reference:
      Schulman (2020), Approximating KL Divergence, joschu.net/blog/kl-approx.html; k3 as a loss
      in Shao et al. (2024), arXiv:2402.03300, eq. 4.

    >>> kl_estimate(jnp.array([-1.0]), jnp.array([-2.0]), estimator="k1").tolist()
    [1.0]
    """
    log_ratio = _constant(ref_logprobs, "ref_logprobs", logprobs) - logprobs.astype(jnp.float32)
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

    L = ½ max((v − R)², (v_c − R)²);  v_c = v_old + clip(v − v_old, −ε, ε)

    Use: for the critic of PPO.
    Rewards: predicting the mean return of what the policy does now.
    Ignores: returns beyond the clip in one update; whether the return is worth having.

    Args:
      values, old_values: the critic's predictions, now and at the rollout.
      returns: what it should have predicted.
      clip: ε, in the unit of the returns, above 0.
    Returns:
      Loss per token, in the squared unit of the returns; at least 0.
    Raises:
      UserError: shapes differ.
    Reference:
      Huang et al. (2022), The 37 Implementation Details of PPO, detail 9, after OpenAI Baselines.

    >>> print(clipped_value_loss(jnp.array([1.0]), jnp.zeros(1), jnp.ones(1), clip=0.5))
    [0.125]
    """
    old_values = _constant(old_values, "old_values", values)
    returns = _constant(returns, "returns", values)
    values = values.astype(jnp.float32)
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
    old = _constant(old_logprobs, "old_logprobs", logprobs)
    return jnp.exp(jnp.minimum(logprobs.astype(jnp.float32) - old, MAX_LOG_RATIO))


def _constant(x: PerToken, name: str, like: PerToken) -> Loss:
    """What was recorded, in float32, one for each of `like`."""
    check_shape(name, x, like.shape, "what is trained")
    return jax.lax.stop_gradient(x.astype(jnp.float32))
