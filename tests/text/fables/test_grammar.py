"""The world: how long, how varied, how well-formed its stories are."""

import math
import re
import statistics

import pytest

from minilm.text.fables import SIZES, Attributes, parse, stories
from minilm.text.fables.__main__ import vocabulary
from minilm.text.fables.words import FEMALE, LISTS


@pytest.fixture(scope="module")
def drawn():
    return {size: list(stories(11, 3000, size=size)) for size in SIZES}


@pytest.mark.parametrize(("size", "low", "high"), [("small", 20, 35), ("full", 70, 100)])
def test_lengths(drawn, size, low, high):
    words = [len(story.text.split()) for story in drawn[size]]
    assert low <= min(words)
    assert max(words) <= high


def test_vocabularies(drawn):
    assert len(vocabulary(drawn["full"])) >= 600
    assert len(vocabulary(drawn["small"])) <= 150


def test_more_than_two_to_the_sixty_stories(drawn):
    """Entropy is at most the logarithm of the number of stories.

    The mean of -log2 P estimates it without bias. No -log2 P exceeds 130 (a choice has at most 40
    options, most fewer), so by Hoeffding's inequality the mean of 3,000 is more than 5 bits too
    high less often than exp(-2 3000 (5 / 130)^2) = 1.4e-4; it is 35 above what is asked.
    """
    bits = [-story.logprob / math.log(2) for story in drawn["full"]]
    assert max(bits) < 130
    assert statistics.mean(bits) - 5 > 60
    assert len({story.text for story in drawn["full"]}) == len(bits)


def test_entropy_of_the_small_world(drawn):
    assert 8 < statistics.mean(-story.logprob for story in drawn["small"]) < 20


@pytest.mark.parametrize("size", SIZES)
def test_lists_hold_distinct_options(size):
    for name, words in LISTS.items():
        assert len(set(words)) == len(words), name


@pytest.mark.parametrize("size", SIZES)
def test_articles_agree(drawn, size):
    for story in drawn[size]:
        assert not re.search(r"\b[Aa] [aeiou]", story.text), story.text
        assert not re.search(r"\b[Aa]n [^aeiou]", story.text), story.text


@pytest.mark.parametrize("size", SIZES)
def test_spacing_and_capitals(drawn, size):
    for story in drawn[size]:
        assert story.text == " ".join(story.text.split())
        assert re.fullmatch(r'(\s?"?[A-Z][^.]*\.)+', story.text), story.text


@pytest.mark.parametrize("size", SIZES)
def test_pronouns_agree_with_the_hero(drawn, size):
    wrong = {True: {"he", "him", "his"}, False: {"she", "her", "hers"}}
    names = "|".join(LISTS["names"])
    for story in drawn[size]:
        hero = re.search(names, story.text).group()  # the first name told
        words = set(re.findall("[a-z]+", story.text.lower()))
        assert not words & wrong[hero in FEMALE], story.text


@pytest.mark.parametrize("size", SIZES)
def test_the_opening_decides_nothing_that_gold_reads(drawn, size):
    for story in drawn[size][:200]:
        opening = re.match(r"[^.]*\.[^.]*\.", story.text).group()
        read = parse(opening, size=size)
        assert read.failure == "no_end"
        assert read.attributes == Attributes()
        assert re.search("|".join(LISTS["names"]), opening)


def test_the_tool_is_named_again_far_from_where_it_was_lent(drawn):
    for story in drawn["full"][:200]:
        words = re.findall("[a-z]+", story.text)
        tool = next(word for word in LISTS["tools"] if words.count(word) > 1)
        places = [i for i, word in enumerate(words) if word == tool]
        assert places[-1] - places[0] > 30


def test_one_to_four_deeds_of_both_kinds(drawn):
    counts = {len(story.attributes.deeds) for story in drawn["full"]}
    assert counts == {1, 2, 3, 4}
    deeds = [deed for story in drawn["full"] for deed in story.attributes.deeds]
    assert 0.45 < sum(deed > 0 for deed in deeds) / len(deeds) < 0.55
