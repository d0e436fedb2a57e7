"""The public face: sources, commands, JSON, what is said while a run goes on."""

import json

import numpy as np
import pytest

from minilm import diagnose as d
from minilm.diagnose.remedies import REMEDIES
from minilm.errors import UserError
from minilm.metrics import MetricsLog

FALL = [0.5 + 5 * float(np.exp(-k / 4)) for k in range(40)]
RISE = FALL[:20] + [0.5 + 0.3 * k for k in range(20)]


def write(folder, values):
    folder.mkdir(parents=True)
    log = MetricsLog(folder / "metrics.jsonl", -1)
    for k, value in enumerate(values):
        log.log(10 * (k + 1), {"loss": value, "grad_norm": 1.0})
    log.close()


@pytest.fixture
def run(tmp_path):
    """A run folder of two stages, of which the second diverged."""
    write(tmp_path / "run" / "pretrain", FALL)
    write(tmp_path / "run" / "reward", RISE)
    (tmp_path / "run" / "config.toml").write_text("seed = 0\n")
    return tmp_path / "run"


def test_a_run_is_judged_stage_by_stage(run):
    found = d.diagnose(run)
    assert [(v.stage, v.name) for v in found] == [
        ("pretrain", "converged"), ("reward", "diverging"),
    ]  # fmt: skip
    assert not d.healthy(found)
    assert d.healthy(d.diagnose(run / "pretrain"))


@pytest.mark.parametrize("part", ["", "reward", "reward/metrics.jsonl"])
def test_commands_name_the_runs_own_config(run, part):
    last = d.diagnose(run / part)[-1]
    assert last.command.startswith(f"minilm run {run / 'config.toml'} --redo reward ")
    assert "--reward.optimizer.learning-rate" in last.command  # lr-range trains no other stage


def test_a_run_that_is_mended_stays_in_its_folder(run):
    write(run / "rlhf", [1.0, 0.5, float("nan"), 0.4, 0.4, 0.4])
    command = d.diagnose(run / "rlhf")[0].command
    # The compute dtype is of all stages, so what was made with another is remade from the start.
    assert command.startswith(f"minilm run {run / 'config.toml'} --redo pretrain --backend.")
    assert command.endswith(f"--out {run}")


def test_a_run_that_started_from_another_is_mended_from_there(run, monkeypatch):
    """`minilm run` without --init would pretrain anew; where a reward model was lent, make one."""
    base = run.with_name("base")
    base.mkdir()
    monkeypatch.chdir(run.parent)
    told = {"init": "base", "init_from_here": "../base", "borrowed": ["pretrain"]}
    (run / "environment.json").write_text(json.dumps(told))
    command = d.diagnose(run / "reward")[0].command
    assert command.startswith(f"minilm run {run / 'config.toml'} --redo reward ")
    assert command.endswith(f" --out {run} --init base")
    told["borrowed"] = ["pretrain", "preferences"]
    (run / "environment.json").write_text(json.dumps(told))
    command = d.diagnose(run / "reward")[0].command
    assert command.startswith(f"minilm reward {run / 'config.toml'} --redo reward ")
    write(run / "rlhf", [1.0, 1.0, 1.0, 30.0, 60.0, 90.0])
    told["borrowed"] = ["pretrain", "preferences", "reward"]
    (run / "environment.json").write_text(json.dumps(told))
    command = next(v.command for v in d.diagnose(run / "rlhf") if "--redo" in v.command)
    assert command.startswith(f"minilm rlhf {run / 'config.toml'} --redo rlhf ")
    assert command.endswith(f" --out {run} --init base")


def test_records_and_their_file_give_the_same_verdicts(run):
    rows = [json.loads(x) for x in (run / "reward/metrics.jsonl").read_text().splitlines()]
    from_file = d.diagnose(run / "reward")[0]
    from_rows = d.diagnose(rows)[0]
    assert from_rows._replace(command="", stage="") == from_file._replace(command="", stage="")


def test_every_verdict_there_can_be_has_a_remedy_and_every_remedy_a_verdict():
    known = set(d.verdicts.RULES) | set(d.rl.RULES) | d.HEALTHY
    assert set(REMEDIES) == known
    assert known >= d.ALARMS


def test_the_json_is_json_whatever_the_figures(run, capsys):
    with (run / "reward/metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "kind": "train", "loss": null, "nonfinite": ["loss"]}\n')
    d.diagnose_command(run, as_json=True)

    def strict(constant):
        raise ValueError(constant)

    out = json.loads(capsys.readouterr().out, parse_constant=strict)
    assert out["healthy"] is False
    reward = [v for v in out["verdicts"] if v["stage"] == "reward"]
    assert reward[0]["name"] == "nonfinite"
    assert reward[0]["evidence"] == [{"figure": "loss not finite", "value": None, "step": 500}]
    assert set(reward[1]) == {"name", "confidence", "evidence", "remedy", "command", "stage"}


def test_the_terminal_gets_every_verdict_with_figures_and_the_next_command(run, capsys):
    d.diagnose_command(run, as_json=False)
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("pretrain", "converged", "diverging", "lowest smoothed loss", "next: minilm run"):
        assert words in out


def test_a_run_that_goes_on_raises_alarms_only():
    rows = [{"step": k, "loss": value} for k, value in enumerate(RISE)]
    assert [v.name for v in d.alarms(rows)] == ["diverging"]
    young = [{"step": k, "loss": 6.0 * (k + 1) ** -0.5} for k in range(30)]
    assert [v.name for v in d.diagnose(young)] == ["too_short"]
    assert d.alarms(young) == []
    assert d.alarms(rows[:3]) == []
    assert d.alarms([]) == []


def test_a_run_of_nothing_but_nan_is_not_called_too_young():
    rows = [{"step": k, "loss": float("nan")} for k in range(3)]
    assert [v.name for v in d.alarms(rows)] == ["nonfinite"]


def test_too_few_points_are_an_error_with_their_number():
    with pytest.raises(UserError, match=r"(?s)too few points.*2 of train.*at least 5"):
        d.diagnose([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9}])


def test_early_stopping_is_the_same_code_as_the_verdict():
    losses = FALL[:20] + [0.55 + 0.02 * k for k in range(20)]
    rows = [{"step": k, "validation_loss": v, "loss": FALL[k]} for k, v in enumerate(losses)]
    assert d.diagnose(rows)[0].name == "overfitting"
    assert d.should_stop(range(40), losses, d.verdicts.PATIENCE)
    assert d.best_step(range(40), losses) == 19
