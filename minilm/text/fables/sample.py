"""Drawing stories: the grammar told to a `Writer`."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, no_type_check

from minilm.text.fables.grammar import story_of
from minilm.text.fables.parse import parse
from minilm.text.fables.teller import Ambiguous, Attributes, Options, Teller, Weights
from minilm.text.fables.words import LISTS


class Story(NamedTuple):
    text: str
    logprob: float  # exact, in nats
    choices: tuple[int, ...]  # the derivation: which option at each choice
    attributes: Attributes


@no_type_check  # see Teller
class Writer(Teller):
    """Writes a story, each choice made by `decide(number of options, weights or None)`."""

    def __init__(self, lists: Mapping[str, Options], decide: Callable[[int, Weights | None], int]):
        super().__init__(lists)
        self.decide = decide
        self.out: list[str] = []
        self.word_open = False  # the last choice ended in a letter

    def story(self) -> Story:
        return Story("".join(self.out), self.logprob, tuple(self.choices), self.attributes)

    def _fixed(self, fixed: str) -> None:
        surface = self._filled(fixed)
        if self.word_open and surface[:1].isalpha():
            raise Ambiguous(f"{surface!r} continues the word that a choice ended with")
        self.out.append(surface)
        self.word_open = False

    def _pick(self, options, surfaces, weights) -> int:
        index = self.decide(len(surfaces), weights)
        self._fixed(surfaces[index])
        self.word_open = surfaces[index][-1].isalpha()
        return index


def generate(seed: int | tuple[int, ...], *, size: str = "full") -> Story:
    """Draw one story: a function of the seed alone, the same on every platform.

    >>> generate(1, size="small").text == generate(1, size="small").text
    True
    """
    key = seed if isinstance(seed, tuple) else (seed,)
    # A string is hashed whole (SHA-512), so neighbouring seeds are as good as any.
    dice = random.Random(",".join(map(str, key)))

    # Without weights `choices` does the same, slowly.
    def decide(count: int, weights: Weights | None) -> int:
        return dice.choices(range(count), weights)[0] if weights else int(dice.random() * count)

    writer = Writer(LISTS, decide)
    story_of(size)(writer)
    return writer.story()


def complete(prompt: str, seed: int | tuple[int, ...], *, size: str = "full") -> str:
    """Draw how a story that begins with `prompt` goes on, as the grammar has it.

    Raises:
      ValueError: no story begins like that.

    >>> len(complete(generate(1, size="small").text[:0], 1, size="small")) > 50
    True
    """
    key = seed if isinstance(seed, tuple) else (seed,)
    known = parse(prompt, size=size).choices
    # The last choices may have been read from too little text to be certain.
    for count in range(len(known), -1, -1):
        dice = random.Random(",".join(map(str, key)))
        given = iter(known[:count])

        def decide(options: int, weights: Weights | None, dice=dice, given=given) -> int:
            drawn = dice.choices(range(options), weights or (1.0,) * options)[0]
            return next(given, drawn)

        writer = Writer(LISTS, decide)
        story_of(size)(writer)
        if (text := writer.story().text).startswith(prompt):
            return text[len(prompt) :]
    raise ValueError(f"no story of the {size} grammar begins with {prompt!r}")


def stories(seed: int, count: int, *, size: str = "full") -> Iterator[Story]:
    """Draw `count` stories; story i depends on (seed, i) only, so a longer draw begins alike."""
    for index in range(count):
        yield generate((seed, index), size=size)
