"""Terms by name: a loss applied to a stage's outputs, added by `[objective.NAME] weight = …`.

Each is (outputs, batch, *, options) -> per-element loss, with the stage's own weights of elements.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from minilm.choices import bind, choose
from minilm.config import Config, TermConfig
from minilm.errors import UserError
from minilm.losses import (
    classification,
    language,
    policy,
    preference,
    ranking,
    regression,
    regularization,
)
from minilm.objective import Objective, Penalty, Term, Weight

type Values = Callable[..., Float[Array, "..."]]


def z_loss(logits, batch):
    return language.z_loss(logits)


def smoothing(logits, batch):
    """Cross-entropy to the uniform distribution: what label smoothing adds."""
    return optax.losses.softmax_cross_entropy(
        logits.astype(jnp.float32), jnp.full(logits.shape, 1 / logits.shape[-1], jnp.float32)
    )


def repetition(logits, batch):
    """Unlikelihood of saying the present token again, where it does not come again."""
    said = language.unlikelihood(logits, batch.tokens)
    return jnp.where(batch.tokens == batch.targets, 0.0, said)


def token_entropy(logits, batch):
    return language.entropy(logits)


def centering(scores, batch):
    """(r₁ + r₂)²: keeps rewards near 0. Eisenstein et al. (2023), arXiv:2312.09244."""
    return (scores.first + scores.second).astype(jnp.float32) ** 2


def hinge(scores, batch, *, margin: float = 1.0):
    """A pair as a list of two, the one with more votes first."""
    return ranking.pairwise_hinge(
        jnp.stack(scores[:2], axis=-1), jnp.stack([batch.label, 1 - batch.label], -1), margin=margin
    )


def bradley_terry_smoothed(scores, batch, *, smoothing: float = 0.1):
    """Votes drawn towards a tie, as of raters of whom a share says anything (label smoothing)."""
    label = (1 - smoothing) * batch.label + smoothing / 2
    return preference.bradley_terry(scores.first, scores.second, label=label)


def bradley_terry_margin(scores, batch, *, margin: float = 1.0):
    """A unanimous vote asks for a difference of `margin` first. Touvron et al. (2023), eq. 2."""
    shift = margin * (2 * batch.label - 1)
    return preference.bradley_terry(scores.first - shift, scores.second, label=batch.label)


def plackett_luce(scores, batch):
    """The order of a prompt's completions as a whole, by their ratings."""
    mask = _completions(batch) > 0
    lowest = jnp.min(jnp.where(mask, batch.rating, jnp.inf), axis=-1, keepdims=True)
    above = jnp.where(mask, batch.rating - lowest, 0.0)
    return ranking.listmle(scores.every, above, mask=mask)


def rating(scores, batch):
    """Squared error to each completion's rating."""
    return regression.squared_error(scores.every, batch.rating)


LOW, HIGH = 0.0, 1.0  # of ratings that are shares of votes


def ordinal(scores, batch, *, levels: int = 5, low: float = LOW, high: float = HIGH):
    """Ratings from `low` to `high` as so many grades; `check_grades` has seen that they are."""
    grade = (levels - 1) * (batch.rating - low) / (high - low)
    grades = jnp.clip(jnp.round(grade), 0, levels - 1).astype(jnp.int32)
    return classification.ordinal(scores.every, grades, levels=levels)


def check_grades(config: Config, ratings: Sequence[float]) -> None:
    """Refuses what `ordinal`, where the objective has it, would clip: under jit it cannot look.

    Raises:
      UserError: `high` is not above `low`, or a rating lies outside them.
    """
    row, where = config.objective.get("ordinal"), "objective.ordinal.options"
    if row is None or (row.stages and "reward" not in row.stages):
        return
    low, high = row.options.get("low", LOW), row.options.get("high", HIGH)
    if isinstance(low, str) or isinstance(high, str) or low >= high:
        raise UserError("high must be a number above low", where=where, value=row.options)
    outside = [x for x in ratings if not low <= x <= high]
    if outside:
        problem = f"{len(outside)} of {len(ratings)} ratings are not from low to high"
        allowed = f"{low} to {high}"
        hint = "low and high end the raters' scale; without ratings a share of votes counts"
        raise UserError(problem, where=where, value=outside[0], allowed=allowed, hint=hint)


def language_model(scores, batch):
    """Next tokens of all completions: Yang et al. (2024), arXiv:2406.10216, section 3.2."""
    before, following = scores.logits[..., :-1, :], batch.tokens[..., 1:]
    return language.next_token_cross_entropy(before, following)


def _lists(batch):
    return (jnp.sum(batch.weights, axis=-1) > 0).astype(jnp.float32)


def _completions(batch):
    return (batch.last > 0).astype(jnp.float32)


def _tokens(batch):
    return (batch.segments[..., 1:] > 0).astype(jnp.float32)


def _pretraining(batch):
    return batch.ptx.weights


def policy_entropy(outputs, batch):
    return jnp.where(batch.mask, outputs.entropy, 0.0)  # dr_grpo counts padding too


def reference_kl(outputs, batch, *, estimator: str = "k3"):
    each = policy.kl_estimate(outputs.logprobs, batch.ref_logprobs, estimator=estimator)  # pyright: ignore
    return jnp.where(batch.mask, each, 0.0)


