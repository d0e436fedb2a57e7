"""Checkpoints: any pytree of arrays in one folder, written whole or not at all, verified when read.

    checkpoints/step_00000500/
      metadata.json     what was saved: step, config, metrics, arrays, sha256 of every file
      arrays/           Orbax (OCDBT): one flat dict, "model.layers.0.q_proj" -> array
      tokenizer.json    and whatever else `files` names

A folder is made beside its place, flushed to disk and renamed, so a process may die at any instant:
what has a step's name is complete. What a disk does to it later, the checksums tell. Saving is
synchronous and by one process. JAX and Orbax are imported inside the functions: they are slow.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm.errors import UserError
from minilm.files import TEMPORARY, flush, sha256, write_atomically

STAGES = ("pretrain", "sft", "reward", "rlhf")  # with checkpoints, in the order of a run


def save(
    folder: Path, step: int, tree: Any, facts: dict, *, keep: int, files: Mapping[str, Path] = {}
) -> Path:
    """Writes `folder/step_XXXXXXXX` and removes the checkpoints no longer wanted.

    Args:
      tree: any pytree of arrays, no random keys (they follow from seed and step).
      facts: JSON values for the metadata, where save adds `step`, `arrays` and their like.
      keep: how many of the last checkpoints stay. The best (`set_best`) stays beside them.
      files: name in the checkpoint -> file to copy there.
    Raises:
      UserError: the disk is full or not writable. Older checkpoints are then as they were.
    """
    import jax
    import orbax.checkpoint as ocp

    arrays = flatten(tree)
    if jax.process_count() > 1:  # Orbax would ask whose array it is
        arrays = jax.device_get(arrays)
    path = folder / f"step_{step:08d}"
    temporary = folder / f"{TEMPORARY}{path.name}"
    try:
        for left in folder.glob(f"{TEMPORARY}*"):  # by a killed process
            shutil.rmtree(left)
        temporary.mkdir(parents=True)
        # Asked beforehand, since on a full disk Orbax's threads print a screen of tracebacks.
        if shutil.disk_usage(folder).free < sum(array.nbytes for array in arrays.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _orbax().save(temporary.absolute() / "arrays", ocp.args.PyTreeSave(arrays))
        for target, source in files.items():
            shutil.copyfile(source, temporary / target)
        written = sorted(f for f in temporary.rglob("*") if f.is_file())
        record = {"step": step, "best": None, "bytes": sum(f.stat().st_size for f in written)}
        record["arrays"] = {key: kind(array) for key, array in arrays.items()}
        record["files"] = {f.relative_to(temporary).as_posix(): sha256(f) for f in written}
        _write_metadata(temporary, facts | record)
        for inner in temporary.rglob("*"):
            flush(inner)
        if path.exists():  # from an earlier try at this step
            _remove(path)
        temporary.rename(path)
        flush(folder)
    except (OSError, ValueError) as error:  # TensorStore's is a ValueError
        hint = "older checkpoints are intact: make room, then run the same command again"
        raise UserError(f"cannot save: {error}", where=folder, hint=hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(path, keep)
    return path


def restore(path: Path, like: Any, *, prefix: str = "") -> Any:
    """The saved pytree, in the structure of `like` and bit for bit as saved.

    Args:
      like: JAX arrays or `jax.ShapeDtypeStruct`s, whose shardings are kept; or NumPy arrays.
      prefix: restore only this part, such as "model" of a train state into a model alone.
    Raises:
      UserError: a damaged checkpoint; leaves missing, left over, or of another shape or dtype.
    """
    import jax

    start = f"{prefix}." if prefix else ""
    wanted = {start + key: leaf for key, leaf in flatten(like).items()}
    expected = {key: kind(leaf) for key, leaf in wanted.items()}
    saved = {k: v for k, v in metadata(path)["arrays"].items() if k.startswith(start)}
    problems = [
        f"'{key}' is {saved.get(key, 'missing')}, expected {expected.get(key, 'nothing')}"
        for key in sorted(saved | expected)
        if saved.get(key) != expected.get(key)
    ]
    if problems:
        shown = "; ".join(problems[:6] + ["…"] * (len(problems) > 6))
        problem = f"the checkpoint does not fit ({len(problems)} of its leaves): {shown}"
        hint = "was it made with another model or optimizer section?"
        raise UserError(problem, where=path, hint=hint)
    arrays, leaves = load_arrays(path, start), []
    for key, leaf in wanted.items():
        if isinstance(leaf, np.ndarray):
            leaves.append(arrays[key])
            continue
        free = isinstance(leaf, jax.Array) and not leaf.committed
        # Copies, since a step that donates its state must not write into NumPy's memory.
        leaves.append(jax.device_put(arrays[key], None if free else leaf.sharding, may_alias=False))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def load_arrays(path: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The arrays whose full names start with `prefix`; needs no model.

    Raises:
      UserError: a damaged checkpoint, or one that lacks arrays it should have.
    """
    import orbax.checkpoint as ocp

    keys = [key for key in metadata(path)["arrays"] if key.startswith(prefix)]
    how = dict.fromkeys(keys, ocp.RestoreArgs(restore_type=np.ndarray))
    request = ocp.args.PyTreeRestore(item=how, restore_args=how, partial_restore=True)
    try:
        arrays = _orbax().restore(path.absolute() / "arrays", args=request)
        found = {key: arrays[key] for key in keys}  # in the tree's order
        if not all(isinstance(x, np.ndarray) for x in found.values()):  # Orbax's own placeholder
            raise KeyError("some of those that metadata.json names are missing")
        return found
    except (
        KeyError,
        TypeError,
        ValueError,
        OSError,
    ) as error:  # Orbax's, of a tree that is another
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"its arrays are not readable: {problem}", where=path) from error


