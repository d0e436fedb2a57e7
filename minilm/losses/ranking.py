"""Losses on the order of a list. Argument order: (scores, relevance); one per list, in float32.

Lists of unequal length are padded; `mask` is true where an item is real, and what lies elsewhere
changes nothing. A list that asks no order, empty or of one item, is 0: give it the weight 0 in the
average. All but ListNet compare items by pairs: memory grows as L².
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Real

from minilm.losses.checks import check_nonnegative, check_option, check_shape
from minilm.losses.preference import bradley_terry

PerItem = Float[Array, "*batch L"]
Relevance = Real[Array, "*batch L"]
Mask = Bool[Array, "*batch L"]
PerList = Float32[Array, "*batch"]

# exp of it is 0, as of minus infinity, but 0 times it is 0 and not NaN.
NEVER = -1e30


def pairwise_logistic(
    scores: PerItem, relevance: Relevance, *, mask: Mask | None = None
) -> PerList:
    """RankNet: pays for scoring the less relevant of two items near or above the other.

    L(s, r) = mean over pairs with r_i > r_j of log(1 + exp(s_j − s_i))

    It is the Bradley–Terry loss of every pair that the list decides. Convex in the scores. A
    constant added to all scores of a list changes nothing.

    Use: where relevance comes as comparisons, or every inversion counts the same.
    Rewards: the right order of any two items, and then distance between them.
    Ignores: where in the list the inversion is; by how much more relevant one is than the other.

    Args:
      scores: s, in nats of log-odds.
      relevance: r, at least 0, higher is better; equal items are not compared.
      mask: true where an item is real; None for whole lists.
    Returns:
      Nats per pair, a mean for each list; at least 0.
    Raises:
      UserError: shapes differ; relevance that is negative or not finite (outside jit).
    Reference:
      Burges et al. (2005), Learning to Rank using Gradient Descent, ICML, section 3.

    >>> print(pairwise_logistic(jnp.array([[1.0, 1.0]]), jnp.array([[2, 0]])).round(4))
    [0.6931]
    """
    scores, relevance, mask = _prepare(scores, relevance, mask)
    margins = _margins(scores)
    return _mean_of_pairs(bradley_terry(margins, jnp.zeros_like(margins)), relevance, mask)


def pairwise_hinge(
    scores: PerItem, relevance: Relevance, *, margin: float = 1.0, mask: Mask | None = None
) -> PerList:
    """Pairwise hinge: pays for each unit that the more relevant of two items lacks to a margin.

    L(s, r) = mean over pairs with r_i > r_j of max(0, m − (s_i − s_j))

    Convex in the scores; pairs beyond the margin have no gradient. A constant added to all scores
    of a list changes nothing.

    Use: where a pair that is settled should not pull any more.
    Rewards: the right order of any two items, by the margin.
    Ignores: everything beyond the margin; where in the list the inversion is.

    Args:
      scores: s, in the unit of the margin.
      relevance: r, at least 0, higher is better; equal items are not compared.
      margin: m, above 0.
      mask: true where an item is real; None for whole lists.
    Returns:
      Loss per pair, in the unit of the scores, a mean for each list; at least 0.
    Raises:
      UserError: margin not above 0; shapes differ; relevance that is negative or not finite
        (outside jit).
    Reference:
      Herbrich, Graepel and Obermayer (2000), Large Margin Rank Boundaries for Ordinal Regression;
      Joachims (2002), Optimizing Search Engines using Clickthrough Data, KDD.

    >>> pairwise_hinge(jnp.array([[1.0, 0.5]]), jnp.array([[2, 0]])).tolist()
    [0.5]
    """
    check_option("margin", margin, 0 < margin < math.inf, "above 0, finite")
    scores, relevance, mask = _prepare(scores, relevance, mask)
    return _mean_of_pairs(jnp.maximum(0.0, margin - _margins(scores)), relevance, mask)


def listnet(scores: PerItem, relevance: Relevance, *, mask: Mask | None = None) -> PerList:
    """ListNet: pays the surprise, in nats, at which item comes first, as relevance would draw it.

    L(s, r) = −Σ_i q_i log p_i;  p = softmax(s), q = softmax(r)

    Its minimiser is s = r plus a constant, its minimum the entropy of q. Convex in the scores.

    Use: where differences in relevance are meant as log-odds of coming first; the cheapest here.
    Rewards: scores that differ as much as relevance does, at the top before all.
    Ignores: the order far down the list, where p and q are small.

    Args:
      scores: s, in nats.
      relevance: r, at least 0, higher is better; its scale matters.
      mask: true where an item is real; None for whole lists.
    Returns:
      Nats per list; at least 0.
    Raises:
      UserError: shapes differ; relevance that is negative or not finite (outside jit).
    Reference:
      Cao et al. (2007), Learning to Rank: From Pairwise Approach to Listwise Approach, ICML.

    >>> print(listnet(jnp.array([[0.0, 0.0]]), jnp.array([[1, 0]])).round(4))
    [0.6931]
    """
    scores, relevance, mask = _prepare(scores, relevance, mask)
    first = jax.nn.softmax(jnp.where(mask, relevance, NEVER))
    # Where no item is real the softmax is uniform, and nothing is first.
    first = jnp.where(mask, first, 0.0)
    return optax.softmax_cross_entropy(jnp.where(mask, scores, NEVER), first)


def listmle(scores: PerItem, relevance: Relevance, *, mask: Mask | None = None) -> PerList:
    """ListMLE: pays the surprise, in nats, at the whole order, drawn item by item from the top.

    L(s, r) = Σ_i [log(exp(s_i) + Σ_{j: r_j < r_i} exp(s_j)) − s_i]

    Without ties it is the negative log-likelihood of the order under Plackett and Luce; for two
    items it is RankNet. Equally relevant items are not compared. Convex in the scores. A constant
    added to all scores of a list changes nothing.

    Use: where whole orders were observed (races, rankings by people).
    Rewards: putting each item above all that are less relevant.
    Ignores: by how much more relevant one is than the other; that mistakes at the top matter more.

    Args:
      scores: s, log-strengths.
      relevance: r, at least 0, higher is better.
      mask: true where an item is real; None for whole lists.
    Returns:
      Nats per list, a sum over its items; at least 0.
    Raises:
      UserError: shapes differ; relevance that is negative or not finite (outside jit).
    Reference:
      Plackett (1975), The Analysis of Permutations, Applied Statistics 24(2); Xia et al. (2008),
      Listwise Approach to Learning to Rank: Theory and Algorithm, ICML.

    >>> print(listmle(jnp.zeros((1, 3)), jnp.array([[2, 1, 0]])).round(3))  # log 3!
    [1.792]
    """
    scores, relevance, mask = _prepare(scores, relevance, mask)
    itself = jnp.eye(scores.shape[-1], dtype=bool)
    left = _decided(relevance, mask) | jnp.broadcast_to(itself, (*scores.shape, scores.shape[-1]))
    # s_j − s_i rather than s_j, so that the item's own term is 0 and the sum at least 0.
    rivals = jnp.where(left, -_margins(scores), NEVER)
    return jnp.sum(jnp.where(mask, jax.nn.logsumexp(rivals, axis=-1), 0.0), axis=-1)


def approximate_ndcg(
    scores: PerItem, relevance: Relevance, *, temperature: float = 1.0, mask: Mask | None = None
) -> PerList:
    """Approximate NDCG: pays the share of the discounted gain that the order forgoes.

    L(s, r) = 1 − DCG / ideal DCG;  DCG = Σ_i (2^{r_i} − 1) / log₂(1 + rank_i)
    rank_i = 1 + Σ_{j ≠ i} σ((s_j − s_i) / T)

    As T → 0 it is 1 − NDCG, whose gradient is 0 almost everywhere. Not convex. A constant added to
    all scores of a list changes nothing.

    Use: where the list is read from the top; after a pairwise or listwise loss, as a finish.
    Rewards: the most relevant items at the very top.
    Ignores: the order of irrelevant items, and what happens far down; it is flat where scores
      differ by many T, be it the wrong way.

    Args:
      scores: s, in the unit of the temperature.
      relevance: r, at least 0 (below 0, under jit, counts as 0); one more doubles the gain.
      temperature: T, above 0.
      mask: true where an item is real; None for whole lists.
    Returns:
      Share per list, below 1; at least 0 up to rounding. 0 where nothing is relevant.
    Raises:
      UserError: temperature not above 0; shapes differ; relevance that is negative or not finite
        (outside jit).
    Reference:
      Järvelin and Kekäläinen (2002), Cumulated Gain-Based Evaluation of IR Techniques, TOIS 20(4);
      Qin, Liu and Li (2010), A General Approximation Framework for Direct Optimization of
      Information Retrieval Measures, Information Retrieval 13.

    >>> scores, relevance = jnp.array([[1e4, 0.0], [0.0, 1e4]]), jnp.array([[1, 0], [1, 0]])
    >>> print(approximate_ndcg(scores, relevance).round(4))  # 1 − 1 / log₂ 3
    [0.     0.3691]
    """
    check_option("temperature", temperature, 0 < temperature < math.inf, "above 0, finite")
    scores, relevance, mask = _prepare(scores, relevance, mask)
    above = jnp.where(mask[..., None, :], jax.nn.sigmoid(-_margins(scores) / temperature), 0.0)
    ranks = 0.5 + jnp.sum(above, axis=-1)  # an item is half above itself
    # Divided by the highest 2^r, which the ratio cancels: no relevance is too large.
    relevance = jnp.maximum(relevance, 0.0)
    top = jnp.max(relevance, axis=-1, keepdims=True)
    gains = jnp.exp2(relevance - top) - jnp.exp2(-top)
    positions = 1 + jax.lax.broadcasted_iota(jnp.float32, gains.shape, gains.ndim - 1)
    best = jnp.sum(jnp.sort(gains, axis=-1, descending=True) * _discount(positions), axis=-1)
    nothing = best == 0
    achieved = jnp.sum(jnp.where(mask, gains * _discount(ranks), 0.0), axis=-1)
    return jnp.where(nothing, 0.0, 1 - achieved / jnp.where(nothing, 1.0, best))


def _prepare(
    scores: PerItem, relevance: Relevance, mask: Mask | None
) -> tuple[Float32[Array, "*batch L"], Float32[Array, "*batch L"], Mask]:
    """Scores and relevance in float32, 0 where no item is; and the mask."""
    check_shape("relevance", relevance, scores.shape, "scores")
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    check_shape("mask", mask, scores.shape, "scores")
    relevance = jnp.where(mask, relevance.astype(jnp.float32), 0.0)
    check_nonnegative(relevance, "relevance")
    return jnp.where(mask, scores.astype(jnp.float32), 0.0), relevance, mask


def _margins(scores: Float32[Array, "*batch L"]) -> Float32[Array, "*batch L L"]:
    """s_i − s_j at [i, j]."""
    return scores[..., :, None] - scores[..., None, :]


def _decided(relevance: Float32[Array, "*batch L"], mask: Mask) -> Bool[Array, "*batch L L"]:
    """Whether i is more relevant than j, both real, at [i, j]."""
    both = mask[..., :, None] & mask[..., None, :]
    return both & (relevance[..., :, None] > relevance[..., None, :])


def _mean_of_pairs(
    values: Float32[Array, "*batch L L"], relevance: Float32[Array, "*batch L"], mask: Mask
) -> PerList:
    pairs = _decided(relevance, mask)
    counts = jnp.sum(pairs.astype(jnp.float32), axis=(-2, -1))
    return jnp.sum(jnp.where(pairs, values, 0.0), axis=(-2, -1)) / jnp.maximum(counts, 1.0)


def _discount(ranks: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return 1 / jnp.log2(1 + ranks)
