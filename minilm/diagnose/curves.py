"""Curves: read from whatever was logged, and named alike whoever logged it."""

import csv
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from minilm import metrics
from minilm.errors import UserError, nearest

# What a quantity is called: minilm's name first, then TRL's, Hugging Face's and plain ones. Names
# are compared in lower case with every other character as "_": `Train/Loss` is `train_loss`.
ALIASES: dict[str, tuple[str, ...]] = {
    "step": (
        "step", "steps", "global_step", "train_global_step", "iteration", "iterations", "iter",
        "update", "updates", "epoch", "epochs",
    ),
    # The term that validation measures too comes before the whole objective.
    "train": (
        "cross_entropy", "bradley_terry", "train_loss", "training_loss", "loss_train", "train",
        "training", "loss",
    ),
    "validation": (
        "validation_loss", "val_loss", "valid_loss", "eval_loss", "dev_loss", "held_out_loss",
        "test_loss", "loss_validation", "loss_val", "validation", "valid", "val", "eval", "dev",
        "held_out", "test",
    ),
    "floor": ("entropy_floor", "bayes_log_loss", "floor"),
    "grad_norm": ("grad_norm", "gradient_norm", "train_grad_norm", "total_norm"),
    "learning_rate": ("learning_rate", "lr", "train_learning_rate", "train_lr"),
    "skipped": ("skipped_in_a_row",),
    "score": ("objective_scores", "reward", "rewards"),
    "kl": ("objective_kl", "kl", "mean_kl"),
    "policy_entropy": ("policy_entropy_avg", "entropy", "objective_entropy"),
    "length": ("completions_mean_length", "mean_length", "length"),
    "clipped": ("completions_clipped_ratio", "clipped_ratio"),
    "reward_std": ("reward_std",),
    "zero_std": ("frac_reward_zero_std",),
    "value_loss": ("loss_value", "loss_value_avg", "value_loss"),
    "proxy": ("proxy",),
    "gold": ("gold", "gold_reward"),
    "parse_share": ("parse_share",),
}  # fmt: skip
KNOWN = {alias for aliases in ALIASES.values() for alias in aliases}
FEWEST = 5  # points of a curve below which nothing is said about its shape

type Values = Float[np.ndarray, " n"]