def _orbax() -> Any:
    """Orbax's checkpointer; of several processes the first saves and reads, and waits for none."""
    import jax
    import orbax.checkpoint as ocp

    options: dict[str, Any] = {}
    if jax.process_count() > 1:
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(0, {0}, "first")
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options), **options)


def metadata(path: Path) -> dict[str, Any]:
    """What `save` was given, with step, best, arrays (dtype, shape), files (sha256) and bytes.

    Raises:
      UserError: a file is missing or not as it was written.
    """
    try:
        record = json.loads((path / "metadata.json").read_bytes())
        digest = record.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"metadata.json is not readable: {error}", where=path) from error
    kinds = {"step": int, "best": (int, float, type(None)), "arrays": dict, "files": dict}
    whole = all(isinstance(record.get(key, ...), types) for key, types in kinds.items())
    whole = whole and all(isinstance(x, str) for x in record["arrays"].values())
    if digest != _digest(record) or not whole:  # the digest tells damage, and is no signature
        raise UserError("metadata.json is not as it was written", where=path)
    for name, expected in record["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError("a file outside of the checkpoint", where=path, value=name)
        if not (path / name).is_file() or sha256(path / name) != expected:
            raise UserError(f"{name} is missing or not as it was written", where=path)
    return record


def set_best(path: Path, best: float | int) -> None:
    """Gives a checkpoint the figure that "best" is judged by (lower is better), once known."""
    _write_metadata(path, metadata(path) | {"best": float(best)})


def keep_best(folder: Path, stopped: int) -> Path:
    """Makes the checkpoint of the lowest "best" the last one: training stopped at `stopped`.

    Killed halfway, the same call completes it.
    """
    known = {path: metadata(path) for path in sorted(folder.glob("step_*"))}
    judged = {path: record["best"] for path, record in known.items() if record["best"] is not None}
    # Not a number is the worst, and kept where nothing else is.
    best = min(judged, key=lambda path: math.inf if math.isnan(judged[path]) else judged[path])
    step = known[best]["step"]
    _write_metadata(best, known[best] | {"steps": step, "stopped_at": stopped})
    for path in known:
        if path > best:
            _remove(path)
    return best


def went_back_to(folder: Path) -> int | None:
    """The step that `keep_best` made the last; None where it did not."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        with contextlib.suppress(UserError):  # a damaged one says nothing
            record = metadata(path)
            return record["step"] if "stopped_at" in record else None
    return None


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None without any. A line on stderr for each damaged one.

    Raises:
      UserError: there are checkpoints, but every one is damaged.
    """
    listed = sorted(folder.glob("step_*"), reverse=True)
    for path in listed:
        try:
            metadata(path)
            return path
        except UserError as error:
            sys.stderr.write(f"minilm: damaged checkpoint skipped: {path}: {error.problem}\n")
    if listed:
        hint = "remove the folder to start this stage again"
        raise UserError(f"every checkpoint is damaged ({len(listed)})", where=folder, hint=hint)
    return None


def find(path: Path, stages: Sequence[str] = STAGES) -> Path:
    """The checkpoint meant by a checkpoint folder, a stage's folder or a run's.

    Of a run it is that of the last finished one of `stages`, else of the last one begun.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if path.name.startswith("step_"):
        metadata(path)
        return path
    inside = [path / name for name in reversed(stages)]
    inside.sort(key=lambda stage: not (stage / "done.json").exists())
    for folder in (path, path / "checkpoints", *(stage / "checkpoints" for stage in inside)):
        if newest := latest(folder):
            return newest
    allowed = "a checkpoint (step_00000500), the folder of a stage, or the folder of a run"
    raise UserError("no checkpoint here", where=path, allowed=allowed)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name, `model.layers.0.q_proj`; the `value` of an NNX variable goes without saying.

    >>> flatten({"b": [1, 2.0], "a": {"c": 3}})
    {'a.c': 3, 'b.0': 1, 'b.1': 2.0}
    """
    import jax

    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
            path = path[:-1]
        flat[jax.tree_util.keystr(path, simple=True, separator=".")] = leaf
    return flat


def kind(array: Any) -> str:
    """Dtype and shape, as in `float32[2, 3]`."""
    return f"{array.dtype}{list(array.shape)}"


def _write_metadata(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record | {"digest": _digest(record)}, indent=1)
    write_atomically(path / "metadata.json", text.encode())


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _prune(newest: Path, keep: int) -> None:
    """Keeps the last `keep` and the best. Later ones, which a resume passed over, go."""
    listed = sorted(newest.parent.glob("step_*"))
    earlier = listed[: listed.index(newest) + 1]
    scores = {}
    for path in earlier:
        with contextlib.suppress(UserError):
            best = metadata(path)["best"]
            if best is not None and not math.isnan(best):
                scores[path] = best
    wanted = {*earlier[-keep:], *sorted(scores, key=lambda path: scores[path])[:1]}
    for path in listed:
        if path not in wanted:
            _remove(path)


def _remove(path: Path) -> None:
    """Takes the name away before the files: a killed process leaves nothing that looks damaged."""
    shutil.rmtree(path.rename(path.with_name(f"{TEMPORARY}removed-{path.name}")))
