"""Losses on classes. Argument order: (logits, labels); one per example, in float32.

A class's weight belongs to the average, not to the loss: `mean(loss, weights[labels])`. There
`class_weights` or `normalize_class_weights` keep the mean weight of an example at 1, so that a
learning rate keeps its meaning.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int, Real

from minilm.losses.checks import (
    check_distributions,
    check_finite,
    check_labels,
    check_option,
    check_shape,
    check_shares,
    check_weights,
)

Loss = Float32[Array, "*batch"]


def binary_cross_entropy(
    logits: Float[Array, "*batch"],
    labels: Float[Array, "*batch"],
    *,
    positive_weight: float = 1.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """Binary cross-entropy: pays the surprise, in nats, at whether it was so.

    L(x, y) = −k y log σ(x) − (1 − y) log(1 − σ(x))

    With k = 1 its minimiser is the log-odds of the conditional probability of a positive; k adds
    log k to them, which is the threshold moved, not knowledge gained. Convex in the logits. Its
    gradient at k = 1 is σ(x) − y.

    Use: for yes or no, where the probability matters; for several labels at once, one logit each.
    Rewards: calibrated probabilities.
    Ignores: what an error costs; with rare positives almost all of it is about the negatives.

    Args:
      logits: x, log-odds of a positive.
      labels: y, 0 or 1, or the share of positives.
      positive_weight: k, above 0: what a positive counts beside a negative.
      label_smoothing: ε, in [0, 1): y becomes (1 − ε) y + ε / 2, so no logit has to be infinite.
    Returns:
      Nats per example (k = 1); at least 0.
    Raises:
      UserError: an option out of range; another shape of labels; labels outside [0, 1] (outside
        jit).
    Reference:
      Cox (1958), The Regression Analysis of Binary Sequences, JRSS B 20(2); weighted in King and
      Zeng (2001), Logistic Regression in Rare Events Data, Political Analysis 9(2).

    >>> print(binary_cross_entropy(jnp.array([0.0, 1e4]), jnp.array([1.0, 1.0])).round(4))
    [0.6931 0.    ]
    """
    holds = 0 < positive_weight < math.inf
    check_option("positive_weight", positive_weight, holds, "above 0, finite")
    _check_smoothing(label_smoothing)
    logits, labels = _binary(logits, labels)
    labels = (1 - label_smoothing) * labels + label_smoothing / 2
    loss = optax.sigmoid_binary_cross_entropy(logits, labels)
    return loss - (positive_weight - 1) * labels * jax.nn.log_sigmoid(logits)


def softmax_cross_entropy(
    logits: Float[Array, "*batch C"], labels: Int[Array, "*batch"], *, label_smoothing: float = 0.0
) -> Loss:
    """Softmax cross-entropy: pays the surprise, in nats, at the class that it was.

    L(x, y) = −(1 − ε) log p_y − ε / C Σ_c log p_c;  p = softmax(x)

    With ε = 0 its minimiser is the conditional distribution of the classes. Convex in the logits.
    Its gradient is p less the (smoothed) one-hot label.

    Use: for one of several classes, where the probabilities matter.
    Rewards: calibrated probabilities; with smoothing, none of them extreme.
    Ignores: which of the wrong classes got the rest, and what each error costs; rare classes, as
      far as they are rare.

    Args:
      logits: unnormalised log-probabilities.
      labels: class indices in [0, C), where the weight is 0 too. Under jit an index outside is
        taken for the nearest class.
      label_smoothing: ε, in [0, 1): the share of the label that is spread over all classes.
    Returns:
      Nats per example; at least 0 up to rounding.
    Raises:
      UserError: label_smoothing out of range; shapes that do not fit; labels out of range (outside
        jit).
    Reference:
      Bridle (1990), Training Stochastic Model Recognition Algorithms as Networks, NIPS 2; smoothing
      in Szegedy et al. (2016), arXiv:1512.00567, section 7.

    >>> print(softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).round(4))
    [1.3863]
    """
    _check_smoothing(label_smoothing)
    logits, labels = _classes(logits, labels)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing == 0:  # spares the second pass over the classes
        return loss
    to_uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    return (1 - label_smoothing) * loss + label_smoothing * to_uniform


def soft_cross_entropy(logits: Float[Array, "*batch C"], targets: Float[Array, "*batch C"]) -> Loss:
    """Soft cross-entropy: pays the surprise, in nats, expected under a given distribution.

    L(x, t) = −Σ_c t_c log p_c;  p = softmax(x)

    It is KL(t ‖ p) plus the entropy of t, so its minimiser is t, and its minimum not 0. Convex in
    the logits.

    Use: where labels are distributions: votes of several raters, mixed examples, a teacher.
    Rewards: matching every share of the target, the doubts too.
    Ignores: what each error costs; how many votes stand behind a share.

    Args:
      logits: unnormalised log-probabilities.
      targets: t, distributions over the classes; a share of 0 is fine.
    Returns:
      Nats per example; at least 0.
    Raises:
      UserError: another shape of targets; targets that are no distributions (outside jit).
    Reference:
      Hinton, Vinyals and Dean (2015), Distilling the Knowledge in a Neural Network,
      arXiv:1503.02531, section 2.

    >>> print(soft_cross_entropy(jnp.zeros((1, 2)), jnp.array([[0.8, 0.2]])).round(4))
    [0.6931]
    """
    check_shape("targets", targets, logits.shape, "logits")
    check_distributions(targets, "targets")
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets.astype(jnp.float32))


def focal(
    logits: Float[Array, "*batch"],
    labels: Float[Array, "*batch"],
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> Loss:
    """Focal loss: pays the surprise, the less the surer the model already is of the truth.

    L(x, y) = −α_y (1 − p_y)^γ log p_y;  p_1 = σ(x), p_0 = 1 − σ(x), α_1 = α, α_0 = 1 − α

    With γ = 0 and without α it is the binary cross-entropy. With γ > 0 its minimiser is less
    extreme than the log-odds, so its probabilities are not calibrated; their order is kept.

    Use: where easy negatives outnumber all else and only the order of the scores matters.
    Rewards: getting the hard examples less wrong.
    Ignores: how sure it is of the easy ones; calibration; a mislabelled example is a hard one.

    Args:
      logits: x, log-odds of a positive.
      labels: y, 0 or 1.
      gamma: γ, at least 0.
      alpha: α, in (0, 1): weight of the positives, of the negatives 1 − α; None weighs neither.
    Returns:
      Loss per example, in weighted nats; at least 0.
    Raises:
      UserError: an option out of range; another shape of labels; labels outside [0, 1] (outside
        jit).
    Reference:
      Lin et al. (2017), Focal Loss for Dense Object Detection, arXiv:1708.02002, eqs. 4 and 5.

    >>> print(focal(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0])).round(4))
    [0.1733 0.0018]
    """
    check_option("gamma", gamma, 0 <= gamma < math.inf, "at least 0, finite")
    if alpha is not None:
        check_option("alpha", alpha, 0 < alpha < 1, "between 0 and 1, exclusive, or None")
    return optax.sigmoid_focal_loss(*_binary(logits, labels), alpha=alpha, gamma=gamma)


def hinge(logits: Float[Array, "*batch"], labels: Float[Array, "*batch"]) -> Loss:
    """Hinge loss: pays for each unit that the score lacks to a margin of 1 on the right side.

    L(x, y) = max(0, 1 − (2 y − 1) x)

    Its minimiser is the sign of the majority, not a probability. Convex in the logits; examples
    beyond the margin have no gradient.

    Use: where only the decision matters.
    Rewards: the right side, by a margin of 1.
    Ignores: everything beyond the margin; how probable the other side is.

    Args:
      logits: x, the score; its sign decides.
      labels: y, 0 or 1.
    Returns:
      Loss per example; at least 0.
    Raises:
      UserError: another shape of labels; labels outside [0, 1] (outside jit).
    Reference:
      Cortes and Vapnik (1995), Support-Vector Networks, Machine Learning 20.

    >>> hinge(jnp.array([0.5, 3.0, 0.5]), jnp.array([1.0, 1.0, 0.0])).tolist()
    [0.5, 0.0, 1.5]
    """
    logits, labels = _binary(logits, labels)
    return optax.hinge_loss(logits, 2 * labels - 1)


def cost_sensitive(
    logits: Float[Array, "*batch C"], labels: Int[Array, "*batch"], costs: Float[Array, "C C"]
) -> Loss:
    """Expected cost: pays what the classes that it considers would cost, given the truth.

    L(x, y) = Σ_c p_c cost[y, c];  p = softmax(x)

    Its minimiser puts all probability on the class of least expected cost, so p is a decision and
    no longer a belief. It is not convex, and flat where the model is sure, be it wrong: begin from
    a model trained on the cross-entropy, or add that as a second term.

    Use: where the books say what each confusion costs.
    Rewards: the cheapest decision.
    Ignores: calibration; classes whose confusion costs the same.

    Args:
      logits: unnormalised log-probabilities of deciding for each class.
      labels: class indices in [0, C), where the weight is 0 too. Under jit an index outside is
        taken for the nearest class.
      costs: costs[truth, decision], finite; the diagonal is what being right costs, mostly 0.
    Returns:
      Cost per example, in the unit of the costs.
    Raises:
      UserError: shapes that do not fit; labels out of range or costs that are not finite (outside
        jit).
    Reference:
      Elkan (2001), The Foundations of Cost-Sensitive Learning, IJCAI, eq. 1.

    >>> costs = jnp.array([[0.0, 1.0], [1000.0, 0.0]])
    >>> cost_sensitive(jnp.zeros((2, 2)), jnp.array([0, 1]), costs).tolist()
    [0.5, 500.0]
    """
    logits, labels = _classes(logits, labels)
    classes = logits.shape[-1]
    check_shape("costs", costs, (classes, classes), "logits, which have so many classes")
    check_finite(costs, "costs")
    return jnp.sum(jax.nn.softmax(logits) * costs.astype(jnp.float32)[labels], axis=-1)


def ordinal(
    scores: Float[Array, "*batch"],
    labels: Int[Array, "*batch"],
    *,
    levels: int = 7,
    spacing: float = 1.0,
) -> Float32[Array, "*batch"]:
    """Ordinal regression: pays the surprise, in nats, at a grade on an ordered scale.

    L(s, y) = −log [σ(θ_y − s) − σ(θ_{y−1} − s)];  θ_j = spacing (j − (levels − 2) / 2)

    The score is where the thing stands on a line that thresholds cut into grades, the outermost
    open: how far apart two grades are is not asked. Convex in the scores.

    Use: where raters gave stars or a Likert scale, one answer at a time.
    Rewards: a score between the thresholds of its grade.
    Ignores: that raters use the scale differently, since the thresholds are the same for all.

    Args:
      scores: s, in nats of log-odds.
      labels: grades y in [0, levels). Under jit one outside is taken for the nearest.
      levels: grades, at least 2.
      spacing: between neighbouring thresholds, in nats.
    Returns:
      Nats per element; at least 0.
    Raises:
      UserError: an option or a label (outside jit) out of range; shapes differ.
    Reference:
      McCullagh (1980), Regression Models for Ordinal Data, JRSS B 42(2), section 2 (proportional
      odds), with thresholds that are given.

    >>> print(ordinal(jnp.array([0.0, 1.0]), jnp.array([0, 1]), levels=2).round(2))
    [0.69 0.31]
    """
    check_option("levels", float(levels), levels >= 2, "at least 2")
    check_option("spacing", spacing, 0 < spacing < math.inf, "above 0, finite")
    check_shape("labels", labels, scores.shape, "scores")
    check_labels(labels, levels)
    grades = jnp.clip(labels, 0, levels - 1).astype(jnp.float32)
    upper = spacing * (grades - (levels - 2) / 2) - scores.astype(jnp.float32)
    # σ(b) − σ(a) = σ(b) σ(−a) (1 − e^{a − b}), which does not cancel.
    below = jnp.where(grades == levels - 1, 0.0, jax.nn.log_sigmoid(upper))
    above = jnp.where(grades == 0, 0.0, jax.nn.log_sigmoid(spacing - upper))
    inner = (grades > 0) & (grades < levels - 1)
    return -(below + above + jnp.where(inner, math.log(-math.expm1(-spacing)), 0.0))


def class_weights(
    counts: Real[Array, "C"],
    *,
    method: Literal["inverse", "effective"] = "inverse",
    beta: float = 0.999,
) -> Float32[Array, "C"]:
    """Class weights: pays a class's examples the more the fewer there are, 1 on average.

    w_c ∝ 1 / n_c (inverse), or w_c ∝ (1 − β) / (1 − β^{n_c}) (effective);  Σ_c n_c w_c = Σ_c n_c

    Inverse frequency lets every class weigh the same as a whole. The effective number of examples
    grows to 1 / (1 − β) only, since new examples resemble old ones: β = 0 weighs all examples the
    same, β → 1 is inverse frequency.

    Use: where a rare class must not drown; the outputs are then no longer probabilities.
    Rewards: rare classes.
    Ignores: what an error costs, which is seldom 1 / frequency.

    Args:
      counts: n_c, examples of each class; a class without any is weighted as if it had one.
      method: inverse frequency or effective number.
      beta: β, in [0, 1), of the effective number.
    Returns:
      Weights, for `mean(loss, weights[labels])`; their mean over the examples is 1.
    Raises:
      UserError: beta out of range; counts that are negative, not finite or all 0 (outside jit).
    Reference:
      King and Zeng (2001), Logistic Regression in Rare Events Data, Political Analysis 9(2); Cui
      et al. (2019), Class-Balanced Loss Based on Effective Number of Samples, arXiv:1901.05555.

    >>> class_weights(jnp.array([1, 1, 4])).tolist()
    [2.0, 2.0, 0.5]
    """
    check_option("beta", beta, 0 <= beta < 1, "at least 0, below 1")
    check_weights(counts, "counts")
    present = jnp.maximum(counts.astype(jnp.float32), 1)
    match method:
        case "inverse":
            weights = 1 / present
        case "effective":
            # expm1, since 1 − β^n cancels for β near 1. β = 0 has no logarithm, and needs none.
            effective = -jnp.expm1(present * math.log(beta)) if beta else jnp.ones_like(present)
            weights = 1 / effective
        case _:
            raise ValueError(f"method must be one of 'inverse', 'effective', got {method!r}")
    return normalize_class_weights(weights, counts)


def normalize_class_weights(
    weights: Float[Array, "C"], counts: Real[Array, "C"]
) -> Float32[Array, "C"]:
    """Given class weights, scaled so that an example pays 1 on average.

    w'_c = w_c Σ n / Σ n w

    Args:
      weights: w_c, what each class counts beside the others.
      counts: n_c, examples of each class.
    Returns:
      Weights, for `mean(loss, weights[labels])`; all 1 where no class that occurs has any (in jit).
    Raises:
      UserError: shapes differ; weights or counts that are negative, not finite or all 0, or no
        class that occurs with a weight (outside jit).

    >>> normalize_class_weights(jnp.array([1.0, 3.0]), jnp.array([1, 1])).tolist()
    [0.5, 1.5]
    """
    check_shape("weights", weights, counts.shape, "counts")
    check_weights(weights)
    check_weights(counts, "counts")
    weights, counts = weights.astype(jnp.float32), counts.astype(jnp.float32)
    check_weights(weights * counts, "weights of the classes that occur")
    total = jnp.sum(weights * counts)
    empty = total == 0
    scaled = weights * jnp.sum(counts) / jnp.where(empty, 1.0, total)
    return jnp.where(empty, 1.0, scaled)


def _check_smoothing(label_smoothing: float) -> None:
    holds = 0 <= label_smoothing < 1
    check_option("label_smoothing", label_smoothing, holds, "at least 0, below 1")


def _binary(
    logits: Float[Array, "*batch"], labels: Float[Array, "*batch"]
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """Both in float32, of one shape, the labels in [0, 1]."""
    check_shape("labels", labels, logits.shape, "logits")
    check_shares(labels, "labels")
    return logits.astype(jnp.float32), labels.astype(jnp.float32)


def _classes(
    logits: Float[Array, "*batch C"], labels: Int[Array, "*batch"]
) -> tuple[Float32[Array, "*batch C"], Int[Array, "*batch"]]:
    """Logits in float32, and labels that are classes."""
    classes = logits.shape[-1]
    check_shape("labels", labels, logits.shape[:-1], "logits without their classes")
    check_labels(labels, classes)
    return logits.astype(jnp.float32), jnp.clip(labels, 0, classes - 1)
