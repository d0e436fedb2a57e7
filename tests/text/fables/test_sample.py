"""Drawing: reproducible, replayable, with the probabilities that the grammar states."""

import os
import subprocess
import sys

import pytest

from minilm.errors import UserError
from minilm.text.fables import SIZES, complete, generate, parse, stories
from minilm.text.fables.grammar import KEEPS, story_of
from minilm.text.fables.sample import Writer
from minilm.text.fables.words import LISTS, WARM
from minilm.text.prompts import opening


@pytest.mark.parametrize("size", SIZES)
def test_a_story_is_a_function_of_seed_and_index(size):
    longer = list(stories(3, 8, size=size))
    assert list(stories(3, 5, size=size)) == longer[:5]
    assert generate((3, 7), size=size) == longer[7]
    assert len({story.text for story in longer}) > 1
    assert generate((4, 7), size=size) != longer[7]


def test_a_story_does_not_depend_on_the_process():
    code = "from minilm.text.fables import generate; print(generate(5).text)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {generate(5).text}


@pytest.mark.parametrize("size", SIZES)
def test_the_choices_are_the_story(size):
    for story in stories(1, 50, size=size):
        script = iter(story.choices)
        writer = Writer(LISTS, lambda count, weights, script=script: next(script))
        story_of(size)(writer)
        assert writer.story() == story


def test_weighted_choices_come_as_often_as_stated():
    """Promises of warm heroes: 5 standard errors, so a false alarm once in a million worlds."""
    drawn = list(stories(0, 4000, size="small"))
    warm = [s for s in drawn if s.text.split()[3] in WARM]  # "Ada was a gentle fox."
    share = sum(bool(s.attributes.promise_kept) for s in warm) / len(warm)
    assert abs(len(warm) / len(drawn) - 0.5) < 5 * (0.25 / len(drawn)) ** 0.5
    assert abs(share - KEEPS[True]) < 5 * (0.25 / len(warm)) ** 0.5


def test_an_unknown_size_is_the_users_mistake():
    with pytest.raises(UserError, match="did you mean 'full'"):
        generate(0, size="ful")


@pytest.mark.parametrize("size", ["small", "full"])
def test_the_grammar_goes_on_from_a_prompt_as_its_stories_do(size):
    """A hundred completions of each of three openings: all are stories, few are alike."""
    for index in range(3):
        story = generate((5, index), size=size)
        prompt = opening(story.text, 1)
        texts = [prompt + complete(prompt, (6, i), size=size) for i in range(100)]
        assert all(parse(text, size=size).valid for text in texts)
        assert len(set(texts)) > 80
    assert complete(prompt, 1, size=size) == complete(prompt, 1, size=size)


def test_no_story_goes_on_from_what_is_none():
    with pytest.raises(ValueError, match="begins with"):
        complete("Call me Ishmael.", 0)
