"""What RLHF is paid by: the learned reward, read at end-of-text, in units of the reference."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm.model import Transformer, sequence_score
from minilm.rollout import Rollout


class Normalization(NamedTuple):
    """Mean and standard deviation of the raw reward on reference completions; fixed for ever."""

    mean: float
    std: float


def learned_reward(
    reward_model: Transformer,
    rollout: Rollout,
    *,
    normalization: Normalization,
    missing_eos_score: float | Array,
) -> Float[Array, "B"]:
    """The proxy: reward model's score at each completion's end-of-text token, normalised.

    A completion without end-of-text has nothing to be read at and gets `missing_eos_score`, the
    "EOS trick" of Stiennon et al. (2020) and Huang et al. (2024), arXiv:2403.17031, detail 23.
    """
    length = jnp.sum(rollout.mask, axis=1)
    last = rollout.tokens.shape[1] - rollout.mask.shape[1] + length - 1
    raw = sequence_score(reward_model, rollout.tokens, rollout.segments, last)
    score = (raw - normalization.mean) / normalization.std
    return jnp.where(rollout.finished, score, jnp.float32(missing_eos_score))
