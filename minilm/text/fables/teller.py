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
import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, no_type_check

Options = tuple[str, ...]
Weights = tuple[float, ...]
_DRAWN = re.compile(r"\{(\w*):([\w/]+)\}")


class Ambiguous(ValueError):
    """A choice whose option the text could not tell, or text that would blur the one before it."""


class Attributes(NamedTuple):
    """What gold is a function of. None: not reached in the valid prefix."""

    deeds: tuple[int, ...] = ()  # +1 kind, -1 unkind, in order
    promise_kept: bool | None = None
    ending_fits: bool | None = None
    slips: int = 0  # copied slots that hold another word of their list


class Template(NamedTuple):
    head: str  # fixed text with copies
    rest: str  # what follows the bar, up to the first slot
    slots: tuple[tuple[str, str, str], ...]  # name ("" forgets), list, fixed text up to the next


@functools.cache
def template(source: str) -> Template:
    """Compile a template.

    >>> template("{She} lost| the {tool} and a {:things}.")
    Template(head='{She} lost', rest=' the {tool} and a ', slots=(('', 'things', '.'),))
    """
    before, *drawn = _DRAWN.split(source)
    head, _, rest = before.partition("|")
    return Template(head, rest, tuple(zip(drawn[::3], drawn[1::3], drawn[2::3], strict=True)))


@functools.cache
def _heads(sources: Options) -> Options:
    return tuple(template(source).head for source in sources)


@functools.lru_cache(maxsize=1 << 14)
def check_prefix_free(surfaces: Options) -> None:
    """Raise `Ambiguous` unless no surface is another, or another's beginning up to a word's end.

    >>> check_prefix_free(("cat", "catfish", "dog"))
    """
    for one, other in itertools.permutations(surfaces, 2):
        goes_on = one[-1:].isalpha() and other[len(one) :][:1].isalpha()
        if other.startswith(one) and not goes_on:
            raise Ambiguous(f"{one!r} begins {other!r}: the text could not tell which")


@no_type_check  # checked calls, as under the tests' import hook, make a story 60 times slower
class Teller(ABC):
    """State of one telling: words kept by name, attributes, choices, log-probability."""

    def __init__(self, lists: Mapping[str, Options]):
        self.lists = lists
        self.words: dict[str, str] = {}  # name -> the word that a copy must repeat
        self.kin: dict[str, Options] = {}  # name -> words that would be a slip there
        self.choices: list[int] = []
        self.logprob = 0.0
        self.attributes = Attributes()

    def keep(self, name: str, word: str, kin: Options) -> None:
        self.words[name] = word
        self.kin[name] = kin

    def tell(self, source: str) -> None:
        """Tell one template."""
        told = template(source)
        if told.head:
            self._fixed(told.head)
        self.rest(told)

    def one_of(self, sources: Options) -> int:
        """Tell one of some templates, chosen by its head; which."""
        index, chosen = self.head_of(sources)
        self.rest(chosen)
        return index

    def head_of(self, sources: Options, weights: Weights | None = None) -> tuple[int, Template]:
        """`one_of` as far as the head, equally likely without weights.

        Before `rest`, what the head decides is noted: it holds even where the rest leaves the
        grammar.
        """
        heads = _heads(sources)
        index = self._choose(heads, tuple([self._filled(head) for head in heads]), weights)
        return index, template(sources[index])

    def rest(self, told: Template) -> None:
        if told.rest:
            self._fixed(told.rest)
        for name, words, after in told.slots:
            options = self.lists[words]
            # A kept word is not drawn a second time, so a copy says whose it is.
            if name and not (kept := set(self.words.values())).isdisjoint(options):
                options = tuple([word for word in options if word not in kept])
            word = options[self._choose(options, options, None)]
            if name:
                self.keep(name, word, self.lists[words.partition("/")[0]])
            if after:
                self._fixed(after)

    def _filled(self, fixed: str) -> str:
        return fixed.format_map(self.words) if "{" in fixed else fixed

    def _choose(self, options: Options, surfaces: Options, weights: Weights | None) -> int:
        """Tell one of `surfaces`, which are `options` with the copies filled in; which."""
        check_prefix_free(surfaces)
        index = self._pick(options, surfaces, weights)
        self.choices.append(index)
        if weights is None:
            self.logprob -= math.log(len(surfaces))
        else:
            *_, total = itertools.accumulate(weights)
            self.logprob += math.log(weights[index] / total)
        return index

    @abstractmethod
    def _fixed(self, fixed: str) -> None:
        """Tell fixed text with copies."""

    @abstractmethod
    def _pick(self, options: Options, surfaces: Options, weights: Weights | None) -> int:
        """As `_choose`, but for the books."""
