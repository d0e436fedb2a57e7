import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.errors import UserError
from minilm.losses.regularization import gradient_penalty, group_gap, l1, l2, l2_from

seeds = st.integers(0, 2**32 - 1)


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _tree(seed):
    rng = np.random.default_rng(seed)
    return {"w": rng.standard_normal((3, 4)), "layers": [rng.standard_normal(5)]}


def _flat(tree):
    return np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


@given(seeds)
def test_penalties_against_float64(seed):
    one, two = _tree(seed), _tree(seed + 1)
    params, initial = jax.tree.map(_f32, one), jax.tree.map(_f32, two)
    np.testing.assert_allclose(l1(params), abs(_flat(one)).sum(), rtol=1e-5)
    np.testing.assert_allclose(l2(params), (_flat(one) ** 2).sum(), rtol=1e-5)
    distance = ((_flat(one) - _flat(two)) ** 2).sum()
    np.testing.assert_allclose(l2_from(params, initial), distance, rtol=1e-5)


def test_gradients_are_the_sign_twice_the_weight_and_twice_the_distance():
    params, initial = {"w": _f32([3.0, 0.0, -4.0])}, {"w": _f32([1.0, 1.0, 1.0])}
    np.testing.assert_array_equal(jax.grad(l1)(params)["w"], [1.0, 0.0, -1.0])
    np.testing.assert_array_equal(jax.grad(l2)(params)["w"], [6.0, 0.0, -8.0])
    slope, of_initial = jax.grad(l2_from, argnums=(0, 1))(params, initial)
    np.testing.assert_array_equal(slope["w"], [4.0, -2.0, -10.0])
    assert not of_initial["w"].any()


def test_l1_makes_zeros_and_l2_does_not():
    # min ½ (w − t)² + λ penalty: soft thresholding, and shrinkage.
    targets, strength = _f32([2.0, 0.3, -0.1]), 0.5
    grid = jnp.linspace(-1, 3, 4001)

    def best(penalty, target):
        costs = 0.5 * (grid - target) ** 2 + strength * jax.vmap(penalty)(grid)
        return float(grid[jnp.argmin(costs)])

    np.testing.assert_allclose([best(l1, t) for t in targets], [1.5, 0.0, 0.0], atol=2e-3)
    np.testing.assert_allclose([best(l2, t) for t in targets], [1.0, 0.15, -0.05], atol=2e-3)


def test_at_the_start_l2_from_is_zero_and_no_parameters_cost_nothing():
    params = jax.tree.map(_f32, _tree(0))
    assert l2_from(params, params) == 0
    assert l1({}) == l2({}) == 0
    assert l1({}).dtype == l2({}).dtype == jnp.float32


def test_bfloat16_parameters_are_summed_in_float32():
    # In bfloat16, 256 + 1 = 256.
    ones = {"w": jnp.ones(10_000, jnp.bfloat16)}
    assert l1(ones) == l2(ones) == 10_000


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ({"w": jnp.zeros(3)}, "initial: not a tree like that of params"),
        ({"w": jnp.zeros(3), "b": jnp.zeros(1)}, r"initial\['b'\]: shape does not fit"),
    ],
)
def test_another_tree_is_refused(initial, message):
    with pytest.raises(UserError, match=message):
        l2_from({"w": jnp.zeros(3), "b": jnp.zeros(2)}, initial)


@given(seeds)
def test_gradient_penalty_of_a_quadratic_form_in_closed_form(seed):
    rng = np.random.default_rng(seed)
    a, b, x = rng.standard_normal((3, 3)), rng.standard_normal(3), rng.standard_normal((5, 3))
    expected = ((x @ (a + a.T) + b) ** 2).sum(-1)
    form, slope = _f32(a), _f32(b)

    def function(x):
        return jnp.einsum("bi,ij,bj->b", x, form, x) + x @ slope

    np.testing.assert_allclose(gradient_penalty(function, _f32(x)), expected, rtol=1e-4, atol=1e-4)


def test_gradient_penalty_trains_the_function_it_is_given():
    # d/dw ‖w‖² = 2 w: a gradient through a gradient.
    inputs = jnp.ones((4, 2, 3))
    w = _f32(np.arange(6).reshape(2, 3))
    slope = jax.grad(
        lambda w: jnp.mean(gradient_penalty(lambda x: jnp.einsum("bij,ij->b", x, w), inputs))
    )(w)
    np.testing.assert_allclose(slope, 2 * w, rtol=1e-6)


def test_a_function_that_returns_no_value_per_example_is_refused():
    with pytest.raises(UserError, match="function's values: shape does not fit"):
        gradient_penalty(lambda x: jnp.sum(x)[None], jnp.ones((2, 3)))


@given(seeds, st.booleans())
def test_group_gap_against_numpy(seed, weighted):
    rng = np.random.default_rng(seed)
    losses, groups = rng.standard_normal(12), np.array([0, 1] * 6)
    weights = rng.random(12) if weighted else np.ones(12)
    means = [np.average(losses[groups == g], weights=weights[groups == g]) for g in (0, 1)]
    out = group_gap(_f32(losses), jnp.asarray(groups), weights=_f32(weights) if weighted else None)
    np.testing.assert_allclose(out, abs(means[0] - means[1]), rtol=1e-4, atol=1e-6)


def test_group_gap_does_not_mind_which_group_is_which_nor_a_constant():
    losses, groups = _f32([1.0, 2.0, 4.0, 8.0]), jnp.array([0, 1, 1, 0])
    gap = group_gap(losses, groups)
    assert gap == group_gap(losses, 1 - groups) == group_gap(losses + 16, groups) == 1.5


def test_group_gap_pays_the_worse_group_down_and_the_better_one_up():
    losses, groups = _f32([1.0, 1.0, 5.0]), jnp.array([0, 0, 1])
    gradient = jax.grad(lambda x: group_gap(x, groups))(losses)
    np.testing.assert_allclose(gradient, [-0.5, -0.5, 1.0])


@pytest.mark.parametrize("groups", [[0, 0, 0], [1, 1, 1]])
def test_an_empty_group_has_no_gap(groups):
    gap, gradient = jax.value_and_grad(group_gap)(_f32([1.0, 2.0, 3.0]), jnp.asarray(groups))
    assert gap == 0
    assert not gradient.any()


def test_a_group_that_is_masked_out_has_no_gap_and_its_losses_do_not_count():
    losses, groups = _f32([1.0, 2.0, jnp.nan]), jnp.array([0, 0, 1])
    gap, gradient = jax.value_and_grad(group_gap)(
        losses, groups, weights=jnp.array([True, True, False])
    )
    assert gap == 0
    assert not gradient.any()


def test_weights_of_nothing_are_refused_outside_jit_and_give_zero_inside():
    losses, groups, nothing = _f32([1.0, 2.0]), jnp.array([0, 1]), jnp.zeros(2)
    with pytest.raises(UserError, match="weights: sum to zero"):
        group_gap(losses, groups, weights=nothing)
    inside = jax.jit(jax.value_and_grad(lambda x, w: group_gap(x, groups, weights=w)))
    gap, gradient = inside(losses, nothing)
    assert gap == 0
    assert not gradient.any()


def test_a_third_group_is_refused():
    with pytest.raises(UserError, match=r"groups: 1 of 3 values not in 0 … 1"):
        group_gap(jnp.zeros(3), jnp.array([0, 2, 1]))
