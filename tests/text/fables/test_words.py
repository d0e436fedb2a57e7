"""The word lists: long enough, and such that templates around them stay English."""

import pytest

from minilm.text.fables.words import FEMALE, LISTS, OBSTACLES, WARM

BEGIN_WITH_A_CONSONANT = [
    "traits",
    "kinds",
    "helpers",
    "birds",
    "insects",
    "young",
    "swimmers",
    "things",
    "trees",
    "grounds",
    "tunes",
    "finds",
    "landmarks",
    "tools/0",
    "tools/1",
    "tools/2",
    "tools/3",
    "small_traits",
    "small_kinds",
    "small_wants",
    "small_tools",
    "small_helpers",
]


@pytest.mark.parametrize("name", LISTS)
def test_a_list_holds_each_phrase_once(name):
    assert len(set(LISTS[name])) == len(LISTS[name]) > 1


def test_there_are_words_enough():
    assert len({word for phrases in LISTS.values() for p in phrases for word in p.split()}) >= 400


@pytest.mark.parametrize("name", BEGIN_WITH_A_CONSONANT)
def test_what_follows_a_begins_with_a_consonant(name):
    assert [word for word in LISTS[name] if word[0] in "aeiou"] == []


def test_heroes_are_as_often_women_as_men_and_warm_as_cold():
    assert len(LISTS["names"]) == 2 * len(FEMALE)
    assert len(LISTS["traits"]) == 2 * len(WARM)
    assert len(set(LISTS["names"])) == len(LISTS["names"])


def test_each_pair_of_obstacles_has_tools_of_its_own():
    assert len(LISTS["tools"]) == 8 * len(OBSTACLES) // 2
    assert len(set(LISTS["tools"])) == len(LISTS["tools"])
