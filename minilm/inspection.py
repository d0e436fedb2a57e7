"""What a checkpoint holds, and how two differ; read without building the model."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minilm.checkpoint import find, kind, load_arrays, metadata
from minilm.errors import UserError

_MODEL = "model."  # of a train state, the part that is the model


class Row(NamedTuple):
    """One array. `norm` is Euclidean; all three are computed in float64."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    norm: float
    mean: float
    std: float


class Description(NamedTuple):
    """A checkpoint in figures."""

    path: Path
    step: int
    parameters: tuple[Row, ...]  # the model's
    others: tuple[Row, ...]  # optimizer state, counters
    bytes: int  # on disk
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    tokenizer: Mapping[str, Any]  # empty where none was saved
    facts: Mapping[str, Any]  # what else the metadata say

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(row.size for row in self.parameters)


class Difference(NamedTuple):
    """How checkpoint `b` differs from `a`."""

    a: Path
    b: Path
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[tuple[str, str, str], ...]  # key, then dtype and shape in a and in b
    changed: tuple[tuple[str, float], ...]  # key and |a - b| / |a|, largest first
    equal: int  # arrays that are the same, bit for bit
    config: tuple[tuple[str, Any, Any], ...]  # dotted key, a's value, b's


def describe(path: Path) -> Description:
    """Reads a checkpoint; of a run or a stage, the one that `checkpoint.find` finds.

    Raises:
      UserError: no checkpoint there, or a damaged one.
    """
    path = find(path)
    record = metadata(path)
    rows = [_row(key, array) for key, array in load_arrays(path).items()]
    told = ("step", "bytes", "config", "metrics", "model", "arrays", "files")
    return Description(
        path=path,
        step=record["step"],
        parameters=tuple(row for row in rows if row.key.startswith(_MODEL)),
        others=tuple(row for row in rows if not row.key.startswith(_MODEL)),
        bytes=record["bytes"],
        config=record.get("config", {}),
        metrics=record.get("metrics", {}),
        tokenizer=_tokenizer_facts(path / "tokenizer.json"),
        facts={k: v for k, v in record.items() if k not in told and v is not None},
    )


def diff(a: Path, b: Path) -> Difference:
    """Compares two checkpoints, array by array and key by key of their configs.

    Raises:
      UserError: no checkpoint at one of the paths, or a damaged one.
    """
    a, b = find(a), find(b)
    left, right = load_arrays(a), load_arrays(b)
    shared = [key for key in left if key in right]
    same = [key for key in shared if kind(left[key]) == kind(right[key])]
    differ = [key for key in same if left[key].tobytes() != right[key].tobytes()]
    changed = [(key, _relative(left[key], right[key])) for key in differ]
    before, after = (_flat(metadata(path).get("config", {})) for path in (a, b))
    return Difference(
        a=a,
        b=b,
        only_a=tuple(key for key in left if key not in right),
        only_b=tuple(key for key in right if key not in left),
        reshaped=tuple((k, kind(left[k]), kind(right[k])) for k in shared if k not in same),
        changed=tuple(sorted(changed, key=lambda change: -change[1])),
        equal=len(same) - len(differ),
        config=tuple(
            (key, before.get(key), after.get(key))
            for key in before | after
            if before.get(key) != after.get(key)
        ),
    )


def render(description: Description, *, optimizer: bool = False) -> RenderableType:
    """For a terminal: facts, then the tree of parameters.

    Args:
      optimizer: show the optimizer's state array by array, too.
    """
    d = description
    facts = Table.grid("key", "value", padding=(0, 2))
    facts.add_row("step", f"{d.step:,}")
    facts.add_row("size", f"{d.total:,} parameters, {d.bytes / 1e6:,.1f} MB on disk")
    more = {**d.facts, "metrics": d.metrics, "tokenizer file": d.tokenizer}
    for name, value in more.items():
        if value != {}:
            facts.add_row(name, Text(_said(value)))
    for name, value in d.config.items():
        facts.add_row(f"config {name}", Text(_said(value)))
    if broken := [r.key for r in d.parameters + d.others if not math.isfinite(r.norm)]:
        facts.add_row("NOT FINITE", Text(", ".join(broken), style="bold red"))
    size = sum(row.size for row in d.others)
    rest = Text(f"and {len(d.others)} arrays of optimizer and counters, {size:,} numbers")
    return Group(
        Text(str(d.path), style="bold"),
        facts,
        _tree(d.parameters),
        _tree(d.others) if optimizer else rest,
    )


