"""Prompts: the openings of held-out documents, in disjoint sets."""

import re
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from minilm.config import Config
from minilm.errors import UserError
from minilm.text.store import Document
from minilm.text.tokenizer import Tokenizer

SENTENCE_END = re.compile(r'[.!?]["”’]?(?=\s)')


class PromptSets(NamedTuple):
    """Openings of different documents: what labels, trains, tunes and reports never meets."""

    preferences: list[str]
    rlhf: list[str]
    development: list[str]
    evaluation: list[str]


def opening(text: str, sentences: int) -> str | None:
    """The first `sentences` sentences, or None when the text has no more than these.

    >>> opening("One fell. Two rose! Three went home.", 2)
    'One fell. Two rose!'
    """
    ends = [m.end() for m in SENTENCE_END.finditer(text)]
    return text[: ends[sentences - 1]] if len(ends) >= sentences else None


def prompt_sets(config: Config, tokenizer: Tokenizer, documents: Sequence[Document]) -> PromptSets:
    """Draws the four sets, each of the size that `[prompts]` gives, from shuffled documents.

    Raises:
      UserError: fewer usable documents than the sets ask for.
    """
    sizes = config.prompts
    counts = (sizes.evaluation, sizes.development, sizes.preferences, sizes.rlhf)
    found: dict[str, None] = {}  # an ordered set: two documents may open alike
    for i in np.random.default_rng((config.seed, 11)).permutation(len(documents)):
        if len(found) == sum(counts):
            break
        prompt = opening(documents[i].text, sizes.sentences)
        if prompt and len(tokenizer.encode(prompt)) + 1 <= sizes.max_tokens:
            found[prompt] = None
    if len(found) < sum(counts):
        raise UserError(
            f"{len(documents)} held-out documents give {len(found)} different prompts of "
            f"{sizes.sentences} sentences and at most {sizes.max_tokens} tokens",
            where="prompts.preferences + rlhf + development + evaluation",
            value=sum(counts),
            allowed=f"at most {len(found)}",
            hint="lower the counts, or raise corpus.held_out or corpus.documents",
        )
    left = iter(found)
    evaluation, development, preferences, rlhf = (list(islice(left, n)) for n in counts)
    return PromptSets(preferences, rlhf, development, evaluation)
