"""What a story is told to: a description of a grammar is a function that makes calls on a `Teller`.

The same description is drawn from (`sample.Writer`) or replayed against a text (`parse.Reader`), so
generation and parsing cannot drift apart. Everything a teller is told is one of three things: fixed
text, a word copied from earlier in the story, or a choice whose surface stands in the text where it
is made. Nothing is latent, hence the probability of a text is the product over its choices.

One invariant makes the text decide the choice: at every choice the surfaces are prefix-free with a
word boundary ("cat" and "catfish" may stand side by side, "cat" and "cat nap" may not). It is
checked whenever a story is told, drawn or read.

Templates: `{tools}` in `{tool:tools}` is a list to draw from, `tool` the name under which the drawn
word is kept; `{:tools}` draws and forgets; `{tool}` copies; `{tool:tools/2}` draws from a part of
`tools`. The head of a template, what is matched when it competes with others, ends before the first
drawn slot or at a bar `|`.
"""

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, no_type_check

_SLOT = re.compile(r"\{(\w*)(?::([\w/]+))?\}")


class Ambiguous(ValueError):
    """A choice whose option the text could not tell, or text that would blur the one before it."""


class Attributes(NamedTuple):
    """What gold is a function of. None: not reached in the valid prefix."""

    deeds: tuple[int, ...] = ()  # +1 kind, -1 unkind, in order
    promise_kept: bool | None = None
    ending_fits: bool | None = None
    slips: int = 0  # copied slots that hold another word of their list


class Slot(NamedTuple):
    """One drawn slot and the fixed text (with copies) up to the next one."""

    name: str  # "" forgets the word
    words: str  # a key of the teller's lists
    after: str


class Template(NamedTuple):
    head: str  # fixed text with copies
    rest: str  # what follows the bar, up to the first slot
    slots: tuple[Slot, ...]


@functools.cache
def template(source: str) -> Template:
    """Compile a template.

    >>> template("{She} lost| the {tool} and a {:things}.")  # doctest: +NORMALIZE_WHITESPACE
    Template(head='{She} lost', rest=' the {tool} and a ',
             slots=(Slot(name='', words='things', after='.'),))
    """
    fixed, slots = [""], []
    end = 0
    for match in _SLOT.finditer(source):
        name, words = match.groups()
        fixed[-1] += source[end : match.start()]
        end = match.end()
        if words is None:
            fixed[-1] += f"{{{name}}}"
        else:
            slots.append((name, words))
            fixed.append("")
    fixed[-1] += source[end:]
    head, _, rest = fixed[0].partition("|")
    return Template(
        head, rest, tuple(Slot(n, w, a) for (n, w), a in zip(slots, fixed[1:], strict=True))
    )


@functools.cache
def _templates(sources: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Template, ...], bool]:
    """The heads, the templates, and whether a head copies a word."""
    compiled = tuple(template(source) for source in sources)
    heads = tuple(each.head for each in compiled)
    return heads, compiled, any("{" in head for head in heads)


@functools.cache
def pieces(fixed: str) -> tuple[tuple[str, str | None], ...]:
    """Fixed text as (literal, name of the copied word after it).

    >>> pieces("gave {helper} the {tool}.")
    (('gave ', 'helper'), (' the ', 'tool'), ('.', None))
    """
    found, end = [], 0
    for match in _SLOT.finditer(fixed):
        found.append((fixed[end : match.start()], match.group(1)))
        end = match.end()
    if end < len(fixed):
        found.append((fixed[end:], None))
    return tuple(found)


@functools.lru_cache(maxsize=1 << 14)
def check_prefix_free(surfaces: tuple[str, ...]) -> None:
    """Raise `Ambiguous` unless no surface is another, or another's beginning up to a word's end.

    >>> check_prefix_free(("cat", "catfish", "dog"))
    """
    # Sorted, everything between a string and one that it begins also begins with it.
    ordered = sorted(surfaces)
    for i, surface in enumerate(ordered):
        if not surface:
            raise Ambiguous(f"an option with an empty surface among {surfaces}")
        for other in ordered[i + 1 :]:
            if not other.startswith(surface):
                break
            if not (surface[-1].isalpha() and other[len(surface) :][:1].isalpha()):
                raise Ambiguous(f"{surface!r} begins {other!r}: the text could not tell which")


