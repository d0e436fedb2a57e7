import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minilm.losses.reduce import Mean, mean


def test_weighted_mean_against_numpy():
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((3, 5)), rng.random((3, 5))
    out = mean(jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(out.value, np.average(values, weights=weights), rtol=1e-6)
    np.testing.assert_allclose(out.count, weights.sum(), rtol=1e-6)


def test_empty_mask_has_value_and_gradient_zero():
    # trl#6668: a loss over nothing is 0 with a count of 0, so that it can be told from a good 0.
    mask = jnp.zeros(3, bool)
    value, gradient = jax.value_and_grad(lambda x: mean(x, mask).value)(jnp.ones(3))
    assert value == 0
    assert mean(jnp.ones(3), mask).count == 0
    np.testing.assert_array_equal(gradient, jnp.zeros(3))
    # Neither where a total reached the pair some other way: 0 / 0 must not enter the chain rule.
    assert jax.grad(lambda total: Mean(total, jnp.zeros(())).value)(1.0) == 0


def test_no_elements_at_all():
    assert mean(jnp.zeros((0, 4)), jnp.zeros((0, 4), bool)).value == 0


def test_masked_infinities_and_nans_do_not_count():
    values = jnp.array([1.0, jnp.nan, jnp.inf, 3.0])
    mask = jnp.array([True, False, False, True])
    value, gradient = jax.value_and_grad(lambda x: mean(x, mask).value)(values)
    assert value == 2
    np.testing.assert_array_equal(gradient, jnp.array([0.5, 0, 0, 0.5]))


def test_bfloat16_is_summed_in_float32():
    # In bfloat16, 256 + 1 = 256: a sum of ten thousand ones would stop there.
    ones = jnp.ones(10_000, jnp.bfloat16)
    out = mean(ones, ones)
    assert out.total.dtype == out.count.dtype == jnp.float32
    assert out.total == out.count == 10_000


@given(st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_ragged_parts_add_up_to_the_whole(lengths, seed):
    # A mean of means would weigh a short part like a long one (maxtext#3040).
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal(n), rng.integers(0, 2, n).astype(bool)) for n in lengths]
    added = Mean(jnp.zeros(()), jnp.zeros(()))
    for values, mask in parts:
        added = added + mean(jnp.asarray(values, jnp.float32), jnp.asarray(mask))
    everything = np.concatenate([values[mask] for values, mask in parts])
    np.testing.assert_allclose(added.count, len(everything))
    expected = everything.mean() if len(everything) else 0.0
    np.testing.assert_allclose(added.value, expected, rtol=1e-5, atol=1e-6)


def test_travels_through_jit_and_tree_functions_as_a_pair():
    out = jax.jit(mean)(jnp.arange(4.0), jnp.ones(4))
    assert isinstance(out, Mean)
    halves = jax.tree.map(lambda x: x / 2, out)
    assert halves.value == out.value == 1.5
