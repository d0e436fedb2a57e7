"""Reading stories: the grammar replayed against a text by a `Reader`."""

import math
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple, no_type_check

from minilm.text.fables.grammar import story_of
from minilm.text.fables.teller import Attributes, Options, Teller, Weights
from minilm.text.fables.words import LISTS

_COPIES = string.Formatter()  # parses "gave {helper} the {tool}." into literals and names


class Parsed(NamedTuple):
    """What the grammar says of a text. `valid` means: exactly a story, without a slip.

    A slip is the right list but the wrong word at a copied slot: the text contradicts its own
    story (another name, another tool). The reading goes on after it.
    """

    valid: bool
    failure: str | None  # None, "slip" (nothing worse), "break" (leaves the grammar), "no_end"
    prefix: int  # characters up to the break; slips don't end it
    logprob: float | None  # exact when valid
    choices: tuple[int, ...]  # read from the prefix
    attributes: Attributes  # read from the prefix


class _Walk(NamedTuple):
    """Fixed text read as far as it goes."""

    complete: bool
    reached: int
    slips: int


class _Stop(Exception):
    """The text ends or leaves the grammar here."""


class Choice(NamedTuple):
    """A choice as it was read."""

    start: int
    surfaces: Options
    weights: Weights | None
    index: int


@no_type_check  # see Teller
class Reader(Teller):
    """Reads `text`: at each choice one option matches what is left, or the reading stops."""

    def __init__(self, lists: Mapping[str, Options], text: str):
        super().__init__(lists)
        self.text = text
        self.position = 0
        self.trace: list[Choice] = []

    def read(self, tell: Callable[[Teller], None]) -> Parsed:
        """Read the text as what `tell` tells."""
        try:
            tell(self)
            failure = "slip" if self.attributes.slips else None
        except _Stop:
            failure = "no_end"
        if self.position < len(self.text):
            failure = "break"
        valid = failure is None
        logprob = self.logprob if valid else None
        choices = tuple(self.choices)
        return Parsed(valid, failure, self.position, logprob, choices, self.attributes)

    def charges(self) -> list[float]:
        """What each character of a text read to its end is charged; see `charges`."""
        charge = [0.0] * len(self.text)
        for start, surfaces, weights, index in self.trace:
            masses = weights or (1.0,) * len(surfaces)
            alive = list(zip(surfaces, masses, strict=True))
            mass = sum(masses)
            for k, character in enumerate(surfaces[index]):
                alive = [(each, m) for each, m in alive if each[k : k + 1] == character]
                left = sum(m for _, m in alive)
                charge[start + k] += math.log(mass / left)
                mass = left
            if len(alive) > 1:  # longer words that begin like this one: the next character tells
                charge[start + len(surfaces[index])] += math.log(mass / masses[index])
        return charge

    def _fixed(self, fixed: str) -> None:
        surface = self._filled(fixed)
        if self.text.startswith(surface, self.position):
            self.position += len(surface)
        else:
            self._follow(self._walk(fixed))

    def _pick(self, options, surfaces, weights) -> int:
        text, start = self.text, self.position
        chosen = -1
        for index, surface in enumerate(surfaces):
            end = start + len(surface)
            if text.startswith(surface, start) and self._ends(surface, end):
                chosen, self.position = index, end
                break
        if chosen < 0:
            walks = [self._walk(option) for option in options]
            best = max(walks, key=lambda walk: (walk.complete, walk.reached, -walk.slips))
            chosen = walks.index(best)
            self._follow(best)
        self.trace.append(Choice(start, surfaces, weights, chosen))
        return chosen

    def _follow(self, walk: _Walk) -> None:
        self.position = walk.reached
        slips = self.attributes.slips + walk.slips
        self.attributes = self.attributes._replace(slips=slips)
        if not walk.complete:
            raise _Stop

    def _walk(self, fixed: str) -> _Walk:
        """Read fixed text from the current position, taking another word of the list as a slip."""
        position, slips = self.position, 0
        for literal, name, _, _ in _COPIES.parse(fixed):
            if not self.text.startswith(literal, position):
                return _Walk(False, position + self._common(literal, position), slips)
            position += len(literal)
            if name is None:
                continue
            word = self.words[name]
            if not self._at(word, position):
                other = next((w for w in self.kin[name] if self._at(w, position)), None)
                if other is None:
                    return _Walk(False, position + self._common(word, position), slips)
                word, slips = other, slips + 1
            position += len(word)
        return _Walk(self._ends(fixed, position), position, slips)

    def _at(self, word: str, position: int) -> bool:
        return self.text.startswith(word, position) and self._ends(word, position + len(word))

    def _ends(self, surface: str, end: int) -> bool:
        """Whether a surface does not end inside a word of the text."""
        return not (surface[-1].isalpha() and self.text[end : end + 1].isalpha())

    def _common(self, expected: str, position: int) -> int:
        """Length of the common beginning of `expected` and the text from `position`."""
        seen = self.text[position : position + len(expected)]
        return next((i for i, c in enumerate(seen) if c != expected[i]), len(seen))


def parse(text: str, *, size: str = "full") -> Parsed:
    """Read a text as a story of the grammar.

    >>> parse("Once upon a time.").failure
    'break'
    """
    return Reader(LISTS, text).read(story_of(size))


def charges(text: str, *, size: str = "full") -> list[float]:
    """Exact -log P(character | what stands before it) for every character of a valid story.

    At each character the mass of the options that still agree with the text shrinks; the logarithm
    of the shrinking is its charge. Options that only the next character rules out ("catfish" after
    "cat") are charged there. The sum is minus the story's log-probability, so the exact charge of
    a token is the sum over its characters.

    Raises:
      ValueError: the text is not a story.
    """
    reader = Reader(LISTS, text)
    read = reader.read(story_of(size))
    if not read.valid:
        raise ValueError(f"not a story of the {size} grammar ({read.failure} at {read.prefix})")
    return reader.charges()
