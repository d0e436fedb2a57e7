"""How much of a text stands word for word in another: memorised, or merely usual."""

from collections.abc import Iterable, Sequence

import numpy as np

WORDS = 13  # Brown et al. (2020), arXiv:2005.14165, App. C, call thirteen words in a row an overlap
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of mixed bits: 2⁶⁴ over the golden ratio


def copied_shares(
    groups: Sequence[Sequence[str]], training: Iterable[str], *, words: int = WORDS
) -> list[float | None]:
    """Of each group of texts the share of its runs of `words` words that `training` has too.

    Read beside each other for samples and for held-out texts: what both have is usual, what
    samples have more of is memorised. Runs are compared by a 64-bit hash of the words.

    Returns:
      A share in [0, 1] a group, None where its texts are shorter than a run.

    >>> copied_shares([["a b c d", "x y"], ["b c z"], ["a"]], ["z a b c"], words=2)
    [0.5, 0.5, None]
    """
    known: dict[str, int] = {}
    runs = []
    for texts in groups:
        ids = [[known.setdefault(w, len(known) + 1) for w in t.split()] for t in texts]
        runs.append(np.concatenate([_runs(np.array(i, np.uint64), words) for i in ids] or [_NONE]))
    wanted = np.unique(np.concatenate(runs or [_NONE]))
    found = np.zeros(len(wanted), bool)
    for text in training:
        # A word that no group has is 0: no run with it is asked for.
        ids = np.array([known.get(w, 0) for w in text.split()], np.uint64)
        there = _runs(ids, words)
        at = np.minimum(np.searchsorted(wanted, there), max(len(wanted) - 1, 0))
        if len(wanted):
            found[at[wanted[at] == there]] = True
    return [float(found[np.searchsorted(wanted, own)].mean()) if len(own) else None for own in runs]


_NONE = np.zeros(0, np.uint64)


def _runs(ids: np.ndarray, words: int) -> np.ndarray:
    """A hash of each run of `words` ids: a polynomial in a random factor, modulo 2⁶⁴."""
    count = len(ids) - words + 1
    if count < 1:
        return _NONE
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(words):
            total = total * _FACTOR + (ids[i : i + count] + np.uint64(1)) * _FACTOR
            total ^= total >> np.uint64(29)
    return total
