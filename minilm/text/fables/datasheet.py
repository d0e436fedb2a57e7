"""What a draw of fables looks like in numbers: the figures of data/README.md."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from minilm.text.fables.gold import score
from minilm.text.fables.sample import Story


def gold_of(story: Story) -> float:
    """Gold of a drawn story, without reading it again."""
    return score(story.attributes, None, 1.0)


def statistics(drawn: Sequence[Story]) -> dict[str, float | int]:
    """Size, entropy, vocabulary, attributes and gold of some stories.

    `entropy` is the mean of -log P in nats: an unbiased estimate, whose standard error is given.
    `bayes_accuracy` is the accuracy of the best possible judge of one rater at temperature 1, on
    pairs of unrelated stories: E[max(p, 1 - p)], p = sigmoid(difference of gold).

    Raises:
      ValueError: fewer than two stories.
    """
    if len(drawn) < 2:
        raise ValueError(f"statistics need at least 2 stories, got {len(drawn)}")
    words = np.array([len(story.text.split()) for story in drawn])
    characters = np.array([len(story.text) for story in drawn])
    entropy = np.array([-story.logprob for story in drawn])
    gold = np.array([gold_of(story) for story in drawn])
    # Neighbours in a draw are independent, so they make unrelated pairs.
    p = 1 / (1 + np.exp(gold[1:] - gold[:-1]))
    deeds = Counter(len(story.attributes.deeds) for story in drawn)
    return {
        "stories": len(drawn),
        "words": float(words.mean()),
        "words_min": int(words.min()),
        "words_max": int(words.max()),
        "characters": float(characters.mean()),
        "distinct_words": len(vocabulary(drawn)),
        "entropy": float(entropy.mean()),
        "entropy_se": float(entropy.std(ddof=1) / np.sqrt(len(drawn))),
        "entropy_min": float(entropy.min()),
        "entropy_per_word": float(entropy.sum() / words.sum()),
        "entropy_per_character": float(entropy.sum() / characters.sum()),
        **{f"deeds_{count}": deeds[count] / len(drawn) for count in sorted(deeds)},
        "kind_share": float(np.mean([d > 0 for s in drawn for d in s.attributes.deeds])),
        "promise_kept": float(np.mean([bool(s.attributes.promise_kept) for s in drawn])),
        "ending_fits": float(np.mean([bool(s.attributes.ending_fits) for s in drawn])),
        "gold": float(gold.mean()),
        "gold_std": float(gold.std(ddof=1)),
        "bayes_accuracy": float(np.maximum(p, 1 - p).mean()),
    }


def vocabulary(drawn: Sequence[Story]) -> set[str]:
    """Distinct words in lower case, without punctuation and possessive endings."""
    return {
        word.strip('.,"').removesuffix("'s").lower()
        for story in drawn
        for word in story.text.split()
    }
