"""Losses on next-token logits. Nats, float32 whatever the dtype of the logits, one per position."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int


def next_token_cross_entropy(
    logits: Float[Array, "*batch V"], labels: Int[Array, "*batch"]
) -> Float32[Array, "*batch"]:
    """Cross-entropy: pays the surprise, in nats, at the token that came.

    L(x, y) = log Σ_v exp(x_v) − x_y. Its minimiser is the conditional distribution of the next
    token, and its minimum the entropy of the text.

    Args:
      logits: unnormalised log-probabilities.
      labels: the tokens that came, in [0, V), masked positions too (give those any valid token
        and weight 0: a label of V or more is NaN).
    Returns:
      Nats per position.
    Reference:
      Bengio et al. (2003), A Neural Probabilistic Language Model, JMLR 3, section 2.

    >>> print(next_token_cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4))
    [1.3863]
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def token_logprobs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> Float32[Array, "*batch"]:
    """Log-probability of each token, in nats: minus its cross-entropy.

    Where tokens were sampled at a temperature, pass the logits divided by it, in the rollout and in
    the update alike, or their ratio is not 1.

    >>> print(token_logprobs(jnp.zeros((1, 4)), jnp.array([2])).round(4))
    [-1.3863]
    """
    return -next_token_cross_entropy(logits, tokens)


def entropy(logits: Float[Array, "*batch V"]) -> Float32[Array, "*batch"]:
    """Entropy: pays for spread-out predictions; with a negative weight, for narrow ones.

    H(p) = −Σ_v p_v log p_v, p = softmax(x).

    Args:
      logits: finite unnormalised log-probabilities.
    Returns:
      Nats per position, from 0 to log V.
    Reference:
      Williams and Peng (1991), Function Optimization using Connectionist Reinforcement Learning
      Algorithms, Connection Science 3(3): entropy as a bonus for exploration.

    >>> print(entropy(jnp.array([[0.0, 0.0], [1e4, 0.0]])).round(4))
    [0.6931 0.    ]
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(logprobs) * -logprobs, axis=-1)


def kl_divergence(
    logits: Float[Array, "*batch V"], ref_logits: Float[Array, "*batch V"]
) -> Float32[Array, "*batch"]:
    """Exact KL(p ‖ q) over the vocabulary: pays for leaving the reference q.

    KL = Σ_v p_v (log p_v − log q_v), p = softmax(x), q = softmax(x_ref). Averaged over the
    policy's own samples and summed over a completion's tokens, it is an estimate of the KL of
    completions with less variance than any made of the sampled tokens' log-probabilities.

    Args:
      logits, ref_logits: finite unnormalised log-probabilities; gradients pass to both.
    Returns:
      Nats per position, at least 0 up to rounding.
    Reference:
      Kullback and Leibler (1951), On Information and Sufficiency, Ann. Math. Statist. 22(1).

    >>> print(kl_divergence(jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 0.0]])).round(4))
    [0.6931]
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    ref_logprobs = jax.nn.log_softmax(ref_logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(logprobs) * (logprobs - ref_logprobs), axis=-1)
