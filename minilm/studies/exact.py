"""A language small enough to enumerate: exact KL, optimum, best-of-n and policy gradient.

Every completion of one prompt is listed, so what estimators estimate can be computed. Logarithms of
probabilities are float64 NumPy arrays [N], one entry a completion; models are minilm's own.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from scipy.special import logsumexp

from minilm.config import ModelConfig
from minilm.model import Transformer
from minilm.rollout import completion_outputs

EOS = 0  # also pads: what lies after the end is masked
PROMPT = 1  # the one prompt is this token
SHAPE = ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)


class World(NamedTuple):
    """Every completion of at most R tokens; one that has no end-of-text is cut off there."""

    vocab: int
    tokens: Int[np.ndarray, "N R"]
    mask: Bool[np.ndarray, "N R"]
    finished: Bool[np.ndarray, "N"]

    @property
    def width(self) -> int:
        return self.tokens.shape[1]


def world(vocab: int = 4, length: int = 4) -> World:
    """All completions over `vocab` tokens, end-of-text among them, in the order of `place`.

    >>> world(2, 2).tokens.tolist()
    [[0, 0], [1, 0], [1, 1]]
    """
    rows = []
    for tokens in itertools.product(range(vocab), repeat=length):
        end = tokens.index(EOS) if EOS in tokens else length
        if all(t == EOS for t in tokens[end:]):  # nothing but padding after the end
            rows.append(tokens)
    array = np.array(rows, np.int32)
    before = np.cumsum(array == EOS, axis=1) - (array == EOS)
    return World(vocab, array, before == 0, (array == EOS).any(axis=1))


def place(tokens: Int[Array, "B R"], vocab: int) -> Int[Array, "B"]:
    """A completion's number in base `vocab`: where a table of vocab^R rewards has it."""
    powers = vocab ** np.arange(tokens.shape[1])[::-1]
    return jnp.sum(tokens * jnp.asarray(powers, jnp.int32)[None], axis=1)


def model_of(world: World, seed: int, *, scale: float = 0.4, critic: bool = False) -> Transformer:
    """A small random transformer whose next-token distributions are far from uniform."""
    model = Transformer(SHAPE, world.vocab, scalar_head=critic, rngs=nnx.Rngs(seed))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    drawn = [x + scale * jax.random.normal(k, x.shape) for x, k in pairs]
    return jax.tree.unflatten(structure, drawn)


@functools.partial(jax.jit, static_argnums=2)
def _token_logprobs(model: Transformer, rows: Any, width: int) -> Float[Array, "N R"]:
    tokens, segments = rows
    return completion_outputs(model, tokens, segments, width, 1.0).logprobs


def token_logprobs(model: Transformer, world: World) -> Float[Array, "N R"]:
    """Of each token of each completion, float32; 0 at padding. Differentiable in the model."""
    count = len(world.tokens)
    tokens = np.concatenate([np.full((count, 1), PROMPT), world.tokens], axis=1).astype(np.int32)
    segments = np.concatenate([np.ones((count, 1), bool), world.mask], axis=1).astype(np.int32)
    return jnp.where(world.mask, _token_logprobs(model, (tokens, segments), world.width), 0.0)


def logprobs(model: Transformer, world: World) -> Float[np.ndarray, " N"]:
    """log π(completion), normalised in float64 against rounding."""
    found = np.asarray(token_logprobs(model, world), np.float64).sum(axis=1)
    return found - logsumexp(found)


def kl(p: Float[np.ndarray, " N"], q: Float[np.ndarray, " N"]) -> float:
    """KL(p ‖ q) in nats."""
    weights = np.exp(p)
    return float(np.sum(np.where(weights > 0, weights * (p - q), 0.0)))


def expected(p: Float[np.ndarray, " N"], values: Float[np.ndarray, " N"]) -> float:
    return float(np.exp(p) @ values)


def optimal(
    reference: Float[np.ndarray, " N"], reward: Float[np.ndarray, " N"], beta: float
) -> Float[np.ndarray, " N"]:
    """log π* ∝ π_ref exp(r/β), which maximises E[r] − β KL(π ‖ π_ref).

    Reference:
      Korbak et al. (2022), RL with KL penalties is better viewed as Bayesian inference,
      arXiv:2205.11275, eq. 7.
    """
    found = reference + reward / beta
    return found - logsumexp(found)


def best_of_n(
    reference: Float[np.ndarray, " N"], reward: Float[np.ndarray, " N"], n: int
) -> Float[np.ndarray, " N"]:
    """log-probabilities of the best of n draws; ties go to any of them, as first come.

    P(best has reward ρ) = F(ρ)^n − F(ρ−)^n, shared among its completions as the reference has them.
    """
    levels, index = np.unique(reward, return_inverse=True)
    mass = np.bincount(index, np.exp(reference), len(levels))
    below = np.concatenate([[0.0], np.cumsum(mass)])
    below /= below[-1]
    gained = below[1:] ** n - below[:-1] ** n
    with np.errstate(divide="ignore"):
        return reference + np.log(gained / mass)[index]


def objective_gradient(
    model: Transformer,
    world: World,
    reward: Float[np.ndarray, " N"],
    *,
    reference: Float[np.ndarray, " N"] | None = None,
    beta: float = 0.0,
) -> Transformer:
    """∇ of E_π[r] − β KL(π ‖ π_ref) in the parameters, by enumeration."""

    def value(model):
        logs = jnp.sum(token_logprobs(model, world), axis=1)
        gain = jnp.asarray(reward, jnp.float32)
        if reference is not None:
            gain = gain - beta * (logs - jnp.asarray(reference, jnp.float32))
        return jnp.sum(jnp.exp(logs) * gain)

    return jax.grad(value)(model)


def weighted_gradient(
    model: Transformer, world: World, weights: Float[np.ndarray, "N R"]
) -> Transformer:
    """Σ weights ∇ log π(token): what an estimator gives on average if these are its weights."""
    constant = jnp.asarray(weights, jnp.float32)
    return jax.grad(lambda m: jnp.sum(constant * token_logprobs(m, world)))(model)


def prefix_values(
    p: Float[np.ndarray, " N"], world: World, reward: Float[np.ndarray, " N"]
) -> Float[np.ndarray, "N R"]:
    """V before each token: the mean reward of completions that begin as this one; 0 at padding."""
    values = np.zeros(world.tokens.shape)
    weights = np.exp(p)
    for t in range(world.width):
        _, index = np.unique(world.tokens[:, :t], axis=0, return_inverse=True)
        index = index.reshape(-1)
        total, mass = np.bincount(index, weights * reward), np.bincount(index, weights)
        values[:, t] = (total / mass)[index]
    return np.where(world.mask, values, 0.0)
