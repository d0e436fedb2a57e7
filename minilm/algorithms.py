"""RL algorithms as rows: an advantage estimator, terms, where KL enters, what is averaged over."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minilm.advantages import (
    best_of_group,
    generalized_advantages,
    group_mean,
    group_z_score,
    leave_one_out,
    to_go,
    whiten,
)
from minilm.choices import choose
from minilm.config import RLHFConfig
from minilm.errors import UserError
from minilm.losses.policy import (
    approx_kl,
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    kl_estimate,
    policy_gradient,
)
from minilm.objective import Objective, Term, Weight
from minilm.rollout import Outputs, Rollout
from minilm.terms import OVER
from minilm.text.batches import Batch

PerToken = Float[Array, "B R"]
PTX = "loss/ptx"  # next-token loss on pretraining rows, whatever the algorithm


class Price(NamedTuple):
    """How leaving the reference is paid for: an estimator of KL, in each token's reward or a loss.

    In the reward any estimator serves. As a loss on the policy's own samples k2 has the gradient of
    KL(π ‖ π₀) between next tokens, k3 that of KL(π₀ ‖ π), and k1 none on average
    (tests/studies/test_exact.py); none counts what a token does to the prefixes after it.
    """

    place: Literal["reward", "loss"]
    estimator: Literal["k1", "k2", "k3"]


class Algorithm(NamedTuple):
    """A row."""

    # (rewards [B, R], rollout, config) -> (advantages [B, R], returns [B, R] | None)
    advantages: Callable[[PerToken, Rollout, RLHFConfig], tuple[PerToken, PerToken | None]]
    terms: Mapping[str, float | str]  # trained ones and their weights, or the config key of one
    kl: Price | None  # None: the algorithm knows no price
    # What a completion's reward is compared with, the others of its prompt or of the batch; or a
    # token's, the batch's tokens or a value head of the policy's, trained by the term `value`.
    baseline: Literal["group", "batch", "tokens", "critic"]
    # What weighs the same: every token, every sequence, every token as a share of the longest
    # possible sequence ("slot"), or every token that has an advantage at all ("chosen").
    over: Literal["token", "sequence", "slot", "chosen"]

    @property
    def critic(self) -> bool:
        return self.baseline == "critic"


class PolicyBatch(NamedTuple):
    """A rollout, priced: what one update reads."""

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    mask: Bool[Array, "B R"]
    old_logprobs: PerToken
    ref_logprobs: PerToken
    advantages: PerToken
    old_values: PerToken | None
    returns: PerToken | None
    kl_scale: Float[Array, "B"]  # the KL coefficient now, as a multiple of the config's
    ptx: Batch | None = None  # rows of the pretraining text, where `rlhf.ptx_coef` asks for them


def token_rewards(
    algorithm: Algorithm, rollout: Rollout, score: Float[Array, "B"], kl_coef: float | Array
) -> PerToken:
    """The score at the last token of each completion, less the KL penalty at every token.

    r_t = −β k(t) + [t is last] · score; Ziegler et al. (2019), arXiv:1909.08593, eq. 2.
    """
    positions = jnp.arange(rollout.mask.shape[1])[None, :]
    last = positions == jnp.sum(rollout.mask, axis=1, keepdims=True) - 1
    rewards = jnp.where(last, score[:, None], 0.0)
    if algorithm.kl is None or algorithm.kl.place == "loss":
        return rewards
    kl = kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator=algorithm.kl.estimator)
    return rewards - kl_coef * jnp.where(rollout.mask, kl, 0.0)


def _of_group(estimate):
    """An estimator of whole completions as one of their tokens."""

    def advantages(rewards, rollout, config):
        of_row = estimate(jnp.sum(rewards, axis=1), group=config.group_size)
        return jnp.where(rollout.mask, of_row[:, None], 0.0), None

    return advantages


def _generalized(rewards, rollout, config):
    advantages, returns = generalized_advantages(
        rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam
    )
    return whiten(advantages, rollout.mask), returns


def _of_batch(rewards, rollout, config):
    """REINFORCE: a completion's reward less the mean of all others of the batch."""
    del config
    scores = jnp.sum(rewards, axis=1)
    return jnp.where(rollout.mask, leave_one_out(scores, group=len(scores))[:, None], 0.0), None


