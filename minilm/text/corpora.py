"""Where text comes from: the fables grammar, local files, the hub, CPython's own manual."""

import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minilm.choices import choose
from minilm.config import Corpus, FablesCorpus, HubCorpus, PydocCorpus, TextCorpus
from minilm.errors import UserError
from minilm.text.fables import stories

FEW = 20  # a corpus of fewer documents is split by position


class Document(NamedTuple):
    """One text. `logprob` is exact, in nats, where the world knows it."""

    text: str
    id: str
    logprob: float | None = None


class Split(NamedTuple):
    train: list[Document]
    held_out: list[Document]


def split(corpus: Corpus, seed: int) -> Split:
    """Training and held-out documents, apart by document; few documents are split by position.

    Raises:
      UserError: an empty corpus, or whatever its source raises.
    """
    documents = list(choose(CORPORA, corpus.kind, "corpus.kind")(corpus, seed))
    documents = [d for d in documents if d.text.strip()]
    if not documents:
        raise UserError("the corpus has no text", where=f"corpus.kind {corpus.kind}")
    if len(documents) < FEW:
        return _by_position(documents, corpus.held_out)
    order = np.random.default_rng((seed, 3)).permutation(len(documents))
    count = max(1, round(corpus.held_out * len(documents)))
    held_out = [documents[i] for i in sorted(order[:count])]
    known = {d.text for d in held_out}
    train = [documents[i] for i in sorted(order[count:]) if documents[i].text not in known]
    return Split(train, held_out)


def _by_position(documents: list[Document], held_out: float) -> Split:
    """The last share of the characters, in order, cutting one document in two."""
    total = sum(len(d.text) for d in documents)
    border = total - max(1, round(held_out * total))
    train, rest = [], []
    for document in documents:
        head, tail = document.text[: max(border, 0)], document.text[max(border, 0) :]
        border -= len(document.text)
        train += [Document(head, document.id)] if head else []
        rest += [Document(tail, document.id + ("#tail" if head else ""))] if tail else []
    return Split(train, rest)


def fables(corpus: FablesCorpus, seed: int) -> Iterator[Document]:
    """Stories with their exact log-probability."""
    for i, story in enumerate(stories(seed, corpus.documents, size=corpus.size)):
        yield Document(story.text, f"fables/{corpus.size}/{seed}/{i}", story.logprob)


def text(corpus: TextCorpus, seed: int) -> Iterator[Document]:
    """Local files: a .txt is one document, whole; others have a document a row."""
    if not corpus.files:
        raise UserError(
            "no files are named", where="corpus.files",
            hint="pass them: --corpus.files PATH [PATH …], .txt, .jsonl, .csv or .parquet",
        )
    for pattern in corpus.files:
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError("no such file", where="corpus.files", value=pattern)
        for path in map(Path, paths):
            yield from _file(path, corpus.column)


LOADERS = {".txt": "text", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def _file(path: Path, column: str) -> Iterator[Document]:
    loader = choose(LOADERS, path.suffix, f"corpus.files {path}")
    _check_text(path, binary=loader == "parquet")
    import datasets

    datasets.disable_progress_bars()
    options = {"sample_by": "document"} if loader == "text" else {}
    try:
        rows = datasets.load_dataset(
            loader, data_files=str(path), split="train", streaming=True, **options
        )
        for i, row in enumerate(rows):
            yield _row(row, "text" if loader == "text" else column, path, i)
    except UserError:
        raise
    except Exception as error:  # datasets wraps what its readers raise in its own types
        raise UserError(f"cannot read: {error.__cause__ or error}", where=path) from error


def _row(row: dict, column: str, where: object, number: int) -> Document:
    if column not in row:
        raise UserError(
            f"no column '{column}'", where=where, allowed=list(row), hint="set corpus.column"
        )
    if not isinstance(row[column], str):
        raise UserError(
            f"column '{column}' of row {number + 1} is not text", where=where, value=row[column]
        )
    return Document(row[column], f"{where}#{number}")


def _check_text(path: Path, *, binary: bool) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=path) from error
    if not data.strip():
        raise UserError("the file is empty", where=path)
    if binary:
        return
    if b"\0" in data:
        raise UserError(
            f"a binary file: NUL at byte {data.index(0)}", where=path, allowed="UTF-8 text"
        )
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 at byte {error.start}", where=path, allowed="UTF-8 text",
            hint="convert it, for example with iconv",
        ) from None


def hub(corpus: HubCorpus, seed: int) -> Iterator[Document]:
    """A Hugging Face data set, a document a row."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            corpus.name, corpus.config, split=corpus.split, streaming=corpus.streaming
        )
        for i, row in enumerate(rows):
            if corpus.max_documents is not None and i >= corpus.max_documents:
                return
            yield _row(row, corpus.column, corpus.name, i)
    except UserError:
        raise
    except Exception as error:  # connection, name, config, split: each its own type
        raise UserError(
            f"cannot load from the hub: {type(error).__name__}: {str(error).splitlines()[0]}",
            where="corpus.name", value=corpus.name,
            hint='offline, use corpus.kind "fables", "text" (local files) or "pydoc"',
        ) from error


def pydoc(corpus: PydocCorpus, seed: int) -> Iterator[Document]:
    """The topics of CPython's language reference."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name], f"pydoc/{name}")


CORPORA: dict[str, Callable[..., Iterable[Document]]] = {
    "fables": fables, "text": text, "hub": hub, "pydoc": pydoc
}
