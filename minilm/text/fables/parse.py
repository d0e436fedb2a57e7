"""Reading stories: the grammar replayed against a text by a `Reader`."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, no_type_check

from minilm.text.fables.grammar import story_of
from minilm.text.fables.teller import Attributes, Teller, cumulative, pieces
from minilm.text.fables.words import LISTS

FAILURES = ("slip", "break", "no_end")


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

    reached: int
    complete: bool
    slips: int


class _Stop(Exception):
    """The text ends or leaves the grammar here."""


class Choice(NamedTuple):
    """A choice as it was read."""

    start: int
    surfaces: tuple[str, ...]
    weights: tuple[float, ...] | None
    index: int

    def mass(self, index: int) -> float:
        return 1.0 if self.weights is None else self.weights[index]


@no_type_check  # see Teller
class Reader(Teller):
    """Reads `text`: at each choice one option matches what is left, or the reading stops."""

    def __init__(self, lists: Mapping[str, tuple[str, ...]], text: str):
        super().__init__(lists)
        self.text = text
        self.position = 0
        self.trace: list[Choice] = []

    def read(self, tell: Callable[[Teller], None]) -> str | None:
        """Read the text as what `tell` tells; the failure, as `Parsed.failure`."""
        try:
            tell(self)
        except _Stop:
            return "no_end" if self.position == len(self.text) else "break"
        if self.position < len(self.text):
            return "break"
        return "slip" if self.slips else None

    def charges(self) -> list[float]:
        """What each character of a text read to its end is charged; see `charges`."""
        charge = [0.0] * len(self.text)
        for choice in self.trace:
            surface = choice.surfaces[choice.index]
            alive = [(each, choice.mass(i)) for i, each in enumerate(choice.surfaces)]
            mass = sum(m for _, m in alive)
            for k, character in enumerate(surface):
                alive = [(each, m) for each, m in alive if each[k : k + 1] == character]
                left = sum(m for _, m in alive)
                charge[choice.start + k] += math.log(mass / left)
                mass = left
            if len(alive) > 1:  # longer words that begin like this one: the next character tells
                charge[choice.start + len(surface)] += math.log(mass / choice.mass(choice.index))
        return charge

    def _fixed(self, fixed: str) -> None:
        surface = fixed.format_map(self.words) if "{" in fixed else fixed
        if self.text.startswith(surface, self.position):
            self.position += len(surface)
        else:
            self._follow(self._walk(fixed))

    def _choose(
        self, options: tuple[str, ...], weights: tuple[float, ...] | None, copies: bool
    ) -> tuple[int, str]:
        text, start = self.text, self.position
        surfaces = self._surfaces(options, copies)
        index = -1
        for i, surface in enumerate(surfaces):
            if text.startswith(surface, start):
                end = start + len(surface)
                if not (surface[-1].isalpha() and text[end : end + 1].isalpha()):
                    index, self.position = i, end
                    break
        if index < 0:
            # Best: complete, then farthest, then fewest slips, then first in the list.
            walks = [self._walk(option) for option in options]
            index = max(
                range(len(walks)),
                key=lambda i: (walks[i].complete, walks[i].reached, -walks[i].slips, -i),
            )
            self._follow(walks[index])
        total = len(surfaces) if weights is None else cumulative(weights)[-1]
        choice = Choice(start, surfaces, weights, index)
        self.logprob += math.log(choice.mass(index) / total)
        self.choices.append(index)
        self.trace.append(choice)
        return index, surfaces[index]

    def _follow(self, walk: _Walk) -> None:
        self.position = walk.reached
        self.slips += walk.slips
        if not walk.complete:
            raise _Stop

    def _walk(self, fixed: str) -> _Walk:
        """Read fixed text from the current position, taking another word of the list as a slip."""
        position, slips = self.position, 0
        for literal, name in pieces(fixed):
            if not self.text.startswith(literal, position):
                return _Walk(position + self._common(literal, position), False, slips)
            position += len(literal)
            if name is None:
                continue
            word = self.words[name]
            if not self._at(word, position):
                other = next((w for w in self.kin[name] if self._at(w, position)), None)
                if other is None:
                    return _Walk(position + self._common(word, position), False, slips)
                word, slips = other, slips + 1
            position += len(word)
        # A surface that ends inside a word of the text is not there.
        if fixed[-1].isalpha() and self.text[position : position + 1].isalpha():
            return _Walk(position, False, slips)
        return _Walk(position, True, slips)

    def _at(self, word: str, position: int) -> bool:
        end = position + len(word)
        return self.text.startswith(word, position) and not self.text[end : end + 1].isalpha()

    def _common(self, expected: str, position: int) -> int:
        """Length of the common beginning of `expected` and the text from `position`."""
        seen = self.text[position : position + len(expected)]
        return next((i for i, c in enumerate(seen) if c != expected[i]), len(seen))


def _read(text: str, size: str) -> tuple[Reader, str | None]:
    reader = Reader(LISTS, text)
    return reader, reader.read(story_of(size))


def parse(text: str, *, size: str = "full") -> Parsed:
    """Read a text as a story of the grammar.

    >>> parse("Once upon a time.").failure
    'break'
    """
    reader, failure = _read(text, size)
    return Parsed(
        valid=failure is None,
        failure=failure,
        prefix=reader.position,
        logprob=reader.logprob if failure is None else None,
        choices=tuple(reader.choices),
        attributes=reader.attributes(),
    )


def charges(text: str, *, size: str = "full") -> list[float]:
    """Exact -log P(character | what stands before it) for every character of a valid story.

    At each character the mass of the options that still agree with the text shrinks; the logarithm
    of the shrinking is its charge. Options that only the next character rules out ("catfish" after
    "cat") are charged there. The sum is minus the story's log-probability, so the exact charge of
    a token is the sum over its characters.

    Raises:
      ValueError: the text is not a story.
    """
    reader, failure = _read(text, size)
    if failure is not None:
        raise ValueError(f"not a story of the {size} grammar ({failure} at {reader.position})")
    return reader.charges()


def failures(texts: Iterable[str], size: str) -> dict[str, int]:
    """How many texts fail in which way; valid ones are not counted."""
    counts = Counter(parse(text, size=size).failure for text in texts)
    return {kind: counts[kind] for kind in FAILURES}


def parse_share(texts: Iterable[str], size: str) -> float:
    """Share of texts that are stories, nan for no texts."""
    valid = [parse(text, size=size).valid for text in texts]
    return sum(valid) / len(valid) if valid else math.nan
