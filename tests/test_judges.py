"""Judges: the truth behind a name."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import vaderSentiment

from minilm import judges
from minilm.config import Config, JudgeConfig, PreferencesConfig
from minilm.errors import UserError
from minilm.judges import JUDGES, configured, rater_judge
from minilm.text.fables import generate, gold


def judge(name, options, where=""):
    return configured(Config(judge=JudgeConfig(name=name, options=options)))


def raters(name):
    return rater_judge(Config(preferences=PreferencesConfig(rater_judge=name)))


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


def ratings(word: str) -> list[int]:
    """The ten of a word, from VADER's file."""
    lines = Path(vaderSentiment.__file__).with_name("vader_lexicon.txt").read_text("utf-8")
    (line,) = (line for line in lines.splitlines() if line.startswith(f"{word}\t"))
    return [int(x) for x in re.findall(r"-?\d+", line[line.index("[") :])]


def test_each_of_vaders_ten_raters_scores_by_their_own_ratings_of_words():
    """VADER's score of a sum x of ratings is x / sqrt(x² + 15); "not" turns and shrinks it."""
    texts = ["a lovely day", "not lovely", "a vile, lovely day", "a day"]
    found = raters("sentiment_raters")([""] * 4, texts)
    lovely, vile = np.array(ratings("lovely")), np.array(ratings("vile"))
    assert len(set(lovely)) > 1
    x = np.stack([lovely, -0.74 * lovely, vile + lovely, 0 * lovely], axis=-1)
    np.testing.assert_allclose(found, x / np.sqrt(x**2 + 15), atol=1e-4)


def test_a_word_that_a_rater_gave_0_moves_that_rater_in_no_way():
    """In the lexicon with 0 it would be bad in capitals and good after "very"."""
    told = ratings("abhor")
    assert 0 in told
    found = raters("sentiment_raters")([""] * 2, ["a very abhor day", "an ABHOR day"])
    np.testing.assert_array_equal(found == 0, np.array(told)[:, None] == np.zeros(2))


def test_only_raters_may_have_a_row_each():
    assert raters(f"{__name__}:two_minds")(["", ""], ["a", "b"]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(UserError, match="one finite score") as refused:
        judge(f"{__name__}:two_minds", {})(["", ""], ["a", "b"])
    assert "shape (2, 2)" in str(refused.value)
    assert "for preferences.rater_judge alone" in str(refused.value)
    for name in ("two_minds", "nobody"):
        with pytest.raises(UserError, match="one finite score") as refused:
            raters(f"{__name__}:{name}")(["", "", ""], ["a", "b", "c"])
        assert refused.value.where == "preferences.rater_judge"


def test_what_a_raters_judge_needs_is_said_of_its_key(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    judges._vader.cache_clear()
    judges._vader_raters.cache_clear()
    for name in ("sentiment", "sentiment_raters"):
        with pytest.raises(UserError, match="needs the package vaderSentiment") as refused:
            raters(name)([""], [""])
        assert refused.value.where == "preferences.rater_judge"
    with pytest.raises(UserError, match="no more stories") as refused:
        raters(f"{__name__}:angry")([""], [""])
    assert refused.value.where == "preferences.rater_judge"
    judges._vader.cache_clear()


@pytest.mark.parametrize("name", sorted(JUDGES.keys() - {"sentiment_raters"}))
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


def two_minds(prompts, completions):
    return [[1, 2], [3, 4]]


def nobody(prompts, completions):
    return np.zeros((0, len(completions)))


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
