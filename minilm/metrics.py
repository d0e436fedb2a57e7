"""What a stage reports while it runs: `metrics.jsonl`, one record a line, and a live line."""

import json
import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minilm.checkpoint import write_atomically
from minilm.errors import UserError

_REFRESH = 0.25  # seconds between two redraws of the live line: four a second read as continuous
_PLAIN = 10.0  # seconds between two plain lines, where there is no terminal
_WINDOW = 30.0  # seconds over which speed is measured: long enough to smooth, short enough to show


class MetricsLog:
    """Appends records to a JSON Lines file; each is in the file, whole, when `log` returns.

    Args:
      path: made if missing, its folder too.
      keep_until: the step of the checkpoint that training goes on from, -1 at the start. Later
        records are cut off: those steps will be taken again.
    Raises:
      UserError: the file is not writable, or a line other than the last is not a record.
    """

    def __init__(self, path: Path, keep_until: int):
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _cut_back(path, keep_until)
            # Unbuffered: a line is one write, so a killed process leaves at most one torn line.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write metrics: {error.strerror}", where=path) from error

    def log(
        self, step: int, values: Mapping[str, Any], kind: Literal["train", "eval"] = "train"
    ) -> None:
        """Writes one record of numbers: `{"step": 10, "kind": "train", "loss": 2.5}`.

        JSON has no NaN and no infinity: these become null, and `nonfinite` lists their names.

        Raises:
          UserError: the disk is full or gone.
        """
        numbers = {name: float(value) for name, value in values.items()}
        nonfinite = [name for name, number in numbers.items() if not math.isfinite(number)]
        record: dict[str, Any] = {"step": int(step), "kind": kind, **numbers}
        if nonfinite:
            record |= dict.fromkeys(nonfinite) | {"nonfinite": nonfinite}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise UserError(f"cannot write metrics: {error.strerror}", where=self._path) from error
        if written != len(line):  # what a disk does that fills up within the line
            raise UserError("cannot write metrics: the disk is full", where=self._path)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`; numbers that were not finite come back as NaN.

    A torn last line (the process was killed, or is writing just now) is left out.

    Raises:
      UserError: no such file, or a line other than the last is not a record.
    """
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and what they say."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read metrics: {error.strerror}", where=path) from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record |= dict.fromkeys(record.get("nonfinite", ()), math.nan)
            found.append((line, {"step": int(record["step"]), "kind": record["kind"]} | record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError("not a record of metrics", where=f"{path}:{number}") from error
    return found


def _cut_back(path: Path, keep_until: int) -> None:
    kept = b"".join(line for line, record in _records(path) if record["step"] <= keep_until)
    if kept != path.read_bytes():
        write_atomically(path, kept)


class Progress:
    """A live line of where a stage stands; plain lines every ten seconds without a terminal.

    `update` is cheap enough for every step: values are formatted only when the line is redrawn.

    Args:
      title: the stage's name.
      total: its last step.
      unit: what the speed counts.
      start: the step that a resumed stage goes on from.
      console: a `rich.console.Console`; standard output by default.
    """

    def __init__(
        self, title: str, total: int, unit: str = "tokens", *, start: int = 0, console: Any = None
    ):
        from rich.console import Console

        self._title, self._total, self._unit = title, total, unit
        self._console = console or Console()
        self._live = self._console.is_terminal and not self._console.is_jupyter
        self._every = _REFRESH if self._live else _PLAIN
        self._step, self._tokens = start, 0
        self._values: Mapping[str, Any] = {}
        self._past: deque[tuple[float, int]] = deque()  # time and step at each redraw
        self._shown_at, self._shown = time.perf_counter(), start
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._live:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            from rich.table import Column

            cut = Column(no_wrap=True, overflow="ellipsis")
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[line]}", markup=False, table_column=cut),
                console=self._console,
                auto_refresh=False,  # no thread: `update` redraws
            )
            line = f"{self._step}/{self._total}"
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._step, line=line
            )
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._step != self._shown:
            self._show(time.perf_counter())
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any], tokens: float | int = 0) -> None:
        """Says that `step` steps are done; steps may be passed over.

        Args:
          metrics: numbers worth showing, in this order.
          tokens: of one step, for the speed; 0 shows none.
        """
        now = time.perf_counter()
        self._step, self._values, self._tokens = step, metrics, tokens
        if not self._past:  # the first step carries compilation: speed counts from its end
            self._past.append((now, step))
        if now - self._shown_at >= self._every:
            self._show(now)

    def note(self, text: str) -> None:
        """Prints a line above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, now: float) -> None:
        self._shown_at, self._shown = now, self._step
        while len(self._past) > 1 and now - self._past[0][0] > _WINDOW:
            self._past.popleft()
        since, step = self._past[0]
        self._past.append((now, self._step))
        parts = [f"{self._step}/{self._total}"]
        parts += [f"{name} {float(value):.4g}" for name, value in self._values.items()]
        if self._step > step and now > since:
            rate = (self._step - step) / (now - since)
            parts += [f"{_short(rate * self._tokens)} {self._unit}/s"] if self._tokens else []
            parts.append(f"{_clock((self._total - self._step) / rate)} left")
        line = "  ".join(parts)
        if self._bar is None:
            self.note(f"{self._title}  {line}")
        else:
            self._bar.update(self._task, completed=self._step, line=line)
            self._bar.refresh()


def _short(number: float | int) -> str:
    """
    >>> [_short(n) for n in (7.25, 950, 21_345, 3.2e6)]
    ['7.2', '950', '21.3k', '3.2M']
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def _clock(seconds: float | int) -> str:
    """
    >>> [_clock(s) for s in (5, 65, 3725)]
    ['0:05', '1:05', '1:02:05']
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
