"""Rollouts: completions of the policy with every log-probability that the update needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minilm.generate import Samples
from minilm.losses.language import entropy, token_logprobs
from minilm.model import Transformer, hidden_states, logits, scalar


class Rollout(NamedTuple):
    """Left-padded prompts with completions (T = P + R), and what models say of each token."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 1 at real tokens, 0 at padding
    mask: Bool[Array, "B R"]  # True at the completion's own tokens, its end-of-text included
    logprobs: Float[Array, "B R"]  # under the sampling policy, recorded while sampling
    ref_logprobs: Float[Array, "B R"]  # under the frozen reference
    values: Float[Array, "B R"] | None  # the critic's, before each token
    finished: Bool[Array, "B"]  # whether the completion ended within R tokens


class Outputs(NamedTuple):
    """What a forward pass says of each completion token."""

    logprobs: Float[Array, "B R"]
    entropy: Float[Array, "B R"]
    values: Float[Array, "B R"] | None
    ptx: Float[Array, "P S"] | None = None  # nats of each target of the pretraining rows, if any


def completion_outputs(
    model: Transformer,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    width: int,
    temperature: float,
) -> Outputs:
    """Log-probabilities, entropies and values of the last `width` tokens of each row.

    `temperature` divides the logits as it did in sampling, else the first ratio would not be 1.
    """
    hidden = hidden_states(model, tokens[:, :-1], segments[:, :-1])[:, -width:]
    scores = logits(model, hidden) / temperature
    values = None if model.score is None else scalar(model, hidden)
    return Outputs(token_logprobs(scores, tokens[:, -width:]), entropy(scores), values)


def complete_rollout(
    model: Transformer,
    reference: Transformer,
    prompts: Int[Array, "B P"],
    samples: Samples,
    *,
    pad_id: int,
    temperature: float,
) -> Rollout:
    """Adds to samples what the reference and the critic say of them."""
    tokens = jnp.concatenate([prompts, samples.tokens], axis=1)
    segments = jnp.concatenate([prompts != pad_id, samples.mask], axis=1).astype(jnp.int32)
    width = samples.tokens.shape[1]
    ref = completion_outputs(reference, tokens, segments, width, temperature).logprobs
    values = None
    if model.score is not None:
        values = completion_outputs(model, tokens, segments, width, temperature).values
        values = jax.lax.stop_gradient(values)
    ref, finished = jax.lax.stop_gradient(ref), samples.finished
    return Rollout(tokens, segments, samples.mask, samples.logprobs, ref, values, finished)
