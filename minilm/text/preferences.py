"""Preference pairs: the JSON Lines format, Bradley-Terry labels, what can be known of them."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minilm.config import PreferencesConfig
from minilm.errors import UserError
from minilm.text.formats import pairwise, plain, real
from minilm.text.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Two completions of a prompt, and how many of `votes` raters chose the first."""

    prompt: str
    chosen: str
    rejected: str
    votes_chosen: int = 1
    votes: int = 1
    gold_chosen: float | None = None  # the judge's score, where there is a judge
    gold_rejected: float | None = None
    rating_chosen: float | None = None  # a rater's own, where each completion was rated
    rating_rejected: float | None = None
    # What each simulated rater sees in `chosen` less that in `rejected`, where that is not gold.
    seen_gaps: tuple[float, ...] | None = None


def chosen_probability(
    gap: np.ndarray | np.floating | float, raters: PreferencesConfig
) -> np.ndarray | np.floating:
    """Expected vote of one rater for the first: Bradley and Terry (1952), a share of it flipped.

    (1 − f) p + f (1 − p);  p = σ(gap / temperature), and a tie is half a vote.
    """
    win, lose = _outcomes(gap, raters)
    return win if not raters.tie_band else 0.5 * (1 + win - lose)


def _outcomes(gap: Any, raters: PreferencesConfig) -> tuple[Any, Any]:
    """P(the first wins) and P(the second wins); between them lies the tie."""
    scaled = np.asarray(gap, np.float64) / raters.rater_temperature

    def wins(x):
        shown = (x + raters.position_bias, x - raters.position_bias)
        return sum(0.5 * (1 + np.tanh((s - raters.tie_band) / 2)) for s in shown) / 2

    win, lose = wins(scaled), wins(-scaled)
    flip = raters.flip_rate
    if not raters.tie_band:
        lose = 1 - win  # exactly
    return (1 - flip) * win + flip * lose, (1 - flip) * lose + flip * win


def label_pairs(
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    gold: np.ndarray,
    rng: np.random.Generator,
    raters: PreferencesConfig,
    seen: np.ndarray | None = None,
) -> list[Pair]:
    """All pairs of each prompt's different completions, labelled by simulated raters.

    The completion with more votes is `chosen`; a tie is drawn. Where raters may call a tie every
    vote counts two, and a tie one for each. Of R raters who see otherwise, vote i is by i mod R.

    Args:
      gold: [prompts, completions].
      seen: what the raters see instead, of the same shape or [R, prompts, completions]; None: gold.
    """
    pairs, worth = [], 2 if raters.tie_band else 1
    total = worth * raters.raters
    views = (gold if seen is None else seen).reshape(-1, *gold.shape)
    each = _votes(raters, len(views))
    for prompt, texts, scores, judged in zip(
        prompts, completions, gold, views.swapaxes(0, 1), strict=True
    ):
        for i, j in itertools.combinations(range(len(texts)), 2):
            if texts[i] == texts[j] or (raters.coverage < 1 and rng.random() >= raters.coverage):
                continue
            win, lose = _outcomes(judged[:, i] - judged[:, j], raters)
            if raters.tie_band:
                shares = np.stack([win, lose, np.maximum(1 - win - lose, 0)], axis=-1)
                won, lost, _ = rng.multinomial(each, shares).sum(axis=0)
                votes = int(raters.raters + won - lost)
            else:
                votes = int(rng.binomial(each, win).sum())
            tie_to_first = bool(rng.random() < 0.5)
            if 2 * votes < total or (2 * votes == total and not tie_to_first):
                i, j, votes = j, i, total - votes
            told = {"gold_chosen": float(scores[i]), "gold_rejected": float(scores[j])}
            gaps = None if seen is None else tuple((judged[:, i] - judged[:, j]).tolist())
            pairs.append(Pair(prompt, texts[i], texts[j], votes, total, **told, seen_gaps=gaps))
    return pairs


def _votes(raters: PreferencesConfig, views: int) -> Int[np.ndarray, " R"]:
    """How many of a pair's votes each of R = `views` raters has: vote i is by rater i mod R."""
    return np.bincount(np.arange(raters.raters) % views, minlength=views)


