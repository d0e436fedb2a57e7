"""Gold: what a fable is worth, a known function of its attributes."""

from minilm.text.fables.parse import parse
from minilm.text.fables.teller import Attributes

DEED = 0.7  # a kind deed earns it, an unkind one costs it
CROWD = 0.4  # times the square of kind deeds beyond two: gold is concave, best at three
PROMISE = {None: 0.0, True: 0.8, False: -0.8}  # kept earns, broken costs
ENDING = {None: 0.0, True: 0.8, False: -0.8}  # one that fits what came before earns
SLIP = 0.5
BREAK_EARLY, BREAK_LATE = 1.0, 0.5  # by how far the text came before it left the grammar
NO_END = 1.0
EXPECTED_CHARACTERS = {"small": 152, "full": 458}  # a story's mean, the unit of "how far"


def score(attributes: Attributes, failure: str | None = None, progress: float = 1.0) -> float:
    """Gold of a story read with these attributes.

    Sum over deeds of +-0.7, less 0.4 max(0, kind deeds - 2)^2; +-0.8 for the promise; +-0.8 for the
    ending (nothing where the text did not come so far); less 0.5 a slip; less 1 - 0.5 progress for
    a break, less 1 for no end. Graded, since with one fixed fine for every text that does not parse
    half of gold's variance would be single wrong words, which a small reward model cannot see.

    Args:
      attributes, failure: as in `Parsed`, read from the longest valid prefix.
      progress: characters of the prefix over a story's mean length; more than 1 counts as 1.

    >>> round(score(Attributes((1, 1, -1), True, True, 0)), 6)
    2.3
    """
    kind = sum(deed > 0 for deed in attributes.deeds)
    total = DEED * sum(attributes.deeds) - CROWD * max(0, kind - 2) ** 2
    total += PROMISE[attributes.promise_kept]
    total += ENDING[attributes.ending_fits]
    total -= SLIP * attributes.slips
    if failure == "break":
        total -= BREAK_EARLY - (BREAK_EARLY - BREAK_LATE) * min(1.0, progress)
    elif failure == "no_end":
        total -= NO_END
    return total


def gold(text: str, *, size: str = "full") -> float:
    """Gold of a text: `score` of what `parse` reads in it."""
    read = parse(text, size=size)
    return score(read.attributes, read.failure, read.prefix / EXPECTED_CHARACTERS[size])
