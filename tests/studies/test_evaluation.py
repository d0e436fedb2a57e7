"""`minilm evaluate`: the files it writes and what they hold."""

import json
import shutil

import pytest

from minilm import cli
from minilm.studies.evaluation import shade, underline


@pytest.fixture(scope="module")
def evaluated(tiny, tiny_run, tmp_path_factory, compiling_once):
    """Two runs on one reward model, the second with another seed and no KL penalty."""
    folder = tmp_path_factory.mktemp("evaluate")
    first = shutil.copytree(tiny_run, folder / "first")
    words = ["rlhf", str(tiny), "--init", str(first), "--out", str(folder / "second")]
    assert cli.main([*words, "--rlhf.kl-coef", "0"]) == 0
    out = folder / "out"
    assert cli.main(["evaluate", str(first), str(folder / "second"), "--out", str(out)]) == 0
    return out


def test_runs_that_share_a_reward_model_share_its_card(evaluated):
    names = {p.name for p in evaluated.iterdir()}
    expected = {"card.json", "card.png", "comparison.json", "frontier.png", "completions.html"}
    assert names == expected


def test_two_arms_are_compared_with_the_reference_and_with_each_other(evaluated):
    found = json.loads((evaluated / "comparison.json").read_text())
    assert len(found["arms"]) == 2
    for arm in found["arms"].values():
        rate = arm["gold_win_rate"]
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert set(arm["calibration"]) == {"before", "after"}
    assert len(found["between"]) == 1


def test_the_win_rate_is_that_of_the_run_itself(evaluated):
    found = json.loads((evaluated / "comparison.json").read_text())
    first = next(iter(found["arms"].values()))
    run = evaluated.parent / "first"
    summary = json.loads((run / "summary.json").read_text())["rlhf"]
    assert first["gold_win_rate"]["mean"] == pytest.approx(summary["gold_win_rate"])
    assert first["kl"] == pytest.approx(summary["kl"])


def test_the_page_shows_the_same_prompts_before_and_after(evaluated):
    page = (evaluated / "completions.html").read_text(encoding="utf-8")
    assert page.count("<b>before</b>") == page.count("<b>after</b>") >= 2
    assert "log π/π_ref" in page


def test_colours_say_likelier_or_less_likely_and_how_good():
    assert shade(3.0) == "rgba(213,94,0,0.75)"
    assert shade(-3.0) == "rgba(0,114,178,0.75)"
    assert underline(0.0) == "none"
    assert "#009e73" in underline(1.0)
    assert "#c0392b" in underline(-1.0)


def test_a_folder_without_a_reward_model_is_refused(tiny, tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
