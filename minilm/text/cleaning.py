"""What a corpus has more than once: counted, and dropped where the config says so."""

import hashlib
import zlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

SHINGLE = 5  # words in a row that are compared
HASHES, BANDS = 128, 16  # of a signature; bands of 8 meet at a similarity of about 0.7
ALIKE = 0.8  # share of common shingles, estimated from the signature: Lee et al. (2022)


class Cleaned(NamedTuple):
    """What is kept, and how many were copies.

    Attributes:
      kept: the places of the texts that are kept, rising.
      exact: texts that came before.
      near: of the others, those nearly as an earlier one; None where it was not asked.
    """

    kept: Int[np.ndarray, " K"]
    exact: int
    near: int | None


def fingerprint(text: str) -> int:
    """64 bits in place of a text; of ten million different texts two share theirs once in 370,000.

    >>> fingerprint("a text") == fingerprint("a text") != fingerprint("another")
    True
    """
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def clean(
    texts: Iterable[str],
    fingerprints: UInt64[np.ndarray, " N"],
    duplicates: Literal["keep", "exact", "near"],
) -> Cleaned:
    """Counts copies among texts, and drops some.

    "exact" drops texts that came before, by their fingerprints; "near" also those that are nearly
    the same. Only "near" reads the texts.

    Near are texts of which an estimated 0.8 of the runs of five words are the same: MinHash (Broder
    1997, On the resemblance and containment of documents) with 128 hashes, compared where one of 16
    bands is equal, as Lee et al. (2022), arXiv:2107.06499, clean language-model corpora. It keeps
    some three kilobytes a text in memory, where the others need a few bytes.
    """
    count = len(fingerprints)
    firsts = np.sort(np.unique(fingerprints, return_index=True)[1])
    exact = count - len(firsts)
    if duplicates != "near":
        return Cleaned(np.arange(count) if duplicates == "keep" else firsts, exact, None)
    first = np.zeros(count, bool)
    first[firsts] = True
    # A band's hash stands for it: what meets by chance, the signatures tell apart.
    bands: dict[int, list[int]] = {}
    kept, signatures = [], []
    for place, text in enumerate(texts):
        if not first[place]:
            continue
        own = _signature(text)
        keys = [hash((n, part.tobytes())) for n, part in enumerate(np.split(own, BANDS))]
        others = {i for key in keys for i in bands.get(key, ())}
        if any(np.mean(own == signatures[i]) >= ALIKE for i in others):
            continue
        for key in keys:
            bands.setdefault(key, []).append(len(signatures))
        signatures.append(own)
        kept.append(place)
    return Cleaned(np.array(kept, np.int64), exact, len(firsts) - len(kept))


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