def _whitened_to_go(rewards, rollout, config):
    """REINFORCE++: what each token is still paid, normalised over the whole batch."""
    return whiten(to_go(rewards, gamma=config.gamma), rollout.mask), None


_grpo = _of_group(group_z_score)
_paid, _lost = Price("reward", "k1"), Price("loss", "k3")
_gradient, _clipped = {"policy_gradient": 1.0}, {"clipped_surrogate": 1.0}
ALGORITHMS: dict[str, Algorithm] = {
    # Ahmadian et al. (2024), arXiv:2402.14740.
    "rloo": Algorithm(_of_group(leave_one_out), _gradient, _paid, "group", "token"),
    # Shao et al. (2024), arXiv:2402.03300.
    "grpo": Algorithm(_grpo, _clipped, _lost, "group", "sequence"),
    # Liu et al. (2025), arXiv:2503.20783: neither the spread nor the length divides.
    "dr_grpo": Algorithm(_of_group(group_mean), _clipped, _lost, "group", "slot"),
    # Yu et al. (2025), arXiv:2503.14476: tokens weigh the same, rare ones may gain more, no KL;
    # a group of equal scores has advantage 0 and does not count.
    "dapo": Algorithm(_grpo, {"clip_higher": 1.0}, None, "group", "chosen"),
    # Williams (1992), with the batch's mean as baseline.
    "reinforce": Algorithm(_of_batch, _gradient, _paid, "batch", "token"),
    # Hu et al. (2025), arXiv:2501.03262.
    "reinforce++": Algorithm(_whitened_to_go, _clipped, _paid, "tokens", "token"),
    # Anthony et al. (2017), arXiv:1705.08439: cross-entropy on the best of each group.
    "expert_iteration": Algorithm(
        _of_group(best_of_group), {"imitation": 1.0}, _paid, "group", "chosen"
    ),
    # Schulman et al. (2017), arXiv:1707.06347; Ziegler et al. (2019), arXiv:1909.08593.
    "ppo": Algorithm(
        _generalized, {"clipped_surrogate": 1.0, "value": "value_coef"}, _paid, "critic", "token"
    ),
}


def algorithm_of(config: RLHFConfig) -> Algorithm:
    """The config's row of ALGORITHMS, with KL priced where and as `kl_in`, `kl_estimator` say.

    Where only `kl_in` is given and it is not the row's own place, k1 in the reward, k2 as a loss.

    Raises:
      UserError: no such row; k1 as a loss; an estimator for a row that prices nothing.
    """
    row = choose(ALGORITHMS, config.algorithm, "rlhf.algorithm")
    if config.kl_in is None and config.kl_estimator is None:
        return row
    place = config.kl_in or (row.kl and row.kl.place)
    if place is None:
        problem, hint = f"{config.algorithm} has no price of KL by itself", "give rlhf.kl_in too"
        raise UserError(problem, where="rlhf.kl_estimator", value=config.kl_estimator, hint=hint)
    usual = row.kl if row.kl and row.kl.place == place else Price(place, _USUAL[place])
    chosen = Price(place, config.kl_estimator or usual.estimator)
    if chosen == ("loss", "k1"):
        problem, where = "k1 as a loss has no gradient on average", "rlhf.kl_estimator"
        raise UserError(problem, where=where, value="k1", allowed="k2 or k3, or rlhf.kl_in reward")
    return row._replace(kl=chosen)


_USUAL: dict[str, Literal["k1", "k2"]] = {"reward": "k1", "loss": "k2"}


def price(
    algorithm: Algorithm,
    rollout: Rollout,
    score: Float[Array, "B"],
    config: RLHFConfig,
    kl_scale: float | Float[Array, ""] = 1.0,
) -> PolicyBatch:
    """Rewards and advantages of a rollout; `kl_scale` times `kl_coef` is the price of a nat."""
    rewards = token_rewards(algorithm, rollout, score, config.kl_coef * kl_scale)
    if config.whiten_rewards:
        rewards = whiten(rewards, rollout.mask, keep_mean=True)
    advantages, returns = algorithm.advantages(rewards, rollout, config)
    scale = jnp.full(score.shape, kl_scale, jnp.float32)
    return PolicyBatch(*rollout[:5], advantages, rollout.values, returns, scale)


