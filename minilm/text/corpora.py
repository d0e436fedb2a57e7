"""Where text comes from: the fables grammar, local files, the hub, CPython's own manual."""

import glob
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.choices import choose
from minilm.config import Corpus, FablesCorpus, FoundCorpus, HubCorpus, PydocCorpus, TextCorpus
from minilm.errors import UserError
from minilm.text.cleaning import clean
from minilm.text.fables import stories
from minilm.text.formats import whole

FEW = 20  # a corpus of fewer documents is split by position


class Document(NamedTuple):
    """One text. `logprob` is exact, in nats, where the world knows it."""

    text: str
    id: str
    logprob: float | None = None


class Split(NamedTuple):
    """`report` says what was read and dropped: see `split`."""

    train: list[Document]
    held_out: list[Document]
    report: dict[str, int | None]


def split(corpus: Corpus, seed: int) -> Split:
    """Training and held-out documents, apart by document; few documents are split by position.

    A text that is held out is not trained on either, however often the corpus has it.

    Returns:
      With a report: `documents` and `characters` read, `empty` ones, which are dropped,
      `exact_duplicates` and `near_duplicates` (None where not asked), dropped if
      `corpus.duplicates` says so, and `held_out_copies` dropped from training.
    Raises:
      UserError: an empty corpus, or whatever its source raises.
    """
    read = list(choose(CORPORA, corpus.kind, "corpus.kind")(corpus, seed))
    full = [d for d in read if d.text.strip()]
    documents, exact, near = clean(
        full, corpus.duplicates if isinstance(corpus, FoundCorpus) else "keep"
    )
    if not documents:
        raise UserError("the corpus has no text", where=f"corpus.kind {corpus.kind}")
    by = _by_position if len(documents) < FEW else _by_document
    train, held_out = by(documents, corpus.held_out, seed)
    known = {d.text for d in held_out}
    kept = [d for d in train if d.text not in known]
    report = {
        "documents": len(read),
        "characters": sum(len(d.text) for d in read),
        "empty": len(read) - len(full),
        "exact_duplicates": exact,
        "near_duplicates": near,
        "held_out_copies": len(train) - len(kept),
        "training_documents": len(kept),
        "held_out_documents": len(held_out),
    }
    return Split(kept, held_out, report)


def _by_document(
    documents: list[Document], held_out: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """A random share. The held-out half stays shuffled: any first part of it is a fair sample."""
    order = np.random.default_rng((seed, 3)).permutation(len(documents))
    count = max(1, round(held_out * len(documents)))
    return ([documents[i] for i in sorted(order[count:])], [documents[i] for i in order[:count]])


def _by_position(
    documents: list[Document], held_out: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """The last share of the characters, in order; the document at the border is cut in two."""
    total = sum(len(d.text) for d in documents)
    border = total - max(1, round(held_out * total))
    train: list[Document] = []
    rest: list[Document] = []
    for document in documents:
        if border >= len(document.text):
            train.append(document)
        elif border <= 0:
            rest.append(document)
        else:
            train.append(Document(document.text[:border], f"{document.id}[:{border}]"))
            rest.append(Document(document.text[border:], f"{document.id}[{border}:]"))
        border -= len(document.text)
    return train, rest


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
            whole = _utf8(path)
            parts = [whole] if corpus.separator is None else whole.split(corpus.separator)
            names = [str(path)] if len(parts) == 1 else [f"{path}#{n}" for n in range(len(parts))]
            yield from map(Document, parts, names)
        else:
            yield from _rows(path, suffix, corpus.column)


# Suffix to the reader of `datasets` and its options. Texts such as "NA" are no missing values.
READERS: dict[str, tuple[str, dict[str, bool]]] = {
    ".txt": ("text", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".parquet": ("parquet", {}),
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


def _utf8(path: Path) -> str:
    """The text of a file, every character kept."""
    data = _bytes(path)
    if 0 in data:
        raise UserError(
            f"a binary file: NUL at byte {data.index(0)}", where=path, allowed="UTF-8 text"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 at byte {error.start}",
            where=path,
            value=data[error.start : error.start + 8],
            allowed="UTF-8 text",
            hint=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 '{path}'",
        ) from None


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=path) from error
    if not data.strip():
        raise UserError("the file is empty", where=path)
    return data


def _rows(path: Path, suffix: str, column: str) -> Iterator[Document]:
    """The rows of a table. The copy that `datasets` makes of them is thrown away."""
    (_bytes if suffix == ".parquet" else _utf8)(path)
    reader, options = READERS[suffix]
    with tempfile.TemporaryDirectory() as cache:
        yield from _documents(
            lambda datasets: datasets.load_dataset(
                reader,
                data_files=glob.escape(str(path.resolve())),
                split="train",
                cache_dir=cache,
                **options,
            ),
            column,
            where=path,
            hint=f"is it a {suffix} file?",
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
    load: Callable, column: str, *, where: object, hint: str, limit: int | None = None
) -> Iterator[Document]:
    """The texts in a column of what `load(datasets)` gives."""
    import datasets  # two seconds: only where it is used

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for number, row in enumerate(load(datasets), 1):
            if limit is not None and number > limit:
                return
            yield Document(_text_of(row, column, where, number), f"{where}#{number}")
    except (UserError, GeneratorExit):
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
