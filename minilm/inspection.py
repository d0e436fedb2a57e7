"""What a checkpoint holds, and how two differ; read without building the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minilm.checkpoint import find, kind, load_arrays, metadata
from minilm.configfile import changed_keys, leaves
from minilm.text.tokenizer import EOS, PAD, Tokenizer


class Row(NamedTuple):
    """One array; the norm is Euclidean, in float64."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    norm: float


class Description(NamedTuple):
    """A checkpoint in figures."""

    path: Path
    parameters: tuple[Row, ...]  # the model's
    others: tuple[Row, ...]  # optimizer state, counters
    tokenizer: Mapping[str, Any]  # empty where none was saved
    metadata: Mapping[str, Any]  # step, config, metrics and what else was saved with them


class Branch(NamedTuple):
    """A line of the tree of arrays: an array, or a name that several begin with."""

    depth: int
    name: str
    share: float  # of all the numbers in the tree
    row: Row | None  # None for a name that several share


BROKEN = "NOT FINITE"  # the fact that is no good news


class Difference(NamedTuple):
    """How checkpoint `b` differs from `a`."""

    a: Path
    b: Path
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    reshaped: tuple[tuple[str, str, str], ...]  # key, then dtype and shape in a and in b
    changed: tuple[tuple[str, float], ...]  # key and |a - b| / |a|; parameters, then the rest
    equal: int  # arrays that are the same, bit for bit
    config: tuple[tuple[str, Any, Any], ...]  # dotted key, a's value, b's


def describe(path: Path) -> Description:
    """Reads a checkpoint; of a run or a stage, the one that `checkpoint.find` finds.

    Raises:
      UserError: no checkpoint there, or a damaged one.
    """
    path = find(path)
    rows = [
        Row(key, array.shape, str(array.dtype), array.size, _norm(array))
        for key, array in load_arrays(path).items()
    ]
    tokenizer = {}
    if (path / "tokenizer.json").exists():
        saved = Tokenizer.load(path / "tokenizer.json")
        tokenizer = {"kind": saved.kind, "size": saved.vocab_size, "special": f"{PAD} {EOS}"}
    return Description(
        path,
        parameters=tuple(row for row in rows if row.key.startswith("model.")),
        others=tuple(row for row in rows if not row.key.startswith("model.")),
        tokenizer=tokenizer,
        metadata=metadata(path),
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
    before, after = (dict(leaves(metadata(path).get("config", {}))) for path in (a, b))
    return Difference(
        a,
        b,
        only_a=tuple(key for key in left if key not in right),
        only_b=tuple(key for key in right if key not in left),
        reshaped=tuple((k, kind(left[k]), kind(right[k])) for k in shared if k not in same),
        changed=tuple(sorted(changed, key=lambda c: (not c[0].startswith("model."), -c[1]))),
        equal=len(same) - len(differ),
        config=tuple((k, before.get(k), after.get(k)) for k in changed_keys(before, after)),
    )


def render(description: Description, *, optimizer: bool = False) -> RenderableType:
    """For a terminal: facts, then the tree of parameters, and of the optimizer's state if asked."""
    d = description
    grid = Table.grid("key", "value", padding=(0, 2))
    for name, value in facts(d).items():
        grid.add_row(name, Text(value, style="bold red" if name == BROKEN else ""))
    shown = _tree(d.others) if optimizer else Text(f"and {others(d)}")
    return Group(Text(str(d.path), style="bold"), grid, _tree(d.parameters), shown)


def facts(description: Description) -> dict[str, str]:
    """What a checkpoint says of itself, by name; under BROKEN the arrays that are not finite."""
    d = description
    known = {k: v for k, v in d.metadata.items() if k not in ("arrays", "files", "model", "config")}
    known |= {f"config {name}": value for name, value in d.metadata.get("config", {}).items()}
    known |= {"tokenizer file": d.tokenizer}
    broken = [r.key for r in d.parameters + d.others if not math.isfinite(r.norm)]
    said = {"parameters": f"{sum(row.size for row in d.parameters):,}"}
    said |= {name: _said(value) for name, value in known.items()}
    return said | ({BROKEN: ", ".join(broken)} if broken else {})


def others(description: Description) -> str:
    """How much there is beside the model, in words."""
    rows = description.others
    size = sum(row.size for row in rows)
    return f"{len(rows)} arrays of optimizer and counters, {size:,} numbers"


def branches(rows: Sequence[Row]) -> Iterator[Branch]:
    """The tree that the names of arrays make, a branch before what is on it."""
    total = sum(row.size for row in rows)
    shown = set()
    for row in rows:
        *above, name = row.key.split(".")
        for depth, part in enumerate(above):
            branch = ".".join([*above[:depth], part, ""])
            if branch not in shown:
                shown.add(branch)
                share = sum(r.size for r in rows if r.key.startswith(branch)) / total
                yield Branch(depth, part, share, None)
        yield Branch(len(above), name, row.size / total, row)


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
    for key, relative in d.changed:
        table.add_row(key, f"{relative:.3g}")
    return Group(Text("\n".join(lines)), *([table] if d.changed else []))


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64).ravel()))


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |a|; infinite where a is zero."""
    norm = _norm(a)
    with np.errstate(invalid="ignore"):
        return _norm(a.astype(np.float64) - b.astype(np.float64)) / norm if norm else math.inf


def _said(value: Any) -> str:
    """
    >>> _said({"loss": 0.123456, "model": {"layers": 4}})
    'loss=0.1235  model.layers=4'
    """
    if isinstance(value, Mapping):
        return "  ".join(f"{name}={_said(leaf)}" for name, leaf in leaves(value) if leaf != {})
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tree(rows: Sequence[Row]) -> Table:
    """Arrays under the names that they share; `share` is of all their numbers."""
    table = Table("array", "shape", "dtype", "norm", "share", box=box.SIMPLE)
    for depth, name, share, row in branches(rows):
        figures = (shape_of(row), row.dtype, f"{row.norm:.4g}") if row else ("", "", "")
        table.add_row("  " * depth + name, *figures, f"{share:.1%}", style="" if row else "bold")
    return table


def shape_of(row: Row) -> str:
    return "x".join(map(str, row.shape)) or "scalar"
