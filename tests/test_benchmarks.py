"""The benchmarks run, take turns and report what a reader compares."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from minilm.config import Config, PretrainConfig
from minilm.optim import make_optimizer
from minilm.stages.pretrain import LANGUAGE
from minilm.step import init_state, make_train_step
from minilm.text.batches import Batches

FOLDER = Path(__file__).parents[1] / "benchmarks"

FAKE = """
import json, os, pathlib, sys
log, dtype = pathlib.Path(sys.argv[1]), sys.argv[3]
if "onednn" in os.environ["XLA_FLAGS"]:
    sys.exit("Unknown flag in XLA_FLAGS")
print(json.dumps({"compile_seconds": 1.5}), flush=True)
for n, _ in enumerate(sys.stdin):
    with log.open("a") as file:
        file.write(dtype + " ")
    # Twice as slow in the second round, as on a shared machine; bfloat16 always half of float32.
    seconds = (1 + n) * (1.0 if dtype == "float32" else 0.5)
    print(json.dumps({"seconds": seconds, "peak_gflops": 10, "resident_mib": 9}), flush=True)
"""


@pytest.fixture
def alternate(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import alternate

    return alternate


def test_variants_take_turns_and_one_that_dies_is_said_to_have_died(alternate, tmp_path):
    script, log = tmp_path / "child.py", tmp_path / "log"
    script.write_text(FAKE)
    results = alternate.measure([str(script), str(log)], list(alternate.VARIANTS), 2)
    assert log.read_text().split() == 2 * ["float32", "bfloat16"]
    assert results["bfloat16+flags"] is None
    assert results["float32"]["compile_seconds"] == 1.5
    assert [t["seconds"] for t in results["bfloat16"]["turns"]] == [0.5, 1.0]
    assert alternate.speedup(results["bfloat16"], results["float32"]) == 2.0


def test_a_peer_takes_its_turn_and_is_compared_within_the_round(alternate, tmp_path):
    script, log = tmp_path / "child.py", tmp_path / "log"
    script.write_text(FAKE)
    peer = 'echo training; echo \'{"batch": 8, "new": 10, "tokens_per_s": 40}\''
    results = alternate.measure([str(script), str(log)], ["bfloat16"], 2, peer)
    assert [turn["seconds"] for turn in results["peer"]["turns"]] == [2.0, 2.0]
    rows = {"bfloat16": {}}
    alternate.against_peer(results, rows)
    assert rows["bfloat16"] == {"times_peer": 3.0, "peer_seconds": 2.0}  # 4 and 2


def test_a_picture_has_a_bar_a_variant_and_the_peer(alternate, tmp_path):
    row = {"tokens_per_second": 100.0, "times_peer": 2.0, "peer_seconds": 1.0}
    alternate.draw("step", {"float32": row, "gone": None}, tmp_path / "a.svg", "tokens_per_second")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "tokens per second" in text and "peer" in text and "gone" not in text


@pytest.mark.parametrize(
    ("name", "positive"),
    [
        ("train_step", ["milliseconds", "tokens_per_second", "share_of_peak", "compile_seconds"]),
        ("rl_step", ["completions_per_second", "rollout_share", "update_share"]),
        ("generate", ["completions_per_second", "tokens_per_second", "compile_seconds"]),
    ],
)
def test_a_benchmark_prints_a_table_and_a_line_of_json(
    name: str, positive: list[str], alternate, monkeypatch, capsys
):
    path = str(FOLDER / f"{name}.py")
    config = str(FOLDER.parent / "configs/fables.toml")
    words = ["--quick", "--variants", "float32", "--config", config]
    monkeypatch.setattr(sys, "argv", [path, *words])
    runpy.run_path(path, run_name="__main__")
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "float32" in table
    result = json.loads(line)
    row = result["variants"]["float32"]
    assert all(row[column] > 0 for column in positive)
    assert row["times_float32"] == 1.0
    assert result["benchmark"] == name
    assert result["machine"]["cores"] >= 1


def test_the_reward_curve_trains_on_the_first_pairs_of_one_set(
    tiny, tiny_run, tmp_path, monkeypatch, capsys
):
    path = str(FOLDER / "reward_curve.py")
    words = [str(tiny), "--init", str(tiny_run), "--pairs", "4", "12", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [path, *words])
    runpy.run_path(path, run_name="__main__")
    result = json.loads(capsys.readouterr().out.rstrip().rpartition("\n")[2])
    assert [row["pairs"] for row in result["rows"]] == [4, 12]
    assert (tmp_path / "reward_curve.png").stat().st_size > 1000
    # One set of pairs, borrowed; the other run's reward model is another.
    assert not (tmp_path / "pairs_4" / "preferences").exists()
    done = [json.loads((tmp_path / f"pairs_{n}/reward/done.json").read_text()) for n in (4, 12)]
    assert done[0]["inputs"] == done[1]["inputs"]
    assert done[0]["summary"]["log_loss"] != done[1]["summary"]["log_loss"]


@pytest.fixture
def scaling(alternate):
    import scaling

    return scaling


def test_scaling_prints_speeds_losses_and_laws(scaling, tmp_path, monkeypatch, capsys):
    config = str(FOLDER.parent / "configs/fables.toml")
    words = ["--quick", "--config", config, "--plot", str(tmp_path / "law.png")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
    scaling.main()
    table, _, line = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "chinchilla" in table
    result = json.loads(line)
    assert result["speeds"][0]["tokens_per_second"] > 0
    assert [run["tokens"] for run in result["runs"]] == [n * 16 * 112 for n in (12, 24, 8, 16)]
    assert all(run["loss"] > run["floor"] > 0 for run in result["runs"])
    assert result["fits"]["exact_floor"] == result["runs"][0]["floor"]
    assert (tmp_path / "law.png").stat().st_size > 1000


def test_a_branch_is_a_run_whose_rate_falls_as_that_of_the_schedule_wsd(scaling):
    """Two budgets share a trunk; each ends as a run of its own would, but for rounding."""
    from toy import CONFIG, OPTIMIZER, arrays, forward, new_model

    rows = 2 + (np.arange(7)[:, None] + np.arange(13)) % 9
    batches = Batches(rows, batch_size=2, seed=0)
    settings = OPTIMIZER.model_copy(update={"warmup_steps": 2})
    config = Config(model=CONFIG, pretrain=PretrainConfig(optimizer=settings))
    for steps, branch in zip(
        (7, 14), scaling.branches(config, new_model(), batches, (7, 14)), strict=True
    ):
        wsd = settings.model_copy(update={"schedule": "wsd", "decay_fraction": scaling.DECAY})
        optimizer = make_optimizer(wsd, steps)
        state, step = (
            init_state(new_model(), optimizer),
            make_train_step(forward, LANGUAGE, optimizer),
        )
        for k in range(steps):
            state, _ = step(state, batches[k])
        assert int(branch.step) == steps
        for name, array in arrays(branch.model).items():
            np.testing.assert_allclose(array, arrays(state.model)[name], atol=1e-5, err_msg=name)


def test_laws_are_found_again(scaling):
    """Points made from a law give it back, and the frontier is what nothing cheaper beats."""
    law = scaling.Chinchilla(0.6, 40.0, 0.4, 200.0, 0.5)
    runs = [
        scaling.Run(n, d, 6.0 * n * d, float(law.at(n, d)), 0.6)
        for n in (50_000, 200_000, 800_000, 2_000_000)
        for d in (100_000, 300_000, 1_000_000, 3_000_000)
    ]
    found = scaling.chinchilla_law(runs)
    assert found == pytest.approx(law, rel=0.05)
    best = scaling.frontier(runs)
    cheaper = [[r.loss for r in runs if r.flops <= b.flops] for b in best]
    assert [b.loss for b in best] == [min(losses) for losses in cheaper]
    curve = [
        scaling.Run(1, 1, scaling.UNIT * c, 0.6 + 0.3 * c**-0.5, 0.6) for c in (1, 2, 4, 8, 16)
    ]
    assert scaling.compute_law(curve) == pytest.approx((0.6, 0.3, 0.5), rel=0.1)


@pytest.mark.parametrize("form", ["txt", "parquet"])
def test_tokenising_a_corpus_is_measured_in_a_child_process(form, tmp_path, monkeypatch, capsys):
    path, out = str(FOLDER / "tokenize_corpus.py"), tmp_path / "found.json"
    words = ["--gigabytes", "0.0003", "--form", form, "--kind", "bytes", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [path, *words])
    runpy.run_path(path, run_name="__main__")
    result = json.loads(capsys.readouterr().out.rstrip().rpartition("\n")[2])
    assert result == json.loads(out.read_text())
    assert result["benchmark"] == "tokenize_corpus" and result["form"] == form
    assert result["mb_per_second"] > 0 and result["tokens_per_second"] > 0 < result["threads"]
    assert result["characters"] == pytest.approx(300_000, rel=0.1)
    assert result["tokens"] > result["characters"]  # of bytes, with the ends of documents
    assert 100 < result["tokenizing_mib"] <= result["peak_mib"] < 4000
