"""Drawing stories: the grammar told to a `Writer`."""

import bisect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, no_type_check

from minilm.text.fables.grammar import story_of
from minilm.text.fables.teller import Ambiguous, Attributes, Teller, cumulative
from minilm.text.fables.words import LISTS

Decide = Callable[[int, tuple[float, ...] | None], int]


class Story(NamedTuple):
    text: str
    logprob: float  # exact, in nats
    choices: tuple[int, ...]  # the derivation: which option at each choice
    attributes: Attributes


@no_type_check  # see Teller
class Writer(Teller):
    """Writes a story, each choice made by `decide(number of options, weights or None)`."""

    def __init__(self, lists: Mapping[str, tuple[str, ...]], decide: Decide):
        super().__init__(lists)
        self.decide = decide
        self.out: list[str] = []
        self.word_open = False  # the last choice ended in a letter

    def text(self) -> str:
        return "".join(self.out)

    def story(self) -> Story:
        return Story(self.text(), self.logprob, tuple(self.choices), self.attributes())

    def _append(self, surface: str) -> None:
        if self.word_open and surface[:1].isalpha():
            raise Ambiguous(f"{surface!r} continues the word that a choice ended with")
        self.out.append(surface)
        self.word_open = False

    def _fixed(self, fixed: str) -> None:
        self._append(fixed.format_map(self.words) if "{" in fixed else fixed)

    def _choose(
        self, options: tuple[str, ...], weights: tuple[float, ...] | None, copies: bool
    ) -> tuple[int, str]:
        surfaces = self._surfaces(options, copies)
        index = self.decide(len(surfaces), weights)
        if weights is None:
            self.logprob -= math.log(len(surfaces))
        else:
            self.logprob += math.log(weights[index] / cumulative(weights)[-1])
        self.choices.append(index)
        surface = surfaces[index]
        self._append(surface)
        self.word_open = surface[-1].isalpha()
        return index, surface


@no_type_check  # see Teller
class Dice:
    """Decides by a seeded generator, the same on every platform."""

    def __init__(self, seed: str):
        # A string is hashed whole (SHA-512), so neighbouring seeds are as good as any.
        self.uniform = random.Random(seed).random

    def __call__(self, count: int, weights: tuple[float, ...] | None) -> int:
        if weights is None:
            return int(self.uniform() * count)
        sums = cumulative(weights)
        return min(bisect.bisect_right(sums, self.uniform() * sums[-1]), count - 1)


def generate(seed: int | tuple[int, ...], *, size: str = "full") -> Story:
    """Draw one story: a function of the seed alone, the same on every platform.

    >>> generate(1, size="small").text == generate(1, size="small").text
    True
    """
    key = seed if isinstance(seed, tuple) else (seed,)
    writer = Writer(LISTS, Dice(",".join(map(str, key))))
    story_of(size)(writer)
    return writer.story()


def stories(seed: int, count: int, *, size: str = "full") -> Iterator[Story]:
    """Draw `count` stories; story i depends on (seed, i) only, so a longer draw begins alike."""
    for index in range(count):
        yield generate((seed, index), size=size)
