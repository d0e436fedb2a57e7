"""Preferences, read off a finished run: who was compared, and what can be known of the labels."""

import json
import math

import numpy as np
import pytest

from minilm.config import Config, PreferencesConfig
from minilm.configfile import load
from minilm.errors import UserError
from minilm.stages import preferences as stage
from minilm.stages.workspace import Workspace
from minilm.text.fables import gold
from minilm.text.preferences import label_pairs
from minilm.text.prompts import prompt_sets
from minilm.text.store import Document
from minilm.text.tokenizer import Tokenizer


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pairs(tiny_run) -> dict[str, list[dict]]:
    folder = tiny_run / "preferences"
    return {name: lines(folder / f"{name}.jsonl") for name in ("train", "held_out")}


@pytest.fixture(scope="module")
def summary(tiny_run) -> dict:
    return json.loads((tiny_run / "preferences" / "done.json").read_text())["summary"]


def test_pairs_are_split_by_prompt(pairs, summary, tiny):
    train, held_out = ({p["prompt"] for p in pairs[name]} for name in ("train", "held_out"))
    assert not train & held_out
    share = load(tiny).preferences.held_out
    assert len(held_out) == pytest.approx(share * len(train | held_out), abs=1)
    assert (summary["pairs"], summary["held_out_pairs"]) == (
        len(pairs["train"]),
        len(pairs["held_out"]),
    )


def test_prompts_open_held_out_stories_that_no_other_stage_reads(pairs, tiny_run, tiny):
    documents = [Document(**row) for row in lines(tiny_run / "pretrain" / "held_out.jsonl")]
    tokenizer = Tokenizer.load(tiny_run / "tokenizer.json")
    sets = prompt_sets(load(tiny), tokenizer, documents)
    used = {p["prompt"] for part in pairs.values() for p in part}
    assert used <= set(sets.preferences)
    assert not used & {*sets.rlhf, *sets.development, *sets.evaluation}
    assert all(any(d.text.startswith(p) for d in documents) for p in used)


def test_all_pairs_of_a_prompts_different_completions_are_labelled_once(pairs, tiny):
    by_prompt: dict[str, list[frozenset]] = {}
    for row in [*pairs["train"], *pairs["held_out"]]:
        by_prompt.setdefault(row["prompt"], []).append(frozenset((row["chosen"], row["rejected"])))
    for found in by_prompt.values():
        texts = set().union(*found)
        assert len(texts) <= load(tiny).preferences.completions
        assert all(len(pair) == 2 for pair in found)
        # Two completions alike have pairs with the same third; beyond them each comes once.
        assert len(set(found)) == math.comb(len(texts), 2)


def test_the_chosen_has_the_votes_and_gold_is_the_judges(pairs, tiny):
    raters = load(tiny).preferences.raters
    for row in pairs["train"]:
        assert row["votes"] == raters
        assert 2 * row["votes_chosen"] >= raters
        for side in ("chosen", "rejected"):
            score = gold(row["prompt"] + row[side], size="small")
            assert row[f"gold_{side}"] == pytest.approx(score, abs=1e-6)


def test_bayes_rates_are_expectations_over_one_raters_vote(pairs, summary, tiny):
    temperature = load(tiny).preferences.rater_temperature
    gaps = np.array([p["gold_chosen"] - p["gold_rejected"] for p in pairs["held_out"]])
    p = 1 / (1 + np.exp(-gaps / temperature))
    assert summary["bayes_accuracy"] == pytest.approx(np.where(p > 0.5, p, 1 - p).mean())
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert summary["bayes_log_loss"] == pytest.approx(entropy.mean())


@pytest.mark.parametrize(
    ("rater_judge", "where"), [(None, "judge.name"), ("theirs:judge", "preferences.rater_judge")]
)
def test_a_judge_that_finds_everything_alike_makes_no_pairs(
    tmp_path, monkeypatch, rater_judge, where
):
    """Its raters drew lots, and the reward model was trained on those."""
    raters = PreferencesConfig(rater_judge=rater_judge)
    texts, rng = [["a", "b", "c"]] * 4, np.random.default_rng(0)
    pairs = label_pairs(list("pqrs"), texts, np.zeros((4, 3)), rng, raters)
    monkeypatch.setattr(stage, "_simulated", lambda ws: pairs)
    with pytest.raises(UserError, match="their votes are noise") as refused:
        stage.preferences(Workspace(Config(preferences=raters), tmp_path, None, "float32"))
    assert refused.value.where == where
    assert not list(tmp_path.iterdir())


def two_raters(prompts, completions):
    return [[len(c) for c in completions], [-len(c) for c in completions]]


def test_each_rater_sees_their_own_and_likes_words(tmp_path):
    dials = {"rater_judge": f"{__name__}:two_raters", "length_bias": 0.5}
    ws = Workspace(Config(preferences=PreferencesConfig(**dials)), tmp_path, None, "float32")
    texts = ["a", "b b", "c c c", "dd"]  # of two prompts
    seen = stage._seen(ws, ["p", "p", "q", "q"], texts, np.zeros((2, 2)))
    np.testing.assert_array_equal(
        seen, [[[1.5, 4.0], [6.5, 2.5]], [[-0.5, -2.0], [-3.5, -1.5]]]
    )  # fmt: skip
