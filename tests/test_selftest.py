"""`minilm selftest`: it kills, it goes on, and it sees what differs."""

import json

import numpy as np
import pytest

from minilm import checkpoint, cli
from minilm.files import read_json, write_json
from minilm.selftest import differences

STAGES = ["pretrain", "preferences", "reward", "rlhf"]


def test_a_copy_differs_in_nothing_and_times_do_not_count(tiny_run, tiny_copy):
    done = read_json(tiny_copy / "reward" / "done.json")
    write_json(tiny_copy / "reward" / "done.json", done | {"wall_seconds": 1e6})
    assert differences(tiny_copy, tiny_run, STAGES) == []


def test_a_single_bit_is_seen_wherever_it_is(tiny_run, tiny_copy, monkeypatch):
    pairs = tiny_copy / "preferences" / "train.jsonl"
    pairs.write_text(pairs.read_text().replace("a", "e", 1))
    records = tiny_copy / "rlhf" / "metrics.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows[0] |= {"learning_rate": 0.125}
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tiny_copy / "reward" / "evaluation.json").unlink()
    load, step = checkpoint.load_arrays, sorted((tiny_copy / "rlhf/checkpoints").iterdir())[-1]

    def flipped(path):
        arrays = load(path)
        if path == step:
            name = next(key for key in arrays if key.startswith("opt_state"))
            array = np.array(arrays[name]).reshape(-1)
            array.view(np.uint8)[0] ^= 1
            arrays |= {name: array}
        return arrays

    monkeypatch.setattr(checkpoint, "load_arrays", flipped)
    found = differences(tiny_copy, tiny_run, STAGES)
    assert found[:2] == ["preferences/train.jsonl", "reward/evaluation.json is in one alone"]
    assert found[2].startswith(f"rlhf/checkpoints/{step.name}: opt_state")
    assert found[3:] == ["rlhf/metrics.jsonl"]


@pytest.mark.slow  # five starts of the interpreter and as many compilations
def test_killed_runs_end_as_the_whole_one(tiny, tmp_path, compiled, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compiled))
    out = tmp_path / "selftest"
    assert cli.main(["selftest", str(tiny), "--kills", "3", "--out", str(out)]) == 0
    assert len(read_json(out / "selftest.json")["kills"]) == 3
    assert "bit-equal" in capsys.readouterr().out


def test_a_folder_of_something_else_is_left_alone(tiny, tiny_copy, capsys):
    assert cli.main(["selftest", str(tiny), "--out", str(tiny_copy)]) == 2
    assert "not empty, and not a selftest's" in capsys.readouterr().err
    assert (tiny_copy / "summary.json").exists()