def render_diff(difference: Difference) -> RenderableType:
    """For a terminal: what only one has, what changed and by how much."""
    d = difference
    lines = [f"a  {d.a}", f"b  {d.b}"]
    for name, keys in (("a", d.only_a), ("b", d.only_b)):
        lines += [f"only in {name}: {', '.join(keys)}"] if keys else []
    lines += [f"{key}: {a} in a, {b} in b" for key, a, b in d.reshaped]
    lines += [f"config {key}: {a!r} in a, {b!r} in b" for key, a, b in d.config]
    lines.append(f"{len(d.changed)} arrays changed, {d.equal} equal bit for bit")
    table = Table("array", "|a - b| / |a|", box=box.SIMPLE)
    table.columns[1].justify = "right"
    for key, relative in d.changed:
        table.add_row(key, f"{relative:.3g}")
    return Group(Text("\n".join(lines)), *([table] if d.changed else []))


def _row(key: str, array: np.ndarray) -> Row:
    values = array.astype(np.float64).ravel()
    with np.errstate(invalid="ignore"):  # an infinity has no mean; it is reported as such
        norm, mean, std = (float(f(values)) for f in (np.linalg.norm, np.mean, np.std))
    return Row(key, array.shape, str(array.dtype), array.size, norm, mean, std)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |a|; infinite where a is zero."""
    left, right = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    with np.errstate(invalid="ignore"):
        norm, apart = float(np.linalg.norm(left)), float(np.linalg.norm(left - right))
    return apart / norm if norm else math.inf


def _flat(config: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """
    >>> _flat({"seed": 0, "model": {"layers": 4}})
    {'seed': 0, 'model.layers': 4}
    """
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{start}{key}.") if nested else {f"{start}{key}": value}
    return flat


def _tokenizer_facts(path: Path) -> dict[str, Any]:
    """Sizes and special tokens, as the `tokenizers` library writes them."""
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_bytes())
        special = " ".join(token["content"] for token in saved.get("added_tokens") or ())
        model = saved.get("model") or {}
        facts = {name: len(model.get(name) or ()) for name in ("vocab", "merges")}
        return {"type": model.get("type")} | facts | {"special": special}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("not a tokenizer file", where=path) from error


def _said(value: Any) -> str:
    """
    >>> _said({"loss": 0.123456, "model": {"layers": 4}})
    'loss=0.1235  model.layers=4'
    """
    if isinstance(value, Mapping):
        return "  ".join(f"{k}={_said(v)}" for k, v in _flat(value).items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tree(rows: Sequence[Row]) -> Table:
    """Arrays under the names that they share; `share` is of all their numbers."""
    table = Table("array", "shape", "dtype", "norm", "mean", "std", "share", box=box.SIMPLE)
    for column in table.columns[3:]:
        column.justify = "right"
    total = sum(row.size for row in rows)
    sizes: dict[tuple[str, ...], int] = {}
    for row in rows:
        names = tuple(row.key.split("."))
        for depth in range(1, len(names)):
            sizes[names[:depth]] = sizes.get(names[:depth], 0) + row.size
    shown = set()
    for row in rows:
        names = tuple(row.key.split("."))
        for depth in range(1, len(names)):
            if (branch := names[:depth]) not in shown:
                shown.add(branch)
                share = f"{sizes[branch] / total:.1%}"
                table.add_row("  " * (depth - 1) + branch[-1], *[""] * 5, share, style="bold")
        numbers = [f"{number:.3g}" for number in (row.norm, row.mean, row.std)]
        shape = "x".join(map(str, row.shape)) or "scalar"
        name = "  " * (len(names) - 1) + names[-1]
        table.add_row(name, shape, row.dtype, *numbers, f"{row.size / total:.1%}")
    return table
