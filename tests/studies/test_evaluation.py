"""`minilm evaluate`: the files it writes and what they hold."""

import dataclasses
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from minilm import cli
from minilm.configfile import load
from minilm.files import write_json
from minilm.generate import Samples
from minilm.stages.policy import PolicyEvaluator, Scored
from minilm.stages.workspace import Workspace, open_run
from minilm.studies.curves import best_of_n, best_of_n_kl
from minilm.studies.evaluation import collected_as_paid, compare, paid, render, shade, underline
from minilm.studies.report_card import SAMPLES, searched


@pytest.fixture(scope="module")
def evaluated(tiny, tiny_run, tmp_path_factory):
    """Two runs on one reward model, the second paid by gold too, at a KL price that moves."""
    folder = tmp_path_factory.mktemp("evaluate")
    first = shutil.copytree(tiny_run, folder / "first")
    words = ["rlhf", str(tiny), "--init", str(first), "--out", str(folder / "second")]
    words += ["--rlhf.judge-weight", "1", "--rlhf.kl-target", "0.001"]
    assert cli.main([*words, "--rlhf.kl-horizon", "100"]) == 0
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


def test_every_arm_is_compared_with_the_best_of_n_of_its_own_reward_model(evaluated):
    found = json.loads((evaluated / "comparison.json").read_text())
    pool = searched(PolicyEvaluator(open_run(evaluated.parent / "first")), "evaluation")
    assert pool is not None
    assert pool.gold is not None
    proxy, gold = (x.astype(np.float64).reshape(-1, SAMPLES) for x in (pool.proxy, pool.gold))
    for arm in found["arms"].values():
        best = arm["best_of_n"]
        assert best["prompts"] == len(proxy)
        assert best["kl"] <= arm["kl"] or best["n"] == 1
        assert best["kl"] == pytest.approx(best_of_n_kl(best["n"]))
        assert best["gold"] == pytest.approx(best_of_n(proxy, gold, best["n"]).mean(), abs=1e-4)
        for name in ("gold_win_rate", "arm_gold_win_rate", "beaten"):
            assert 0 <= best[name]["low"] <= best[name]["mean"] <= best[name]["high"] <= 1


def scored(prompts: list[str], each: int, gold: float) -> Scored:
    repeated = [p for p in prompts for _ in range(each)]
    n = len(repeated)
    samples = Samples(*(jnp.zeros(shape) for shape in ((n, 1), (n, 1), (n, 1), (n,))))
    proxy, told = (np.full(n, x, np.float32) for x in (0.0, gold))
    return Scored(repeated, np.zeros((n, 1), np.int32), samples, repeated, proxy, told)


@pytest.fixture
def seeds(tiny, tmp_path) -> dict:
    """Two runs that differ in their seed: one arm."""
    spaces = {}
    for seed in (0, 1):
        run = tmp_path / f"seed_{seed}"
        write_json(run / "rlhf" / "evaluation.json", {"kl": 1.5})
        write_json(run / "reward" / "done.json", {"hash": "the same"})
        spaces[run] = Workspace(load(tiny, ["--seed", str(seed)]), run, None, "float32")
    return spaces


def test_an_arm_with_prompts_of_several_seeds_is_not_compared_with_one_pool(seeds):
    """Its second run's gold was paired row by row with the first run's prompts."""
    policies, pools = {}, {}
    for run, name, gold in zip(seeds, ("ask", "another"), (5.0, 9.0), strict=True):
        prompts = [f"{name} {n}" for n in range(3)]
        policies[run] = (scored(prompts, 1, gold), scored(prompts, 2, 0.0), {})
        pools[run] = scored(prompts, SAMPLES, gold + 1)
    (arm,) = compare(seeds, policies, pools)["arms"].values()
    assert len(arm["runs"]) == 2
    assert "best_of_n" not in arm
    first = next(iter(seeds))
    same = dict.fromkeys(seeds, policies[first]), dict.fromkeys(seeds, pools[first])
    (arm,) = compare(seeds, *same)["arms"].values()
    assert arm["best_of_n"]["beaten"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert (arm["best_of_n"]["arm_gold"], arm["best_of_n"]["gold"]) == (5.0, pytest.approx(6.0))


@pytest.mark.parametrize(
    ("words", "alike"),
    [([], True), (["--rlhf.steps", "9"], True), (["--seed", "1"], False),
     (["--rlhf.missing-eos-score", "-5"], False), (["--prompts.max-new-tokens", "9"], False),
     (["--judge.name", "length"], False)],
)  # fmt: skip
def test_a_pool_serves_those_who_would_be_paid_alike(seeds, tiny, words, alike):
    space = next(iter(seeds.values()))
    other = dataclasses.replace(space, config=load(tiny, ["--seed", "0", *words]))
    assert (paid(other) == paid(space)) == alike


def test_the_page_shows_the_same_prompts_before_and_after(evaluated):
    page = (evaluated / "completions.html").read_text(encoding="utf-8")
    assert page.count("<b>before</b>") == page.count("<b>after</b>") >= 2
    assert "log π/π_ref" in page


def test_what_is_shown_is_priced_as_the_run_was(evaluated):
    """The page once left out gold's share of the reward, and priced KL as at the start."""
    run = evaluated.parent / "second"
    ws = open_run(run)
    before, after = collected_as_paid(ws, PolicyEvaluator(ws))
    learned, gold = (before.metrics[f"reward/{name}"].value for name in ("learned", "judge"))
    assert float(before.scores.mean()) == pytest.approx(float(learned + gold), abs=1e-5)
    assert abs(float(gold)) > 1e-3
    rows = [json.loads(line) for line in (run / "rlhf/metrics.jsonl").read_text().splitlines()]
    # The coefficient of the last step, which itself moved it once more, by a fifth at most.
    last = [row["objective/kl_coef"] for row in rows if "objective/kl_coef" in row][-1]
    coef = ws.config.rlhf.kl_coef
    scales = [float(side.batch.kl_scale[0]) for side in (before, after)]
    assert scales[0] == 1
    assert scales[1] != 1
    assert scales[1] * coef == pytest.approx(last, rel=0.2 * 16 / 100 + 1e-4)


def test_colours_say_likelier_or_less_likely_and_how_good():
    assert shade(3.0) == "rgba(213,94,0,0.75)"
    assert shade(-3.0) == "rgba(0,114,178,0.75)"
    assert underline(0.0) == "none"
    assert "#009e73" in underline(1.0)
    assert "#c0392b" in underline(-1.0)


def test_a_folder_without_a_reward_model_is_refused(tiny, tmp_path, capsys):
    assert cli.main(["evaluate", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def told(card: dict) -> str:
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    for shown in render({"cards": [card]}):
        console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_is_not_known_of_a_card_is_not_claimed(evaluated):
    """Gold that rises to the last n sets a least, and there is no way to a ceiling of 0.5."""
    card = json.loads((evaluated / "card.json").read_text())
    search = card["search"] | {"n": [1.0, 64.0], "kl": [0.0, 3.17]}
    rising = search | {"rising_to_the_last": True, "safe_kl": None, "safe_n": None}
    text = told(card | {"search": rising, "labels": card["labels"] | {"way_to_bayes": None}})
    assert "at least KL 3.17 nats (gold rises to the last n, best of 64)" in text
    assert "way from 0.5" not in text
    fallen = search | {"rising_to_the_last": False, "safe_kl": 0.5, "safe_n": 4}
    text = told(card | {"search": fallen})
    assert "safe up to KL 0.50 nats (best of 4)" in text
    assert "way from 0.5" in text