LANGUAGE: dict[str, Values] = {
    "z_loss": z_loss,
    "smoothing": smoothing,
    "repetition": repetition,
    "entropy": token_entropy,
}
TERMS: dict[str, dict[str, Values]] = {
    "pretrain": LANGUAGE,
    "sft": LANGUAGE,
    "reward": {
        "centering": centering,
        "hinge": hinge,
        "bradley_terry_smoothed": bradley_terry_smoothed,
        "bradley_terry_margin": bradley_terry_margin,
        "plackett_luce": plackett_luce,
        "rating": rating,
        "ordinal": ordinal,
        "language_model": language_model,
    },
    "rlhf": {"entropy": policy_entropy, "reference_kl": reference_kl},
}
# The elements' weights of terms whose elements are others than those of the stage's own.
OVER: dict[str, Callable[[Any], Float[Array, "..."]]] = {
    "plackett_luce": _lists,
    "rating": _completions,
    "ordinal": _completions,
    "language_model": _tokens,
    "ptx": _pretraining,
}
PENALTIES: dict[str, Callable[[Any], Float[Array, ""]]] = {
    "l1": regularization.l1,
    "l2": regularization.l2,
}


def reads_lists(config: Config) -> bool:
    """Whether a term of the reward model reads each prompt's completions as a list, or one by one.

    Pairs of a list would give it other lists, other ratings, and completions many times over.
    """
    rows = [config.objective.get(name) for name in OVER if name in TERMS["reward"]]
    return any(row and (not row.stages or "reward" in row.stages) for row in rows)


def known_names(own: Mapping[str, Objective]) -> set[str]:
    """Every name that `[objective.NAME]` may have, given each stage's own objective."""
    names = {name for rows in TERMS.values() for name in rows} | set(PENALTIES)
    return names | {plain(t.name) for o in own.values() for t in o.terms if not _is_metric(t)}


def _is_metric(term: Term) -> bool:
    """Only watched: a count, say, which nothing can be learnt from."""
    return isinstance(term.weight, float) and term.weight == 0 and "loss/" not in term.name


def plain(name: str) -> str:
    """A term's name without TRL's prefix: `loss/policy_gradient` is configured as the latter."""
    return name.removeprefix("loss/")


def configured(own: Objective, stage: str, config: Config, steps: int) -> Objective:
    """A stage's own objective with what `[objective]` adds to it or weighs otherwise.

    Args:
      own: its first term's weights of elements are those of the added terms, but for OVER.
      steps: optimizer steps of the stage, for the schedules.
    Raises:
      UserError: an unknown name or option; a term named for a stage that has none of the kind.
    """
    terms = {plain(term.name): term for term in own.terms}
    penalties = list(own.penalties)
    for name, row in config.objective.items():
        where = f"objective.{name}"
        if row.stages and stage not in row.stages:
            continue
        if not any(name in rows for rows in (terms, TERMS[stage], PENALTIES)):
            if stage in row.stages:
                choose(terms | TERMS[stage] | PENALTIES, name, f"{where} in {stage}")
            continue
        weight = scheduled(row, steps, where)
        if name in terms:
            if _is_metric(terms[name]) and weight != 0:
                problem = "is measured, and nothing can be learnt from it"
                raise UserError(problem, where=where, allowed=sorted(known_names({stage: own})))
            if row.options:
                raise UserError("a stage's own term takes no options", where=f"{where}.options")
            terms[name] = terms[name]._replace(weight=weight)
        elif name in PENALTIES:
            penalties.append(Penalty(name, weight, PENALTIES[name]))
        else:
            values = bind(TERMS[stage], name, row.options, where)
            terms[name] = Term(name, weight, values, OVER.get(name, own.terms[0].over))
    objective = Objective(tuple(terms.values()), tuple(penalties))
    if not objective.trained:
        raise UserError(
            f"no term of {stage} has a weight: nothing would be learnt", where="objective"
        )
    return objective


def scheduled(row: TermConfig, steps: int, where: str) -> Weight:
    """The weight by optimizer step; a number where it stays."""
    end = steps if row.end is None else row.end
    if row.schedule == "constant":
        return row.weight
    if row.schedule != "step" and end <= row.begin:
        raise UserError("must lie beyond begin", where=f"{where}.end", value=end)
    span = max(end - row.begin, 1)
    difference = row.weight - row.final_weight
    shapes: dict[str, Callable[[Any], Any]] = {
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
        "step": lambda done: jnp.where(done > 0, 0.0, 1.0),
    }
    shape = shapes[row.schedule]

    def weight(step: Any) -> Any:
        passed = jnp.asarray(step, jnp.float32) - row.begin + int(row.schedule == "step")
        return row.final_weight + difference * shape(jnp.clip(passed / span, 0.0, 1.0))

    return weight


# Whose docstring says what a term rewards and ignores; the others are losses of the same name.
LOSS_OF = {
    "cross_entropy": "next_token_cross_entropy",
    "smoothing": "soft_cross_entropy",
    "repetition": "unlikelihood",
    "centering": "squared_error",
    "hinge": "pairwise_hinge",
    "bradley_terry_smoothed": "bradley_terry",
    "bradley_terry_margin": "bradley_terry",
    "plackett_luce": "listmle",
    "rating": "squared_error",
    "language_model": "next_token_cross_entropy",
    "reference_kl": "kl_estimate",
    "kl": "kl_estimate",
    "clip_higher": "clipped_surrogate",
    "imitation": "next_token_cross_entropy",
    "value": "clipped_value_loss",
    "ptx": "next_token_cross_entropy",
}
