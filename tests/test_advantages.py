import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.advantages import (
    best_of_group,
    generalized_advantages,
    group_mean,
    group_z_score,
    leave_one_out,
    to_go,
    whiten,
)

seeds = st.integers(0, 2**32 - 1)
discounts = st.sampled_from([(1.0, 0.95), (0.9, 0.5), (0.0, 1.0)])
WIDTH = 9

# Compiled once for each pair of options, not at each of the examples.
jitted_gae = jax.jit(generalized_advantages, static_argnames=("gamma", "lam"))


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _rollout(seed, batch=5):
    """Rewards, values and a right-padded mask; the first row is empty, the second full."""
    rng = np.random.default_rng(seed)
    lengths = np.array([0, WIDTH, *rng.integers(1, WIDTH + 1, batch - 2)])
    mask = np.arange(WIDTH) < lengths[:, None]
    return rng.standard_normal((batch, WIDTH)), rng.standard_normal((batch, WIDTH)), mask, lengths


def _double_sum(rewards, values, length, gamma, lam):
    """GAE of one sequence, as the sum over later errors that defines it."""
    v = [*values[:length], 0.0]
    deltas = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)
    ]


@given(seeds, discounts)
def test_gae_against_the_double_sum(seed, discount):
    gamma, lam = discount
    rewards, values, mask, lengths = _rollout(seed)
    advantages, returns = jitted_gae(
        _f32(rewards), _f32(values), jnp.asarray(mask), gamma=gamma, lam=lam
    )
    expected = np.zeros_like(rewards)
    for row, length in enumerate(lengths):
        expected[row, :length] = _double_sum(rewards[row], values[row], length, gamma, lam)
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values * mask, rtol=1e-4, atol=1e-5)


@given(seeds)
def test_gae_with_lambda_one_is_reward_to_go_minus_value(seed):
    rewards, values, mask, _ = _rollout(seed)
    advantages, returns = jitted_gae(_f32(rewards), _f32(values), jnp.asarray(mask), lam=1.0)
    to_go = np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1] * mask
    np.testing.assert_allclose(advantages, to_go - values * mask, atol=1e-5)
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


@given(seeds)
def test_gae_with_lambda_zero_is_the_one_step_error(seed):
    rewards, values, mask, lengths = _rollout(seed)
    advantages, _ = jitted_gae(_f32(rewards), _f32(values), jnp.asarray(mask), gamma=0.9, lam=0.0)
    for row, length in enumerate(lengths):
        for t in range(length):
            following = values[row, t + 1] if t + 1 < length else 0.0
            error = rewards[row, t] + 0.9 * following - values[row, t]
            np.testing.assert_allclose(advantages[row, t], error, atol=1e-5)


@pytest.mark.parametrize("garbage", [1e4, np.inf, np.nan])
def test_nothing_leaks_from_padding(garbage):
    rewards, values, mask, _ = _rollout(0)
    clean = generalized_advantages(_f32(rewards), _f32(values), jnp.asarray(mask))
    spoilt = generalized_advantages(
        _f32(np.where(mask, rewards, garbage)),
        _f32(np.where(mask, values, garbage)),
        jnp.asarray(mask),
    )
    for before, after in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(before, after)
        assert not after[~mask].any()


def test_wider_padding_changes_nothing():
    rewards, values, mask, _ = _rollout(1)
    before = generalized_advantages(_f32(rewards), _f32(values), jnp.asarray(mask))
    wide = [np.pad(x, ((0, 0), (0, 4))) for x in (rewards, values, mask)]
    after = generalized_advantages(_f32(wide[0]), _f32(wide[1]), jnp.asarray(wide[2]))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b[:, :WIDTH], atol=1e-6)


