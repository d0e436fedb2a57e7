"""Checkpoints: any pytree in one folder, written whole or not at all, verified when read.

    checkpoints/step_00000500/
      metadata.json     what was saved: step, config, metrics, arrays, sha256 of every file
      arrays/           Orbax (OCDBT): one flat dict, "model.layers.0.q_proj" -> array
      tokenizer.json    and whatever else `files` names

A folder is made beside its place, flushed to disk and renamed, so a process may die at any instant:
what has a step's name is complete. What a disk does to it later, the checksums tell. Saving is
synchronous and by one process. Orbax is imported inside the functions, since it brings JAX along.
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from minilm.errors import UserError

FORMAT = 1
STAGES = ("pretrain", "sft", "reward", "dpo", "rlhf")  # in the order in which a run makes them
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".tmp-"
_MARGIN = 1_000_000  # bytes beside the arrays: metadata, tokenizer, folders


def save(
    folder: Path,
    step: int,
    tree: Any,
    metadata: Mapping[str, Any],
    *,
    keep: int,
    files: Mapping[str, Path] | None = None,
    best: float | int | None = None,
) -> Path:
    """Writes `folder/step_XXXXXXXX` and removes the checkpoints no longer wanted.

    Args:
      folder: the stage's `checkpoints/`; made if missing.
      tree: any pytree of arrays and scalars, no random keys (they follow from seed and step).
      metadata: JSON values, merged with `step`, `best`, `arrays`, `files` and their like.
      keep: how many of the last checkpoints stay. The best stays beside them.
      files: name in the checkpoint -> file to copy there.
      best: what "best" is judged by; lower is better. `set_best` gives it afterwards.
    Returns:
      The new checkpoint.
    Raises:
      UserError: the disk is full or not writable. Older checkpoints are then as they were.
      ValueError: a leaf that is no array, or two with one name; a reserved metadata key.
    """
    import jax

    arrays = flatten(tree)
    record = {"format": FORMAT, "minilm_version": version("minilm"), "step": int(step)}
    record["best"] = None if best is None else float(best)
    if taken := sorted({*record, "arrays", "files", "bytes", "digest"} & set(metadata)):
        raise ValueError(f"metadata keys that save writes itself: {taken}")
    folder = folder.absolute()
    name = f"step_{step:08d}"
    temporary = folder / f"{_TEMPORARY}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        # Orbax knows no Python numbers; a jax.Array it writes shard by shard.
        plain = {k: v if isinstance(v, jax.Array) else np.asarray(v) for k, v in arrays.items()}
        # Asked beforehand, since on a full disk Orbax's threads print a screen of tracebacks.
        if shutil.disk_usage(folder).free < sum(v.nbytes for v in plain.values()) + _MARGIN:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with _orbax() as (ocp, checkpointer):
            checkpointer.save(temporary / "arrays", args=ocp.args.PyTreeSave(plain))
        for target, source in (files or {}).items():
            shutil.copyfile(source, temporary / target)
        written = sorted(file for file in temporary.rglob("*") if file.is_file())
        record |= {
            **metadata,
            "arrays": {key: kind(leaf) for key, leaf in arrays.items()},
            "files": {file.relative_to(temporary).as_posix(): _sha256(file) for file in written},
            "bytes": sum(file.stat().st_size for file in written),
        }
        _write_metadata(temporary, record)
        for inner in temporary.rglob("*"):
            _flush(inner)
        if (folder / name).exists():  # of an earlier try at this step
            _put_aside(folder / name)
        temporary.rename(folder / name)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if reason := _disk_trouble(error):
            # Futures that Orbax gave up would print their tracebacks when they are collected.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            hint = "older checkpoints are intact: make room, then run the same command again"
            raise UserError(f"cannot save: {reason}", where=folder, hint=hint) from error
        raise
    _prune(folder, folder / name, keep)
    return folder / name


def restore(path: Path, like: Any, *, prefix: str = "") -> Any:
    """The saved pytree, in the structure of `like` and bit for bit as saved.

    Args:
      path: a checkpoint folder.
      like: arrays or `jax.ShapeDtypeStruct`s, whose shardings are kept; NumPy leaves and Python
        numbers come back as such.
      prefix: restore only this part, such as "model" of a train state into a model alone.
    Raises:
      UserError: a damaged checkpoint; leaves missing, left over, or of another shape or dtype.
    """
    import jax

    start = f"{prefix}." if prefix else ""
    wanted = {start + key: leaf for key, leaf in flatten(like).items()}
    saved = metadata(path)["arrays"]
    _check_fits(path, {k: v for k, v in saved.items() if k.startswith(start)}, wanted)
    arrays = load_arrays(path, start)

    def placed(array: np.ndarray, leaf: Any) -> Any:
        if isinstance(leaf, bool | int | float):
            return type(leaf)(array.item())
        if isinstance(leaf, np.ndarray | np.generic):
            return array
        # Copies, since a step that donates its state must not write into NumPy's memory.
        if leaf.sharding is None or (isinstance(leaf, jax.Array) and not leaf.committed):
            return jax.numpy.array(array)
        return jax.device_put(array, leaf.sharding, may_alias=False)

    leaves = [placed(arrays[key], leaf) for key, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_arrays(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays whose full names start with `prefix`, read without building a model.

    Raises:
      UserError: a damaged checkpoint.
    """
    keys = [key for key in verified(path)["arrays"] if key.startswith(prefix)]
    if not keys:
        return {}
    with _orbax() as (ocp, checkpointer):
        how = dict.fromkeys(keys, ocp.RestoreArgs(restore_type=np.ndarray))
        request = ocp.args.PyTreeRestore(item=how, restore_args=how, partial_restore=True)
        arrays = checkpointer.restore(path.absolute() / "arrays", args=request)
    return {key: arrays[key] for key in keys}