def label_probabilities(
    pairs: Sequence[Pair], config: PreferencesConfig
) -> tuple[Float[np.ndarray, " N"], bool]:
    """P(one rater prefers `chosen`), and whether that is known.

    It is where the raters are simulated; where they see differently, the mean over their votes. In
    a file of the user's, gold or not, nobody knows how its raters voted: there it is the observed
    share of votes.
    """
    if config.file or any(p.gold_chosen is None or p.gold_rejected is None for p in pairs):
        return np.array([p.votes_chosen / p.votes for p in pairs]), False
    return _vote_mean(pairs, config, lambda p: p), True


def rater_agreement(pairs: Sequence[Pair], config: PreferencesConfig) -> Float[np.ndarray, " N"]:
    """P(two votes on a pair agree), of simulated raters; of a pair's only vote, with its like.

    >>> told = {"gold_chosen": 1.0, "gold_rejected": 0.0, "seen_gaps": (9.0, -9.0)}
    >>> pair = Pair("", "a", "b", 1, 2, **told)
    >>> rater_agreement([pair], PreferencesConfig(raters=2)).round(3).tolist()
    [0.0]
    """
    n = config.raters
    p, squares = (_vote_mean(pairs, config, f) for f in (lambda p: p, np.square))
    if n == 1:
        return p**2 + (1 - p) ** 2
    # Over ordered pairs of different votes: all pairs less those of a vote with itself.
    return (n * (p**2 + (1 - p) ** 2) - squares - (1 - 2 * p + squares)) / (n - 1)


def _vote_mean(pairs: Sequence[Pair], config: PreferencesConfig, of: Callable[[Any], Any]):
    """Over the votes on each pair: the mean of of(P(this vote is for `chosen`)), [N]."""
    gaps = [p.seen_gaps or (p.gold_chosen - p.gold_rejected,) for p in pairs]  # pyright: ignore
    each = np.asarray(chosen_probability(np.concatenate(gaps), config))
    shares = np.concatenate([_votes(config, len(g)) for g in gaps]) / config.raters
    starts = np.cumsum([0, *map(len, gaps)])[:-1]
    return np.add.reduceat(of(each) * shares, starts)