@functools.cache
def cumulative(weights: tuple[float, ...]) -> tuple[float, ...]:
    """Partial sums of a choice's weights; raises ValueError unless all are positive."""
    if min(weights) <= 0:
        raise ValueError(f"weights must be positive, got {weights}: leave the option out instead")
    total, sums = 0.0, []
    for weight in weights:
        total += weight
        sums.append(total)
    return tuple(sums)


@no_type_check  # checked calls, as under the tests' import hook, make a story 60 times slower
class Teller(ABC):
    """State of one telling: words kept by name, attributes, choices, log-probability."""

    def __init__(self, lists: Mapping[str, tuple[str, ...]]):
        self.lists = lists
        self.words: dict[str, str] = {}  # name -> the word that a copy must repeat
        self.kin: dict[str, tuple[str, ...]] = {}  # name -> words that would be a slip there
        self.taken: set[str] = set()  # the kept words
        self.choices: list[int] = []
        self.logprob = 0.0
        self.deeds: list[int] = []
        self.promise_kept: bool | None = None
        self.ending_fits: bool | None = None
        self.slips = 0

    def keep(self, name: str, word: str, kin: tuple[str, ...]) -> None:
        """Keep `word` for copies; raises Ambiguous when the name is taken: a slot drawn twice."""
        if name in self.words:
            raise Ambiguous(f"the slot '{name}' already holds {self.words[name]!r}")
        self.words[name] = word
        self.kin[name] = kin
        self.taken.add(word)

    def tell(self, source: str) -> None:
        """Tell one template."""
        told = template(source)
        if told.head:
            self._fixed(told.head)
        self.rest(told)

    def one_of(self, sources: tuple[str, ...], weights: tuple[float, ...] | None = None) -> int:
        """Choose among templates by their heads, equally likely without weights; the index."""
        index, chosen = self.head_of(sources, weights)
        self.rest(chosen)
        return index

    def head_of(
        self, sources: tuple[str, ...], weights: tuple[float, ...] | None = None
    ) -> tuple[int, Template]:
        """`one_of` as far as the head; `rest` tells the rest.

        Between the two, what the head decides is noted: it holds even where the rest leaves the
        grammar.
        """
        heads, compiled, copies = _templates(sources)
        index, _ = self._choose(heads, weights, copies)
        return index, compiled[index]

    def rest(self, told: Template) -> None:
        if told.rest:
            self._fixed(told.rest)
        for name, words, after in told.slots:
            options = self.lists[words]
            # A kept word is not drawn a second time, so a copy says whose it is.
            if name and not self.taken.isdisjoint(options):
                options = tuple(word for word in options if word not in self.taken)
            _, word = self._choose(options, None, False)
            if name:
                self.keep(name, word, self.lists[words.partition("/")[0]])
            if after:
                self._fixed(after)

    def attributes(self) -> Attributes:
        return Attributes(tuple(self.deeds), self.promise_kept, self.ending_fits, self.slips)

    @abstractmethod
    def _fixed(self, fixed: str) -> None:
        """Tell fixed text with copies."""

    @abstractmethod
    def _choose(
        self, options: tuple[str, ...], weights: tuple[float, ...] | None, copies: bool
    ) -> tuple[int, str]:
        """Tell one of `options`, fixed text (with `copies` or none); its index and its surface."""

    def _surfaces(self, options: tuple[str, ...], copies: bool) -> tuple[str, ...]:
        if copies:
            options = tuple([option.format_map(self.words) for option in options])
        check_prefix_free(options)
        return options