def metadata(path: Path) -> dict[str, Any]:
    """What `save` was given, with step, best, arrays (dtype, shape), files (sha256) and bytes.

    Raises:
      UserError: metadata.json is missing, is not JSON or does not match its own checksum.
    """
    where = path / "metadata.json"
    try:
        record = json.loads(where.read_bytes())
        digest = record.pop("digest")
    except OSError as error:
        raise UserError(f"metadata.json: {error.strerror}", where=path) from error
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError("metadata.json is not readable", where=path) from error
    if digest != _digest(record):
        raise UserError("metadata.json has changed since it was written", where=path)
    if record["format"] != FORMAT:
        raise UserError("another format", where=path, value=record["format"], allowed=str(FORMAT))
    return record


def set_best(path: Path, best: float | int) -> None:
    """Gives a checkpoint the figure that "best" is judged by, once its evaluation is done."""
    _write_metadata(path, metadata(path) | {"best": float(best)})


def verified(path: Path) -> dict[str, Any]:
    """The metadata of a checkpoint whose every file is what was written.

    Raises:
      UserError: says which file is missing or has changed.
    """
    record = metadata(path)
    for name, expected in record["files"].items():
        try:
            found = _sha256(path / name)
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}", where=path) from error
        if found != expected:
            raise UserError(f"{name} has changed since it was written", where=path)
    return record


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None without any. A line on stderr for each damaged one.

    Raises:
      UserError: there are checkpoints, but every one is damaged.
    """
    listed = _listed(folder)
    for _, path in reversed(listed):
        try:
            verified(path)
        except UserError as error:
            sys.stderr.write(f"minilm: damaged checkpoint skipped: {path}: {error.problem}\n")
        else:
            return path
    if listed:
        hint = "remove the folder to start this stage again"
        raise UserError(f"every checkpoint is damaged ({len(listed)})", where=folder, hint=hint)
    return None


def find(path: Path) -> Path:
    """The checkpoint meant by a checkpoint folder, a stage's folder or a run's.

    Of a run it is that of the last finished stage, else of the last one begun.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise UserError("no such folder", where=path)
    if _NAME.fullmatch(path.name) or (path / "metadata.json").exists():
        verified(path)
        return path
    stages = [path / name for name in reversed(STAGES)]
    finished = [stage for stage in stages if (stage / "done.json").exists()]
    for folder in [path, path / "checkpoints", *(s / "checkpoints" for s in finished + stages)]:
        if newest := latest(folder):
            return newest
    allowed = "a checkpoint (step_00000500), the folder of a stage, or the folder of a run"
    raise UserError("no checkpoint here", where=path, allowed=allowed)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name: attributes, keys and indices joined by dots, as in `model.layers.0.q_proj`.

    An NNX variable keeps its array under `value`, which says nothing and is left out.

    Raises:
      ValueError: a leaf that is no array or number, or two leaves with one name.

    >>> flatten({"b": [1, 2.0], "a": {"c": 3}})
    {'a.c': 3, 'b.0': 1, 'b.1': 2.0}
    """
    import jax

    kinds = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float)
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        key = jax.tree_util.keystr(path, simple=True, separator=".")
        if key in flat:
            raise ValueError(f"two leaves are called '{key}'")
        if not isinstance(leaf, kinds) or kind(leaf).startswith(("key<", "<U", "|S", "object")):
            raise ValueError(f"'{key}' is no array of numbers: {type(leaf).__name__}")
        flat[key] = leaf
    return flat


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces a file's content so that a reader, or a crash, meets the old or the new, whole.

    Raises:
      UserError: the disk is full or not writable; the old content is still there.
    """
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        temporary.write_bytes(data)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write: {error.strerror}", where=path) from error


