"""Gold scorers: the truth that evaluation reads and simulated raters follow, never the trainer.

A judge takes prompts and completions as text and returns one score each, as TRL's reward functions
do. Yours (options keyword-only) is `judge.name = "my_module:my_function"`, or a row.
"""

import functools
import re
from collections.abc import Callable, Sequence
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
    analyzer = _vader()
    texts = [c for _, c in zip(prompts, completions, strict=True)]
    return np.array([analyzer.polarity_scores(t)["compound"] for t in texts], dtype=np.float32)


@functools.cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # pyright: ignore[reportMissingImports]
    except ImportError:
        hint = "uv sync --extra sentiment, or pip install vaderSentiment"
        raise UserError("needs the package vaderSentiment", where="judge.name", hint=hint) from None
    return SentimentIntensityAnalyzer()


JUDGES: dict[str, Callable[..., np.ndarray]] = {
    "fables": fables,
    "length": length,
    "regex": regex,
    "sentiment": sentiment,
}


def configured(config: Config) -> Judge | None:
    """The judge that `[judge]` names, or None for "none"; fables are judged at the corpus' size.

    Raises:
      UserError: no such judge; when it is called: it fails, or does not return one finite score
        for each completion.
    """
    name, options = config.judge.name, dict(config.judge.options)
    if name == "none":
        return None
    if name == "fables" and config.corpus.kind == "fables":
        options.setdefault("size", config.corpus.size)
    judge = bind(JUDGES, name, options, "judge.name")

    def checked(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        try:
            scores = np.asarray(judge(prompts, completions), np.float32)
        except UserError:
            raise
        except Exception as error:  # the function may be the user's
            raise UserError(f"the judge failed: {error!r}", where="judge", value=name) from error
        if scores.shape != (len(completions),) or not np.isfinite(scores).all():
            problem = "a judge must return one finite score for each completion"
            seen = scores if scores.shape == (len(completions),) else f"shape {scores.shape}"
            raise UserError(problem, where="judge.name", value=seen)
        return scores

    return checked
