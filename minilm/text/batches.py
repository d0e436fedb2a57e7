"""Token rows: documents packed once, memory-mapped, and batches as a function of (seed, step)."""

import bisect
import hashlib
import heapq
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from minilm.config import PretrainConfig
from minilm.errors import UserError
from minilm.files import TEMPORARY, replacing
from minilm.text.store import Document
from minilm.text.tokenizer import Tokenizer

type Rows = Integer[np.ndarray, "N T1"]
type Ids = Integer[np.ndarray, "_"]

TOLD = 2**20  # characters between two words on progress
LAYOUT = 2  # of the cached rows: another number makes old files stale


class Batch(NamedTuple):
    """Inputs, targets one token on, loss weights (0 at padding) and segments: one a document.

    NumPy arrays here, JAX's inside a jitted step: a pytree either way.
    """

    tokens: Int[Any, "B T"]
    targets: Int[Any, "B T"]
    weights: Float[Any, "B T"]
    segments: Int[Any, "B T"]


def batch_of(rows: Rows) -> Batch:
    """A batch from rows of T + 1 tokens. Attention stays inside a document."""
    tokens = np.asarray(rows[:, :-1], np.int32)
    targets = np.asarray(rows[:, 1:], np.int32)
    weights = (targets != Tokenizer.pad_id).astype(np.float32)
    segments = np.cumsum(tokens == Tokenizer.eos_id, axis=1, dtype=np.int32)
    return Batch(tokens, targets, weights, segments)


def batch_across(rows: Rows) -> Batch:
    """The same, but that a token also sees the documents before its own."""
    batch = batch_of(rows)
    return batch._replace(segments=(batch.tokens != Tokenizer.pad_id).astype(np.int32))


