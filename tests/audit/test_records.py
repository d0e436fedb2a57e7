"""Checks of a stage's records: each finds its fault and nothing else."""

import json
import math

import numpy as np
import pytest

from minilm import checkpoint
from minilm.audit import records
from minilm.config import Config
from minilm.stages.workspace import Workspace


@pytest.fixture
def ws(tmp_path) -> Workspace:
    """A finished reward stage of 30 steps, logged every ten."""
    folder = tmp_path / "reward"
    folder.mkdir()
    found = Workspace(Config(), tmp_path, None, "float32")
    log(found, [train(10), train(20), train(30), {"step": 30, "kind": "eval", "loss": 1.0}])
    done(found, {"log_loss": 0.5, "pairs": 3})
    save(found, 30)
    return found


def train(step: int, **more) -> dict:
    return {"step": step, "kind": "train", "loss": 1.0, "skipped_in_a_row": 0, **more}


def log(ws: Workspace, rows: list[dict]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (ws.stage("reward") / "metrics.jsonl").write_text(text)


def done(ws: Workspace, summary: dict) -> None:
    (ws.stage("reward") / "done.json").write_text(json.dumps({"summary": summary}))


def save(ws: Workspace, step: int, dtype: str = "float32") -> None:
    facts = {"steps": 30, "stage": "reward", "compute_dtype": dtype}
    state = {"model": {"w": np.ones(2, np.float32)}}
    checkpoint.save(ws.stage("reward") / "checkpoints", step, state, facts, keep=9)


def failed(ws: Workspace) -> list[str]:
    return [
        c.name.removeprefix("reward: ") for c in records.record_checks(ws, "reward") if not c.passed
    ]


def test_a_whole_stage_passes(ws):
    assert failed(ws) == []


@pytest.mark.parametrize("steps", [[10, 20, 20, 30], [10, 30], [10, 20, 10, 20, 30]])
def test_repeated_and_skipped_records_are_found(ws, steps):
    log(ws, [train(step) for step in steps])
    assert failed(ws) == ["steps follow each other"]


def test_an_unfinished_checkpoint_is_found(ws, tmp_path):
    other = Workspace(Config(), tmp_path / "other", None, "float32")
    other.stage("reward").mkdir(parents=True)
    log(other, [train(10), train(20)])
    done(other, {"log_loss": 0.5})
    save(other, 20)
    assert failed(other) == ["the last step is saved"]


def test_a_missing_checkpoint_is_found(tmp_path):
    ws = Workspace(Config(), tmp_path, None, "float32")
    ws.stage("reward").mkdir(parents=True)
    log(ws, [train(10)])
    done(ws, {"log_loss": 0.5})
    assert failed(ws) == ["the last step is saved"]


def test_a_damaged_checkpoint_is_found(ws):
    folder = ws.stage("reward") / "checkpoints" / "step_00000030" / "arrays"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    assert failed(ws) == ["the last step is saved"]


def test_figures_that_are_not_numbers_are_found(ws):
    done(ws, {"log_loss": math.nan})
    assert failed(ws) == ["the last step is measured"]


def test_figures_older_than_the_training_are_found(ws):
    log(ws, [train(10), {"step": 10, "kind": "eval", "loss": 1.0}, train(20), train(30)])
    assert failed(ws) == ["the last step is measured"]


@pytest.mark.parametrize("fault", [{"skipped_in_a_row": 2}, {"nonfinite": ["loss"]}])
def test_updates_that_were_not_finite_are_found(ws, fault):
    log(ws, [train(10), train(20, **fault), train(30)])
    assert failed(ws) == ["updates were finite"]


def test_stages_of_two_dtypes_are_found(ws):
    (ws.out / "environment.json").write_text(json.dumps({"device": "cpu"}))
    (check,) = records.environment_checks(ws)
    assert check.passed
    assert check.said == "float32 on cpu"
    (ws.out / "rlhf").mkdir()
    (ws.out / "rlhf" / "done.json").write_text("{}")
    facts = {"steps": 1, "stage": "rlhf", "compute_dtype": "bfloat16"}
    state = {"model": {"w": np.ones(2, np.float32)}}
    checkpoint.save(ws.out / "rlhf" / "checkpoints", 1, state, facts, keep=1)
    (check,) = records.environment_checks(ws)
    assert not check.passed
