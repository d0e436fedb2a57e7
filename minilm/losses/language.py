"""Losses on next-token logits. Nats, float32 whatever the dtype of the logits, one per position."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int

from minilm.errors import UserError
from minilm.losses.checks import check_labels, check_option, check_shape

Logits = Float[Array, "*batch V"]
Tokens = Int[Array, "*batch"]
Loss = Float32[Array, "*batch"]


def next_token_cross_entropy(logits: Logits, labels: Tokens) -> Loss:
    """Cross-entropy: pays the surprise, in nats, at the token that came.

    L(x, y) = log Σ_v exp(x_v) − x_y

    Its minimiser is the conditional distribution of the next token, and its minimum the entropy of
    the text. Convex in the logits. Its gradient is softmax(x) less the one-hot label.

    Use: to pretrain, and to fine-tune on texts that are as they should be.
    Rewards: putting probability on the token that came, in proportion to how often it comes.
    Ignores: what a token means: a wrong name costs as much as a wrong article of the same
      probability; whether the text is good; anything after the next token.

    Args:
      logits: unnormalised log-probabilities.
      labels: the tokens that came, in [0, V), masked positions too (give those any valid token
        and weight 0: a label of V or more is NaN under jit).
    Returns:
      Nats per position; at least 0 up to rounding.
    Raises:
      UserError: shapes that do not fit; labels out of range (outside jit).
    Reference:
      Bengio et al. (2003), A Neural Probabilistic Language Model, JMLR 3, section 2.

    >>> print(next_token_cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4))
    [1.3863]
    """
    _check(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def token_logprobs(logits: Logits, tokens: Tokens) -> Loss:
    """Log-probability of each token, in nats: minus its cross-entropy.

    Where tokens were sampled at a temperature, pass the logits divided by it, in the rollout and in
    the update alike, or their ratio is not 1.

    >>> print(token_logprobs(jnp.zeros((1, 4)), jnp.array([2])).round(4))
    [-1.3863]
    """
    return -next_token_cross_entropy(logits, tokens)


def z_loss(logits: Logits) -> Loss:
    """z-loss: pays the square of the log-normaliser, which the cross-entropy leaves free.

    L(x) = log² Z;  Z = Σ_v exp(x_v)

    At its minimum, 0, the logits are log-probabilities. Not convex.

    Use: beside the cross-entropy, weight 1e-4, where logits drift off in low precision.
    Rewards: logits about log-probabilities in size.
    Ignores: which token came.

    Args:
      logits: unnormalised log-probabilities.
    Returns:
      Nats² per position; at least 0.
    Reference:
      Chowdhery et al. (2022), PaLM, arXiv:2204.02311, section 5.

    >>> print(z_loss(jnp.zeros((1, 4))).round(3))  # log² 4
    [1.922]
    """
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2


def unlikelihood(logits: Logits, labels: Tokens) -> Loss:
    """Unlikelihood: pays for the probability of a token that should not come.

    L(x, y) = −log(1 − p_y);  p = softmax(x)

    Nearly p_y where that is small, and without bound as it nears 1. Not convex.

    Use: beside the cross-entropy, against repetition and against what is known to be wrong.
    Rewards: any other token.
    Ignores: which token comes in its place; whether the token is wrong here or elsewhere.

    Args:
      logits: unnormalised log-probabilities of at least two tokens.
      labels: the unwanted tokens, in [0, V), masked positions too. Under jit one outside is taken
        for no token, and costs nothing.
    Returns:
      Nats per position; at least 0 up to rounding.
    Raises:
      UserError: one token only, which nothing could replace; shapes that do not fit; labels out of
        range (outside jit).
    Reference:
      Welleck et al. (2019), Neural Text Generation with Unlikelihood Training, arXiv:1908.04319,
      eq. 2.

    >>> print(unlikelihood(jnp.zeros((1, 4)), jnp.array([2])).round(4))  # −log ¾
    [0.2877]
    """
    _check(logits, labels)
    tokens = logits.shape[-1]
    if tokens < 2:
        raise UserError("needs at least two tokens", where="logits", value=logits.shape)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    # The others' probabilities, added up: 1 − p_y in float32 is 0 long before they are.
    others = ~jax.nn.one_hot(labels, tokens, dtype=bool)
    return -jax.nn.logsumexp(jnp.where(others, logprobs, -1e30), axis=-1)


def entropy(logits: Logits) -> Loss:
    """Entropy: pays for spread-out predictions; with a negative weight, for narrow ones.

    H(p) = −Σ_v p_v log p_v;  p = softmax(x)

    Use: with a negative weight, as a bonus for exploration in RLHF.
    Rewards: with a positive weight certainty, with a negative one variety of tokens.
    Ignores: what the tokens are; variety between whole texts.

    Args:
      logits: finite unnormalised log-probabilities.
    Returns:
      Nats per position, at most log V; at least 0 up to rounding.
    Reference:
      Williams and Peng (1991), Function Optimization using Connectionist Reinforcement Learning
      Algorithms, Connection Science 3(3): entropy as a bonus for exploration.

    >>> print(entropy(jnp.array([[0.0, 0.0], [1e4, 0.0]])).round(4))
    [0.6931 0.    ]
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(logprobs) * -logprobs, axis=-1)