class Curve(NamedTuple):
    """One quantity over the steps it was logged at: ascending, finite."""

    steps: Values
    values: Values

    def between(self, low: float, high: float) -> "Curve":
        """The part from `low` to `high`, shares of the last step; both ends belong to it."""
        start, stop = (share * self.steps[-1] for share in (low, high))
        inside = (self.steps >= start) & (self.steps <= stop)
        return Curve(self.steps[inside], self.values[inside])

    @property
    def early(self) -> float:
        """Median of the first tenth, and of three points at least."""
        return float(np.median(self.values[: max(len(self.values) // 10, 3)]))

    @property
    def late(self) -> float:
        """Median of the last tenth, and of three points at least."""
        return float(np.median(self.values[-max(len(self.values) // 10, 3) :]))


@dataclasses.dataclass(frozen=True)
class Curves:
    """Everything that one file of metrics tells.

    Attributes:
      series: by the names of `ALIASES`.
      nonfinite: (step, name as logged) of every figure that was not finite.
      source: the file or folder, for messages; empty where records were handed in.
    """

    series: Mapping[str, Curve]
    nonfinite: tuple[tuple[float, str], ...] = ()
    source: str = ""

    def get(self, name: str, fewest: int = FEWEST) -> Curve | None:
        """The curve, None where fewer than `fewest` points of it were logged."""
        curve = self.series.get(name)
        return curve if curve is not None and len(curve.steps) >= fewest else None

    @property
    def last_step(self) -> float:
        """The last step of any figure."""
        ends = [curve.steps[-1] for curve in self.series.values()]
        return float(max([*ends, *(step for step, _ in self.nonfinite)]))


def load(path: Path | str) -> dict[str, Curves]:
    """Curves of a run folder (by stage), a stage folder, a `.jsonl` of metrics or a `.csv`.

    Raises:
      UserError: nothing to read there; a file that is neither; columns that cannot be told.
    """
    path = Path(path)
    if path.is_dir():
        own = path / "metrics.jsonl"
        files = [own] if own.exists() else sorted(path.glob("*/metrics.jsonl"))
        files = [f for f in files if ".old" not in f.parent.name]
        if not files:
            raise UserError("no metrics.jsonl here, nor in a folder below", where=path)
        return {f.parent.name: collect(metrics.read(f), str(f)) for f in files}
    if path.suffix.lower() in (".csv", ".tsv"):
        return {path.stem: collect(_table(path), str(path))}
    if path.suffix.lower() == ".jsonl" or not path.exists():
        return {path.parent.name: collect(metrics.read(path), str(path))}
    allowed = "a run folder, a stage folder, metrics.jsonl, or .csv/.tsv with a header line"
    raise UserError("not a file of metrics", where=path, value=path.suffix, allowed=allowed)


def collect(records: Iterable[Mapping[str, Any]], source: str = "") -> Curves:
    """The curves in records of numbers by name, each with its step. What is unknown is ignored.

    Raises:
      UserError: no step, or neither a loss nor a reward, in any record; names those found.
    """
    points: dict[str, dict[float, float]] = {}
    found: dict[str, None] = {}
    bad: list[tuple[float, str]] = []
    records = list(records)
    if not records:
        raise UserError("no metrics in it yet", where=source or None)
    names = {name: None for record in records for name in record}
    chosen = _match(names)
    if "step" not in chosen or not {"train", "validation", "score"} & chosen.keys():
        raise _unnamed(chosen, list(names), source)
    others = [n for n in names if n not in chosen.values() and _plain(n) in KNOWN]
    for record in records:
        step = _number(record.get(chosen["step"]), chosen["step"], source)
        if step is None or not math.isfinite(step):
            continue
        for name in others:  # such as the whole `loss` beside the term that is judged
            value = record.get(name)
            if isinstance(value, float) and not math.isfinite(value):
                bad.append((step, name))
        for quantity, name in chosen.items():
            value = _number(record.get(name), name, source)
            if quantity == "step" or value is None:
                continue
            found[quantity] = None
            if math.isfinite(value):
                points.setdefault(quantity, {})[step] = value
            else:
                bad.append((step, name))
    # A dict kept the last value of a step that came twice, as a resumed run logs it.
    series = {
        quantity: Curve(*(np.array(x, np.float64) for x in zip(*sorted(p.items()), strict=True)))
        for quantity, p in points.items()
    }
    if not found:
        raise UserError("no figures in these metrics", where=source or None)
    return Curves(series, tuple(sorted(bad)), source)


def _number(value: Any, name: str, source: str) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise UserError(f"'{name}' is not a number", where=source or None, value=value) from None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _match(names: Iterable[str]) -> dict[str, str]:
    """Quantity to the name that it was logged under; the first alias that fits wins."""
    plain = {_plain(name): name for name in reversed(list(names))}
    chosen = {}
    for quantity, aliases in ALIASES.items():
        exact = [plain[alias] for alias in aliases if alias in plain]
        # `Train loss (nats)`: a known name of two words, and then something.
        longer = [n for a in aliases if "_" in a for p, n in plain.items() if p.startswith(f"{a}_")]
        if exact or longer:
            chosen[quantity] = (exact or longer)[0]
    return chosen


def _unnamed(chosen: Mapping[str, str], names: list[str], source: str) -> UserError:
    missing = "step" if "step" not in chosen else "train"
    what = "step column" if missing == "step" else "loss or reward column"
    close = next(filter(None, (nearest(a, map(_plain, names)) for a in ALIASES[missing])), None)
    return UserError(
        f"no {what} among these names",
        where=source or None,
        value=", ".join(names[:20]) or None,
        allowed=ALIASES[missing],
        hint=f"rename '{close}'?" if close else None,
    )


def _table(path: Path) -> list[dict[str, Any]]:
    """Records of a CSV or TSV with a header; cells may be empty, `nan` or `inf`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read: {error}", where=path) from error
    first = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first.count)
    lines = enumerate(csv.reader(text.splitlines(), delimiter=separator), 1)
    rows = [(number, row) for number, row in lines if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise UserError("needs a header line and rows below it", where=path)
    header = [name.strip() for name in rows[0][1]]
    wanted = set(_match(header).values())
    records = []
    for number, row in rows[1:]:
        if len(row) > len(header):
            problem = f"{len(row)} cells under {len(header)} names"
            raise UserError(problem, where=f"{path}:{number}", value=separator.join(row))
        cells = {name: cell.strip() for name, cell in zip(header, row, strict=False)}
        try:
            numbers = {n: float(cells[n]) if cells[n] else None for n in wanted & cells.keys()}
            records.append({**cells, **numbers})
        except ValueError:
            raise UserError(
                "not a number", where=f"{path}:{number}", value=separator.join(row)
            ) from None
    return records
