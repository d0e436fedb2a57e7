"""What the curves of RLHF say: rules on reward, KL, entropy, length, critic and gold."""

import math

import numpy as np

from minilm.diagnose import fits
from minilm.diagnose.curves import Curve, Curves
from minilm.diagnose.frame import Evidence, Finding, Rule, above, below
from minilm.diagnose.verdicts import nonfinite

# Limits set as those of `verdicts`.
NO_VARIANCE = 0.7  # share of groups whose completions all score the same, from the start
UNEXPLAINED = 3.2  # critic's error over half the variance of rewards in a group
COLLAPSED = 0.18  # entropy at the end over that at the start
LONGER = 1.8  # length at the end over that at the start
RISEN = 0.4  # rise of the proxy that counts, in standard deviations within a group
FALLEN = 0.5  # of gold's whole range, that it has fallen from its highest
HOLLOW = 1.0  # rise of the proxy with which gold should have risen too
UNPARSED = 0.25  # of the parse share, that is lost
FAR, COSTLY = 4.0, 2.5  # nats a completion; times what the same reward need have cost


def is_policy(curves: Curves) -> bool:
    """Whether these are curves of RLHF: a reward, and what only a policy has."""
    others = {"kl", "policy_entropy", "reward_std", "length"}
    return curves.get("score") is not None and bool(others & curves.series.keys())


def _spread(curves: Curves) -> float:
    """The larger of the reward's standard deviations within a group, at the start and the end."""
    spread = curves.get("reward_std")
    return 1.0 if spread is None else max(spread.early, spread.late, 1e-6)


def _rise(curves: Curves) -> float:
    """How far the proxy has risen, in standard deviations within a group at the start."""
    score, spread = curves.get("score"), curves.get("reward_std")
    if score is None:
        return 0.0
    unit = 1.0 if spread is None else max(spread.early, 1e-6)
    return (score.late - score.early) / unit


def _ends(figure: str, curve: Curve) -> tuple[Evidence, Evidence]:
    first, last = float(curve.steps[0]), float(curve.steps[-1])
    return Evidence(figure, curve.early, first), Evidence(figure, curve.late, last)


def zero_reward_variance(curves: Curves) -> Finding | None:
    """From the start on, all completions of a prompt score the same: there is nothing to learn."""
    share = curves.get("zero_std")
    if share is None:
        spread = curves.get("reward_std")
        if spread is None:
            return None
        share = Curve(spread.steps, (spread.values < 1e-6).astype(np.float64))
    early = float(np.mean(share.between(0.0, 0.3).values))
    if min(early, share.late) < NO_VARIANCE:
        return None
    told = _ends("share of groups without variance", share)
    return Finding(above(min(early, share.late), NO_VARIANCE), told)


def value_function_failure(curves: Curves) -> Finding | None:
    """The critic's error is a multiple of what the rewards' own spread would explain."""
    error = curves.get("value_loss")
    if error is None:
        return None
    ratio = error.late / (0.5 * _spread(curves) ** 2)
    if ratio < UNEXPLAINED:
        return None
    told = (*_ends("value loss", error), Evidence("over half the reward's variance", ratio))
    return Finding(above(ratio, UNEXPLAINED), told)


def entropy_collapse(curves: Curves) -> Finding | None:
    """The policy has become nearly certain of every token."""
    entropy = curves.get("policy_entropy")
    if entropy is None or entropy.early <= 0:
        return None
    left = max(entropy.late, 0.0) / entropy.early
    if left > COLLAPSED:
        return None
    return Finding(below(left, COLLAPSED), _ends("entropy", entropy))


def length_gaming(curves: Curves) -> Finding | None:
    """Completions grow and the proxy with them, and no judge says that they are better."""
    length, score, gold = curves.get("length"), curves.get("score"), curves.get("gold", 3)
    if length is None or score is None or length.early <= 0:
        return None
    growth = length.late / length.early
    if growth < LONGER or _rise(curves) < RISEN:
        return None
    if gold is not None and gold.values[-1] > gold.values[0] + fits.noise(gold.values):
        return None  # longer, and better
    told = [*_ends("length", length), *_ends("proxy", score)]
    clipped = curves.get("clipped")
    if clipped is not None:
        told.append(Evidence("share cut off", clipped.late, float(clipped.steps[-1])))
    return Finding(above(growth - 1, LONGER - 1), tuple(told))


