"""Fables: short stories from a probabilistic grammar with state, and the truth about them."""

from minilm.text.fables.gold import gold
from minilm.text.fables.grammar import SIZES
from minilm.text.fables.parse import Parsed, charges, failures, parse, parse_share
from minilm.text.fables.sample import Story, generate, stories
from minilm.text.fables.teller import Ambiguous, Attributes

__all__ = [
    "SIZES",
    "Ambiguous",
    "Attributes",
    "Parsed",
    "Story",
    "charges",
    "failures",
    "generate",
    "gold",
    "parse",
    "parse_share",
    "stories",
]
