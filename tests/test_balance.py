"""Rules that find the weights: what they leave at rest, in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm import balance
from minilm.config import BalanceConfig, OptimizerConfig
from minilm.errors import UserError
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer
from minilm.step import init_state, make_train_step

CONFIG = BalanceConfig(method="uncertainty", learning_rate=0.1)


def iterate(config, losses, norms, steps):
    rule, given = balance.balance_of(config), (jnp.asarray(losses), jnp.asarray(norms))
    update = jax.jit(lambda state: rule.update(state, *given, config))
    state = rule.initial(len(losses))
    for _ in range(steps):
        state = update(state)
    return rule.factors(state)


def test_uncertainty_rests_where_every_weighted_loss_is_one_half():
    """d/ds (exp(−s) L + s/2) = 0 at exp(−s) L = 1/2."""
    losses = np.array([0.02, 1.0, 40.0], np.float32)
    found = iterate(CONFIG, losses, losses, 2000)
    np.testing.assert_allclose(found * losses, 0.5, rtol=1e-3)


def test_gradnorm_makes_terms_pull_equally_hard():
    """With α = 0 at rest w_i G_i is the same for all; the weights' sum is kept."""
    config = BalanceConfig(method="gradnorm", learning_rate=0.01, alpha=0.0)
    norms = np.array([1.0, 5.0, 0.5], np.float32)
    found = iterate(config, np.ones(3, np.float32), norms, 3000)
    pulls = np.asarray(found) * norms
    assert pulls.max() / pulls.min() < 1.1  # a sign's step leaves it swinging by the rate
    assert float(found.sum()) == pytest.approx(3)


def test_gradnorm_pulls_harder_where_training_is_slow():
    config = BalanceConfig(method="gradnorm", learning_rate=0.01, alpha=1.0)
    rule = balance.balance_of(config)
    state = rule.update(rule.initial(2), jnp.ones(2), jnp.ones(2), config)
    update = jax.jit(lambda s: rule.update(s, jnp.array([1.0, 0.25]), jnp.ones(2), config))
    for _ in range(2000):  # the second has come down to a quarter of its first loss
        state = update(state)
    slow, fast = rule.factors(state)
    assert float(slow / fast) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(("lost", "norm"), [(0.0, 0.0), (1.0, 0.0), (-1.0, 100.0), (0.0, 3.0)])
def test_a_term_that_cannot_be_balanced_keeps_its_weight_and_spoils_no_others(lost, norm):
    """A scheduled term at weight 0, an empty one, a reward as a negative loss: with them, all the
    weight once went where no gradient was, or to NaN."""
    config = BalanceConfig(method="gradnorm", learning_rate=0.02)
    rule = balance.BALANCES["gradnorm"]
    state = rule.initial(3)
    for _ in range(300):
        losses, norms = jnp.asarray([1.0, 2.0, lost]), jnp.asarray([1.0, 4.0, norm])
        state = rule.update(state, losses, norms, config)
    weights = np.asarray(rule.factors(state))
    assert weights[2] == 1.0
    assert weights[0] == pytest.approx(4 * weights[1], rel=0.05)
    assert weights[:2].sum() == pytest.approx(2, rel=1e-4)


def test_a_loss_of_zero_raises_its_weight_to_a_bound():
    found = iterate(CONFIG, np.zeros(1, np.float32), np.zeros(1, np.float32), 3000)
    assert float(found[0]) == pytest.approx(np.exp(10.0), rel=1e-4)


def test_none_leaves_the_weights():
    assert balance.initial(BalanceConfig(), 3) == {}
    assert float(balance.BALANCES["none"].factors({})) == 1


def test_an_unknown_method_is_a_users_error():
    with pytest.raises(UserError, match=r"balance\.method"):
        balance.balance_of(BalanceConfig.model_construct(method="gradnrom"))


class Line(nnx.Module):
    def __init__(self):
        self.slope = nnx.Param(jnp.ones(()))


class Points(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    weights: np.ndarray


def forward(model, batch):
    return model.slope[...] * batch.x


POINTS = Points(np.ones(4, np.float32), np.full(4, 2.0, np.float32), np.ones(4, np.float32))
TUG = Objective(
    (
        Term("up", 1.0, lambda o, b: (o - b.y) ** 2, lambda b: b.weights),
        Term("down", 1.0, lambda o, b: 100.0 * o**2, lambda b: b.weights),
    )
)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_training_a_loud_term_is_turned_down(accumulation):
    """At a slope of 1 the terms' gradients are 2 and 200."""
    config = BalanceConfig(method="gradnorm", learning_rate=0.02, alpha=0.0)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"), 200)
    step = make_train_step(forward, TUG, optimizer, accumulation=accumulation, balancing=config)
    state = init_state(Line(), optimizer, TUG, config)
    for _ in range(200):
        state, metrics = step(state, POINTS)
    assert float(metrics["weight/up"].value) > 10 * float(metrics["weight/down"].value)


def test_without_balance_a_constant_weight_is_not_logged():
    optimizer = make_optimizer(OptimizerConfig(), 10)
    _, metrics = make_train_step(forward, TUG, optimizer)(init_state(Line(), optimizer), POINTS)
    assert not [name for name in metrics if name.startswith("weight/")]
    assert float(metrics["loss"].value) == pytest.approx(1.0 + 100.0)
