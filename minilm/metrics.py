"""What a stage reports while it runs: `metrics.jsonl`, one record a line, and a live line."""

import datetime
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from minilm import checkpoint
from minilm.errors import UserError
from minilm.files import write_atomically
from minilm.losses.reduce import Mean
from minilm.trackers import Tracker

_REFRESH = 0.25  # seconds between two redraws of the live line: four a second read as continuous
_PLAIN = 10.0  # seconds between two plain lines, where there is no terminal


class MetricsLog:
    """Appends records to a JSON Lines file; each is in the file, whole, when `log` returns.

    Args:
      keep_until: the step of the checkpoint that training goes on from, -1 at the start. Later
        records are cut off: those steps will be taken again.
      tracker: is told the same, as `train/loss` and so on.
    Raises:
      UserError: the file is not writable, or a line other than the last is not a record.
    """

    def __init__(self, path: Path, keep_until: int, tracker: Tracker | None = None):
        self._path, self._tracker = path, tracker
        found = _records(path) if path.exists() else []
        write_atomically(path, b"".join(line for line, r in found if r["step"] <= keep_until))
        # Unbuffered: a line is one write, so a killed process leaves at most one torn line.
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Writes one record of numbers: `{"step": 10, "kind": "train", "loss": 2.5}`.

        JSON has no NaN and no infinity: these become null, and `nonfinite` lists their names.
        """
        numbers = {name: float(value) for name, value in values.items()}
        record: dict[str, Any] = {"step": step, "kind": kind, **numbers}
        if nonfinite := [name for name, number in numbers.items() if not math.isfinite(number)]:
            record |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        try:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise UserError(f"cannot write metrics: {error.strerror}", where=self._path) from error

        if self._tracker:
            self._tracker.log(step, {f"{kind}/{name}": n for name, n in numbers.items()})

    def close(self) -> None:
        self._file.close()
        if self._tracker:
            self._tracker.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`; numbers that were not finite come back as NaN.

    A torn last line (the process was killed, or is writing just now) is left out.

    Raises:
      UserError: no such file, or a line other than the last is not a record.
    """
    return [record for _, record in _records(path)]


def means(window: list[dict]) -> dict[str, float]:
    """Totals over counts: a mean of means would weigh ragged batches wrongly."""
    out = {}
    for name in sorted(window[0], key=lambda n: n != "loss"):  # what is shown first comes first
        values = [w[name] for w in window]
        if isinstance(values[0], Mean):
            total, count = sum(float(v.total) for v in values), sum(float(v.count) for v in values)
            out[name] = total / count if count else 0.0
        else:
            out[name] = float(np.mean(values))
    return out


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Whole lines and what they say."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read metrics: {error.strerror}", where=path) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            # As `log` writes them, or as other writers do.
            bad = [n for n, x in record.items() if isinstance(x, float) and not math.isfinite(x)]
            if bad := [*record.get("nonfinite", ()), *bad]:
                record |= dict.fromkeys(bad, math.nan) | {"nonfinite": bad}
            found.append((line, {"step": record["step"], "kind": record["kind"]} | record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError("not a record of metrics", where=f"{path}:{number}") from error
    return found


def evaluations(stage: Path) -> list[dict[str, Any]]:
    """The "eval" records in a stage's folder, up to the model that it kept.

    The file goes on beyond that where training went back to its best, or to `rlhf.kl_budget`.
    """
    rows = [r for r in read(stage / "metrics.jsonl") if r["kind"] == "eval"]
    kept = checkpoint.went_back_to(stage / "checkpoints")
    return [r for r in rows if kept is None or r["step"] <= kept]


class Progress:
    """A live line of where a stage stands; plain lines every ten seconds without a terminal.

    Args:
      total: the last step.
      start: the step that a resumed stage goes on from.
    """

    def __init__(self, title: str, total: int, *, start: int = 0, console: Console | None = None):
        self._console = console or Console()
        self._live = self._console.is_terminal and not self._console.is_jupyter
        self._bar = Bar(
            BarColumn(20),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            auto_refresh=False,  # no thread: `update` redraws
            get_time=time.perf_counter,
        )
        self._title = title
        self._id = self._bar.add_task(f"{title}  {start}/{total}", total=total, completed=start)
        self._task = self._bar.tasks[self._id]
        self._values: Mapping[str, Any] = {}
        self._tokens: float | int = 0
        self._shown, self._shown_at = start, time.perf_counter()

    def __enter__(self) -> "Progress":
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._task.completed != self._shown:
            self._show()
        if self._live:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any], tokens: float | int = 0) -> None:
        """Says that `step` steps are done; cheap, since values are formatted at a redraw only.

        Args:
          metrics: numbers worth showing, in this order.
          tokens: of one step, for the speed; 0 shows none.
        """
        self._values, self._tokens = metrics, tokens
        self._bar.update(self._id, completed=step)
        if time.perf_counter() - self._shown_at >= (_REFRESH if self._live else _PLAIN):
            self._show()

    def note(self, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self) -> None:
        task = self._task
        self._shown, self._shown_at = task.completed, time.perf_counter()
        parts = [self._title, f"{task.completed}/{task.total}"]
        if task.speed and self._tokens:  # over the last 30 s, without the first step's compilation
            parts.append(f"{task.speed * self._tokens:,.0f} tokens/s")
        if task.time_remaining:
            parts.append(f"{datetime.timedelta(seconds=task.time_remaining)} left")
        parts += [f"{name} {float(value):.4g}" for name, value in self._values.items()]
        if self._live:
            line = "  ".join(parts)[: self._console.width - 22]  # or the bar would make room
            self._bar.update(self._id, description=line, refresh=True)
        else:
            self.note("  ".join(parts))
