"""Where text comes from: the fables grammar, local files, the hub, CPython's own manual."""

import codecs
import contextlib
import gc
import glob
import itertools
import logging
import os
import tempfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from minilm.choices import choose
from minilm.config import Corpus, FablesCorpus, FoundCorpus, HubCorpus, PydocCorpus, TextCorpus
from minilm.errors import UserError
from minilm.text.cleaning import clean
from minilm.text.fables import stories
from minilm.text.formats import whole
from minilm.text.store import Document, Documents, Store
from minilm.text.tokenizer import cut

FEW = 20  # a corpus of fewer documents is split by position
LONGEST = 2**24  # characters of a document; a longer one is read as several
HELD_OUT = 2**24  # characters that are held out at most: all of them are in memory and are judged
BLOCK = 2**20  # bytes of a file read at once

type Numbers = Int[np.ndarray, "_"]


class Split(NamedTuple):
    """`train` is read from a file, `held_out` in memory; `report` says what was dropped."""

    train: Documents
    held_out: list[Document]
    report: dict[str, int | None]


def split(corpus: Corpus, seed: int, folder: Path | None = None) -> Split:
    """Training and held-out documents, apart by document; few documents are split by position.

    A text that is held out is not trained on either, however often the corpus has it. Texts beyond
    LONGEST are several documents; what is held out has no more than HELD_OUT characters, or is one
    document, and the rest of its share is trained on.

    Args:
      folder: where documents are kept while they are needed, if not in the system's folder.
    Returns:
      With a report: `documents` and `characters` read, `empty` ones, which are dropped,
      `exact_duplicates` and `near_duplicates` (None where not asked), dropped if
      `corpus.duplicates` says so, and `held_out_copies` dropped from training.
    Raises:
      UserError: an empty corpus, a full disk, or whatever its source raises.
    """
    store = Store(folder)
    read = characters = empty = texts = 0
    for document in choose(CORPORA, corpus.kind, "corpus.kind")(corpus, seed):
        read += 1
        characters += len(document.text)
        if document.text.strip():
            texts += 1
            for part in _parts(document):
                store.append(part)
        else:
            empty += 1
    everything = Documents(store, np.arange(len(store)))
    kept, exact, near = clean(
        (d.text for d in everything),
        store.fingerprints,
        corpus.duplicates if isinstance(corpus, FoundCorpus) else "keep",
    )
    if not len(kept):
        raise UserError("the corpus has no text", where=f"corpus.kind {corpus.kind}")
    # A long text's parts are one text: its end is held out, not one from between the others.
    by = _by_position if min(texts, len(kept)) < FEW else _by_document
    train, held_out = by(store, kept, corpus.held_out, seed)
    marks = store.fingerprints
    chosen = train[~np.isin(marks[train], marks[held_out])]
    report = {
        "documents": read,
        "characters": characters,
        "empty": empty,
        "exact_duplicates": exact,
        "near_duplicates": near,
        "held_out_copies": len(train) - len(chosen),
        "training_documents": len(chosen),
        "held_out_documents": len(held_out),
    }
    return Split(Documents(store, chosen), list(Documents(store, held_out)), report)


def _parts(document: Document) -> Iterator[Document]:
    """A document, or what a very long one is cut into."""
    if len(document.text) <= LONGEST:
        yield document
        return
    for number, part in enumerate(cut(document.text, LONGEST)):
        yield Document(part, f"{document.id}[{number}]")


def _by_document(
    store: Store, kept: Numbers, held_out: float, seed: int
) -> tuple[Numbers, Numbers]:
    """A random share. The held-out half stays shuffled: any first part of it is a fair sample."""
    order = kept[np.random.default_rng((seed, 3)).permutation(len(kept))]
    share = order[: max(1, round(held_out * len(order)))]
    count = max(1, np.searchsorted(store.sizes[share].cumsum(), HELD_OUT, side="right"))
    return np.sort(order[count:]), order[:count]


