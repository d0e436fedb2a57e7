"""Write stories as JSON Lines, or their statistics: `python -m minilm.text.fables --help`."""

import argparse
import json

from minilm.text.fables.datasheet import gold_of, statistics
from minilm.text.fables.grammar import SIZES
from minilm.text.fables.sample import Story, stories


def record(story: Story) -> dict[str, object]:
    """A story as a row of data/*.jsonl."""
    return {
        "text": story.text,
        "logprob": story.logprob,
        "gold": round(gold_of(story), 6),
        "deeds": story.attributes.deeds,
        "promise_kept": story.attributes.promise_kept,
        "ending_fits": story.attributes.ending_fits,
    }


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
            print(json.dumps(record(story)))


if __name__ == "__main__":
    main()
