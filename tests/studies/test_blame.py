"""`minilm blame`: oracles in place of stages, and whom that accuses."""

import json

import pytest

from minilm import cli
from minilm.studies.blame import Swap, draw, render, sentence


def test_the_stage_whose_oracle_adds_most_is_named():
    swap = Swap("reward model", "gold itself", 0.5, 2.0)
    said = sentence(0.4, swap)
    assert said.startswith("Most is lost at the reward model: with gold itself instead")
    assert "from 0.50 to 2.00" in said
    assert "No stage" in sentence(0.4, Swap("start", "the grammar", 1.0, 1.04))


def test_a_tiny_run_is_taken_apart(tiny_copy, compiling_once, capsys):
    """Every oracle runs with the run's own budget; what they leave can be read and resumed."""
    assert cli.main(["blame", str(tiny_copy)]) == 0
    found = json.loads((tiny_copy / "blame" / "blame.json").read_text())
    assert [s["stage"] for s in found["swaps"]] == ["labels", "reward model", "optimiser", "start"]
    assert found["blamed"] == max(found["swaps"], key=lambda s: s["gap"])["stage"]
    # The grammar's stories parse, those of a model of forty steps do not.
    start = found["swaps"][-1]
    assert start["after"] > start["before"] + 0.5
    labels = json.loads((tiny_copy / "blame/labels/preferences/done.json").read_text())
    assert labels["sections"]["preferences"]["raters"] == 1000
    paid = json.loads((tiny_copy / "blame/reward/rlhf/done.json").read_text())
    assert paid["sections"]["rlhf"]["judge_weight"] == 1
    assert not (tiny_copy / "blame/reward/reward").exists()
    assert found["sentence"] in " ".join(capsys.readouterr().out.split())
    assert draw(found).startswith(b"\x89PNG")
    assert render(found)


@pytest.mark.slow
def test_three_injected_faults_are_found(tmp_path, processes):
    """Votes that are flipped, a reward model of one layer and 60 pairs, too few steps."""
    faults = {
        "labels": ["--preferences.raters", 1, "--preferences.flip-rate", 0.4],
        "reward model": ["--reward.num-layers", 1, "--preferences.max-pairs", 60],
        "optimiser": ["--rlhf.steps", 4],
    }
    base = tmp_path / "base"
    done = processes("run", "configs/quick.toml", "--out", base, "--until", "pretrain")
    assert done.code == 0
    for stage, words in faults.items():
        out = tmp_path / stage.replace(" ", "_")
        done = processes("run", "configs/quick.toml", "--init", base, "--out", out, *words)
        assert done.code == 0, done.output
        assert processes("blame", out).code == 0
        assert json.loads((out / "blame/blame.json").read_text())["blamed"] == stage


def test_a_run_that_has_no_policy_yet_is_refused(tiny_copy, capsys):
    (tiny_copy / "rlhf" / "done.json").unlink()
    assert cli.main(["blame", str(tiny_copy)]) == 2
    assert "RLHF is not finished" in capsys.readouterr().err
