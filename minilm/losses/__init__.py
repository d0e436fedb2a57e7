"""Losses: arrays to arrays, one loss per element, float32; no model, no state, no reduction."""

from collections.abc import Callable

from jaxtyping import Array

from minilm.losses.language import (
    entropy,
    kl_divergence,
    next_token_cross_entropy,
    token_logprobs,
    z_loss,
)
from minilm.losses.policy import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimate,
    policy_gradient,
)
from minilm.losses.preference import bradley_terry
from minilm.losses.reduce import Mean, mean

# Everything that can be minimised, by name. A new row is tested without new test code.
LOSSES: dict[str, Callable[..., Array]] = {
    "next_token_cross_entropy": next_token_cross_entropy,
    "entropy": entropy,
    "kl_divergence": kl_divergence,
    "z_loss": z_loss,
    "bradley_terry": bradley_terry,
    "clipped_surrogate": clipped_surrogate,
    "policy_gradient": policy_gradient,
    "kl_estimate": kl_estimate,
    "clipped_value_loss": clipped_value_loss,
}

__all__ = [
    "LOSSES",
    "Mean",
    "approx_kl",
    "clip_fraction",
    "mean",
    "token_logprobs",
    *LOSSES,  # pyright: ignore[reportUnsupportedDunderAll]
]
