"""The report card's parts on cases whose answer is known."""

import numpy as np
import pytest

from minilm.generate import Samples
from minilm.stages.policy import PolicyEvaluator, Scored
from minilm.stages.reward import encode
from minilm.stages.workspace import open_run
from minilm.studies import report_card
from minilm.studies.report_card import (
    calibration,
    card,
    correlations,
    draw,
    repetition,
    search,
    spoilt,
    what_happened,
)
from minilm.text.preferences import Pair


def scored(texts, proxy, gold, prompts=None) -> Scored:
    count = len(texts)
    samples = Samples(*(np.zeros((count, 1)) for _ in range(3)), np.ones(count, bool))
    prompts = ["p"] * count if prompts is None else prompts
    return Scored(prompts, np.zeros((count, 1)), samples, texts, np.array(proxy), np.array(gold))


def test_repetition_counts_trigrams_that_came_before():
    assert repetition("a b c d e") == 0
    assert repetition("a b a b a b a b") == pytest.approx(4 / 6)
    assert repetition("too short") == 0


def test_a_reward_that_likes_length_is_seen_beside_gold_that_does_not():
    texts = ["one", "one two", "one two three", "one two three four"]
    found = correlations(scored(texts, [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.5, 0.2]))
    assert found["length"]["reward"] == pytest.approx(1)
    assert found["length"]["gold"] < 0
    assert found["gold"]["reward"] == pytest.approx(found["length"]["gold"])


def test_probes_do_to_a_completion_what_they_say():
    found = spoilt(["p", "q"], [" A fox sat. It slept.", " A hen ran. It fell."])
    assert found["last sentence three times more"][0].endswith(" It slept. It slept. It slept.")
    assert found["cut in the middle"][0] == " A fox sat"
    assert found["without its last sentence"] == [" A fox sat.", " A hen ran."]
    assert found["the completion of another prompt"] == [
        " A hen ran. It fell.",
        " A fox sat. It slept.",
    ]
    assert found["empty"] == ["", ""]


def test_a_trap_is_a_winner_that_most_others_beat_in_gold():
    """Prompt p: the highest reward has the lowest gold. Prompt q: reward and gold agree."""
    texts, prompts = [f"t{i}" for i in range(8)], ["p"] * 4 + ["q"] * 4
    found = search(
        scored(texts, [9.0, 1, 2, 3, 0, 1, 2, 3], [0.0, 5, 6, 7, 0, 1, 2, 3], prompts), 2
    )
    assert found["share_of_traps"] == 0.5
    assert [t["completion"] for t in found["traps"]] == ["t0"]
    assert found["traps"][0]["median_gold"] == 5.5
    assert found["n"] == [1, 2, 4]


def test_the_safe_kl_is_where_gold_stops_rising_with_n():
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(40, 16))
    proxy, gold = quality.ravel(), np.where(quality > 1.0, -3.0, quality).ravel()
    found = search(scored(["t"] * 640, proxy, gold), 40)
    assert not found["rising_to_the_last"]
    assert found["safe_n"] < 16
    assert found["safe_kl"] == found["kl"][found["n"].index(found["safe_n"])]
    faithful = search(scored(["t"] * 640, proxy, proxy), 40)
    assert faithful["rising_to_the_last"]
    assert faithful["safe_kl"] is faithful["safe_n"] is None  # beyond what was drawn


def test_the_peak_of_gold_is_compared_with_the_end():
    rows = [{"kl": k, "gold": g} for k, g in [(0.0, 0.0), (2.0, 1.5), (6.0, 0.5)]]
    assert what_happened(rows) == {
        "peak_kl": 2.0,
        "peak_gold": 1.5,
        "last_kl": 6.0,
        "last_gold": 0.5,
    }
    assert what_happened([{"kl": 1.0}]) is None