def bayes_rates(p: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Best possible accuracy and log-loss against one rater's label: E max(p, 1−p), E H(p)."""
    q = np.clip(p, 1e-300, 1 - 1e-16)
    entropy = -(p * np.log(q) + (1 - p) * np.log1p(-q)).mean()
    return float(np.maximum(p, 1 - p).mean()), float(entropy)


def rows_of(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The pairs as JSON objects; keys without a value are left out."""
    return [{k: v for k, v in p._asdict().items() if v is not None} for p in pairs]


def fitting(
    pairs: Sequence[Pair], tokenizer: Tokenizer, max_tokens: int, what: str = "pairs"
) -> list[Pair]:
    """The pairs whose texts are both short enough, the tokens that begin and end them included.

    Raises:
      UserError: none is.
    """
    tokens = functools.cache(lambda text: len(tokenizer.encode(text)))

    def length(pair: Pair) -> int:
        return tokens(pair.prompt) + max(tokens(pair.chosen), tokens(pair.rejected)) + 2

    found = [pair for pair in pairs if length(pair) <= max_tokens]
    if not found:
        problem = f"all {len(pairs)} {what} are longer than the limit"
        hint = f"the shortest has {min(map(length, pairs))} tokens, the longest "
        hint += f"{max(map(length, pairs))}"
        raise UserError(problem, where="reward.max_tokens", value=max_tokens, hint=hint)
    return found


EVEN = 1e-6  # off 0.5: no number of votes that anybody draws tells it from even odds
REQUIRED = ("prompt", "chosen", "rejected")
REAL = int | float
NUMBERS = {"votes_chosen": int, "votes": int, "gold_chosen": REAL, "gold_rejected": REAL}
NUMBERS |= {"rating_chosen": REAL, "rating_rejected": REAL}


def pairs_from(rows: Sequence[dict], where: str) -> list[Pair]:
    """Pairs from JSON objects of the usual shapes (`formats`); extra keys are ignored.

    Raises:
      UserError: a missing field, a value of the wrong type, NaN or infinity, or two completions
        that are the same, by line number; no pair at all.
    """
    if not rows:
        raise UserError("no preference pairs", where=where)
    pairs = []
    for place, found in pairwise(rows, where):
        row = plain(found)
        for key in REQUIRED:
            if key not in row:
                allowed = "prompt, chosen, rejected; optional: " + ", ".join(NUMBERS)
                problem = f"missing field '{key}'"
                raise UserError(problem, where=place, value=sorted(row), allowed=allowed)
            if not isinstance(row[key], str):
                raise UserError(f"'{key}' must be a text", where=place, value=row[key])
        if row["chosen"] == row["rejected"]:
            problem = "'chosen' and 'rejected' are the same text: there is nothing to prefer"
            raise UserError(problem, where=place, value=row["chosen"][:60])
        for key, kind in NUMBERS.items():
            value = row.get(key)
            if isinstance(value, bool) or not (value is None or isinstance(value, kind)):
                raise UserError(f"'{key}' must be a number", where=place, value=value)
            if value is not None and not real(value):
                raise UserError(f"'{key}' must be a finite number", where=place, value=value)
        if (row.get("votes") is None) != (row.get("votes_chosen") is None):
            problem = "votes and votes_chosen need each other"
            raise UserError(problem, where=place, value=sorted(row))
        pair = Pair(**{k: row[k] for k in Pair._fields if row.get(k) is not None})
        pair = pair._replace(seen_gaps=_seen_gaps(row, place))
        if not 0 <= pair.votes_chosen <= pair.votes or pair.votes < 1:
            problem, votes = "votes_chosen must lie between 0 and votes", pair[3:5]
            raise UserError(problem, where=place, value=votes)
        pairs.append(pair)
    if not pairs:
        problem = "no prompt has both a better and a worse completion: nothing to prefer"
        hint = "completions of one prompt with different `rating`s, or `label` true and false"
        raise UserError(problem, where=where, value=f"{len(rows)} rows", hint=hint)
    return pairs


def _seen_gaps(row: dict[str, Any], place: str) -> tuple[float, ...] | None:
    gaps: Any = row.get("seen_gaps")
    one, other = (row.get(f"seen_{which}") for which in REQUIRED[1:])  # of older files
    if gaps is None and real(one) and real(other):
        gaps = [one - other]  # pyright: ignore[reportOptionalOperand]
    if gaps is None:
        return None
    if not (isinstance(gaps, list | tuple) and gaps and all(real(gap) for gap in gaps)):
        problem = "'seen_gaps' must be a list of finite numbers, one a rater"
        raise UserError(problem, where=place, value=gaps)
    return tuple(map(float, gaps))


def check_completions(pairs: Sequence[Pair], where: str) -> None:
    """Refuses an empty completion in somebody else's file; a model of ours may well write one.

    Raises:
      UserError: by line number.
    """
    for number, pair in enumerate(pairs, 1):
        for key, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not text.strip():
                hint = "leave such pairs out: an empty completion shows the model nothing"
                raise UserError(f"'{key}' is empty", where=f"{where}:{number}", hint=hint)


def check_worth_training_on(
    pairs: Sequence[Pair], where: str, raters: PreferencesConfig | None = None
) -> None:
    """Refuses pairs that show no preference.

    Args:
      raters: of simulated pairs. A judge that finds all completions alike leaves no ties, but votes
        drawn at even odds.
    Raises:
      UserError: all pairs are ties, or all votes were noise.
    """
    if all(2 * pair.votes_chosen == pair.votes for pair in pairs):
        problem = "every pair is a tie: half of the votes for each, and nothing to learn"
        raise UserError(problem, where=where, value=f"{len(pairs)} pairs")
    if raters is None:
        return
    p, known = label_probabilities(pairs, raters)
    if known and np.abs(p - 0.5).max() < EVEN:
        problem = "no pair shows the raters a difference: their votes are noise"
        hint = "another judge, or a model trained for longer, whose completions differ to this one"
        raise UserError(problem, where=where, value=f"{len(pairs)} pairs", hint=hint)
