"""Write stories as JSON Lines, or their figures: `python -m minilm.text.fables --help`."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from minilm.text.fables.gold import score
from minilm.text.fables.grammar import SIZES
from minilm.text.fables.sample import Story, stories


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minilm.text.fables", description=__doc__)
    parser.add_argument("--stories", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--seed", type=int, default=0, help="story i depends on it and i only (0)")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--statistics", action="store_true", help="figures instead of stories")
    options = parser.parse_args(arguments)
    drawn = stories(options.seed, options.stories, size=options.size)
    if options.statistics:
        if options.stories < 2:
            parser.error(f"--statistics needs --stories 2 or more, got {options.stories}")
        for name, value in statistics(list(drawn)).items():
            print(f"{name:24} {value:.6g}")
    else:
        for story in drawn:
            row = {"text": story.text, "logprob": story.logprob}
            row |= {"gold": round(score(story.attributes), 6)} | story.attributes._asdict()
            del row["slips"]  # a drawn story has none
            print(json.dumps(row))


def statistics(drawn: Sequence[Story]) -> dict[str, float]:
    """Size, entropy, vocabulary, attributes and gold of two stories or more: see data/README.md.

    `entropy` is the mean of -log P in nats: an unbiased estimate, whose standard error is given.
    `bayes_accuracy` is the accuracy of the best possible judge of one rater at temperature 1, on
    pairs of unrelated stories: E[max(p, 1 - p)], p = sigmoid(difference of gold).
    """
    words = np.array([len(story.text.split()) for story in drawn])
    characters = np.array([len(story.text) for story in drawn])
    entropy = np.array([-story.logprob for story in drawn])
    attributes = [story.attributes for story in drawn]
    gold = np.array([score(a) for a in attributes])
    # Neighbours in a draw are independent, so they make unrelated pairs.
    p = 1 / (1 + np.exp(gold[1:] - gold[:-1]))
    deeds = Counter(len(a.deeds) for a in attributes)
    figures = {
        "stories": len(drawn),
        "words": words.mean(),
        "words_min": words.min(),
        "words_max": words.max(),
        "characters": characters.mean(),
        "distinct_words": len(vocabulary(drawn)),
        "entropy": entropy.mean(),
        "entropy_se": entropy.std(ddof=1) / np.sqrt(len(drawn)),
        "entropy_per_word": entropy.sum() / words.sum(),
        "entropy_per_character": entropy.sum() / characters.sum(),
        **{f"deeds_{count}": deeds[count] / len(drawn) for count in sorted(deeds)},
        "kind_share": np.mean([deed > 0 for a in attributes for deed in a.deeds]),
        "promise_kept": np.mean([a.promise_kept is True for a in attributes]),
        "ending_fits": np.mean([a.ending_fits is True for a in attributes]),
        "gold": gold.mean(),
        "gold_std": gold.std(ddof=1),
        "bayes_accuracy": np.maximum(p, 1 - p).mean(),
    }
    return {name: float(value) for name, value in figures.items()}


def vocabulary(drawn: Sequence[Story]) -> set[str]:
    """Distinct words in lower case, without punctuation and possessive endings."""
    words = {word for story in drawn for word in story.text.split()}
    return {word.strip('.,"').removesuffix("'s").lower() for word in words}


if __name__ == "__main__":
    main()
