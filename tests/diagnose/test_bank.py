"""Verdicts on the stored runs with a known cause, on the half that no limit was set on."""

import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from minilm.diagnose import HEALTHY, rl, verdicts

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def diagnosis():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import diagnosis

        yield diagnosis


@pytest.fixture(scope="module")
def held_out(diagnosis):
    return diagnosis.cases("odd")


def test_the_bank_has_sixty_runs_with_a_cause_and_twenty_without(diagnosis):
    files = sorted(diagnosis.BANK.glob("*.csv"))
    labels = Counter(file.stem.rpartition("-")[0] for file in files)
    assert labels["healthy"] >= 20
    assert sum(labels.values()) - labels["healthy"] >= 60
    assert all(file.stat().st_size <= 3 * 1024 for file in files)
    assert sum(file.stat().st_size for file in files) <= 400 * 1024


def test_every_verdict_that_there_is_has_runs_of_its_cause_in_both_halves(diagnosis):
    causes = (set(verdicts.RULES) | set(rl.RULES) | {"healthy"}) - HEALTHY
    for parity in (0, 1):
        labels = Counter()
        for file in diagnosis.BANK.glob("*.csv"):
            label, _, seed = file.stem.rpartition("-")
            labels[label] += int(seed) % 2 == parity
        assert {label for label, count in labels.items() if count >= 3} == causes


def test_the_first_verdict_is_the_injected_cause_nine_times_in_ten_on_held_out_runs(
    diagnosis, held_out
):
    recalls = diagnosis.recalls(held_out)
    assert sum(recalls.values()) / len(recalls) >= 0.9, recalls


def test_no_held_out_healthy_run_raises_an_alarm(held_out):
    healthy = [case for case in held_out if case.label == "healthy"]
    assert len(healthy) >= 10
    assert [case.file.name for case in healthy if case.said != "healthy"] == []


def test_every_verdict_of_the_bank_rests_on_figures_and_says_what_to_do(held_out):
    for case in held_out:
        for verdict in case.found:
            assert 0 <= verdict.confidence <= 1
            assert verdict.evidence
            assert verdict.remedy
            assert verdict.command.startswith("minilm ")


def test_the_benchmark_prints_the_matrix_and_a_line_of_json(diagnosis, monkeypatch, capsys):
    path = str(FOLDER / "diagnosis.py")
    monkeypatch.setattr(sys, "argv", [path, "--half", "odd"])
    runpy.run_path(path, run_name="__main__")
    out = capsys.readouterr().out
    assert "injected cause" in out
    assert '"macro_recall"' in out.splitlines()[-1]
