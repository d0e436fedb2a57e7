import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.errors import UserError
from minilm.losses.ranking import (
    approximate_ndcg,
    listmle,
    listnet,
    pairwise_hinge,
    pairwise_logistic,
)

seeds = st.integers(0, 2**32 - 1)
LOSSES = [pairwise_logistic, pairwise_hinge, listnet, listmle, approximate_ndcg]


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _lists(seed, items=5, levels=3):
    """Four lists, some items equally relevant, some missing."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((4, items)) * 2
    return scores, rng.integers(0, levels, (4, items)), rng.random((4, items)) < 0.8


def _each(reference, scores, relevance, mask):
    """A reference for one list, over what is real of each."""
    rows = zip(scores, relevance, mask, strict=True)
    return np.array([reference(list(s[m]), [int(x) for x in r[m]]) for s, r, m in rows])


def _pairs(s, r, price):
    """Mean price of the margins of all pairs with an order."""
    prices = [
        price(s[i] - s[j]) for i, j in itertools.permutations(range(len(s)), 2) if r[i] > r[j]
    ]
    return sum(prices) / len(prices) if prices else 0.0


def _logistic(s, r):
    return _pairs(s, r, lambda margin: math.log1p(math.exp(-margin)))


def _hinge(s, r):
    return _pairs(s, r, lambda margin: max(0.0, 1.0 - margin))


def _listnet(s, r):
    p = [math.exp(x) / sum(map(math.exp, s)) for x in s]
    q = [math.exp(x) / sum(map(math.exp, r)) for x in r]
    return -sum(b * math.log(a) for a, b in zip(p, q, strict=True))


def _listmle(s, r):
    loss = 0.0
    for i in range(len(s)):
        rivals = sum(math.exp(s[j]) for j in range(len(s)) if r[j] < r[i])
        loss -= math.log(math.exp(s[i]) / (math.exp(s[i]) + rivals))
    return loss


def _ndcg(s, r, temperature=1.0):
    if not any(r):
        return 0.0
    gained = 0.0
    for i in range(len(s)):
        above = [1 / (1 + math.exp((s[i] - x) / temperature)) for j, x in enumerate(s) if j != i]
        gained += (2 ** r[i] - 1) / math.log2(2 + sum(above))
    ideal = sum((2**x - 1) / math.log2(2 + k) for k, x in enumerate(sorted(r, reverse=True)))
    return 1 - gained / ideal


@pytest.mark.parametrize(
    ("loss", "reference"),
    list(zip(LOSSES, (_logistic, _hinge, _listnet, _listmle, _ndcg), strict=True)),
    ids=[loss.__name__ for loss in LOSSES],
)
def test_against_float64(loss, reference):
    compiled = jax.jit(lambda s, r, m: loss(s, r, mask=m))
    for seed in range(20):
        scores, relevance, mask = _lists(seed)
        out = compiled(_f32(scores), jnp.asarray(relevance), jnp.asarray(mask))
        expected = _each(reference, scores, relevance, mask)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_listmle_is_the_probability_of_the_order_under_plackett_and_luce():
    scores, relevance = np.array([0.3, -1.0, 0.8, 0.1]), np.array([1, 3, 0, 2])

    def probability(order):
        left, p = list(order), 1.0
        for item in order:
            p *= math.exp(scores[item]) / sum(math.exp(scores[j]) for j in left)
            left.remove(item)
        return p

    orders = list(itertools.permutations(range(4)))
    np.testing.assert_allclose(sum(map(probability, orders)), 1.0)
    observed = tuple(np.argsort(-relevance))
    loss = listmle(_f32(scores)[None], jnp.asarray(relevance)[None])
    np.testing.assert_allclose(loss, [-math.log(probability(observed))], rtol=1e-5)


def test_of_two_items_listmle_and_ranknet_are_bradley_terry():
    scores, relevance = _f32([[0.7, -0.4]]), jnp.array([[0, 1]])
    expected = [math.log1p(math.exp(0.7 + 0.4))]
    for loss in (listmle, pairwise_logistic):
        np.testing.assert_allclose(loss(scores, relevance), expected, rtol=1e-6)


def test_listnet_is_least_where_scores_are_the_relevance():
    relevance = _f32([[2.0, 0.0, 1.0]])
    loss, gradient = jax.value_and_grad(lambda s: listnet(s, relevance).sum())(relevance + 5)
    q = np.exp([2.0, 0.0, 1.0]) / np.exp([2.0, 0.0, 1.0]).sum()
    np.testing.assert_allclose(loss, -(q * np.log(q)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((1, 3)), atol=1e-6)


def test_a_cold_approximate_ndcg_is_one_less_ndcg():
    for seed in range(5):
        scores, relevance, _ = _lists(seed)
        relevance[:, 0] = 1  # something is relevant
        discounts = 1 / np.log2(np.arange(2, 7))
        achieved, ideal = (
            (2.0 ** np.take_along_axis(relevance, order, 1) - 1) @ discounts
            for order in (np.argsort(-scores), np.argsort(-relevance))
        )
        out = approximate_ndcg(_f32(scores), jnp.asarray(relevance), temperature=1e-3)
        np.testing.assert_allclose(out, 1 - achieved / ideal, atol=1e-4)


def test_approximate_ndcg_of_great_relevance_does_not_overflow():
    # 2^200 is no number in float32; the ratio is one.
    scores, relevance = _f32([[0.0, 5.0, 9.0]]), jnp.array([[200, 199, 0]])
    out = approximate_ndcg(scores, relevance, temperature=0.01)
    expected = 1 - (1 / math.log2(4) + 0.5 / math.log2(3)) / (1 + 0.5 / math.log2(3))
    np.testing.assert_allclose(out, [expected], rtol=1e-4)


@pytest.mark.parametrize(
    "loss", [pairwise_logistic, pairwise_hinge, listnet, listmle, approximate_ndcg]
)
def test_a_constant_added_to_the_scores_of_a_list_changes_nothing(loss):
    scores, relevance, mask = _lists(11)
    shift = _f32([[-8.0], [1.0], [4.0], [32.0]])
    moved = loss(_f32(scores) + shift, jnp.asarray(relevance), mask=jnp.asarray(mask))
    same = loss(_f32(scores), jnp.asarray(relevance), mask=jnp.asarray(mask))
    np.testing.assert_allclose(moved, same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [pairwise_logistic, pairwise_hinge, listmle])
def test_only_the_order_of_the_relevance_counts(loss):
    scores, relevance, _ = _lists(12)
    stretched = jnp.asarray(relevance) ** 3 * 10
    np.testing.assert_array_equal(
        loss(_f32(scores), stretched), loss(_f32(scores), jnp.asarray(relevance))
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_a_better_order_costs_less(loss):
    relevance = jnp.array([[3, 2, 1, 0]])
    right, swapped, wrong = (
        loss(_f32([scores]), relevance)
        for scores in ([3.0, 2.0, 1.0, 0.0], [2.0, 3.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0])
    )
    assert right < swapped < wrong


def test_a_mistake_at_the_top_costs_ndcg_more_and_ranknet_the_same():
    relevance = jnp.array([[1, 1, 0, 0]] * 2)
    # One item out of place: at the top, or next to the border.
    scores = _f32([[8.0, 4.0, 12.0, 0.0], [12.0, 4.0, 8.0, 0.0]])
    top, border = approximate_ndcg(scores, relevance, temperature=0.1)
    assert top > border + 0.05
    relevance = jnp.array([[3, 2, 1, 0]] * 2)
    scores = _f32([[2.0, 3.0, 1.0, 0.0], [3.0, 2.0, 0.0, 1.0]])  # one neighbouring swap each
    for loss in (pairwise_logistic, pairwise_hinge):
        np.testing.assert_allclose(*loss(scores, relevance), rtol=1e-6)


@given(seeds, st.sampled_from([0.5, 2.0]))
def test_margin_and_temperature_are_in_the_unit_of_the_scores(seed, k):
    scores, relevance, _ = _lists(seed)
    scores, relevance = _f32(scores), jnp.asarray(relevance)
    np.testing.assert_allclose(
        pairwise_hinge(k * scores, relevance, margin=k),
        k * pairwise_hinge(scores, relevance),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        approximate_ndcg(k * scores, relevance, temperature=k),
        approximate_ndcg(scores, relevance),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("loss", "level"),
    [(pairwise_logistic, 1), (pairwise_hinge, 1), (listmle, 1), (approximate_ndcg, 0)],
)
def test_where_all_items_are_equally_relevant_there_is_nothing_to_pay(loss, level):
    scores = _f32(_lists(13)[0])
    relevance = jnp.full(scores.shape, level)
    value, gradient = jax.value_and_grad(lambda s: loss(s, relevance).sum())(scores)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_negative_relevance_and_odd_options_are_refused(loss):
    with pytest.raises(UserError, match=r"relevance: 1 of 2 values negative.*\(0, 1\)"):
        loss(jnp.zeros((1, 2)), _f32([[1.0, -1.0]]))
    with pytest.raises(UserError, match="relevance: 1 of 2 values not finite"):
        loss(jnp.zeros((1, 2)), _f32([[1.0, jnp.nan]]))


def test_options_out_of_range_are_refused():
    lists = jnp.zeros((1, 2)), jnp.array([[1, 0]])
    with pytest.raises(UserError, match=r"^margin: out of range"):
        pairwise_hinge(*lists, margin=0.0)
    with pytest.raises(UserError, match=r"^temperature: out of range"):
        approximate_ndcg(*lists, temperature=-1.0)


def test_negative_relevance_counts_as_none_under_jit_in_ndcg():
    scores = _f32([[1.0, 2.0, 3.0]])
    ndcg = jax.jit(approximate_ndcg)
    np.testing.assert_array_equal(
        ndcg(scores, _f32([[1.0, -5.0, 0.0]])), ndcg(scores, _f32([[1.0, 0.0, 0.0]]))
    )