def _by_position(
    store: Store, kept: Numbers, held_out: float, seed: int
) -> tuple[Numbers, Numbers]:
    """The last share of the characters, in order; the document at the border is cut in two."""
    total = store.sizes[kept].sum()
    border = total - min(max(1, round(held_out * total)), max(1, HELD_OUT))
    train: list[int] = []
    rest: list[int] = []
    for number, size in zip(kept, store.sizes[kept], strict=True):
        if border >= size:
            train.append(number)
        elif border <= 0:
            rest.append(number)
        else:
            text, name, _ = store[int(number)]
            train.append(store.append(Document(text[:border], f"{name}[:{border}]")))
            rest.append(store.append(Document(text[border:], f"{name}[{border}:]")))
        border -= size
    return np.array(train, np.int64), np.array(rest, np.int64)


def fables(corpus: FablesCorpus, seed: int) -> Iterator[Document]:
    """Stories with their exact log-probability."""
    for i, story in enumerate(stories(seed, corpus.documents, size=corpus.size)):
        yield Document(story.text, f"fables/{corpus.size}/{seed}/{i}", story.logprob)


def text(corpus: TextCorpus, seed: int) -> Iterator[Document]:
    """Local files, each once: a .txt is one document, or several; others have a document a row.

    Raises:
      UserError: no file named or found; one that is empty, binary, not UTF-8, or not what its
        suffix says; a column that is missing or not text.
    """
    if not corpus.files:
        raise UserError(
            "no files are named",
            where="corpus.files",
            hint="pass them: --corpus.files PATH [PATH …], .txt, .jsonl, .csv or .parquet",
        )
    for path in dict.fromkeys(p for pattern in corpus.files for p in matches(pattern)):
        suffix = path.suffix.lower()
        choose(READERS, suffix, f"corpus.files {path}: suffix")
        if suffix == ".txt":
            # Not through `datasets`, which opens files in text mode and so rewrites \r\n as \n.
            parts = _separated(_utf8(path), corpus.separator)
            first, second = next(parts), next(parts, None)
            if second is None:
                yield Document(first, str(path))
                continue
            for number, part in enumerate(itertools.chain((first, second), parts)):
                yield Document(part, f"{path}#{number}")
        else:
            yield from _rows(path, suffix, corpus.column)


# Suffix to the reader of `datasets` and its options. Texts such as "NA" are no missing values.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {"batch_size": 1024}),  # not a row group, of which one may be the file
}


def matches(pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted. Raises UserError: none, or a folder."""
    path = Path(pattern).expanduser()
    # Not Path.glob, which takes no absolute pattern.
    names = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)  # noqa: PTH207
    found = sorted(map(Path, names))
    if not found:
        raise UserError("no such file", where="corpus.files", value=pattern)
    for folder in filter(Path.is_dir, found):
        raise UserError(
            "a folder, not a file",
            where="corpus.files",
            value=str(folder),
            hint=f"name its files with a glob: '{folder}/**/*.txt'",
        )
    return found


def _utf8(path: Path) -> Iterator[str]:
    """The text of a file in blocks, every character kept."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    for data in itertools.chain(_bytes(path), [b""]):
        if 0 in data:
            raise UserError(
                f"a binary file: NUL at byte {start + data.index(0)}",
                where=path,
                allowed="UTF-8 text",
            )
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UserError(
                f"not UTF-8 at byte {start - waiting + error.start}",
                where=path,
                value=error.object[error.start : error.start + 8],
                allowed="UTF-8 text",
                hint=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 '{path}'",
            ) from None
        start += len(data)


def _bytes(path: Path) -> Iterator[bytes]:
    empty = True
    try:
        with path.open("rb") as file:
            while data := file.read(BLOCK):
                empty = empty and not data.strip()
                yield data
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=path) from error
    if empty:
        raise UserError("the file is empty", where=path)


def _separated(blocks: Iterator[str], separator: str | None) -> Iterator[str]:
    """What lies between separators, one text at least; of a very long one parts of it."""
    left = ""
    margin = len(separator or "")  # of a separator the end may not have been read yet
    for block in blocks:
        *whole, left = (left + block).split(separator) if separator else [left + block]
        yield from whole
        while len(left) > LONGEST + margin:
            part = next(cut(left, LONGEST))
            yield part
            left = left[len(part) :]
    yield left


