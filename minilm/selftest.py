"""`minilm selftest`: a run killed at random instants must end as one that was not, bit for bit."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from minilm import checkpoint, configfile, metrics
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import TEMPORARY, read_json, write_atomically, write_json
from minilm.pipeline import stages_of

console = Console(soft_wrap=True)
TIMES = {"seconds", "wall_seconds", "tokens_per_second", "flop_utilization"}
EARLIEST = 0.7  # how often a kill falls into the earliest stage that is due
SAVES = 8  # of a stage, about
FEW_STEPS = 160
POLL = 0.001  # seconds: a save of a small model takes some fifty


class Kill(NamedTuple):
    """One SIGKILL: in which stage, when, and what checkpoint was there to go on from."""

    stage: str
    when: str
    left: str


def selftest_command(config: Config, out: Path, *, kills: int, seed: int) -> int:
    """`minilm selftest CONFIG`: 0 where every killed run ended as the whole one, else 1.

    A run is killed, and started again, until it is done; then the next, until there were `kills`
    kills, equally many of every stage, each at a random instant or within a save. Checkpoints are
    saved more often than the config says, so that there are some to go on from.

    Args:
      out: folder of the runs; what an earlier selftest left there is removed.
    Raises:
      UserError: the uninterrupted run, or one that goes on, fails by itself.
    """
    if out.exists() and not (out / "selftest.json").exists() and any(out.iterdir()):
        hint = "name another with --out"
        raise UserError("not empty, and not a selftest's", where="--out", value=str(out), hint=hint)
    shutil.rmtree(out, ignore_errors=True)
    write_json(out / "selftest.json", {})
    path = out / "config.toml"
    write_atomically(path, configfile.dump(_saving_often(config)).encode())
    whole, rng = out / "whole", random.Random(seed)
    console.print(f"the run that is not killed: {whole}")
    with _running(path, whole, out) as process:
        process.wait()
    _check(process, out)
    stages = [s.name for s in stages_of(config)]
    lasted = {s: read_json(whole / s / "done.json")["wall_seconds"] for s in stages}
    done: list[Kill] = []
    wrong: list[str] = []
    table = Table(Column("kill", justify="right"), "stage", "when", "goes on from")
    for number in range(1, kills + 1):
        run = out / f"killed_{number}"
        # One choice of dtype and flags: a trial of its own could choose otherwise.
        choice = read_json(whole / "environment.json")["choice"]
        write_json(run / "environment.json", {"choice": choice})
        while len(done) < kills:
            counts = {s: sum(k.stage == s for k in done) for s in stages}
            due = [s for s in stages if counts[s] < kills / len(stages)]
            kill = _until_killed(path, run, out, due, lasted, rng)
            if kill is None:
                break
            done.append(kill)
            console.print(f"kill {len(done)} of {kills}: {kill.stage}, {kill.when}")
            table.add_row(str(len(done)), *kill)
        else:
            with _running(path, run, out) as process:
                process.wait()
            _check(process, out)
        wrong += [f"{run.name}: {text}" for text in differences(run, whole, stages)]
        if len(done) == kills:
            break
    Console(width=max(console.width, 100)).print(table)
    runs = len(list(out.glob("killed_*")))
    for text in wrong:
        console.print(f"differs: {text}")
    same = "bit-equal" if not wrong else f"{len(wrong)} differences"
    console.print(
        f"{len(done)} kills of {runs} runs, against one that was not killed: parameters, optimizer"
        f" state, metrics, samples of {', '.join(stages)}: {same}"
    )
    write_json(out / "selftest.json", {"kills": [k._asdict() for k in done], "differences": wrong})
    return int(bool(wrong))


def _saving_often(config: Config) -> Config:
    """The same with a checkpoint every few steps."""

    def every(section: Any, steps: int) -> Any:
        return section.model_copy(update={"checkpoint_every": max(1, steps // SAVES)})

    return config.model_copy(
        update={
            "pretrain": every(config.pretrain, config.pretrain.steps),
            "sft": every(config.sft, FEW_STEPS),  # how many these two take, their data say
            "reward": every(config.reward, FEW_STEPS),
            "rlhf": every(config.rlhf, config.rlhf.steps),
        }
    )


@contextlib.contextmanager
def _running(config: Path, run: Path, out: Path) -> Iterator[subprocess.Popen]:
    """`minilm run` as a process group, which is killed at the latest at the end."""
    words = [sys.executable, "-m", "minilm", "run", str(config), "--out", str(run)]
    with (out / "output.txt").open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _check(process: subprocess.Popen, out: Path) -> None:
    if process.returncode:
        text = (out / "output.txt").read_text(errors="replace").strip().splitlines()
        said = "\n".join(text[-12:])
        raise UserError(f"a run that was not killed failed:\n{said}", where=out / "output.txt")


def _until_killed(
    config: Path, run: Path, out: Path, due: list[str], lasted: dict[str, float], rng: random.Random
) -> Kill | None:
    """Starts, or goes on with, a run and kills it in a stage; None where it was done before that.

    Of the stages that are `due` one early in the run is likelier: what it passes is not killed.
    """
    left = [s for s in due if not (run / s / "done.json").exists()]
    if not left:
        with _running(config, run, out) as process:
            process.wait()
        _check(process, out)
        return None
    stage = left[0] if rng.random() < EARLIEST else rng.choice(left)
    started = run / stage / "started.json"
    before, saves = _inode(started), run / stage / "checkpoints"
    within = rng.random() < 0.5 and stage != "preferences"  # which saves no checkpoint
    delay = rng.uniform(0, 0.05 if within else lasted[stage])
    when = "within a save" if within else f"{delay:.2f} s after its start"
    with _running(config, run, out) as process:

        def alive(condition: Callable[[], Any]) -> bool:
            while process.poll() is None:
                if condition():
                    return True
                time.sleep(POLL)
            return False

        if alive(lambda: _inode(started) not in (None, before)) and (
            not within or alive(lambda: any(saves.glob(f"{TEMPORARY}step_*")))
        ):
            end = time.monotonic() + delay
            if alive(lambda: time.monotonic() >= end):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                # A stage that had little left may have ended before.
                left = [s for s in lasted if not (run / s / "done.json").exists()]
                if left and left[0] != stage:
                    when, stage = f"{when.removesuffix('its start')}{stage} began", left[0]
                newest = sorted(p.name for p in (run / stage / "checkpoints").glob("step_*"))
                return Kill(stage, when, newest[-1] if newest else "its beginning")
        process.wait()
    _check(process, out)
    return None


def _inode(path: Path) -> int | None:
    """By which a file that was written anew is told from the one before."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def differences(ours: Path, theirs: Path, stages: list[str]) -> list[str]:
    """What differs between two runs' stages: figures, curves, files, parameters, optimizer state.

    Times do not count.
    """
    found = []
    for stage in stages:
        found += _differences(ours / stage, theirs / stage, stage)
    x, y = (read_json(run / "summary.json") for run in (ours, theirs))
    found += [f"summary.json: {s}" for s in stages if _timeless(x.get(s)) != _timeless(y.get(s))]
    files = [run / "tokenizer.json" for run in (ours, theirs)]  # of a run that borrows one: none
    a, b = (file.read_bytes() if file.exists() else None for file in files)
    return found + ["tokenizer.json"] * (a != b)


