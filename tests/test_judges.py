"""Judges: the truth behind a name."""

import sys

import numpy as np
import pytest

from minilm import judges
from minilm.config import Config, JudgeConfig
from minilm.errors import UserError
from minilm.judges import JUDGES, configured
from minilm.text.fables import generate, gold


def judge(name, options, where=""):
    return configured(Config(judge=JudgeConfig(name=name, options=options)))


@pytest.mark.parametrize("size", ["small", "full"])
def test_fables_scores_prompt_and_completion_together(size):
    texts = [generate(seed, size=size).text for seed in range(20)]
    cuts = [40 + seed for seed in range(20)]
    scores = judge("fables", {"size": size}, "judge")(
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [gold(text, size=size) for text in texts], rtol=1e-6)


def test_length_is_best_at_the_target():
    score = judge("length", {"target": 3}, "judge")
    scores = score(["p"] * 4, ["a b c", "a b", "a b c d", ""])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0, -1 / 3, -1 / 3, -1], rtol=1e-6)


def test_length_needs_a_target_of_words():
    with pytest.raises(UserError, match="at least 1 word"):
        judge("length", {"target": 0}, "judge")([""], [""])


def test_regex_counts_matches_and_names_a_pattern_that_is_none():
    score = judge("regex", {"pattern": r"\bkind\b"})
    assert score(["kind"], ["kind, kindly and kind"]).tolist() == [2.0]
    with pytest.raises(UserError, match="no regular expression"):
        judge("regex", {"pattern": "("})([""], [""])


def test_sentiment_knows_good_from_bad_and_that_not_turns_it():
    score = judge("sentiment", {})
    good, bad, turned, none = score([""] * 4, ["a lovely day", "a vile day", "not lovely", "a day"])
    assert good > 0.5
    assert bad < -0.5
    assert turned < 0
    assert none == 0


def test_sentiment_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    judges._vader.cache_clear()
    with pytest.raises(UserError, match="needs the package vaderSentiment"):
        judge("sentiment", {})([""], [""])
    judges._vader.cache_clear()


@pytest.mark.parametrize("name", JUDGES)
def test_every_row_gives_one_finite_score_each(name):
    options = {"length": {"target": 5}, "regex": {"pattern": "a"}}
    score = judge(name, options.get(name, {}), "judge")
    scores = score(["", "Once"], ["", " upon a time"])
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()
    assert score([], []).shape == (0,)
    with pytest.raises(UserError):
        score(["one"], [])


def shout(prompts, completions, *, factor: float = 1.0):
    return [factor * c.count("!") for c in completions]  # a list, as TRL's functions give


def short(prompts, completions):
    return [1.0]


def undecided(prompts, completions):
    return np.full(len(completions), np.nan)


def angry(prompts, completions):
    raise RuntimeError("no more stories")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "one finite score"),
        ("undecided", "one finite score"),
        ("angry", "no more stories"),
    ],
)
def test_a_judge_that_does_not_judge_is_a_users_error(name, said):
    score = judge(f"{__name__}:{name}", {}, "judge")
    with pytest.raises(UserError, match=said):
        score(["a", "b"], ["c", "d"])


def test_a_judge_of_the_users_own(monkeypatch):
    score = judge(f"{__name__}:shout", {"factor": 2.0}, "judge")
    assert score(["", ""], ["a!", "b"]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fable", {}, "did you mean 'fables'"),
        ("fables", {"sise": "small"}, "did you mean 'size'"),
        ("nowhere:score", {}, "cannot import"),
        (":score", {}, "cannot import"),
    ],
)
def test_mistakes_are_explained(name, options, said):
    with pytest.raises(UserError, match=said):
        judge(name, options, "judge.name")
