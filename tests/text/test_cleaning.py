"""Copies are counted, and dropped where that is asked."""

import numpy as np
import pytest

from minilm.text.cleaning import Cleaned, clean, fingerprint


def cleaned(*texts: str, duplicates) -> Cleaned:
    return clean(texts, np.array([fingerprint(t) for t in texts], np.uint64), duplicates)


def words(seed: int, count: int = 200) -> list[str]:
    return [f"w{i}" for i in np.random.default_rng(seed).integers(0, 5000, count)]


ONE, OTHER = " ".join(words(0)), " ".join(words(1))
NEARLY = " ".join([*words(0)[:-3], "another", "ending", "here"])  # 96 % of its runs are ONE's
HALF = " ".join(words(0)[:100] + words(2)[:100])


@pytest.mark.parametrize(
    ("duplicates", "kept", "near"),
    [("keep", [0, 1, 2, 3, 4], None), ("exact", [0, 1, 3, 4], None), ("near", [0, 1, 4], 1)],
)
def test_which_copies_are_dropped(duplicates, kept, near):
    found = cleaned(ONE, OTHER, ONE, NEARLY, HALF, duplicates=duplicates)
    assert found.kept.tolist() == kept  # the first stays
    assert (found.exact, found.near) == (1, near)


def test_short_texts_are_alike_only_when_their_words_are():
    assert cleaned("a b", "a  b", "a c", "", "b", duplicates="near").near == 1


def test_the_estimate_of_similarity_is_near_the_true_one():
    """Texts that share 95 of 100 runs are found, those that share half are not: no false alarm in
    300 pairs, of which each has a chance under 1e-9 by the binomial of 128 hashes."""
    base = [" ".join(words(i)) for i in range(300)]
    halves = [" ".join(words(i)[:130] + words(1000 + i)[:70]) for i in range(300)]
    close = [" ".join([*words(i)[:-2], "x", "y"]) for i in range(300)]
    assert cleaned(*base, *halves, duplicates="near").near == 0
    assert cleaned(*base, *close, duplicates="near").near == 300
