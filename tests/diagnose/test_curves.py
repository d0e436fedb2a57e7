"""Metrics are read from wherever they lie, under whatever name; what cannot be read is said."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from minilm.diagnose.curves import Curve, collect, load
from minilm.errors import UserError
from minilm.metrics import MetricsLog


def csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_minilms_own_records_become_curves_by_quantity():
    records = [
        {"step": 0, "kind": "eval", "validation_loss": 3.0, "entropy_floor": 0.5},
        {"step": 10, "kind": "train", "loss": 2.6, "cross_entropy": 2.5, "grad_norm": 1.0},
        {"step": 20, "kind": "train", "loss": 1.6, "cross_entropy": 1.5, "grad_norm": 0.5},
    ]
    series = collect(records).series
    # With other terms in the objective `loss` is not what validation measures.
    assert series["train"].values.tolist() == [2.5, 1.5]
    assert series["train"].steps.tolist() == [10, 20]
    assert series["validation"].values.tolist() == [3.0]
    assert series["floor"].values.tolist() == [0.5]


@pytest.mark.parametrize(
    "header",
    [
        "step,train,validation", "Step,Train Loss,Val Loss", "iteration,train/loss,val/loss",
        "global_step;training_loss;eval_loss", "epoch\tloss\ttest_loss",
        "iter, train_loss (nats) , valid loss (nats)", "update,LOSS,held-out",
    ],
)  # fmt: skip
def test_columns_are_found_under_the_names_that_people_give_them(header, tmp_path):
    separator = max(",;\t", key=header.count)
    rows = "\n".join(separator.join(row) for row in (["1", "3.0", "3.5"], ["2", "2.0", ""]))
    (curves,) = load(csv(tmp_path / "log.csv", f"{header}\n{rows}\n")).values()
    assert curves.series["train"].values.tolist() == [3.0, 2.0]
    assert curves.series["validation"].values.tolist() == [3.5]


def test_what_is_not_finite_is_kept_apart_with_its_step(tmp_path):
    path = csv(tmp_path / "log.csv", "step,loss\n1,3\n2,nan\n3,inf\n4,2\n")
    (curves,) = load(path).values()
    assert curves.series["train"].steps.tolist() == [1, 4]
    assert curves.nonfinite == ((2.0, "loss"), (3.0, "loss"))


def test_a_csv_of_a_run_says_the_same_as_its_jsonl(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    lines = ["step,loss,grad_norm"]
    for step in range(5, 50, 5):
        log.log(step, {"loss": 1 / step, "grad_norm": math.nan if step == 20 else 2.0})
        lines.append(f"{step},{1 / step},{'nan' if step == 20 else 2.0}")
    log.close()
    (one,) = load(tmp_path).values()
    (other,) = load(csv(tmp_path / "same.csv", "\n".join(lines))).values()
    assert one.nonfinite == other.nonfinite
    for name in ("train", "grad_norm"):
        for ours, theirs in zip(one.series[name], other.series[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_run_folder_gives_a_set_of_curves_a_stage(tmp_path):
    for stage in ("pretrain", "reward", "pretrain.old1"):
        folder = tmp_path / stage
        folder.mkdir()
        folder.joinpath("metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2}\n')
    assert set(load(tmp_path)) == {"pretrain", "reward"}
    assert set(load(tmp_path / "reward")) == {"reward"}
    assert set(load(tmp_path / "reward" / "metrics.jsonl")) == {"reward"}


def test_a_step_that_was_logged_twice_counts_as_the_resumed_run_had_it():
    records = [{"step": s, "loss": x} for s, x in [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0)]]
    train = collect(records).series["train"]
    assert (train.steps.tolist(), train.values.tolist()) == ([1, 2, 3], [9, 5, 7])


def test_a_part_is_cut_by_shares_of_the_last_step():
    curve = Curve(np.arange(0.0, 101, 10), np.arange(11.0))
    assert curve.between(0.25, 0.5).values.tolist() == [3, 4, 5]


def test_a_reward_model_that_logs_mean_rewards_is_not_taken_for_a_policy():
    records = [{"step": k, "loss": 0.7, "mean_reward": 0.1, "accuracy": 0.5} for k in range(9)]
    assert "score" not in collect(records).series


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step,speed\n1,2\n", ["loss or reward", "step, speed", "train_loss"]),
        ("stepp,loss\n1,2\n", ["no step column", "rename 'stepp'?"]),
        ("step,loss\n1,2\n2,abc\n", ["not a number", "log.csv:3"]),
        ("step,loss\n1,2,3\n", ["3 cells under 2 names", "log.csv:2"]),
        ("step,loss\n", ["header line and rows"]),
        ("", ["header line and rows"]),
        ("step,loss\n1,\n", ["no figures"]),
    ],
)
def test_a_table_that_cannot_be_read_says_why(text, words, tmp_path):
    with pytest.raises(UserError) as error:
        load(csv(tmp_path / "log.csv", text))
    assert [word for word in words if word not in str(error.value)] == []


def test_paths_without_metrics_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl here"):
        load(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="not a file of metrics"):
        load(csv(tmp_path / "notes.txt", "step,loss"))
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        load(tmp_path / "binary.csv")


def test_a_figure_that_is_text_is_named():
    with pytest.raises(UserError, match="'loss' is not a number"):
        collect([{"step": 1, "loss": "low"}])
    assert collect([{"step": 1, "loss": 1.0, "note": "text"}]).series["train"].values == [1.0]


def test_json_records_with_null_are_read_as_written(tmp_path):
    record = {"step": 3, "kind": "train", "loss": None, "nonfinite": ["loss"]}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (curves,) = load(path).values()
    assert curves.nonfinite == ((3.0, "loss"),)
    assert curves.last_step == 3
