import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.losses.language import kl_divergence
from minilm.losses.policy import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimate,
    policy_gradient,
)

seeds = st.integers(0, 2**32 - 1)


def _one(x):
    return jnp.full(1, x, jnp.float32)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-5, 5), st.floats(0.05, 0.9))
def test_clipped_surrogate_and_policy_gradient_against_the_formula(new, old, advantage, clip):
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    expected = -min(ratio * advantage, clipped * advantage)
    out = clipped_surrogate(_one(new), _one(old), _one(advantage), clip=clip)
    np.testing.assert_allclose(out, [expected], rtol=1e-4, atol=1e-4)
    out = policy_gradient(_one(new), _one(old), _one(advantage))
    np.testing.assert_allclose(out, [-ratio * advantage], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.0, 1.0, True),
        (1.0, -1.0, True),
        (1.5, 1.0, False),  # likelier already: no further
        (1.5, -1.0, True),  # likelier but worse: back
        (0.5, 1.0, True),
        (0.5, -1.0, False),
    ],
)
def test_the_clip_stops_only_steps_that_go_further(ratio, advantage, moves):
    gradient = jax.grad(lambda x: clipped_surrogate(x, _one(0.0), _one(advantage), clip=0.2).sum())(
        _one(math.log(ratio))
    )
    np.testing.assert_allclose(gradient, _one(-ratio * advantage if moves else 0.0), rtol=1e-5)


@pytest.mark.parametrize("loss", [clipped_surrogate, policy_gradient])
def test_only_the_policy_has_a_gradient(loss):
    # torchforge#571: old log-probabilities recomputed from the policy made the ratio 1 for ever;
    # even when the same array is passed twice its gradient here is REINFORCE's.
    advantages = jnp.array([2.0, -1.0])
    same = jax.grad(lambda x: loss(x, x, advantages).sum())(jnp.array([-1.0, -2.0]))
    np.testing.assert_allclose(same, -advantages)
    recorded = jax.grad(lambda *xs: loss(*xs).sum(), argnums=(1, 2))(advantages, advantages, same)
    assert not any(g.any() for g in recorded)


def test_policy_gradient_is_reinforce_for_a_policy_of_three_actions():
    # Enumerated: the expected gradient is that of the expected reward, Σ_a π(a) A(a).
    logits, advantages = jnp.array([0.3, -0.2, 0.9]), jnp.array([1.0, -2.0, 0.5])
    old = jax.nn.log_softmax(logits)
    weights = jnp.exp(old)

    def sampled(x):
        return jnp.sum(weights * policy_gradient(jax.nn.log_softmax(x), old, advantages))

    p = np.exp(np.array([0.3, -0.2, 0.9]))
    p /= p.sum()
    a = np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(jax.grad(sampled)(logits), -p * (a - p @ a), atol=1e-6)


def _enumerated(seed, size=6):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.standard_normal(size), jnp.float32) for _ in range(2))


@given(seeds)
def test_k1_and_k3_have_the_exact_kl_as_expectation(seed):
    logits, ref_logits = _enumerated(seed)
    logprobs, ref_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(logprobs, ref_logprobs, estimator=estimator)
        expectation = jnp.sum(jnp.exp(logprobs) * estimates)
        np.testing.assert_allclose(
            expectation, kl_divergence(logits, ref_logits), rtol=1e-4, atol=1e-5
        )


@given(seeds)
def test_as_losses_k2_has_the_gradient_of_the_kl_and_k1_none(seed):
    logits, ref_logits = _enumerated(seed)
    ref_logprobs = jax.nn.log_softmax(ref_logits)
    weights = jnp.exp(jax.nn.log_softmax(logits))

    def gradient(estimator):
        return jax.grad(
            lambda x: jnp.sum(
                weights * kl_estimate(jax.nn.log_softmax(x), ref_logprobs, estimator=estimator)
            )
        )(logits)

    np.testing.assert_allclose(
        gradient("k2"), jax.grad(kl_divergence)(logits, ref_logits), atol=1e-5
    )
    np.testing.assert_allclose(gradient("k1"), np.zeros(6), atol=1e-6)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_k2_and_k3_are_never_negative(logprob, ref_logprob):
    assert kl_estimate(_one(logprob), _one(ref_logprob), estimator="k2") >= 0
    assert kl_estimate(_one(logprob), _one(ref_logprob), estimator="k3") >= 0


@given(st.floats(-12, 12))
def test_estimators_against_the_formulas(log_ratio):
    expected = {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(log_ratio) - 1 - log_ratio}
    for estimator, value in expected.items():
        out = kl_estimate(_one(0.0), _one(log_ratio), estimator=estimator)
        np.testing.assert_allclose(out, [value], rtol=1e-4, atol=1e-6)


def test_k3_keeps_its_digits_near_the_reference():
    # r − 1 − log r in float32 is 0 or 1.2e-7 here; the truth is 5e-9.
    out = kl_estimate(_one(0.0), _one(1e-4), estimator="k3")
    np.testing.assert_allclose(out, [5e-9], rtol=1e-2)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 1))
def test_clipped_value_loss_against_the_formula(value, old, target, clip):
    near = min(max(value, old - clip), old + clip)
    expected = max((value - target) ** 2, (near - target) ** 2) / 2
    out = clipped_value_loss(_one(value), _one(old), _one(target), clip=clip)
    np.testing.assert_allclose(out, [expected], rtol=1e-4, atol=1e-5)


def test_clipped_value_loss_grants_no_gain_past_the_clip():
    def gradient(value):
        return jax.grad(lambda v: clipped_value_loss(v, _one(0.0), _one(1.0), clip=0.2).sum())(
            _one(value)
        )

    np.testing.assert_allclose(gradient(0.1), [-0.9], rtol=1e-6)
    np.testing.assert_allclose(gradient(0.5), [0.0])  # already moved towards the target
    np.testing.assert_allclose(gradient(-0.5), [-1.5])  # moved away: pays in full


def test_diagnostics_of_a_policy_that_has_not_moved_are_zero():
    logprobs = jnp.array([-1.0, -3.0])
    assert not clip_fraction(logprobs, logprobs).any()
    assert not approx_kl(logprobs, logprobs).any()


def test_clip_fraction_counts_ratios_beyond_the_clip_on_either_side():
    ratios = jnp.array([0.75, 0.85, 1.0, 1.15, 1.25])
    out = clip_fraction(jnp.log(ratios), jnp.zeros(5), clip=0.2)
    np.testing.assert_array_equal(out, jnp.array([1.0, 0.0, 0.0, 0.0, 1.0]))


def test_an_unknown_estimator_is_refused():
    # Without the tests' import hook, which would object to the literal first.
    with pytest.raises(ValueError, match="must be one of 'k1', 'k2', 'k3', got 'k4'"):
        inspect.unwrap(kl_estimate)(jnp.zeros(2), jnp.zeros(2), estimator="k4")
