"""Advantages: how much better than expected. Estimators, not losses; nothing here has a gradient.

Scores are one per sequence, rewards one per token. The completions of one prompt (a group) are
consecutive in the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from minilm.losses.reduce import mean


def generalized_advantages(
    rewards: Float[Array, "B R"],
    values: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float32[Array, "B R"], Float32[Array, "B R"]]:
    """GAE: from reward-to-go minus value (λ = 1, no bias) to the one-step error (λ = 0).

    A_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, with V = 0 after the last real token.

    Args:
      rewards: per token.
      values: the critic's prediction before each token.
      mask: True on real tokens, which stand at the left; what lies on padding is never read.
      gamma: discount per token.
      lam: λ, the weight of later errors.
    Returns:
      (advantages, returns), returns = advantages + values the critic's target; both 0 on padding.
    Reference:
      Schulman et al. (2016), High-Dimensional Continuous Control Using Generalized Advantage
      Estimation, arXiv:1506.02438, eq. 16.

    >>> rewards, mask = jnp.array([[0.0, 1.0, 9.0]]), jnp.array([[True, True, False]])
    >>> advantages, returns = generalized_advantages(rewards, jnp.zeros((1, 3)), mask, lam=0.5)
    >>> advantages.tolist()
    [[0.5, 1.0, 0.0]]
    """
    rewards = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    # V after the last real token is 0, because padding is.
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def backward(later: Float32[Array, " B"], delta: Float32[Array, " B"]):
        advantage = delta + gamma * lam * later
        return advantage, advantage

    start = jnp.zeros_like(deltas[:, 0])
    _, advantages = jax.lax.scan(backward, start, deltas.T, reverse=True)
    return advantages.T, advantages.T + values


def leave_one_out(scores: Float[Array, " B"], *, group: int) -> Float32[Array, " B"]:
    """RLOO: each score minus the mean of the others in its group, an unbiased baseline.

    A_i = s_i − Σ_{j≠i} s_j / (G − 1) = (s_i − mean(s)) G / (G − 1). Sums to 0 in each group.

    Args:
      group: G, completions of a prompt; ValueError unless at least 2 and a divisor of B.
    Returns:
      One advantage per completion, in the unit of the scores.
    Reference:
      Ahmadian et al. (2024), Back to Basics, arXiv:2402.14740, after Kool et al. (2019).

    >>> leave_one_out(jnp.array([1.0, 3.0, 5.0, 5.0]), group=2).tolist()
    [-2.0, 2.0, 0.0, 0.0]
    """
    groups = _grouped(scores, group)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    return (centred * (group / (group - 1))).reshape(-1)


def group_z_score(scores: Float[Array, " B"], *, group: int) -> Float32[Array, " B"]:
    """GRPO: each score as standard deviations from its group's mean.

    A_i = (s_i − mean(s)) / (std(s) + 1e-4), std with G − 1, both as in TRL.
    A group of equal scores has advantage 0.

    Args:
      group: G, completions of a prompt; ValueError unless at least 2 and a divisor of B.
    Returns:
      One advantage per completion, without unit.
    Reference:
      Shao et al. (2024), DeepSeekMath, arXiv:2402.03300, section 4.1.2.

    >>> group_z_score(jnp.array([1.0, 2.0, 3.0, 5.0, 5.0, 5.0]), group=3).round(2).tolist()
    [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    """
    groups = _grouped(scores, group)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    return (centred / (jnp.std(groups, axis=1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def group_mean(scores: Float[Array, " B"], *, group: int) -> Float32[Array, " B"]:
    """Dr. GRPO: each score minus its group's mean, without division by the standard deviation.

    A_i = s_i − mean(s). The mean holds s_i itself, so the gradient is (G − 1)/G of the unbiased
    one: a smaller step in the right direction.

    Args:
      group: G, completions of a prompt; ValueError unless at least 2 and a divisor of B.
    Returns:
      One advantage per completion, in the unit of the scores.
    Reference:
      Liu et al. (2025), Understanding R1-Zero-Like Training, arXiv:2503.20783, section 3.2.

    >>> group_mean(jnp.array([1.0, 3.0, 5.0, 5.0]), group=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    groups = _grouped(scores, group)
    return (groups - jnp.mean(groups, axis=1, keepdims=True)).reshape(-1)


def best_of_group(scores: Float[Array, " B"], *, group: int) -> Float32[Array, " B"]:
    """Expert iteration: 1 for the highest score of each group, the first of equals, else 0.

    Args:
      group: G, completions of a prompt; ValueError unless at least 2 and a divisor of B.
    Returns:
      Which completions are learned from.
    Reference:
      Anthony et al. (2017), arXiv:1705.08439; for language models Havrilla et al. (2024),
      arXiv:2403.04642, section 3.

    >>> best_of_group(jnp.array([1.0, 3.0, 5.0, 5.0]), group=2).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    groups = _grouped(scores, group)
    best = jnp.argmax(groups, axis=1)[:, None]
    chosen = jnp.arange(group)[None, :] == best
    return chosen.astype(jnp.float32).reshape(-1)


def to_go(rewards: Float[Array, "B R"], *, gamma: float = 1.0) -> Float32[Array, "B R"]:
    """What is still to come from each token on: Σ_k γ^k r_{t+k}.

    >>> to_go(jnp.array([[1.0, 2.0, 4.0]]), gamma=0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """

    def backward(later: Float32[Array, " B"], reward: Float32[Array, " B"]):
        total = reward + gamma * later
        return total, total

    rewards = rewards.astype(jnp.float32)
    _, totals = jax.lax.scan(backward, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)
    return totals.T


def whiten(
    values: Float[Array, "*batch"], mask: Bool[Array, "*batch"], *, keep_mean: bool = False
) -> Float32[Array, "*batch"]:
    """Mean 0 and variance 1 over the real elements of the whole batch, as PPO takes advantages.

    (v − mean) / √(var + 1e-8), var with N. Elements under the mask do not count and come out as 0.
    With `keep_mean` the mean is added again, as PPO takes rewards.

    Reference:
      Ziegler et al. (2019), arXiv:1909.08593; `whiten` in openai/lm-human-preferences.

    >>> whiten(jnp.array([1.0, 3.0, 99.0]), jnp.array([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    middle = mean(values, mask).value
    centred = jnp.where(mask, values.astype(jnp.float32) - middle, 0.0)
    scaled = centred * jax.lax.rsqrt(mean(centred**2, mask).value + 1e-8)
    return jnp.where(mask, scaled + middle, 0.0) if keep_mean else scaled


def _grouped(scores: Float[Array, " B"], group: int) -> Float32[Array, "prompts group"]:
    if group < 2 or scores.shape[0] % group:
        raise ValueError(
            f"group must be at least 2 and divide the batch of {scores.shape[0]}, got {group}"
        )
    return scores.astype(jnp.float32).reshape(-1, group)
