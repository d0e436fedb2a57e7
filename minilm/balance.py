"""Weights of an objective's terms that find themselves in training: two published rules.

A rule's state lives in `TrainState.extra`, so a resumed run balances on as if never stopped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm.choices import choose
from minilm.config import BalanceConfig

type State = dict[str, Array]
type PerTerm = Float[Array, "N"]


class Balance(NamedTuple):
    """A rule.

    Attributes:
      initial: (number of terms) -> state.
      factors: (state) -> what each term's own weight is multiplied by.
      update: (state, losses, gradient norms of the terms times their own weights) -> state.
      needs_norms: whether `update` reads the norms, which cost a backward pass a term.
    """

    initial: Callable[[int], State]
    factors: Callable[[State], PerTerm]
    update: Callable[[State, PerTerm, PerTerm, BalanceConfig], State]
    needs_norms: bool


def _uncertainty_update(state: State, losses: PerTerm, norms: PerTerm, config) -> State:
    """Gradient descent on s in Σ exp(−s) L + s / 2."""
    s = state["log_variances"]
    gradient = 0.5 - jnp.exp(-s) * losses
    # A loss far above its scale would throw s beyond the exponential's range in one step, and one
    # of 0, which pays for any weight, in many.
    s = s - config.learning_rate * jnp.clip(gradient, -10.0, 10.0)
    return {"log_variances": jnp.clip(s, -10.0, 10.0)}


def _gradnorm_update(state: State, losses: PerTerm, norms: PerTerm, config) -> State:
    """log w_i moves towards log G_i = log (mean(G) r_i^α); then the weights' sum is kept.

    The paper descends Σ |G_i − mean(G) r_i^α|: where norms differ a hundredfold its steps, which
    are signs times norms, throw the weights about for ever. This has the same place of rest. A term
    without a gradient, which would pull at no weight, or whose loss is not above 0, so that no
    training rate is defined, keeps its weight and is in no mean: it is not balanced.
    """
    weights, first = state["weights"], state["first"]
    alive = (norms > 1e-12) & (losses > 0)
    first = jnp.where(jnp.isnan(first) & alive, losses, first)

    def total(x):
        return jnp.sum(jnp.where(alive, x, 0.0))

    progress = jnp.where(alive, losses / jnp.where(alive, first, 1.0), 1.0)  # inverse training rate
    pulls = jnp.where(alive, weights * norms, 1.0)
    count = jnp.maximum(total(jnp.ones_like(losses)), 1.0)
    pace = progress / jnp.maximum(total(progress) / count, 1e-12)
    target = total(pulls) / count * pace**config.alpha
    gap = jnp.log(pulls) - jnp.log(jnp.maximum(target, 1e-12))
    moved = weights * jnp.exp(-config.learning_rate * jnp.clip(gap, -5.0, 5.0))
    rest = len(weights) - jnp.sum(jnp.where(alive, 0.0, weights))  # the sum of all stays
    moved = moved * rest / jnp.maximum(total(moved), 1e-12)
    return {"weights": jnp.where(alive, moved, weights), "first": first}


BALANCES: dict[str, Balance] = {
    "none": Balance(
        initial=lambda n: {},
        factors=lambda state: jnp.float32(1),
        update=lambda state, losses, norms, config: state,
        needs_norms=False,
    ),
    # Kendall, Gal and Cipolla (2018), arXiv:1705.07115, eq. 10, with s = log σ²: at rest every
    # weighted loss is 1/2. For losses that are at least 0.
    "uncertainty": Balance(
        initial=lambda n: {"log_variances": jnp.zeros(n)},
        factors=lambda state: jnp.exp(-state["log_variances"]),
        update=_uncertainty_update,
        needs_norms=False,
    ),
    # Chen et al. (2018), GradNorm, arXiv:1711.02257, eq. 2; norms are of the whole gradient, not
    # of the last shared layer's. Terms pull equally hard, slower ones a little harder.
    "gradnorm": Balance(
        initial=lambda n: {"weights": jnp.ones(n), "first": jnp.full(n, jnp.nan)},
        factors=lambda state: state["weights"],
        update=_gradnorm_update,
        needs_norms=True,
    ),
}


def balance_of(config: BalanceConfig) -> Balance:
    """Raises UserError: no such method."""
    return choose(BALANCES, config.method, "balance.method")


def initial(config: BalanceConfig, terms: int) -> State:
    """What `TrainState.extra` holds for the rule, under names of its own."""
    state = balance_of(config).initial(terms)
    return {f"balance/{name}": array for name, array in state.items()}


def stored(extra: dict[str, Any]) -> State:
    """The rule's state out of `extra`."""
    start = "balance/"
    return {k.removeprefix(start): v for k, v in extra.items() if k.startswith(start)}
