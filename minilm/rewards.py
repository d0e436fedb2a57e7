"""What RLHF is paid by: the learned reward, read at end-of-text, in units of the reference."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minilm.config import RLHFConfig
from minilm.model import Transformer, sequence_score
from minilm.rollout import Rollout


class Normalization(NamedTuple):
    """Mean and standard deviation of the raw reward on reference completions; fixed for ever."""

    mean: float
    std: float


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["members"],
    meta_fields=["scales", "combine", "penalty"],
)
@dataclasses.dataclass(frozen=True)
class RewardModel:
    """One reward model, or an ensemble whose members differ in their seed alone.

    Attributes:
      members: transformers with a scalar head.
      scales: by which each member's raw reward becomes one in units of the reference.
      combine: "mean"; "worst", the least of the members; "penalized", mean − penalty · standard
        deviation over the members: Coste et al. (2023), arXiv:2310.02743, eq. 2 to 4 (which
        subtract the variance).
    """

    members: tuple[Transformer, ...]
    scales: tuple[Normalization, ...]
    combine: str = "mean"
    penalty: float = 1.0

    def combined(self, raw: Sequence[Array | np.ndarray]) -> Float[Array, "B"]:
        """Each member's raw rewards [B] as the one that pays."""
        units = [
            (jnp.asarray(x) - scale.mean) / scale.std
            for x, scale in zip(raw, self.scales, strict=True)
        ]
        if len(units) == 1:
            return units[0]
        every = jnp.stack(units)
        if self.combine == "worst":
            return jnp.min(every, axis=0)
        mean = jnp.mean(every, axis=0)
        return mean if self.combine == "mean" else mean - self.penalty * jnp.std(every, axis=0)


def shaped(score: Float[Array, "B"], rollout: Rollout, config: RLHFConfig) -> Float[Array, "B"]:
    """What is paid for a completion of that score: clipped, less a price for each token."""
    if config.reward_clip is not None:
        score = jnp.clip(score, -config.reward_clip, config.reward_clip)
    if config.length_penalty:
        score = score - config.length_penalty * jnp.sum(rollout.mask, axis=1).astype(jnp.float32)
    return score


def learned_reward(
    reward_model: RewardModel, rollout: Rollout, *, missing_eos_score: float | Array
) -> Float[Array, "B"]:
    """The proxy: reward model's score at each completion's end-of-text token, normalised.

    A completion without end-of-text has nothing to be read at and gets `missing_eos_score`, the
    "EOS trick" of Stiennon et al. (2020) and Huang et al. (2024), arXiv:2403.17031, detail 23.
    """
    length = jnp.sum(rollout.mask, axis=1)
    last = rollout.tokens.shape[1] - rollout.mask.shape[1] + length - 1
    read = rollout.tokens, rollout.segments, last
    score = reward_model.combined([sequence_score(m, *read) for m in reward_model.members])
    return jnp.where(rollout.finished, score, jnp.float32(missing_eos_score))