def kind(array: Any) -> str:
    """
    >>> kind(np.zeros((2, 3), np.float32))
    'float32[2, 3]'
    """
    dtype = np.asarray(array).dtype if isinstance(array, bool | int | float) else array.dtype
    return f"{dtype}{list(np.shape(array))}"


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """Orbax and a checkpointer whose threads do not log the errors that are raised here anyway."""
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        yield ocp, checkpointer
    logger.setLevel(before)  # but not after an error: threads that were given up still report


def _check_fits(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = [f"'{key}' is not in the checkpoint" for key in wanted if key not in saved]
    problems += [f"'{key}' is in the checkpoint alone" for key in saved if key not in wanted]
    problems += [
        f"'{key}' is {saved[key]}, expected {kind(leaf)}"
        for key, leaf in wanted.items()
        if key in saved and saved[key] != kind(leaf)
    ]
    if problems:
        shown = sorted(problems)[:6] + ["…"] * (len(problems) > 6)
        raise UserError(
            f"the checkpoint does not fit ({len(problems)} of its leaves): {'; '.join(shown)}",
            where=path,
            hint="was it made with another model or optimizer section?",
        )


def _write_metadata(path: Path, record: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(record, default=lambda scalar: scalar.item()))
    text = json.dumps(plain | {"digest": _digest(plain)}, indent=1)
    write_atomically(path / "metadata.json", text.encode())


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Makes a file's content, or a folder's names, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, read off the disk: what has the name is complete."""
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(m[1]), path) for path in names if (m := _NAME.fullmatch(path.name)))


def _sweep(folder: Path) -> None:
    """Removes what was put aside, and what a killed process left half-written."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keeps the last `keep`, the best, and always the one just written."""
    wanted, scores = {newest}, {}
    listed = _listed(folder)
    for _, path in reversed(listed):
        try:
            # Beyond the newest lies what a resume passed over, as a rule because it is damaged.
            score = (verified(path) if path.name > newest.name else metadata(path))["best"]
        except UserError:
            continue  # a damaged one neither counts nor stays
        if len(wanted | {path}) <= keep:
            wanted.add(path)
        if score is not None and not math.isnan(score):
            scores[path] = score
    if scores:
        wanted.add(min(scores, key=lambda path: scores[path]))
    for _, path in listed:
        if path not in wanted:
            _put_aside(path)
    _sweep(folder)


def _put_aside(path: Path) -> None:
    """Takes the name away before the files: a killed process leaves nothing that looks damaged."""
    path.rename(path.with_name(f"{_TEMPORARY}removed-{path.name}"))


def _disk_trouble(error: BaseException) -> str | None:
    """What a disk refused, in words. TensorStore raises a ValueError with the errno in its text."""
    if isinstance(error, OSError):
        return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(found[1]))
    return None
