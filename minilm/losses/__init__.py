"""Losses: arrays to arrays, one loss per element, float32; no model, no state, no reduction."""

from collections.abc import Callable

from jaxtyping import Array

from minilm.losses import language, policy, preference

# Everything that can be minimised, by name. A new row is tested without new test code.
LOSSES: dict[str, Callable[..., Array]] = {
    "next_token_cross_entropy": language.next_token_cross_entropy,
    "entropy": language.entropy,
    "kl_divergence": language.kl_divergence,
    "bradley_terry": preference.bradley_terry,
    "clipped_surrogate": policy.clipped_surrogate,
    "policy_gradient": policy.policy_gradient,
    "kl_estimate": policy.kl_estimate,
    "clipped_value_loss": policy.clipped_value_loss,
}