def _rows(path: Path, suffix: str, column: str) -> Iterator[Document]:
    """The rows of a table, some thousands in memory at a time."""
    for _ in (_bytes if suffix == ".parquet" else _utf8)(path):
        pass  # what is wrong with its bytes is said before any row
    reader, options = READERS[suffix]
    with tempfile.TemporaryDirectory() as cache:
        yield from _documents(
            lambda datasets: datasets.load_dataset(
                reader,
                data_files=glob.escape(str(path.resolve())),
                split="train",
                streaming=True,  # else its copy in Arrow is mapped into memory
                cache_dir=cache,
                **options,
            ),
            column,
            where=path,
            hint=f"is it a {suffix} file?",
            guessed=suffix == ".csv",
        )


def hub(corpus: HubCorpus, seed: int) -> Iterator[Document]:
    """A Hugging Face data set by name, or one in a local folder, a document a row.

    Raises:
      UserError: the hub is out of reach; a data set, configuration, split or column is not there.
    """
    alternatives = 'corpus.kind "fables", "text" (local files) and "pydoc" need no network'
    if not Path(corpus.name).is_dir() and not _reachable():
        raise UserError(
            "the Hugging Face hub is out of reach",
            where="corpus.name",
            value=corpus.name,
            hint=f"{alternatives}; HF_HUB_OFFLINE=1 takes a data set from the local cache",
        )
    yield from _documents(
        lambda datasets: datasets.load_dataset(
            corpus.name, corpus.config, split=corpus.split, streaming=corpus.streaming
        ),
        corpus.column,
        where=f"corpus.name {corpus.name}",
        hint=alternatives,
        limit=corpus.max_documents,
    )


def _reachable() -> bool:
    """Whether the hub answers: `datasets` itself would retry for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return True  # nothing will be fetched: a cached data set loads, another fails at once
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return True  # an answer, if a refusal
    except (OSError, ValueError):
        return False
    return True


def _documents(
    load: Callable,
    column: str,
    *,
    where: object,
    hint: str,
    limit: int | None = None,
    guessed: bool = False,
) -> Iterator[Document]:
    """The texts in a column of what `load(datasets)` gives.

    Args:
      guessed: types are, part by part, so that a part of digits alone gives numbers.
    """
    import datasets  # two seconds: only where it is used

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with contextlib.closing(iter(load(datasets))) as rows:
            for number, row in enumerate(itertools.islice(rows, limit), 1):
                value = row.get(column)
                if guessed and number > 1 and isinstance(value, int | float):
                    row = row | {column: str(value)}
                yield Document(_text_of(row, column, where, number), f"{where}#{number}")
    except (UserError, GeneratorExit):
        with warnings.catch_warnings():  # pandas leaves a table open that is not read to its end
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
        raise
    except Exception as error:  # network, name, split, format: each raises types of its own
        reason = str(error.__cause__ or error).strip() or type(error).__name__
        raise UserError(f"cannot load: {reason.splitlines()[0]}", where=where, hint=hint) from error


def _text_of(row: dict, column: str, where: object, number: int) -> str:
    if column not in row and column == "text" and (found := whole(row)) is not None:
        return found
    if column not in row:
        raise UserError(
            f"no column '{column}'", where=where, allowed=sorted(row), hint="set corpus.column"
        )
    value = row[column]
    if not isinstance(value, str):
        raise UserError(
            f"column '{column}' of row {number} is not text but {type(value).__name__}",
            where=where,
            value=value,
            hint="set corpus.column",
        )
    return value


def pydoc(corpus: PydocCorpus, seed: int) -> Iterator[Document]:
    """The topics of CPython's language reference."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name], f"pydoc/{name}")


CORPORA: dict[str, Callable[..., Iterable[Document]]] = {
    "fables": fables,
    "text": text,
    "hub": hub,
    "pydoc": pydoc,
}
