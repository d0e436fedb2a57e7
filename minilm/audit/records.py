"""Integrity checks of what a run has written: its records, its checkpoints, its order of work."""

from collections.abc import Iterator

import numpy as np

from minilm import checkpoint, metrics
from minilm.audit.checks import Check
from minilm.audit.setting import TRAINED
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import read_json
from minilm.stages.workspace import Workspace


def record_checks(ws: Workspace, stage: str) -> Iterator[Check]:
    """The checks of a finished stage's folder."""
    for name, check in RECORD_CHECKS.items():
        try:
            passed, said = check(ws, stage)
        except UserError as error:
            passed, said = False, error.problem
        yield Check(f"{stage}: {name}", passed, said)


def steps_follow_each_other(ws: Workspace, stage: str) -> tuple[bool, str]:
    """A resumed run neither repeats nor skips a record (trl#2657, nanochat#808)."""
    steps = [r["step"] for r in _records(ws, stage) if r["kind"] == "train"]
    every = _loop(ws.config, stage).log_every
    gaps = np.diff([0, *steps])
    wrong = int(((gaps <= 0) | (gaps > every)).sum())
    return wrong == 0 and bool(
        steps
    ), f"{len(steps)} records up to step {max(steps, default=0)}, {wrong} out of order"


def the_last_step_is_saved(ws: Workspace, stage: str) -> tuple[bool, str]:
    """The newest checkpoint is whole and of the last step (maxtext#5260, nanochat#446)."""
    newest = max((ws.stage(stage) / "checkpoints").glob("step_*"), default=None)
    if newest is None:
        return False, "there is no checkpoint"
    found = checkpoint.metadata(newest)  # verifies every file
    return found["step"] == found["steps"], f"step {found['step']} of {found['steps']}, verified"


def the_last_step_is_measured(ws: Workspace, stage: str) -> tuple[bool, str]:
    """The figures in the summary are there, finite, and no older than the checkpoint."""
    summary = read_json(ws.stage(stage) / "done.json").get("summary", {})
    numbers = [v for v in summary.values() if isinstance(v, float)]
    finite = bool(numbers) and all(np.isfinite(numbers))
    evaluations = [r["step"] for r in _records(ws, stage) if r["kind"] == "eval"]
    last = max((r["step"] for r in _records(ws, stage)), default=0)
    current = not evaluations or evaluations[-1] == last
    return (
        finite and current,
        f"{len(numbers)} figures; evaluated at step {max(evaluations, default=last)} of {last}",
    )


def updates_were_finite(ws: Workspace, stage: str) -> tuple[bool, str]:
    skipped = sum(r.get("skipped_in_a_row", 0) > 0 for r in _records(ws, stage))
    bad = sum("nonfinite" in r for r in _records(ws, stage))
    return not (
        skipped or bad
    ), f"{skipped} records with skipped updates, {bad} with non-finite figures"


RECORD_CHECKS = {
    "steps follow each other": steps_follow_each_other,
    "the last step is saved": the_last_step_is_saved,
    "the last step is measured": the_last_step_is_measured,
    "updates were finite": updates_were_finite,
}


def environment_checks(ws: Workspace) -> Iterator[Check]:
    """The dtype is one that the device computes (a T4 has no bfloat16), in every stage the same."""
    found = read_json(ws.out / "environment.json")
    dtypes = {
        checkpoint.metadata(checkpoint.find(ws.stage(stage)))["compute_dtype"]
        for stage in TRAINED
        if (ws.stage(stage) / "done.json").exists()
    }
    said = f"{', '.join(sorted(dtypes))} on {found.get('device', 'an unknown device')}"
    yield Check("run: one compute dtype", len(dtypes) == 1, said)


def _records(ws: Workspace, stage: str) -> list[dict]:
    return metrics.read(ws.stage(stage) / "metrics.jsonl")


def _loop(config: Config, stage: str):
    return dict(config)[stage]