class Growth(NamedTuple):
    """The rows of each step: from `start`, doubled at even intervals, `full` after `steps` steps.

    A batch that doubles after equally many steps grows linearly in what has been read: GPT-3's
    schedule, in the few sizes that are compiled.

    Reference:
      Brown et al. (2020), Language Models are Few-Shot Learners, arXiv:2005.14165, App. B.

    >>> growth = Growth(2, 8, 4)
    >>> [growth.size(k) for k in range(6)]
    [2, 2, 4, 4, 8, 8]
    >>> [growth.before(k) for k in range(6)]
    [0, 2, 4, 8, 12, 20]
    """

    start: int  # `full` divided by a power of two
    full: int
    steps: int = 0  # 0: all have the full size

    @property
    def _ends(self) -> list[int]:
        """The first step after each size but the full one."""
        doublings = (self.full // self.start).bit_length() - 1
        return [-(-self.steps * (n + 1) // doublings) for n in range(doublings)]

    def size(self, step: int) -> int:
        """Rows of a step's batch."""
        return self.start << bisect.bisect_right(self._ends, step)

    def before(self, step: int) -> int:
        """Rows of all steps before this one."""
        ends = self._ends
        spans = zip([0, *ends], [*ends, step], strict=True)
        return sum(max(min(b, step) - a, 0) * (self.start << n) for n, (a, b) in enumerate(spans))


def growth_of(config: PretrainConfig) -> Growth:
    """That of pretraining."""
    start = config.batch_size if config.batch_start is None else config.batch_start
    return Growth(start, config.batch_size, config.batch_warmup_steps)


class Batches:
    """Batch k, by random access: the rows are shuffled anew each epoch, without end.

    No iterator state: a resumed run asks for the batch of its step. The last batch of an epoch is
    filled with the first rows of the next.

    Args:
      batch_size: rows of each, or how they grow.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int | Growth,
        seed: int,
        make: Callable[[Rows], Batch] = batch_of,
    ):
        import grain  # two seconds: only where it is used

        constant = isinstance(batch_size, int)
        self._growth = Growth(batch_size, batch_size) if constant else batch_size
        self.rows, self._make = rows, make
        # Row numbers, not rows: half the Python a row. Grain takes seeds of 32 bits.
        self._order = grain.MapDataset.range(len(rows)).shuffle(seed=seed % 2**32).repeat()

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, 0, self.size(step))

    def size(self, step: int) -> int:
        """Rows of a batch."""
        return self._growth.size(step)

    def part(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop` of a batch: what one of several hosts reads of it."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        first = self._growth.before(step)
        chosen = np.array([self._order[first + i] for i in range(start, stop)], np.int64)
        rows = self.rows[chosen]
        release(self.rows)
        return self._make(rows)


def release(rows: Rows) -> None:
    """Gives pages of a mapped file that were read back: they would count as this process's."""
    if isinstance(rows.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        rows.base.madvise(mmap.MADV_DONTNEED)


def count_tokens(rows: Rows) -> int:
    """All but padding, and but the token that opens a row: each of a document's tokens once."""
    total = 0
    for start in range(0, len(rows), 2**12):
        total += int(np.count_nonzero(rows[start : start + 2**12, 1:] != Tokenizer.pad_id))
        release(rows)
    return total


def tokenize(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    sequence_length: int,
    cache: Path,
    seed: int,
    tell: Callable[[int], None] = lambda characters: None,
) -> Rows:
    """Rows of `sequence_length` + 1 tokens, made once and memory-mapped from `cache`.

    Every document reads: end-of-text, text, end-of-text. Documents are packed in an order drawn
    from `seed`, each read when its turn comes and written where it belongs, so that memory holds
    some megabytes of them. The file is named by what decides its content, and made again when
    damaged; a process that is killed leaves none of that name.

    Args:
      tell: is given the number of characters that are read, again and again.
    Returns:
      uint16 or int32 [N, sequence_length + 1].
    Raises:
      UserError: the corpus is shorter than one sequence; the cache cannot be written, or is full.
    """
    key = hashlib.sha256(f"{LAYOUT} {tokenizer.digest} {sequence_length} {seed}".encode())
    for document in documents:
        key.update(hashlib.sha256(document.text.encode()).digest())
    path = cache / f"rows-{key.hexdigest()[:16]}.npy"
    rows = _cached(path, sequence_length)
    if rows is not None:
        return rows
    total = 0

    def texts() -> Iterator[str]:
        read = told = 0
        for i in np.random.default_rng((seed, 5)).permutation(len(documents)):
            text = documents[i].text
            read += len(text)
            yield text
            if read - told >= TOLD:
                tell(told := read)

    def encoded() -> Iterator[Ids]:
        nonlocal total
        for ids in tokenizer.stream(texts()):
            total += len(ids) + 1  # each with its end-of-text
            yield ids

    for left in cache.glob(f"{TEMPORARY}rows-*"):  # by a process that was killed
        left.unlink()
    with replacing(path) as file:
        header = _header(file, tokenizer.dtype, (0, sequence_length + 1))
        width = (sequence_length + 1) * np.dtype(tokenizer.dtype).itemsize
        count = 0
        for row, column, piece in _laid(encoded(), sequence_length):
            file.seek(header + row * width + column * piece.itemsize)
            file.write(piece.tobytes())
            count = max(count, row + 1)
        if total < sequence_length:
            raise UserError(
                f"the corpus is shorter than one sequence: {total} tokens to train on, "
                f"{sequence_length} needed",
                where="pretrain.sequence_length",
                value=sequence_length,
                allowed=f"at most {total} with this corpus and tokenizer",
                hint="give more text, or a shorter sequence",
            )
        file.truncate(header + count * width)  # what nothing was written to reads as 0: padding
        file.seek(0)
        _header(file, tokenizer.dtype, (count, sequence_length + 1))
    return np.load(path, mmap_mode="r")


def _header(file: BinaryIO, dtype: type[np.generic], shape: tuple[int, int]) -> int:
    """Writes that of a .npy, which is as long whatever the number of rows. Returns its end."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.tell()


def _cached(path: Path, length: int) -> Rows | None:
    """The rows of a cache file, None when there is none or it is damaged."""
    try:
        rows = np.load(path, mmap_mode="r")
        whole = path.stat().st_size == rows.offset + rows.nbytes
    except (
        OSError,
        ValueError,
        EOFError,
    ):  # missing; no or half a header; fewer bytes than it says
        return None
    return rows if whole and rows.ndim == 2 and rows.shape[1] == length + 1 else None


def pack(encoded: Sequence[Ids], length: int) -> Rows:
    """Documents laid into rows of `length` + 1 ids; each of their tokens is a target once.

    A document that fits stays whole, in the fullest row that has room (best fit); the closing
    end-of-text of one is the opening one of the next. A longer one is cut into windows that
    overlap by one token; its last window opens a row that takes others after it. Padding is last.
    """
    laid = list(_laid(encoded, length))
    count = max((row + 1 for row, _, _ in laid), default=0)
    dtype = encoded[0].dtype if encoded else np.int32
    packed = np.full((count, length + 1), Tokenizer.pad_id, dtype)
    for row, column, piece in laid:
        packed[row, column : column + len(piece)] = piece
    return packed


def _laid(encoded: Iterable[Ids], length: int) -> Iterator[tuple[int, int, Ids]]:
    """What `pack` writes, as (row, column, ids). It remembers rows with room, not contents."""
    eos, count = Tokenizer.eos_id, 0
    rooms: list[list[int]] = [[] for _ in range(length)]  # by targets that fit still: heaps of rows
    filled = 0  # bit n is set where rooms[n] has rows
    for ids in encoded:
        piece = np.full(len(ids) + 2, eos, ids.dtype)
        piece[1:-1] = ids
        fits = len(piece) <= length + 1
        while len(piece) > length + 1:
            yield count, 0, piece[: length + 1]
            count += 1
            piece = piece[length:]
        need = len(piece) - 1
        enough = filled >> need << need if fits else 0
        if enough:
            room = (enough & -enough).bit_length() - 1  # the least
            row = heapq.heappop(rooms[room])
            if not rooms[room]:
                filled ^= 1 << room
            yield row, length + 1 - room, piece[1:]
        else:
            room, row = length, count
            count += 1
            yield row, 0, piece
        if room > need:
            heapq.heappush(rooms[room - need], row)
            filled |= 1 << (room - need)


def alone(
    token_lists: Iterable[Sequence[int] | Ids], *, batch_size: int, max_length: int, ids: Tokenizer
) -> Iterator[tuple[Batch, Int[np.ndarray, " B"]]]:
    """Each document by itself, from the start token, its own end-of-text included.

    Rows are sorted by length and padded to a multiple of 32 (at most to `max_length`), so that few
    shapes are compiled. Windows of a longer document overlap by one token and share its index.

    Yields:
      A batch and the document of each of its rows, -1 at rows that only fill the batch.
    """
    pieces: list[tuple[int, np.ndarray]] = []  # of arrays: lists would be ten times as large
    for n, tokens in enumerate(token_lists):
        whole = np.full(len(tokens) + 2, ids.eos_id, ids.dtype)
        whole[1:-1] = tokens
        pieces += [(n, whole[i : i + max_length + 1]) for i in range(0, len(whole) - 1, max_length)]
    pieces.sort(key=lambda p: len(p[1]))
    for start in range(0, len(pieces), batch_size):
        part = pieces[start : start + batch_size]
        longest = len(part[-1][1]) - 1
        width = min(-(-longest // 32) * 32, max_length)
        rows = np.full((batch_size, width + 1), ids.pad_id, np.int32)
        owners = np.full(batch_size, -1)
        for place, (n, piece) in enumerate(part):
            rows[place, : len(piece)] = piece
            owners[place] = n
        yield batch_of(rows), owners
