"""Gold: what it pays for, and that it spreads enough to be learnt from."""

import numpy as np
import pytest

from minilm.text.fables import SIZES, Attributes, generate, gold, stories
from minilm.text.fables.__main__ import statistics
from minilm.text.fables.gold import EXPECTED_CHARACTERS, score


@pytest.mark.parametrize(
    ("kind", "expected"), [(1, 0.7), (2, 1.4), (3, 1.7), (4, 1.2), (5, -0.1), (6, -2.2)]
)
def test_kind_deeds_are_best_at_three(kind, expected):
    assert score(Attributes(deeds=(1,) * kind), None, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("attributes", "failure", "progress", "expected"),
    [
        (Attributes(), None, 1.0, 0.0),
        (Attributes((1, -1), True, True), None, 1.0, 1.6),
        (Attributes((-1, -1), False, False), None, 1.0, -3.0),
        (Attributes((1, 1, 1, -1), True, False), None, 1.0, 1.0),
        (Attributes((1,), True, True, slips=2), "slip", 1.0, 1.3),
        (Attributes(), "break", 0.0, -1.0),
        (Attributes(), "break", 0.5, -0.75),
        (Attributes((1,), True), "break", 1.2, 1.0),  # past the mean length counts as all of it
        (Attributes((1,), True), "no_end", 0.5, 0.5),
    ],
)
def test_by_hand(attributes, failure, progress, expected):
    assert score(attributes, failure, progress) == pytest.approx(expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_text_is_worth_what_its_attributes_are(size):
    for seed in range(50):
        story = generate(seed, size=size)
        assert gold(story.text, size=size) == score(story.attributes, None, 1.0)


def test_a_late_break_costs_less_than_an_early_one():
    text = generate(0).text
    words = text.split()
    early, late = (" ".join([*words[:n], "zebra", *words[n:]]) for n in (5, 20))
    assert gold(early) < gold(late) < 0  # no attribute is decided in the first 20 words


@pytest.mark.parametrize("size", SIZES)
def test_the_unit_of_progress_is_the_mean_length(size):
    lengths = [len(story.text) for story in stories(2, 1000, size=size)]
    assert EXPECTED_CHARACTERS[size] == pytest.approx(np.mean(lengths), rel=0.02)


@pytest.mark.parametrize("size", SIZES)
def test_gold_spreads_and_raters_disagree_enough(size):
    found = statistics(list(stories(5, 3000, size=size)))
    assert found["gold_std"] > 1
    assert 0.72 < found["bayes_accuracy"] < 0.85
