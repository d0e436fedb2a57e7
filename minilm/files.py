"""Files of a run: JSON and JSON Lines, written whole or not at all, mistakes in them named."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minilm.errors import UserError

TEMPORARY = ".tmp-"  # begins the name of what is not yet whole


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file's content: a reader, or a crash, meets the old or the new, whole.

    Raises:
      UserError: the disk is full or not writable.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which takes the place of another when the block has ended well.

    Raises:
      UserError: the disk is full or not writable.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise UserError(f"cannot write: {error.strerror}", where=path) from error
        raise


def flush(path: Path) -> None:
    """Makes a file's content, or a folder's names, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Raises ValueError at NaN and infinity, which JSON has not."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file.

    Raises:
      UserError: not readable, or not a JSON object.
    """
    return _object(_text(path), path) if path.exists() else {}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file.

    Raises:
      UserError: a missing file, or a line that is not a JSON object, by number.
    """
    lines = enumerate(_text(path).split("\n"), 1)
    return [_object(line, f"{path}:{number}") for number, line in lines if line.strip()]


def sha256(path: Path) -> str:
    """Of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(paths: Iterable[str]) -> dict[str, str]:
    """The beginning of each file's SHA-256; a missing file has none, for who reads it to tell.

    Raises:
      UserError: one cannot be read.
    """
    found = {}
    for path in paths:
        try:
            found[path] = sha256(Path(path))[:16]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot read: {error.strerror}", where=path) from error
    return found


def stage_folder(run: Path, name: str) -> Path:
    """A stage, or a file, of a run: in its folder, or in that of the run it started from."""
    init = init_of(run)
    return run / name if init is None or (run / name).exists() else stage_folder(init, name)


def init_of(run: Path) -> Path | None:
    """The folder of the run that a run started from (--init), from wherever it is asked.

    Where it lies as seen from the run comes first, so that runs may move together; then what was
    typed, for a run that has moved alone; then a folder of that name beside the run.
    """
    environment = read_json(run / "environment.json")
    if not (typed := environment.get("init")):
        return None
    places = (run / environment.get("init_from_here", typed), Path(typed))
    places = (*places, run.parent / Path(typed).name)
    return next((p for p in places if p.is_dir()), places[0])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("missing file", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read: {error}", where=path) from error


def _object(text: str, where: object) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=where) from error
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=where, value=value)
    return value
