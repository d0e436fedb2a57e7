import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.errors import UserError
from minilm.losses.classification import (
    binary_cross_entropy,
    class_weights,
    cost_sensitive,
    focal,
    hinge,
    normalize_class_weights,
    ordinal,
    soft_cross_entropy,
    softmax_cross_entropy,
)
from minilm.losses.reduce import mean

seeds = st.integers(0, 2**32 - 1)


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _one(x):
    return jnp.full(1, x, jnp.float32)


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _softmax(logits):
    """Probabilities of rows, in float64."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _classes(seed, scale=3.0, examples=8, classes=5):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((examples, classes)) * scale
    return logits, rng.integers(0, classes, examples)


@given(st.floats(-20, 20), st.floats(0, 1), st.floats(0.1, 10), st.sampled_from([0.0, 0.2]))
def test_binary_cross_entropy_against_float64(logit, label, k, smoothing):
    p, y = _sigmoid(logit), (1 - smoothing) * label + smoothing / 2
    expected = -k * y * math.log(p) - (1 - y) * math.log(_sigmoid(-logit))
    out = binary_cross_entropy(
        _one(logit), _one(label), positive_weight=k, label_smoothing=smoothing
    )
    np.testing.assert_allclose(out, [expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("k", "smoothing"), [(1.0, 0.0), (9.0, 0.0), (1.0, 0.2)])
def test_the_minimiser_is_the_log_odds_plus_the_log_of_the_positive_weight(k, smoothing):
    share = 0.3
    logits = jnp.linspace(-4, 4, 8001)
    losses = binary_cross_entropy(
        logits, jnp.full_like(logits, share), positive_weight=k, label_smoothing=smoothing
    )
    y = (1 - smoothing) * share + smoothing / 2
    assert abs(float(logits[jnp.argmin(losses)]) - math.log(k * y / (1 - y))) < 0.02


@given(seeds, st.floats(0.0, 10.0), st.sampled_from([0.0, 0.1, 0.5]))
def test_softmax_cross_entropy_against_float64(seed, scale, smoothing):
    logits, labels = _classes(seed, scale)
    logprobs = np.log(_softmax(logits))
    expected = -(1 - smoothing) * logprobs[np.arange(8), labels] - smoothing * logprobs.mean(-1)
    out = softmax_cross_entropy(_f32(logits), jnp.asarray(labels), label_smoothing=smoothing)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@given(seeds, st.sampled_from([0.0, 0.1]))
def test_integer_and_one_hot_labels_agree(seed, smoothing):
    logits, labels = _classes(seed)
    smoothed = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    np.testing.assert_allclose(
        soft_cross_entropy(_f32(logits), _f32(smoothed)),
        softmax_cross_entropy(_f32(logits), jnp.asarray(labels), label_smoothing=smoothing),
        rtol=1e-5,
        atol=1e-6,
    )


@given(seeds)
def test_two_classes_are_the_binary_case(seed):
    rng = np.random.default_rng(seed)
    logits, labels = _f32(rng.standard_normal(6) * 3), jnp.asarray(rng.integers(0, 2, 6))
    both = jnp.stack([jnp.zeros(6), logits], axis=-1)
    np.testing.assert_allclose(
        softmax_cross_entropy(both, labels),
        binary_cross_entropy(logits, labels.astype(jnp.float32)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_gradients_are_probability_less_label():
    logits, labels = _classes(0)
    targets = np.random.default_rng(1).dirichlet(np.ones(5), 8)
    p = _softmax(logits)
    hard = jax.grad(lambda x: softmax_cross_entropy(x, jnp.asarray(labels)).sum())(_f32(logits))
    np.testing.assert_allclose(hard, p - np.eye(5)[labels], atol=1e-6)
    soft = jax.grad(lambda x: soft_cross_entropy(x, _f32(targets)).sum())(_f32(logits))
    np.testing.assert_allclose(soft, p - targets, atol=1e-6)


def test_soft_cross_entropy_is_least_at_the_target_and_there_its_entropy():
    target = np.array([0.5, 0.3, 0.2])
    best = _f32(np.log(target))[None]
    loss, gradient = jax.value_and_grad(lambda x: soft_cross_entropy(x, _f32([target])).sum())(best)
    np.testing.assert_allclose(loss, -(target * np.log(target)).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros((1, 3)), atol=1e-7)


def test_a_share_of_zero_costs_nothing_at_a_probability_of_zero():
    loss, gradient = jax.value_and_grad(lambda x: soft_cross_entropy(x, _f32([[0.0, 1.0]])).sum())(
        _f32([[-1e4, 1e4]])
    )
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros((1, 2)))


def test_of_one_class_there_is_nothing_to_learn():
    loss, gradient = jax.value_and_grad(
        lambda x: softmax_cross_entropy(x, jnp.zeros(2, int), label_smoothing=0.1).sum()
    )(_f32([[1e4], [-1e4]]))
    assert loss == 0
    assert not gradient.any()


@given(st.floats(-15, 15), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.5, 2.0, 5.0]))
def test_focal_against_float64(logit, label, gamma):
    truth = _sigmoid(logit) if label else _sigmoid(-logit)
    expected = -((1 - truth) ** gamma) * math.log(truth)
    out = focal(_one(logit), _one(label), gamma=gamma)
    np.testing.assert_allclose(out, [expected], rtol=1e-3, atol=1e-6)
    weighted = focal(_one(logit), _one(label), gamma=gamma, alpha=0.25)
    np.testing.assert_allclose(weighted, (0.25 if label else 0.75) * out, rtol=1e-6)


def test_focal_with_gamma_zero_is_the_cross_entropy_and_else_less_calibrated():
    logits = jnp.linspace(-4, 4, 801)
    ones, zeros = jnp.ones(801), jnp.zeros(801)
    np.testing.assert_allclose(
        focal(logits, ones, gamma=0.0), binary_cross_entropy(logits, ones), rtol=1e-5
    )
    # 0.9 of the labels positive: log-odds 2.2.
    mixed = 0.9 * focal(logits, ones) + 0.1 * focal(logits, zeros)
    assert 0.3 < float(logits[jnp.argmin(mixed)]) < math.log(9) - 0.3


def test_focal_asks_less_of_the_easy():
    easy, hard = focal(_one(3.0), _one(1.0)), focal(_one(-3.0), _one(1.0))
    plain = binary_cross_entropy(_one(3.0), _one(1.0)), binary_cross_entropy(_one(-3.0), _one(1.0))
    assert easy / plain[0] < 0.01
    assert hard / plain[1] > 0.9


@given(st.floats(-5, 5), st.sampled_from([0.0, 1.0]))
def test_hinge_against_the_formula(logit, label):
    expected = max(0.0, 1 - logit) if label else max(0.0, 1 + logit)
    np.testing.assert_allclose(hinge(_one(logit), _one(label)), [expected], rtol=1e-5, atol=1e-6)


def test_hinge_is_least_at_the_majority_whatever_its_share():
    logits = jnp.linspace(-2, 2, 401)
    for share in (0.55, 0.95):
        losses = share * hinge(logits, jnp.ones(401)) + (1 - share) * hinge(logits, jnp.zeros(401))
        assert abs(float(logits[jnp.argmin(losses)]) - 1) < 0.011


@given(seeds)
def test_cost_sensitive_against_float64(seed):
    logits, labels = _classes(seed)
    costs = np.random.default_rng(seed + 1).random((5, 5)) * 10
    expected = (_softmax(logits) * costs[labels]).sum(-1)
    out = cost_sensitive(_f32(logits), jnp.asarray(labels), _f32(costs))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_cost_sensitive_decides_by_expected_cost_and_not_by_probability():
    # Fraud in 1 of 100 cases, a miss as dear as 1000 alarms: flag everything.
    labels = jnp.asarray([1] + [0] * 99)
    costs = jnp.array([[0.0, 1.0], [1000.0, 0.0]])

    def loss(alarm):
        logits = jnp.broadcast_to(jnp.stack([jnp.zeros(()), alarm]), (100, 2))
        return jnp.mean(cost_sensitive(logits, labels, costs))

    assert jax.grad(loss)(jnp.zeros(())) < 0
    np.testing.assert_allclose(loss(_f32(20.0)), 0.99, rtol=1e-3)
    np.testing.assert_allclose(loss(_f32(-20.0)), 10.0, rtol=1e-3)


def test_cost_of_any_error_is_the_probability_of_one():
    logits, labels = _classes(3)
    zero_one = 1 - jnp.eye(5)
    out = cost_sensitive(_f32(logits), jnp.asarray(labels), zero_one)
    np.testing.assert_allclose(out, 1 - _softmax(logits)[np.arange(8), labels], atol=1e-6)


counts = st.lists(st.integers(0, 10_000), min_size=1, max_size=6).filter(any)


@given(counts, st.sampled_from([("inverse", 0.5), ("effective", 0.0), ("effective", 0.999)]))
def test_class_weights_are_one_for_the_mean_example(counts, row):
    method, beta = row
    weights = class_weights(jnp.asarray(counts), method=method, beta=beta)
    np.testing.assert_allclose(np.average(weights, weights=counts), 1.0, rtol=1e-4)
    assert (weights > 0).all()


def test_inverse_frequency_lets_every_class_weigh_the_same():
    counts = np.array([990, 9, 1])
    weights = np.asarray(class_weights(jnp.asarray(counts)))
    np.testing.assert_allclose(weights * counts, np.full(3, 1000 / 3), rtol=1e-5)


@given(counts.filter(lambda c: min(c) > 0), st.sampled_from([0.9, 0.99, 0.999]))
def test_effective_numbers_against_float64(counts, beta):
    raw = (1 - beta) / (1 - beta ** np.array(counts, np.float64))
    expected = raw * sum(counts) / (raw * counts).sum()
    weights = class_weights(jnp.asarray(counts), method="effective", beta=beta)
    np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_effective_numbers_lie_between_equal_weights_and_inverse_frequency():
    counts = jnp.array([1000, 10])
    equal = class_weights(counts, method="effective", beta=0.0)
    np.testing.assert_allclose(equal, [1.0, 1.0], rtol=1e-6)
    near = class_weights(counts, method="effective", beta=1 - 1e-7)
    np.testing.assert_allclose(near, class_weights(counts), rtol=1e-3)


def test_a_class_without_examples_is_weighted_as_if_it_had_one():
    absent, rare = class_weights(jnp.array([99, 0])), class_weights(jnp.array([99, 1]))
    np.testing.assert_allclose(absent[1] / absent[0], rare[1] / rare[0], rtol=1e-6)


def test_one_class_weighs_one():
    np.testing.assert_allclose(class_weights(jnp.array([7])), [1.0])


def test_given_weights_keep_their_ratio_and_enter_the_average():
    weights = normalize_class_weights(jnp.array([1.0, 10.0]), jnp.array([90, 10]))
    np.testing.assert_allclose(weights[1] / weights[0], 10.0, rtol=1e-6)
    np.testing.assert_allclose(0.9 * weights[0] + 0.1 * weights[1], 1.0, rtol=1e-6)
    losses, labels = jnp.array([1.0, 4.0]), jnp.array([0, 1])
    assert mean(losses, weights[labels]).value == pytest.approx((1 + 10 * 4) / 11)


def test_given_weights_of_no_class_that_occurs_count_all_alike_under_jit():
    weights, counts = jnp.array([0.0, 1.0]), jnp.array([5, 0])
    np.testing.assert_array_equal(jax.jit(normalize_class_weights)(weights, counts), [1.0, 1.0])
    with pytest.raises(UserError, match="weights of the classes that occur: sum to zero"):
        normalize_class_weights(weights, counts)


@pytest.mark.parametrize("loss", ["softmax", "cost"])
@pytest.mark.parametrize("label", [-1, 5])
def test_a_class_out_of_range_is_refused_outside_jit_and_clamped_inside(loss, label):
    logits, labels = _classes(4)[0], jnp.asarray([0, 1, 2, 3, 4, 0, label, 1])
    costs = _f32(np.random.default_rng(5).random((5, 5)))

    def function(y):
        if loss == "softmax":
            return softmax_cross_entropy(_f32(logits), y)
        return cost_sensitive(_f32(logits), y, costs)

    with pytest.raises(UserError, match=r"labels: 1 of 8 values not in 0 … 4, .* \(6,\)"):
        function(labels)
    clamped = function(jnp.clip(labels, 0, 4))
    np.testing.assert_allclose(jax.jit(function)(labels), clamped, rtol=1e-6)


@pytest.mark.parametrize("loss", [binary_cross_entropy, focal, hinge])
def test_labels_of_minus_one_and_one_are_refused(loss):
    with pytest.raises(UserError, match="labels: 1 of 2 values not between 0 and 1"):
        loss(jnp.zeros(2), jnp.array([-1.0, 1.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: binary_cross_entropy(_one(0), _one(0), positive_weight=0.0), "positive_weight: "),
        (lambda: binary_cross_entropy(_one(0), _one(0), label_smoothing=1.0), "label_smoothing: "),
        (lambda: focal(_one(0), _one(0), gamma=-1.0), "gamma: "),
        (lambda: focal(_one(0), _one(0), alpha=1.0), "alpha: "),
        (lambda: soft_cross_entropy(jnp.zeros((1, 2)), _f32([[0.5, 0.6]])), "sum of targets: "),
        (lambda: soft_cross_entropy(jnp.zeros((1, 2)), _f32([[-0.5, 1.5]])), "targets: 2 of 2"),
        (lambda: class_weights(jnp.zeros(3)), "counts: sum to zero"),
        (lambda: class_weights(jnp.array([3, -1])), "counts: 1 of 2 values negative"),
        (lambda: class_weights(jnp.ones(2), method="effective", beta=1.0), "beta: "),
        (
            lambda: cost_sensitive(
                jnp.zeros((1, 2)), jnp.zeros(1, int), _f32([[0, 1], [jnp.nan, 0]])
            ),
            "costs: 1 of 4 values not finite",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(UserError, match=f"^{message}"):
        call()


def test_an_unknown_method_is_refused():
    # Without the tests' import hook, which would object to the literal first.
    with pytest.raises(ValueError, match="must be one of 'inverse', 'effective', got 'root'"):
        inspect.unwrap(class_weights)(jnp.ones(2), method="root")


@given(st.floats(-8, 8), st.integers(0, 4), st.floats(0.2, 4))
def test_ordinal_against_float64(score, grade, spacing):
    thresholds = spacing * (np.arange(4, dtype=np.float64) - 1.5)
    below = np.concatenate([[0.0], 1 / (1 + np.exp(score - thresholds)), [1.0]])
    out = ordinal(_one(score), jnp.array([grade]), levels=5, spacing=spacing)
    expected = -np.log(below[grade + 1] - below[grade])
    np.testing.assert_allclose(float(out[0]), expected, rtol=1e-4, atol=1e-5)


def test_the_grades_of_a_score_are_a_distribution():
    scores = jnp.repeat(jnp.linspace(-6, 6, 13)[:, None], 7, axis=1)
    grades = jnp.broadcast_to(jnp.arange(7), (13, 7))
    np.testing.assert_allclose(jnp.exp(-ordinal(scores, grades)).sum(1), 1.0, rtol=1e-5)
