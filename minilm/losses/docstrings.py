"""What a loss's docstring says, part by part: docs/losses.md and the audit print the parts."""

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

HEADINGS = ("Use", "Rewards", "Ignores", "Args", "Returns", "Raises", "Reference")
_HEADING = re.compile(rf"({'|'.join(HEADINGS)}):(?: (.*))?")
_ARGUMENT = re.compile(r"  (\w+(?:, \w+)*): (.*)")


class Explanation(NamedTuple):
    """A docstring's parts, each on one line but the formula; "" where there is none.

    Attributes:
      name: of the function.
      family: of losses, such as "regression".
      pays: the first line.
      formula: the second paragraph, line by line.
      remarks: the paragraphs after it.
      use, rewards, ignores, returns, reference: the sections of these names.
      args: what each argument is.
    """

    name: str
    family: str
    pays: str
    formula: str
    remarks: tuple[str, ...]
    use: str
    rewards: str
    ignores: str
    args: dict[str, str]
    returns: str
    reference: str


def explain(loss: Callable) -> Explanation:
    """Takes a loss's docstring apart.

    >>> from minilm.losses.regression import absolute_error
    >>> explain(absolute_error).ignores
    'how far out the far cases lie; the mean, hence totals.'
    >>> explain(absolute_error).formula
    'L(p, t) = |p − t|'
    """
    text = (inspect.getdoc(loss) or "").partition("\n>>> ")[0]
    sections: dict[str, list[str]] = {heading: [] for heading in ("", *HEADINGS)}
    current = ""
    for line in text.splitlines():
        if match := _HEADING.fullmatch(line):
            current = match[1]
            line = match[2] or ""
        sections[current].append(line)
    pays, formula, *remarks = [*"\n".join(sections[""]).strip().split("\n\n"), ""]
    return Explanation(
        name=loss.__name__,
        family=loss.__module__.rpartition(".")[2],
        pays=_joined(pays.splitlines()),
        formula=formula,
        remarks=tuple(_joined(paragraph.splitlines()) for paragraph in remarks if paragraph),
        use=_joined(sections["Use"]),
        rewards=_joined(sections["Rewards"]),
        ignores=_joined(sections["Ignores"]),
        args=_arguments(sections["Args"]),
        returns=_joined(sections["Returns"]),
        reference=_joined(sections["Reference"]),
    )


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines if line.strip())


def _arguments(lines: list[str]) -> dict[str, str]:
    """What is said of each name; lines further in go on with the one above."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if match := _ARGUMENT.fullmatch(line):
            found[match[1]] = [match[2]]
        elif line.strip():
            found[list(found)[-1]].append(line)
    return {name: _joined(text) for name, text in found.items()}
