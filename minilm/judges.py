"""Gold scorers: the truth that evaluation reads and simulated raters follow, never the trainer.

A judge takes prompts and completions as text and returns one score each, as TRL's reward functions
do. Yours (options keyword-only) is `judge.name = "my_module:my_function"`, or a row. What simulated
raters judge by (`preferences.rater_judge`) may also be several opinions, a row of scores each.
"""

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from minilm.choices import bind
from minilm.config import Config
from minilm.errors import UserError
from minilm.text.fables import gold

Judge = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def fables(
    prompts: Sequence[str], completions: Sequence[str], *, size: str = "full"
) -> Float[np.ndarray, " B"]:
    """Gold of the fables that prompts and completions make together (`minilm.text.fables.gold`).

    >>> bool(fables(["Once a gentle"], [" storm."])[0] < -0.9)  # leaves the grammar at once
    True
    """
    pairs = zip(prompts, completions, strict=True)
    return np.array([gold(p + c, size=size) for p, c in pairs], dtype=np.float32)


def length(
    prompts: Sequence[str], completions: Sequence[str], *, target: int
) -> Float[np.ndarray, " B"]:
    """Minus the distance of a completion's number of words from `target`, in units of `target`.

    A truth that any corpus has.

    >>> length(["", ""], ["one two", "one two three"], target=4).tolist()
    [-0.5, -0.25]
    """
    if target < 1:
        raise ValueError(f"target must be at least 1 word, got {target}")
    counts = [len(c.split()) for _, c in zip(prompts, completions, strict=True)]
    return -np.abs(np.array(counts, dtype=np.float32) - target) / np.float32(target)


def regex(
    prompts: Sequence[str], completions: Sequence[str], *, pattern: str
) -> Float[np.ndarray, " B"]:
    """How often a regular expression matches in a completion: a rule that anybody can read.

    >>> regex([""], ["a cat and a catfish"], pattern=r"\\bcat\\b").tolist()
    [1.0]
    """
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern is no regular expression: {error}") from error
    matches = [len(found.findall(c)) for _, c in zip(prompts, completions, strict=True)]
    return np.array(matches, dtype=np.float32)


def sentiment(prompts: Sequence[str], completions: Sequence[str]) -> Float[np.ndarray, " B"]:
    """How cheerful a completion is: VADER's compound score, from −1 to 1.

    VADER is a lexicon of 7,500 words, each rated by ten people, with rules for negation and
    emphasis; so gold is human opinion, of words.

    Raises:
      UserError: the package is not installed.
    Reference:
      Hutto and Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
      Social Media Text, ICWSM.
    """
    texts = [c for _, c in zip(prompts, completions, strict=True)]
    return _compound(_vader(), texts)


def sentiment_raters(
    prompts: Sequence[str], completions: Sequence[str]
) -> Float[np.ndarray, "10 B"]:
    """How cheerful each of the ten people who rated VADER's words would find a completion.

    Row k is VADER's compound score, from −1 to 1, with the k-th rating of every word in place of
    the mean. A word that a rater gave 0 is not in that rater's lexicon, as none is in VADER's whose
    mean is 0: its rules would find it bad in capitals and good after "very".

    Raises:
      UserError: the package is not installed.
    Reference:
      Hutto and Gilbert (2014), as `sentiment`; the ratings are the last column of its lexicon.
    """
    texts = [c for _, c in zip(prompts, completions, strict=True)]
    return np.stack([_compound(analyzer, texts) for analyzer in _vader_raters()])


def _compound(analyzer: Any, texts: Sequence[str]) -> Float[np.ndarray, " B"]:
    return np.array([analyzer.polarity_scores(t)["compound"] for t in texts], dtype=np.float32)


@functools.cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]
    except ImportError:
        hint = "uv sync --extra sentiment, or pip install vaderSentiment"
        raise UserError("needs the package vaderSentiment", hint=hint) from None
    return SentimentIntensityAnalyzer()


@functools.cache
def _vader_raters() -> list[Any]:
    """VADER with the lexicon of each rater; a line is word, mean, deviation and ten ratings."""
    lines = _vader().lexicon_full_filepath.rstrip("\n").split("\n")
    rated = {word: json.loads(told) for word, *_, told in (x.strip().split("\t") for x in lines)}
    raters = [copy.copy(_vader()) for _ in range(10)]
    for k, rater in enumerate(raters):
        rater.lexicon = {word: float(r[k]) for word, r in rated.items() if r[k]}
    return raters


JUDGES: dict[str, Callable[..., np.ndarray]] = {
    "fables": fables,
    "length": length,
    "regex": regex,
    "sentiment": sentiment,
    "sentiment_raters": sentiment_raters,
}


def configured(config: Config) -> Judge | None:
    """The judge that `[judge]` names, or None for "none"; fables are judged at the corpus' size.

    Raises:
      UserError: no such judge; when it is called: it fails, or does not return one finite score
        for each completion.
    """
    name = config.judge.name
    return None if name == "none" else _checked(config, name, config.judge.options, "judge.name")


def rater_judge(config: Config) -> Judge | None:
    """What simulated raters judge by, scores [N] or, a row each, [R, N]; None where it is gold.

    Raises:
      UserError: no such judge, or one that needs options; when it is called: it fails, or does not
        return one finite score for each completion, or that for each rater.
    """
    name = config.preferences.rater_judge
    return None if name is None else _checked(config, name, {}, "preferences.rater_judge")


def _checked(config: Config, name: str, options: Mapping[str, Any], where: str) -> Judge:
    if name == "fables" and config.corpus.kind == "fables":
        options = {"size": config.corpus.size} | dict(options)
    judge, rows = bind(JUDGES, name, options, where), where == "preferences.rater_judge"

    def checked(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        try:
            scores = np.asarray(judge(prompts, completions), np.float32)
        except UserError as error:
            if error.where is not None:
                raise
            raise UserError(str(error), where=where) from None
        except Exception as error:  # the function may be the user's
            raise UserError(f"the judge failed: {error!r}", where=where, value=name) from error
        several = scores.ndim == 2 and len(scores) > 0
        fits = scores.shape[-1:] == (len(completions),) and (scores.ndim == 1 or (several and rows))
        if not fits or not np.isfinite(scores).all():
            problem = "a judge must return one finite score for each completion"
            hint = "a row for each rater is for preferences.rater_judge alone" if several else None
            seen = scores if fits else f"shape {scores.shape}"
            raise UserError(problem, where=where, value=seen, hint=hint if not rows else None)
        return scores

    return checked
