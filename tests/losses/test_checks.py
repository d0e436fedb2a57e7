import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm.errors import UserError
from minilm.losses.checks import (
    check_distributions,
    check_finite,
    check_labels,
    check_nonnegative,
    check_shape,
    check_shares,
    check_weights,
)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (check_finite, [0.0, -1e38], [0.0, -np.inf]),
        (check_shares, [0.0, 0.5, 1.0], [0.0, 1.001]),
        (check_shares, [1.0], [np.nan]),
        (check_distributions, [[0.25, 0.75], [0.0, 1.0]], [[0.25, 0.75], [0.5, 0.0]]),
        (check_nonnegative, [0.0, 3.0], [0.0, -1e-9]),
        (check_weights, [0.0, 2.0], [0.0, 0.0]),
        (check_weights, [0.5], [np.nan]),
        (lambda x, name: check_labels(x, 3, name), [0, 2], [0, 3]),
        (lambda x, name: check_labels(x, 3, name), [1], [-1]),
    ],
)
def test_good_values_pass_bad_ones_are_named_and_under_jit_none_are_looked_at(check, good, bad):
    good, bad = np.array(good), np.array(bad)
    check(good, "these")
    check(jnp.asarray(good), "these")
    with pytest.raises(UserError, match="these"):
        check(bad, "these")
    with pytest.raises(UserError, match="these"):
        check(jnp.asarray(bad), "these")

    @jax.jit
    def compiled(x):
        check(x, "these")
        return x

    compiled(jnp.asarray(bad))


def test_bfloat16_is_read_and_its_distributions_may_be_off_by_rounding():
    thirds = jnp.full((4, 3), 1 / 3, jnp.bfloat16)
    assert np.asarray(thirds, np.float64).sum(-1)[0] != 1
    check_distributions(thirds, "targets")
    with pytest.raises(UserError, match=r"1 of 2 values not finite, .* \(1,\)\n.*inf"):
        check_finite(jnp.array([1.0, jnp.inf], jnp.bfloat16), "targets")


def test_a_shape_is_looked_at_under_jit_too():
    def compiled(x):
        check_shape("targets", x, (3,), "predictions")
        return x

    with pytest.raises(UserError, match=r"targets: shape does not fit that of predictions"):
        jax.jit(compiled)(jnp.zeros((3, 1)))