@pytest.mark.parametrize(("group", "prompts"), [(2, 1), (2, 3), (5, 2)])
@given(seed=seeds)
def test_group_estimators_against_one_group_at_a_time(group, prompts, seed):
    scores = np.random.default_rng(seed).standard_normal(group * prompts) * 3
    for estimator, expected in (
        (leave_one_out, lambda s: [x - np.mean(np.delete(s, i)) for i, x in enumerate(s)]),
        (group_z_score, lambda s: (s - s.mean()) / (s.std(ddof=1) + 1e-4)),
    ):
        out = estimator(_f32(scores), group=group)
        groups = [scores[i : i + group] for i in range(0, len(scores), group)]
        np.testing.assert_allclose(
            out, np.concatenate([expected(s) for s in groups]), rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(np.reshape(out, (prompts, group)).sum(1), 0.0, atol=1e-4)


@pytest.mark.parametrize("estimator", [leave_one_out, group_z_score])
def test_a_group_of_equal_scores_teaches_nothing(estimator):
    np.testing.assert_array_equal(estimator(jnp.full(8, -3.0), group=4), jnp.zeros(8))


@pytest.mark.parametrize("estimator", [leave_one_out, group_z_score])
def test_another_prompt_s_scores_do_not_matter(estimator):
    scores = jnp.array([1.0, 2.0, 4.0, 0.0, 0.5, 3.0])
    before, after = (estimator(s, group=3) for s in (scores, scores.at[3:].multiply(1000.0)))
    np.testing.assert_array_equal(before[:3], after[:3])


@pytest.mark.parametrize("estimator", [leave_one_out, group_z_score, group_mean, best_of_group])
@pytest.mark.parametrize("group", [0, 1, 4])
def test_an_impossible_group_is_refused(estimator, group):
    with pytest.raises(ValueError, match="group must be at least 2 and divide the batch of 6"):
        estimator(jnp.zeros(6), group=group)


@given(seeds, st.floats(-100, 100), st.floats(0.1, 100))
def test_whitened_values_have_mean_zero_and_variance_one(seed, shift, scale):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((4, 8)) * scale + shift
    mask = rng.random((4, 8)) < 0.7
    mask[0, :2] = True
    out = np.asarray(whiten(_f32(values), jnp.asarray(mask)), np.float64)
    assert not out[~mask].any()
    np.testing.assert_allclose(out[mask].mean(), 0.0, atol=2e-3)
    np.testing.assert_allclose(out[mask].var(), 1.0, rtol=1e-3)
    expected = (values[mask] - values[mask].mean()) / values[mask].std()
    np.testing.assert_allclose(out[mask], expected, rtol=1e-2, atol=2e-3)


def test_whitening_nothing_or_equal_values_gives_zeros():
    values = jnp.array([5.0, jnp.nan])
    np.testing.assert_array_equal(whiten(values, jnp.array([False, False])), jnp.zeros(2))
    np.testing.assert_array_equal(whiten(values, jnp.array([True, False])), jnp.zeros(2))


def test_bfloat16_scores_give_float32_advantages():
    scores = jnp.array([1.0, 2.0, 3.0, 5.0], jnp.bfloat16)
    for estimator in (leave_one_out, group_z_score):
        assert estimator(scores, group=2).dtype == jnp.float32
    assert whiten(scores, scores > 0).dtype == jnp.float32
    table = scores.reshape(2, 2)
    assert all(x.dtype == jnp.float32 for x in generalized_advantages(table, table, table > 0))


@given(seeds, st.sampled_from([2, 3]))
def test_a_groups_mean_shrinks_the_leave_one_out_advantage(seed, group):
    scores = _f32(np.random.default_rng(seed).standard_normal(6))
    shrunk = np.asarray(leave_one_out(scores, group=group)) * (group - 1) / group
    np.testing.assert_allclose(group_mean(scores, group=group), shrunk, atol=1e-6)


@given(seeds)
def test_one_of_each_group_is_its_best(seed):
    scores = np.random.default_rng(seed).standard_normal(12)
    found = np.asarray(best_of_group(_f32(scores), group=4)).reshape(3, 4)
    np.testing.assert_array_equal(found.argmax(1), scores.reshape(3, 4).argmax(1))
    np.testing.assert_array_equal(found.sum(1), 1)


@given(seeds, st.sampled_from([1.0, 0.9, 0.0]))
def test_what_is_to_come_against_the_sum(seed, gamma):
    rewards = np.random.default_rng(seed).standard_normal((2, 5))
    expected = [
        [sum(gamma ** (k - t) * row[k] for k in range(t, 5)) for t in range(5)] for row in rewards
    ]
    np.testing.assert_allclose(to_go(_f32(rewards), gamma=gamma), expected, atol=1e-5)
