import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.losses.language import entropy, kl_divergence, next_token_cross_entropy, token_logprobs

seeds = st.integers(0, 2**32 - 1)


def _softmax(row):
    """Probabilities of one row in float64, one number at a time."""
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def _logits(seed, scale=3.0, shape=(2, 5, 11)):
    return np.random.default_rng(seed).standard_normal(shape) * scale


def _f32(x):
    return jnp.asarray(x, jnp.float32)


@given(seeds, st.floats(0.0, 20.0))
def test_cross_entropy_and_logprobs_against_float64(seed, scale):
    logits = _logits(seed, scale)
    labels = np.random.default_rng(seed + 1).integers(0, 11, (2, 5))
    expected = np.array(
        [
            [-math.log(_softmax(row)[y]) for row, y in zip(rows, ys, strict=True)]
            for rows, ys in zip(logits, labels, strict=True)
        ]
    )
    out = next_token_cross_entropy(_f32(logits), jnp.asarray(labels))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(token_logprobs(_f32(logits), jnp.asarray(labels)), -out)


def test_cross_entropy_gradient_is_softmax_minus_one_hot():
    logits, labels = _logits(0, shape=(4, 6)), np.array([0, 5, 2, 2])
    gradient = jax.grad(lambda x: next_token_cross_entropy(x, jnp.asarray(labels)).sum())(
        _f32(logits)
    )
    expected = np.array([_softmax(row) for row in logits]) - np.eye(6)[labels]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@given(seeds, st.floats(-100, 100))
def test_a_constant_added_to_all_logits_changes_nothing(seed, shift):
    logits, labels = _logits(seed), jnp.asarray(_logits(seed + 1, 1e3, (2, 5)), jnp.int32) % 11
    same, moved = _f32(logits), _f32(logits + shift)
    # float32 resolves 1e-5 at 100.
    for loss in (lambda x: next_token_cross_entropy(x, labels), entropy):
        np.testing.assert_allclose(loss(same), loss(moved), atol=1e-4)
    np.testing.assert_allclose(kl_divergence(same, moved), 0.0, atol=1e-4)


@given(seeds)
def test_entropy_and_kl_against_float64(seed):
    logits, ref_logits = _logits(seed, shape=(6, 11)), _logits(seed + 1, shape=(6, 11))
    p, q = (np.array([_softmax(row) for row in x]) for x in (logits, ref_logits))
    np.testing.assert_allclose(entropy(_f32(logits)), -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(
        kl_divergence(_f32(logits), _f32(ref_logits)), (p * np.log(p / q)).sum(-1), rtol=1e-4
    )


@given(seeds, st.floats(0.0, 50.0))
def test_entropy_and_kl_keep_their_bounds(seed, scale):
    logits, ref_logits = _f32(_logits(seed, scale)), _f32(_logits(seed + 1, scale))
    assert (entropy(logits) >= -1e-6).all()
    assert (entropy(logits) <= math.log(11) + 1e-5).all()
    assert (kl_divergence(logits, ref_logits) >= -1e-5).all()
    np.testing.assert_array_equal(kl_divergence(logits, logits), jnp.zeros((2, 5)))


def test_kl_gradient_with_respect_to_both_arguments_against_float64():
    logits, ref_logits = _logits(0, 1.0, (5,)), _logits(1, 1.0, (5,))
    p, q = np.array(_softmax(logits)), np.array(_softmax(ref_logits))
    first, second = jax.grad(lambda *xs: kl_divergence(*xs), argnums=(0, 1))(
        _f32(logits), _f32(ref_logits)
    )
    divergence = (p * np.log(p / q)).sum()
    np.testing.assert_allclose(first, p * (np.log(p / q) - divergence), atol=1e-6)
    np.testing.assert_allclose(second, q - p, atol=1e-6)


def test_certain_and_wrong_at_ten_thousand():
    logits = jnp.array([[1e4, -1e4, 0.0]] * 2)
    loss = next_token_cross_entropy(logits, jnp.array([0, 1]))
    np.testing.assert_array_equal(loss, jnp.array([0.0, 2e4]))


@pytest.mark.parametrize("labels", [np.zeros((2, 5), np.float32), np.zeros((2, 4), np.int32)])
def test_labels_of_another_shape_or_kind_are_refused(labels):
    with pytest.raises(Exception, match="type"):
        next_token_cross_entropy(jnp.zeros((2, 5, 7)), jnp.asarray(labels))
