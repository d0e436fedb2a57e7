"""Fables: short stories from a probabilistic grammar with state, and the truth about them."""

from minilm.text.fables.gold import gold
from minilm.text.fables.grammar import SIZES
from minilm.text.fables.parse import charges, parse
from minilm.text.fables.sample import complete, generate, stories
from minilm.text.fables.teller import Attributes

__all__ = ["SIZES", "Attributes", "charges", "complete", "generate", "gold", "parse", "stories"]
