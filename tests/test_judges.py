"""Judges: the truth behind a name."""

import numpy as np
import pytest

from minilm.errors import UserError
from minilm.judges import JUDGES, judge
from minilm.text.fables import generate, gold


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
    with pytest.raises(ValueError, match="at least 1 word"):
        judge("length", {"target": 0}, "judge")([""], [""])


@pytest.mark.parametrize("name", JUDGES)
def test_every_row_gives_one_finite_score_each(name):
    options = {"length": {"target": 5}}
    score = judge(name, options.get(name, {}), "judge")
    scores = score(["", "Once"], ["", " upon a time"])
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()
    assert score([], []).shape == (0,)
    with pytest.raises(ValueError):
        score(["one"], [])


def shout(prompts, completions, *, factor: float = 1.0):
    return np.array([factor * c.count("!") for c in completions], np.float32)


def test_a_judge_of_the_users_own(monkeypatch):
    score = judge(f"{__name__}:shout", {"factor": 2.0}, "judge")
    assert score(["", ""], ["a!", "b"]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fable", {}, "did you mean 'fables'"),
        ("fables", {"sise": "small"}, "did you mean 'size'"),
        ("nowhere:score", {}, "cannot import"),
    ],
)
def test_mistakes_are_explained(name, options, said):
    with pytest.raises(UserError, match=said):
        judge(name, options, "judge.name")