def _differences(a: Path, b: Path, where: str) -> list[str]:
    names, others = ({p.name for p in folder.iterdir()} for folder in (a, b))
    found = [f"{where}/{name} is in one alone" for name in sorted(names ^ others)]
    for name in sorted(names & others):
        one, other, place = a / name, b / name, f"{where}/{name}"
        if name.startswith("step_"):
            found += _arrays(one, other, place)
        elif one.is_dir():
            found += _differences(one, other, place)
        elif name.endswith(".json"):
            x, y = (json.loads(p.read_text()) for p in (one, other))
            found += [place] * (_timeless(x) != _timeless(y))
        elif name == "metrics.jsonl":
            x, y = (metrics.read(p) for p in (one, other))
            found += [place] * (_timeless(x) != _timeless(y))
        elif one.read_bytes() != other.read_bytes():
            found.append(place)
    return found


def _arrays(one: Path, other: Path, where: str) -> list[str]:
    x, y = (checkpoint.load_arrays(path) for path in (one, other))
    unlike = [k for k in x.keys() & y.keys() if x[k].tobytes() != y[k].tobytes()]
    return [f"{where}: {key}" for key in sorted({*unlike, *(x.keys() ^ y.keys())})]


def _timeless(value: Any) -> Any:
    """JSON without what depends on the clock."""
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES}
    return [_timeless(v) for v in value] if isinstance(value, list) else value
