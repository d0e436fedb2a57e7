import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.errors import UserError
from minilm.losses.preference import bradley_terry


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 1))
def test_against_float64(chosen, rejected, label):
    win = 1 / (1 + math.exp(rejected - chosen))
    lose = 1 / (1 + math.exp(chosen - rejected))
    expected = -label * math.log(win) - (1 - label) * math.log(lose)
    out = bradley_terry(
        jnp.full(1, chosen), jnp.full(1, rejected), label=jnp.full(1, label, jnp.float32)
    )
    np.testing.assert_allclose(out, [expected], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", [np.full(3, 2.0), np.array([0.5, np.nan, 1.0])])
def test_labels_that_are_no_shares_are_refused(label):
    with pytest.raises(UserError, match="label"):
        bradley_terry(jnp.zeros(3), jnp.zeros(3), label=jnp.asarray(label, jnp.float32))


def test_gradient_is_predicted_minus_observed_share():
    scores, labels = jnp.array([-2.0, 0.0, 1.0]), jnp.array([0.0, 0.6, 1.0])
    chosen, rejected = jax.grad(
        lambda c, r: bradley_terry(c, r, label=labels).sum(), argnums=(0, 1)
    )(scores, jnp.zeros(3))
    expected = 1 / (1 + np.exp(-np.array([-2.0, 0.0, 1.0]))) - np.array([0.0, 0.6, 1.0])
    np.testing.assert_allclose(chosen, expected, atol=1e-6)
    np.testing.assert_allclose(rejected, -expected, atol=1e-6)


@given(st.floats(-5, 5), st.floats(0, 1))
def test_swapping_the_pair_and_its_label_changes_nothing(margin, label):
    ahead, behind = jnp.full(1, margin), jnp.zeros(1)
    np.testing.assert_allclose(
        bradley_terry(ahead, behind, label=label),
        bradley_terry(behind, ahead, label=1 - label),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_minimum_is_at_the_log_odds_of_the_votes(share):
    margins = jnp.linspace(-4, 4, 8001)
    losses = bradley_terry(margins, jnp.zeros_like(margins), label=share)
    best = float(margins[jnp.argmin(losses)])
    assert abs(best - math.log(share / (1 - share))) < 0.05
    floor = -share * math.log(share) - (1 - share) * math.log(1 - share)
    np.testing.assert_allclose(losses.min(), floor, rtol=1e-5)


def test_averaged_votes_equal_the_average_over_votes():
    margin, zero = jnp.full(1, 0.7), jnp.zeros(1)
    votes = [bradley_terry(margin, zero, label=v) for v in (1.0, 1.0, 1.0, 0.0, 0.0)]
    np.testing.assert_allclose(bradley_terry(margin, zero, label=0.6), sum(votes) / 5, rtol=1e-6)