def next_kl_scale(
    scale: Float[Array, ""], kl: Float[Array, ""], completions: int, config: RLHFConfig
) -> Float[Array, ""]:
    """The KL coefficient's multiple after a step: up where KL is above its target.

    β ← β (1 + clip(KL / target − 1, −0.2, 0.2) n / horizon); unchanged without a target.

    Reference:
      Ziegler et al. (2019), Fine-Tuning Language Models from Human Preferences,
      arXiv:1909.08593, section 2.2.
    """
    if config.kl_target is None:
        return scale
    error = jnp.clip(kl / config.kl_target - 1, -0.2, 0.2)
    return scale * (1 + error * completions / config.kl_horizon)


def _after(updates: int, name: str, weight: float) -> Weight:
    """The weight of a term, which is 0 for some updates unless it is the critic's."""
    if not updates or name == "value":
        return weight
    return lambda step: jnp.where(jnp.asarray(step) < updates, 0.0, weight)


def objective(algorithm: Algorithm, config: RLHFConfig) -> Objective:
    """The algorithm's terms with their weights, and TRL's diagnostics as terms of weight 0.

    With `ptx_coef` also `loss/ptx`, −log p of the pretraining rows in the batch: PPO-ptx of Ouyang
    et al. (2022), arXiv:2203.02155, eq. 2.
    """

    def over_tokens(batch: PolicyBatch):
        return batch.mask.astype(jnp.float32)

    def over_sequences(batch: PolicyBatch):
        mask = batch.mask.astype(jnp.float32)
        return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)

    def over_slots(batch: PolicyBatch):
        return jnp.ones(batch.mask.shape, jnp.float32)  # a loss on padding is 0

    def over_chosen(batch: PolicyBatch):
        return (batch.mask & (batch.advantages != 0)).astype(jnp.float32)

    over = {
        "token": over_tokens,
        "sequence": over_sequences,
        "slot": over_slots,
        "chosen": over_chosen,
    }[algorithm.over]
    clip, clip_value = config.clip, config.value_clip

    def surrogate(o: Outputs, b: PolicyBatch, high: float | None = None):
        options = {"clip": clip, "clip_high": high}
        return clipped_surrogate(o.logprobs, b.old_logprobs, b.advantages, **options)

    def kl(o: Outputs, b: PolicyBatch):
        estimator = algorithm.kl.estimator if algorithm.kl else "k3"
        each = kl_estimate(o.logprobs, b.ref_logprobs, estimator=estimator)
        return jnp.where(b.mask, b.kl_scale[:, None] * each, 0.0)

    values = {
        "policy_gradient": lambda o, b: policy_gradient(o.logprobs, b.old_logprobs, b.advantages),
        "clipped_surrogate": surrogate,
        "clip_higher": lambda o, b: surrogate(o, b, config.clip_high),
        "imitation": lambda o, b: -o.logprobs * b.advantages,
        "kl": kl,
        "value": lambda o, b: clipped_value_loss(
            o.values, b.old_values, b.returns, clip=clip_value
        ),
    }
    dials = config.model_dump()
    weights = {n: dials[w] if isinstance(w, str) else w for n, w in algorithm.terms.items()}
    if algorithm.kl and algorithm.kl.place == "loss":
        weights["kl"] = config.kl_coef
    first = config.value_warmup_steps * config.epochs * config.minibatches
    trained = [Term(f"loss/{n}", _after(first, n, w), values[n], over) for n, w in weights.items()]
    if config.ptx_coef:
        weight = _after(first, "ptx", config.ptx_coef)
        trained.append(Term(PTX, weight, lambda o, b: o.ptx, OVER["ptx"]))
    watched: dict[str, Callable[[Outputs, PolicyBatch], Array]] = {
        "policy/entropy_avg": lambda o, b: o.entropy,
        "policy/approxkl_avg": lambda o, b: approx_kl(o.logprobs, b.old_logprobs),
        "policy/clipfrac_avg": lambda o, b: clip_fraction(o.logprobs, b.old_logprobs, clip=clip),
        "val/ratio": lambda o, b: jnp.exp(o.logprobs - b.old_logprobs),
        "val/ratio_deviation": lambda o, b: jnp.abs(jnp.exp(o.logprobs - b.old_logprobs) - 1.0),
    }
    return Objective((*trained, *(Term(n, 0.0, f, over_tokens) for n, f in watched.items())))