def kl_divergence(logits: Logits, ref_logits: Logits) -> Loss:
    """Exact KL(p ‖ q) over the vocabulary: pays for leaving the reference q.

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v);  p = softmax(x), q = softmax(x_ref)

    Averaged over the policy's own samples and summed over a completion's tokens, it is an estimate
    of the KL of completions with less variance than any made of the sampled tokens'
    log-probabilities.

    Use: as a leash to a reference model, where its logits are at hand.
    Rewards: saying nothing that the reference would not.
    Ignores: what the reference says and p leaves out; whether leaving it would be better.

    Args:
      logits, ref_logits: finite unnormalised log-probabilities; gradients pass to both.
    Returns:
      Nats per position; at least 0 up to rounding.
    Raises:
      UserError: shapes differ.
    Reference:
      Kullback and Leibler (1951), On Information and Sufficiency, Ann. Math. Statist. 22(1).

    >>> print(kl_divergence(jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 0.0]])).round(4))
    [0.6931]
    """
    check_shape("ref_logits", ref_logits, logits.shape, "logits")
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    ref_logprobs = jax.nn.log_softmax(ref_logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(logprobs) * (logprobs - ref_logprobs), axis=-1)


def forward_kl(logits: Logits, teacher_logits: Logits) -> Loss:
    """Forward KL distillation: pays for missing what the teacher would say.

    L(x, x_T) = KL(p_T ‖ p) = Σ_v p_T,v (log p_T,v − log p_v)

    The cross-entropy to the teacher's distribution less its entropy, so its minimum is 0. Convex in
    the logits. Gradients reach the student only. To distil at a temperature divide both by it.

    Use: to copy a teacher as a whole; on texts of the teacher or of the data.
    Rewards: covering everything that the teacher finds probable.
    Ignores: probability on what the teacher would hardly say: a small student spreads over it.

    Args:
      logits, teacher_logits: finite unnormalised log-probabilities; the teacher's are a constant.
    Returns:
      Nats per position; at least 0 up to rounding.
    Raises:
      UserError: shapes differ.
    Reference:
      Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network,
      arXiv:1503.02531, section 2.

    >>> print(forward_kl(jnp.array([[0.0, 0.0]]), jnp.array([[50.0, 0.0]])).round(4))
    [0.6931]
    """
    return kl_divergence(jax.lax.stop_gradient(teacher_logits), logits)


def reverse_kl(logits: Logits, teacher_logits: Logits) -> Loss:
    """Reverse KL distillation: pays for saying what the teacher would not.

    L(x, x_T) = KL(p ‖ p_T) = Σ_v p_v (log p_v − log p_T,v)

    It is `kl_divergence` with a teacher that is a constant. Not convex. To distil at a temperature
    divide both by it.

    Use: on the student's own texts, where a small student shall be right rather than complete.
    Rewards: staying where the teacher finds a token probable, at one of its modes if need be.
    Ignores: what the teacher would also say.

    Args:
      logits, teacher_logits: finite unnormalised log-probabilities; the teacher's are a constant.
    Returns:
      Nats per position; at least 0 up to rounding.
    Raises:
      UserError: shapes differ.
    Reference:
      Gu et al. (2023), MiniLLM: Knowledge Distillation of Large Language Models, arXiv:2306.08543.

    >>> print(reverse_kl(jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 0.0]])).round(4))
    [0.6931]
    """
    return kl_divergence(logits, jax.lax.stop_gradient(teacher_logits))


def jensen_shannon(logits: Logits, teacher_logits: Logits, *, beta: float = 0.5) -> Loss:
    """Jensen–Shannon distillation: pays for being told apart from the teacher by a token.

    L(x, x_T) = β KL(p_T ‖ m) + (1 − β) KL(p ‖ m);  m = β p_T + (1 − β) p

    Divided by β it goes to the forward KL as β → 0, divided by 1 − β to the reverse KL as β → 1.
    Not convex. Gradients reach the student only.

    Use: between forward and reverse KL; where teacher and student may exclude each other's tokens.
    Rewards: agreeing with the teacher where either has much probability.
    Ignores: how impossible a token is to the other: it is bounded, and flat where they share
      nothing.

    Args:
      logits, teacher_logits: finite unnormalised log-probabilities; the teacher's are a constant.
      beta: β, in (0, 1), the teacher's share in m.
    Returns:
      Nats per position, at most the entropy of (β, 1 − β); at least 0 up to rounding.
    Raises:
      UserError: beta out of range; shapes differ.
    Reference:
      Lin (1991), Divergence Measures Based on the Shannon Entropy, IEEE Trans. Inf. Theory 37(1);
      for language models Agarwal et al. (2023), arXiv:2306.13649, eq. 1.

    >>> print(jensen_shannon(jnp.array([[1e4, 0.0]]), jnp.array([[0.0, 1e4]])).round(4))
    [0.6931]
    """
    check_option("beta", beta, 0 < beta < 1, "between 0 and 1, exclusive")
    check_shape("teacher_logits", teacher_logits, logits.shape, "logits")
    student = jax.nn.log_softmax(logits.astype(jnp.float32))
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits).astype(jnp.float32))
    middle = jnp.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    from_teacher = jnp.sum(jnp.exp(teacher) * (teacher - middle), axis=-1)
    from_student = jnp.sum(jnp.exp(student) * (student - middle), axis=-1)
    return beta * from_teacher + (1 - beta) * from_student


def _check(logits: Logits, labels: Tokens) -> None:
    check_shape("labels", labels, logits.shape[:-1], "logits without their vocabulary")
    check_labels(labels, logits.shape[-1])
