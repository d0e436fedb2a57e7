"""Token rows: documents packed once, memory-mapped, and batches as a function of (seed, step)."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minilm.errors import UserError
from minilm.text.corpora import Document
from minilm.text.tokenizer import Tokenizer

type Rows = Int[np.ndarray, "N T1"]


class Batch(NamedTuple):
    """Inputs, targets one token on, loss weights (0 at padding) and segments: one a document."""

    tokens: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    weights: Float[np.ndarray, "B T"]
    segments: Int[np.ndarray, "B T"]


def batch_of(rows: Rows) -> Batch:
    """A batch from rows of T + 1 tokens. Attention stays inside a document."""
    tokens = np.asarray(rows[:, :-1], np.int32)
    targets = np.asarray(rows[:, 1:], np.int32)
    weights = (targets != Tokenizer.pad_id).astype(np.float32)
    segments = np.cumsum(tokens == Tokenizer.eos_id, axis=1, dtype=np.int32)
    return Batch(tokens, targets, weights, segments)


class Batches:
    """Batch k, by random access: the rows are shuffled anew each epoch, without end."""

    def __init__(self, rows: Rows, *, batch_size: int, seed: int):
        import grain

        self._rows, self._size = rows, batch_size
        self._order = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat()
        self.steps_per_epoch = len(rows) / batch_size

    def __getitem__(self, step: int) -> Batch:
        start = step * self._size
        return batch_of(self._rows[[self._order[start + i] for i in range(self._size)]])


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, sequence_length: int,
    cache: Path, seed: int,
) -> Rows:
    """Rows of `sequence_length` + 1 tokens, made once and memory-mapped from `cache`.

    Every document reads: end-of-text, text, end-of-text; the closing token of one is the opening
    one of the next in its row. Documents that fit stay whole and are packed by best fit; longer
    ones are cut into windows that overlap by one token, so each token is predicted once.

    Raises:
      UserError: the corpus is shorter than one sequence.
    """
    key = hashlib.sha256(f"{tokenizer.digest} {sequence_length} {seed}".encode())
    for document in documents:
        key.update(hashlib.sha256(document.text.encode()).digest())
    path = cache / f"rows-{key.hexdigest()[:16]}.npy"
    if path.exists():
        try:
            return np.load(path, mmap_mode="r")
        except ValueError:
            path.unlink()
    encoded = tokenizer.encode_batch([d.text for d in documents])
    total = sum(map(len, encoded))
    if total < sequence_length:
        raise UserError(
            f"the corpus has {total} tokens, fewer than one sequence",
            where="pretrain.sequence_length", value=sequence_length, allowed=f"at most {total}",
            hint="give more text, or a shorter sequence",
        )
    rows = np.array(pack(encoded, sequence_length), np.int32)
    np.random.default_rng((seed, 5)).shuffle(rows)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, rows)
    temporary.replace(path)
    return np.load(path, mmap_mode="r")


def pack(encoded: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Padded rows of `length` + 1 ids; best fit for whole documents, windows for long ones."""
    eos, pad = Tokenizer.eos_id, Tokenizer.pad_id
    rows: list[list[int]] = []
    open_rows: dict[int, list[list[int]]] = {}  # by room left
    for ids in encoded:
        need = len(ids) + 1
        if need > length:
            whole = [eos, *ids, eos]
            rows += [whole[i : i + length + 1] for i in range(0, len(whole) - 1, length)]
            continue
        room = next((r for r in range(need, length + 1) if open_rows.get(r)), None)
        row = open_rows[room].pop() if room is not None else [eos]
        row += [*ids, eos]
        open_rows.setdefault(length + 1 - len(row), []).append(row)
    rows += [row for group in open_rows.values() for row in group]
    return [row + [pad] * (length + 1 - len(row)) for row in rows]


def alone(
    token_lists: Sequence[Sequence[int]], *, batch_size: int, max_length: int, ids: Tokenizer
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each document by itself, from the start token, its own end-of-text included.

    Rows are sorted by length and padded to a multiple of 32, so that few shapes are compiled.
    Windows of a long document share its index.

    Yields:
      A batch and the document of each of its rows, -1 at rows that only fill the batch.
    """
    pieces = []
    for n, tokens in enumerate(token_lists):
        whole = [ids.eos_id, *tokens, ids.eos_id]
        pieces += [
            (n, whole[i : i + max_length + 1]) for i in range(0, len(whole) - 1, max_length)
        ]
    pieces.sort(key=lambda p: len(p[1]))
    for start in range(0, len(pieces), batch_size):
        part = pieces[start : start + batch_size]
        width = min(-(-(len(part[-1][1]) - 1) // 32) * 32, max(max_length, 32))
        rows = np.full((batch_size, width + 1), ids.pad_id, np.int32)
        for row, (_, piece) in zip(rows, part, strict=False):
            row[: len(piece)] = piece
        owners = np.full(batch_size, -1)
        owners[: len(part)] = [n for n, _ in part]
        yield batch_of(rows), owners
