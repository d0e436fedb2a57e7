"""`minilm overoptimize`: what it makes, resumes and says."""

import json
from typing import Any

import numpy as np
import pytest

from minilm import checkpoint, cli
from minilm.report.files import RunFolder
from minilm.stages.policy import PolicyEvaluator
from minilm.studies.curves import Curve
from minilm.studies.overoptimize import curve_of, render, sentence, summary


@pytest.fixture(scope="module")
def study(tiny, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    words = ["overoptimize", str(tiny), "--init", str(tiny_run), "--out", str(out)]
    words += ["--study.seeds", "2", "--study.best_of", "4", "--study.best_of_prompts", "4"]
    words += ["--study.arms.kl=--rlhf.kl-coef=0.5 --rlhf.steps 3", "--study.arms.main="]
    assert cli.main(words) == 0
    return out, words


def read(out):
    return json.loads((out / "study.json").read_text())


def test_every_arm_has_its_seeds_its_best_of_n_and_its_fall(study):
    out, _ = study
    found = read(out)
    assert set(found) == {"main", "kl"}
    for arm in found.values():
        assert len(arm["seeds"]) == 2
        assert arm["seeds"][0]["kl"] != arm["seeds"][1]["kl"]
        assert arm["best_of_n"]["n"] == [1, 2, 4]
        assert arm["fall"]["low"] <= arm["fall"]["mean"] <= arm["fall"]["high"]
    assert (out / "overoptimize.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_differs_in_its_options_and_seeds_share_its_reward_model(study):
    out, _ = study
    done = [json.loads((out / "kl" / f"seed_{s}/rlhf/done.json").read_text()) for s in (0, 1)]
    assert [d["sections"]["rlhf"]["kl_coef"] for d in done] == [0.5, 0.5]
    assert done[0]["inputs"] == done[1]["inputs"]
    assert not (out / "kl" / "seed_0" / "reward").exists()
    main = json.loads((out / "main" / "seed_0/rlhf/done.json").read_text())
    assert main["sections"]["rlhf"]["kl_coef"] != 0.5
    assert curve_of(out / "kl" / "seed_0").steps.tolist() == [0, 3]


def test_what_comes_after_the_policy_that_was_kept_is_left_out(tiny_copy):
    """With `rlhf.kl_budget` training goes back to an earlier policy, and the curve goes on."""
    assert curve_of(tiny_copy).steps.tolist() == [0, 3, 6]
    saved = sorted((tiny_copy / "rlhf/checkpoints").iterdir())
    early = next(path for path in saved if checkpoint.metadata(path)["step"] < 6)
    step = checkpoint.metadata(early)["step"]
    checkpoint.set_best(early, 0.0)
    checkpoint.keep_best(tiny_copy / "rlhf/checkpoints", 6)
    kept = [s for s in (0, 3, 6) if s <= step]
    assert curve_of(tiny_copy).steps.tolist() == kept
    assert [row["step"] for row in RunFolder(tiny_copy).evaluations("rlhf")] == kept


def test_the_same_command_again_trains_nothing(study, capsys):
    out, words = study
    files = {p: p.stat().st_mtime_ns for p in out.rglob("checkpoints/**/*") if p.is_file()}
    before = read(out)
    assert cli.main(words) == 0
    assert files == {p: p.stat().st_mtime_ns for p in files}
    assert read(out) == before
    assert "best of 4 completions" not in capsys.readouterr().out


def test_arms_share_the_completions_of_their_reference(study, monkeypatch):
    """Drawing them is most of what best-of-n takes."""
    out, words = study
    before, seeds, complete = read(out), [], PolicyEvaluator.complete

    def counted(self, model, prompts, *, seed):
        seeds.append(seed)
        return complete(self, model, prompts, seed=seed)

    monkeypatch.setattr(PolicyEvaluator, "complete", counted)
    for arm in before:
        (out / arm / "best_of.json").unlink()
    assert cli.main(words) == 0
    assert seeds == [43]
    assert read(out) == before


def test_one_seed_is_refused(tiny, tmp_path, capsys):
    words = ["overoptimize", str(tiny), "--out", str(tmp_path), "--study.seeds", "1"]
    assert cli.main(words) == 2
    assert "at least two seeds" in capsys.readouterr().err


def made(golds, proxies=(0.0, 1.0, 2.0)) -> dict[str, Any]:
    kl = np.array([0.0, 1.0, 4.0])
    curves = [Curve(np.arange(3), kl, np.array(proxies), np.array(g)) for g in golds]
    rng = np.random.default_rng(0)
    sampled = {name: rng.normal(size=(3, 4)).tolist() for name in ("proxy", "gold")}
    return summary(curves, sampled, (1.0,)) | {"accuracy": 0.7, "bayes_accuracy": 0.8}


def test_the_sentence_says_that_gold_turned_and_from_where():
    arm = made([[0.0, 1.0, -1.0], [0.0, 1.2, -0.9], [0.0, 0.9, -1.1]])
    assert arm["turns"]
    assert "gold fell by 2.03" in sentence("main", arm)
    assert "a KL budget of 1.0 nats" in sentence("main", arm)
    assert arm["early_stopping"][0]["regret"] == pytest.approx(0)
    assert arm["early_stopping"][1]["regret"] == pytest.approx(arm["fall"]["mean"])


def test_regret_is_counted_from_where_the_other_seeds_would_stop():
    """The best budget of these three seeds is 1; without the second it is 4, without others 1."""
    arm = made([[0.0, 1.0, 2.0], [0.0, 4.0, 0.0], [0.0, 1.0, 2.0]])
    assert arm["best_kl_budget"] == 1.0
    assert arm["gold_at_best_budget"] == pytest.approx(2)
    others = arm["gold_at_the_others_budget"]
    assert others["mean"] == pytest.approx((1 + 0 + 1) / 3)
    within, end = arm["early_stopping"]
    assert within["regret"] == pytest.approx((0 - 4 + 0) / 3)
    assert end["regret"] == pytest.approx(np.mean(arm["falls"]))
    assert within["regret_low"] < within["regret"] < within["regret_high"]


def test_best_of_n_has_its_interval_over_prompts():
    arm = made([[0.0, 1.0, -1.0], [0.0, 1.2, -0.9]])
    best = arm["best_of_n"]
    assert all(np.array(best["gold_low"]) <= best["gold"])
    assert all(np.array(best["gold_high"]) >= best["gold"])
    told = f"best of 4 reaches gold {best['gold'][-1]:.2f} [{best['gold_low'][-1]:.2f}, "
    assert told.replace("-", "−") in sentence("main", arm)


def test_what_comes_after_the_highest_proxy_counts_no_more():
    """A collapse in which proxy falls too is no Goodhart: gold is read where proxy was highest."""
    arm = made([[0.0, 1.0, 1.1], [0.0, 1.2, 1.1], [0.0, 0.9, 1.1]], proxies=[0.0, 2.0, 1.0])
    assert arm["fall"]["mean"] == 0
    assert not arm["turns"]
    assert arm["gold_at_the_last_step"] == pytest.approx(1.1)


def test_a_fall_that_noise_explains_is_not_told_as_one():
    arm = made([[0.0, 1.0, 1.5], [0.0, 1.2, 0.9], [0.0, 0.9, 1.4]])
    assert not arm["turns"]
    assert "no fall of gold" in sentence("main", arm)
    assert render({"main": arm})
