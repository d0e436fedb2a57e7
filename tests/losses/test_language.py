import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.errors import UserError
from minilm.losses.language import (
    entropy,
    forward_kl,
    jensen_shannon,
    kl_divergence,
    next_token_cross_entropy,
    reverse_kl,
    token_logprobs,
    unlikelihood,
    z_loss,
)

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


@pytest.mark.parametrize("loss", [next_token_cross_entropy, unlikelihood])
def test_a_token_outside_the_vocabulary_is_refused_outside_jit(loss):
    with pytest.raises(UserError, match=r"labels: 1 of 2 values not in 0 … 6, .* \(1,\)"):
        loss(jnp.zeros((2, 7)), jnp.array([6, 7]))


@given(seeds, st.floats(0.0, 10.0))
def test_z_loss_and_unlikelihood_against_float64(seed, scale):
    logits = _logits(seed, scale, (6, 11))
    labels = np.random.default_rng(seed + 1).integers(0, 11, 6)
    squares = [math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits]
    np.testing.assert_allclose(z_loss(_f32(logits)), squares, rtol=1e-4, atol=1e-5)
    others = [sum(np.delete(_softmax(row), y)) for row, y in zip(logits, labels, strict=True)]
    out = unlikelihood(_f32(logits), jnp.asarray(labels))
    np.testing.assert_allclose(out, -np.log(others), rtol=1e-4, atol=1e-5)


def test_z_loss_leaves_log_probabilities_alone_and_draws_others_to_them():
    logits = jax.nn.log_softmax(_f32(_logits(1, 1.0, (1, 5))))
    value, gradient = jax.value_and_grad(lambda x: z_loss(x).sum())(logits + 2)
    np.testing.assert_allclose(value, 4.0, rtol=1e-5)
    np.testing.assert_allclose(gradient.sum(), 4.0, rtol=1e-5)  # downwards, by 2 log Z
    np.testing.assert_allclose(z_loss(logits), [0.0], atol=1e-10)


def test_unlikelihood_of_a_certain_token_is_finite_and_pulls():
    # 1 − p is 0 in float32 from a margin of 17 on.
    loss, gradient = jax.value_and_grad(lambda x: unlikelihood(x, jnp.array([0])).sum())(
        _f32([[1e4, -1e4, -1e4]])
    )
    np.testing.assert_allclose(loss, 2e4, rtol=1e-3)
    np.testing.assert_allclose(gradient, [[1.0, -0.5, -0.5]], rtol=1e-5)


def test_unlikelihood_of_no_token_costs_nothing_under_jit():
    out = jax.jit(unlikelihood)(_f32(_logits(2, 1.0, (1, 5))), jnp.array([9]))
    np.testing.assert_allclose(out, [0.0], atol=1e-6)


def test_unlikelihood_of_the_only_token_there_is_is_refused():
    with pytest.raises(UserError, match="needs at least two tokens"):
        unlikelihood(jnp.zeros((3, 1)), jnp.zeros(3, jnp.int32))


@given(seeds, st.sampled_from([0.1, 0.5, 0.7]))
def test_distillation_against_float64(seed, beta):
    logits, teacher = _logits(seed, shape=(6, 11)), _logits(seed + 1, shape=(6, 11))
    p, q = (np.array([_softmax(row) for row in x]) for x in (logits, teacher))
    m = beta * q + (1 - beta) * p
    forward, reverse = (q * np.log(q / p)).sum(-1), (p * np.log(p / q)).sum(-1)
    middle = beta * (q * np.log(q / m)).sum(-1) + (1 - beta) * (p * np.log(p / m)).sum(-1)
    both = _f32(logits), _f32(teacher)
    np.testing.assert_allclose(forward_kl(*both), forward, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(reverse_kl(*both), reverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(jensen_shannon(*both, beta=beta), middle, rtol=1e-4, atol=1e-6)
    swapped = jensen_shannon(*both[::-1], beta=1 - beta)
    np.testing.assert_allclose(swapped, middle, rtol=1e-4, atol=1e-6)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (jensen_shannon(*both, beta=beta) <= bound + 1e-6).all()


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, jensen_shannon])
def test_only_the_student_has_a_gradient_and_none_at_the_teacher(loss):
    student, teacher = _f32(_logits(3, 1.0, (4, 5))), _f32(_logits(4, 1.0, (4, 5)))

    def total(x, y):
        return loss(x, y).sum()

    to_student, to_teacher = jax.grad(total, argnums=(0, 1))(student, teacher)
    assert abs(to_student).max() > 0.01
    assert not to_teacher.any()
    np.testing.assert_allclose(jax.grad(total)(teacher + 3, teacher), 0 * teacher, atol=1e-6)


def test_forward_kl_has_the_gradient_of_the_cross_entropy_to_the_teacher():
    student, teacher = _logits(5, 1.0, (5,)), _logits(6, 1.0, (5,))
    gradient = jax.grad(lambda x: forward_kl(x, _f32(teacher)))(_f32(student))
    np.testing.assert_allclose(
        gradient, np.array(_softmax(student)) - np.array(_softmax(teacher)), atol=1e-6
    )


def test_forward_kl_covers_two_modes_and_reverse_kl_takes_one():
    # A teacher of two modes; students that say one of them, or spread over everything.
    teacher = _f32([[6.0, 0.0, 0.0, 6.0]])
    one_mode, spread = _f32([[6.0, 0.0, 0.0, -2.0]]), _f32([[0.0, 0.0, 0.0, 0.0]])
    assert forward_kl(spread, teacher) < forward_kl(one_mode, teacher)
    assert reverse_kl(one_mode, teacher) < reverse_kl(spread, teacher)


def test_jensen_shannon_goes_to_forward_and_reverse_kl_at_its_ends():
    both = _f32(_logits(7, 1.0, (3, 5))), _f32(_logits(8, 1.0, (3, 5)))
    near = jensen_shannon(*both, beta=1e-3) / 1e-3, jensen_shannon(*both, beta=0.999) / 1e-3
    np.testing.assert_allclose(near[0], forward_kl(*both), rtol=2e-2)
    np.testing.assert_allclose(near[1], reverse_kl(*both), rtol=2e-2)


def test_jensen_shannon_needs_a_share_of_both():
    with pytest.raises(UserError, match=r"^beta: out of range"):
        jensen_shannon(jnp.zeros((1, 2)), jnp.zeros((1, 2)), beta=0.0)
