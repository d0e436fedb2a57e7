"""Losses: arrays to arrays, one loss per element, float32; no model, no state, no reduction.

docs/losses.md shows each: its formula, its picture, what it rewards and what it ignores.
"""

from collections.abc import Callable

from jaxtyping import Array

from minilm.losses import (
    classification,
    language,
    policy,
    preference,
    ranking,
    regression,
    regularization,
)

# Everything that can be minimised, by name. A new row is tested without new test code.
LOSSES: dict[str, Callable[..., Array]] = {
    function.__name__: function
    for function in (
        regression.squared_error,
        regression.absolute_error,
        regression.huber,
        regression.log_cosh,
        regression.quantile_loss,
        regression.expectile_loss,
        regression.linex,
        regression.gaussian_nll,
        classification.binary_cross_entropy,
        classification.softmax_cross_entropy,
        classification.soft_cross_entropy,
        classification.focal,
        classification.hinge,
        classification.cost_sensitive,
        classification.ordinal,
        ranking.pairwise_logistic,
        ranking.pairwise_hinge,
        ranking.listnet,
        ranking.listmle,
        ranking.approximate_ndcg,
        language.next_token_cross_entropy,
        language.z_loss,
        language.unlikelihood,
        language.entropy,
        language.kl_divergence,
        language.forward_kl,
        language.reverse_kl,
        language.jensen_shannon,
        preference.bradley_terry,
        policy.clipped_surrogate,
        policy.policy_gradient,
        policy.kl_estimate,
        policy.clipped_value_loss,
        regularization.l1,
        regularization.l2,
        regularization.l2_from,
        regularization.gradient_penalty,
        regularization.group_gap,
    )
}
