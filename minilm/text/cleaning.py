"""What a corpus has more than once: counted, and dropped where the config says so."""

import zlib
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

SHINGLE = 5  # words in a row that are compared
HASHES, BANDS = 128, 16  # of a signature; bands of 8 meet at a similarity of about 0.7
ALIKE = 0.8  # share of common shingles, estimated from the signature: Lee et al. (2022)


class Cleaned(NamedTuple):
    """Documents that are kept, in their order, and how many were copies.

    Attributes:
      exact: documents whose text an earlier one has.
      near: of the others, those nearly as an earlier one; None where it was not asked.
    """

    documents: list[Any]
    exact: int
    near: int | None


def clean(documents: Iterable[Any], duplicates: Literal["keep", "exact", "near"]) -> Cleaned:
    """Counts copies among what has a `text`, and drops some.

    "exact" drops texts that came before, "near" also those that are nearly the same.

    Near are texts of which an estimated 0.8 of the runs of five words are the same: MinHash (Broder
    1997, On the resemblance and containment of documents) with 128 hashes, compared where one of 16
    bands is equal, as Lee et al. (2022), arXiv:2107.06499, clean language-model corpora.
    """
    kept: list[Any] = []
    seen: set[str] = set()
    bands: dict[tuple[int, bytes], list[int]] = {}
    signatures: list[np.ndarray] = []
    exact = near = 0
    for document in documents:
        if document.text in seen:
            exact += 1
            if duplicates == "keep":
                kept.append(document)
            continue
        seen.add(document.text)
        if duplicates == "near":
            own = _signature(document.text)
            keys = [(n, part.tobytes()) for n, part in enumerate(np.split(own, BANDS))]
            others = {i for key in keys for i in bands.get(key, ())}
            if any(np.mean(own == signatures[i]) >= ALIKE for i in others):
                near += 1
                continue
            for key in keys:
                bands.setdefault(key, []).append(len(signatures))
            signatures.append(own)
        kept.append(document)
    return Cleaned(kept, exact, near if duplicates == "near" else None)


_FACTORS, _SHIFTS = np.random.default_rng(0).integers(1, 2**63, (2, HASHES, 1), np.uint64)
_FACTORS |= np.uint64(1)


def _signature(text: str) -> np.ndarray:
    """The least of each hash over the runs of words, uint64 [HASHES]; of a short text, of all."""
    words = text.split()
    count = max(len(words) - SHINGLE + 1, 1)
    runs = {" ".join(words[i : i + SHINGLE]).encode() for i in range(count)}
    # Two checksums side by side: 64 bits that are the same in every process.
    codes = np.array([zlib.crc32(r) << 32 | zlib.adler32(r) for r in sorted(runs)], np.uint64)
    least = np.full(HASHES, np.iinfo(np.uint64).max)
    for start in range(0, len(codes), 4096):  # a long text's table would be large
        hashed = codes[start : start + 4096] * _FACTORS + _SHIFTS
        hashed ^= hashed >> np.uint64(31)
        least = np.minimum(least, (hashed * _FACTORS).min(axis=1))
    return least
