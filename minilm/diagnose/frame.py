"""What a verdict is: a name, how sure it is, the figures it rests on, what to do about it."""

from collections.abc import Callable
from typing import NamedTuple

from minilm.diagnose.curves import Curves


class Evidence(NamedTuple):
    """A figure, and the step it was read at where there is one."""

    figure: str
    value: float
    step: float | None = None

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step:g}"
        return f"{self.figure}: {self.value:.4g}{at}"


class Finding(NamedTuple):
    """What a rule found."""

    confidence: float
    evidence: tuple[Evidence, ...]


class Verdict(NamedTuple):
    """One thing that a run's curves say.

    Attributes:
      confidence: in [0, 1], 0.5 at the rule's limit. It grows with the distance from the limit; it
        is no probability.
      command: the next one to try; CONFIG stands for the config file where the run has none.
      stage: the folder or file that it is about; empty for records handed in.
    """

    name: str
    confidence: float
    evidence: tuple[Evidence, ...]
    remedy: str
    command: str
    stage: str = ""


type Rule = Callable[[Curves], Finding | None]


def above(value: float, limit: float) -> float:
    """Confidence that a positive figure is large: 0.5 at the limit, towards 1 beyond it.

    >>> above(3.0, 1.0)
    0.75
    """
    return value / (value + limit) if value < float("inf") else 1.0


def below(value: float, limit: float) -> float:
    """Confidence that a figure of at least 0 is small: 0.5 at the limit, 1 at 0.

    >>> below(1.0, 3.0)
    0.75
    """
    return limit / (value + limit)