def reward_hacking(curves: Curves) -> Finding | None:
    """The proxy rises, and gold falls from its highest; without gold, the parse share does."""
    score, gold = curves.get("score"), curves.get("gold", 3)
    parses = curves.get("parse_share", 3)
    if score is None or _rise(curves) < RISEN:
        return None
    truth, figure = (gold, "gold") if gold is not None else (parses, "parse share")
    if truth is None:
        return None
    few = len(truth.values) < 5  # too few to average, or to tell their noise
    highest, last = float(truth.values.max()), float(truth.values[-1 if few else -2 :].mean())
    fallen = highest - last
    scale = float(np.ptp(truth.values)) if truth is gold else highest
    share, limit = fallen / max(scale, 1e-12), FALLEN if truth is gold else UNPARSED
    # A gold that only trembles has a range too; but in the end it should have risen.
    clear = share >= limit and (few or fallen >= 2 * fits.noise(truth.values))
    hollow = truth is gold and last <= truth.values[0] and _rise(curves) >= HOLLOW
    if not clear and not hollow:
        return None
    sure = above(share, limit) if clear else above(_rise(curves), HOLLOW)
    best = float(truth.steps[int(np.argmax(truth.values))])
    told = (
        Evidence(f"highest {figure}", highest, best),
        Evidence(figure, float(truth.values[-1]), float(truth.steps[-1])),
        *_ends("proxy", score),
    )
    return Finding(sure, told)


def kl_blow_up(curves: Curves) -> Finding | None:
    """The policy is far from the reference, and further than its reward need have cost.

    Tilting a Gaussian reward of standard deviation σ by its exponential raises its mean by Δ at a
    KL of Δ² / 2σ², and no policy does it for less (Gao et al. 2022, arXiv:2210.10760, section 3).
    """
    kl = curves.get("kl")
    if kl is None or kl.late < FAR:
        return None
    need = max(_rise(curves), 0.0) ** 2 / 2
    cost = kl.late / max(need, 1e-6)
    if cost < COSTLY:
        return None
    told = (*_ends("KL, nats a completion", kl), Evidence("KL that this reward needs", need))
    return Finding(min(above(kl.late, FAR), above(cost, COSTLY)), told)


def no_progress(curves: Curves) -> Finding | None:
    """The proxy has not risen by more than chance."""
    score = curves.get("score")
    if score is None or len(score.steps) < 12:
        return None
    rise, error = fits.slope(score)
    if rise > 2 * error or not math.isfinite(error):
        return None
    return Finding(0.5, _ends("proxy", score))


def course(curves: Curves) -> tuple[str, Finding] | None:
    """`improving`, or `converged` where the last third brought nothing more."""
    score = curves.get("score")
    if score is None:
        return None
    rise, error = fits.slope(score.between(2 / 3, 1.0))
    error = max(error, 1e-12)  # of a curve without noise
    told = _ends("proxy", score)
    if rise > error:
        return "improving", Finding(above(rise, error), told)
    return "converged", Finding(below(max(rise, 0.0), error), told)


RULES: dict[str, Rule] = {  # causes before their consequences
    "nonfinite": nonfinite,
    "zero_reward_variance": zero_reward_variance,
    "entropy_collapse": entropy_collapse,
    "value_function_failure": value_function_failure,
    "length_gaming": length_gaming,
    "reward_hacking": reward_hacking,
    "kl_blow_up": kl_blow_up,
    "plateau": no_progress,
}
EXPLAINED_BY: dict[str, frozenset[str]] = {  # as in `verdicts`
    "entropy_collapse": frozenset({"zero_reward_variance"}),
    "value_function_failure": frozenset({"zero_reward_variance", "entropy_collapse"}),
    "plateau": frozenset("*"),
}