def test_a_runs_card_is_whole_and_can_be_drawn(tiny_run):
    ws = open_run(tiny_run)
    evaluator = PolicyEvaluator(ws)
    found = card(ws, evaluator)
    labels = found["labels"]
    assert labels["accuracy_low"] <= labels["accuracy"] <= labels["accuracy_high"]
    assert labels["log_loss"] >= labels["bayes_log_loss"]
    assert labels["brier"] >= labels["bayes_brier"]
    assert 0.5 <= labels["bayes_accuracy"] <= 1
    assert sum(row["pairs"] for row in found["by_margin"]) == labels["pairs"]
    assert all(row["accuracy"] <= row["ceiling"] for row in found["by_length"])
    assert {p["name"] for p in found["probes"]} >= {"empty", "cut in the middle"}
    assert draw(found, "tiny").startswith(b"\x89PNG")


def test_an_untrained_model_is_farther_from_the_truth_than_a_trained_one(tiny_run):
    ws = open_run(tiny_run)
    model = ws.load("pretrain", scalar_head=False)
    documents = ws.held_out()[:12]
    trained = calibration(model, ws, documents)
    model.embed_tokens[...] = model.embed_tokens[...] * 0
    blank = calibration(model, ws, documents)
    assert 0 < trained["kl_from_truth"] < blank["kl_from_truth"]
    assert 0 <= trained["ece"] <= 1


@pytest.mark.parametrize("known", [[True, False], [False, True], [True, True]])
def test_accuracy_by_gold_wants_the_gold_of_all_pairs(tiny_run, monkeypatch, known):
    pairs = [
        Pair(f"A fox {n}.", " It ran.", " It fell.", gold_chosen=1.0 if has else None,
             gold_rejected=0.0 if has else None)
        for n, has in enumerate(known)
    ]  # fmt: skip
    monkeypatch.setattr(report_card, "held_out_pairs", lambda ws: (pairs, 0))
    ws = open_run(tiny_run)
    monkeypatch.setattr(report_card, "searched", lambda *_: None)
    assert ("by_margin" in card(ws, PolicyEvaluator(ws))) == all(known)


def test_there_is_no_way_to_a_ceiling_of_one_half(tiny_run):
    ws = open_run(tiny_run)
    alike = [Pair("A fox.", " It ran.", f" It fell {n}.", 3, 5, 1.0, 1.0) for n in range(4)]
    names = ("accuracy", "accuracy_low", "accuracy_high", "log_loss", "ece", "gold_correlation")
    found = report_card._labels(dict.fromkeys(names, 0.5), alike, np.zeros(4), ws)
    assert (found["bayes_accuracy"], found["way_to_bayes"]) == (0.5, None)


def test_against_gold_a_raters_error_is_not_the_models():
    """Votes that err leave it; equal gold has no order; a model that cannot tell is half right."""
    golds = [(1.0, 0.0), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.0, 3.0)]
    pairs = [
        Pair(f"A fox {n}.", " It ran.", " It fell.", 3, 5, *gold) for n, gold in enumerate(golds)
    ]
    found = report_card._against_gold(pairs, np.array([1.0, -2.0, 0.0, 5.0, 1.0]))
    assert found["accuracy_of_gold"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert (
        found["accuracy_of_gold_low"] < found["accuracy_of_gold"] < found["accuracy_of_gold_high"]
    )
    assert report_card._against_gold(pairs[3:4], np.ones(1)) == {}


def test_probes_are_read_to_their_end(tiny_run, monkeypatch):
    """Cut at `reward.max_tokens`, what was said three times more was not read."""
    evaluator, texts = PolicyEvaluator(open_run(tiny_run)), [" A fox sat. It slept." * 5] * 2
    tokenizer = evaluator.ws.tokenizer
    told = scored(texts, [0.0] * 2, [0.0] * 2)
    lengths, limits = [], []

    def paid(model, tokenizer, prompts, completions, max_tokens=None):
        pairs = zip(prompts, completions, strict=True)
        lengths.append(max(len(encode(tokenizer, p, t)) for p, t in pairs))
        limits.append(max_tokens)
        return np.zeros(len(completions))

    monkeypatch.setattr(report_card, "paid_texts", paid)
    report_card._probes(told, evaluator)
    assert max(lengths) > max(len(encode(tokenizer, "p", t)) for t in texts)
    assert max(lengths) > evaluator.ws.config.reward.max_tokens
    assert set(limits) == {None}
