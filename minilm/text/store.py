"""Documents beyond what memory holds: kept in a temporary file, read one by one."""

import array
import contextlib
import itertools
import json
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int, UInt64

from minilm.errors import UserError
from minilm.text.cleaning import fingerprint

IN_MEMORY = 2**24  # bytes; what is larger goes to the disk


class Document(NamedTuple):
    """One text. `logprob` is exact, in nats, where the world knows it."""

    text: str
    id: str
    logprob: float | None = None


class Store:
    """Takes documents; in memory it keeps 24 bytes of each: its end, its size, its fingerprint.

    Args:
      folder: where the file may grow; None: the system's folder for such. The file has no name, so
        a process that is killed leaves nothing behind.
    Raises:
      UserError: the folder cannot be written, or is full.
    """

    def __init__(self, folder: Path | None = None):
        self._where = folder or Path(tempfile.gettempdir())
        self._ends, self._sizes = array.array("Q", [0]), array.array("Q")  # of bytes; characters
        self._fingerprints = array.array("Q")
        try:
            self._where.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(self._where))  # noqa: SIM115
        except OSError as error:
            raise self._failed(error) from error
        weakref.finalize(self, _close, self._file)

    def append(self, document: Document) -> int:
        """Keeps a document. Returns its number, counted from 0."""
        # As UTF-8, for its size; halves of a surrogate pair, which are none, as they are.
        data = json.dumps(document, ensure_ascii=False).encode(errors="surrogatepass")
        try:
            self._file.seek(self._ends[-1])
            self._file.write(data)
        except OSError as error:
            raise self._failed(error) from error
        self._ends.append(self._ends[-1] + len(data))
        self._sizes.append(len(document.text))
        self._fingerprints.append(fingerprint(document.text))
        return len(self) - 1

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, number: int) -> Document:
        start, end = self._ends[number], self._ends[number + 1]
        try:
            self._file.seek(start)
            data = self._file.read(end - start).decode(errors="surrogatepass")
            return Document(*json.loads(data))
        except OSError as error:
            raise self._failed(error) from error

    @property
    def sizes(self) -> Int[np.ndarray, " N"]:
        """Characters of each document, int64."""
        return np.array(self._sizes, np.int64)

    @property
    def fingerprints(self) -> UInt64[np.ndarray, " N"]:
        """Of each document's text."""
        return np.array(self._fingerprints, np.uint64)

    def _failed(self, error: OSError) -> UserError:
        return UserError(
            f"cannot keep the corpus: {error.strerror}",
            where=self._where,
            hint="it takes as much room there as its text has",
        )


def _close(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # of a full disk, which has been told
        file.close()


class Documents(Sequence[Document]):
    """Some documents of a store, in an order of their own. Each is read when it is asked for."""

    def __init__(self, store: Store, numbers: Int[np.ndarray, " N"]):
        self._store, self._numbers = store, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: Any) -> "Document | Documents":
        chosen = self._numbers[index]
        return (
            Documents(self._store, chosen) if isinstance(index, slice) else self._store[int(chosen)]
        )

    def __iter__(self) -> Iterator[Document]:
        return (self._store[int(i)] for i in self._numbers)

    def __eq__(self, other: object) -> bool:
        """Whether the same documents are there in the same order."""
        return isinstance(other, Sequence) and all(
            a == b for a, b in itertools.zip_longest(self, other)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def characters(self) -> int:
        """Of all of them."""
        return int(self._store.sizes[self._numbers].sum())

    def spread(self, characters: int) -> "Documents":
        """About so many characters of them: all, or every second, third … document."""
        return self[:: max(1, -(-self.characters // characters))]
