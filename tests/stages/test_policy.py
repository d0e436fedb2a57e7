"""A policy's figures: win rate by hand, exact KL against NumPy, the proxy as RLHF pays it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm import configfile
from minilm.config import ModelConfig
from minilm.errors import UserError
from minilm.generate import Samples
from minilm.model import Transformer, hidden_states, logits, sequence_score
from minilm.rewards import Normalization, RewardModel
from minilm.stages.policy import PolicyEvaluator, exact_kl, proxy_scores, win_rate
from minilm.stages.workspace import Workspace, open_run

VOCAB, PAD, EOS = 7, 0, 1
TINY = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
PROMPTS = [[1, 5, 3], [1], [1, 4]]
COMPLETIONS = [[5, 6, EOS], [2, 2, 3, 4], [EOS]]


def random_model(seed: int, *, scalar_head: bool = False) -> Transformer:
    shape = jax.eval_shape(
        lambda: Transformer(TINY, VOCAB, scalar_head=scalar_head, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), shape)


def rows_and_samples() -> tuple[np.ndarray, Samples]:
    rows = np.zeros((3, 3), np.int32)
    tokens = np.zeros((3, 4), np.int32)
    for n, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        rows[n, 3 - len(prompt) :] = prompt
        tokens[n, : len(completion)] = completion
    mask = np.arange(4) < np.array([[len(c)] for c in COMPLETIONS])
    finished = np.array([c[-1] == EOS for c in COMPLETIONS])
    return rows, Samples(tokens, mask, np.zeros((3, 4), np.float32), finished)


def row_of(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    row, segments = np.zeros((2, 1, 8), np.int32)
    row[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return row, segments


@jax.jit
def forward(model, tokens, segments):
    return logits(model, hidden_states(model, tokens, segments))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def test_exact_kl_is_summed_over_the_vocabulary_and_the_completions_own_tokens():
    policy, reference = random_model(0), random_model(1)
    rows, samples = rows_and_samples()
    kl, entropy = exact_kl(policy, reference, rows, samples, PAD, batch_size=2)
    for n, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = prompt + completion
        own = slice(len(prompt) - 1, len(ids) - 1)
        p, q = (
            log_softmax(np.asarray(forward(m, *row_of(ids)), np.float64)[0, own])
            for m in (policy, reference)
        )
        assert kl[n] == pytest.approx(np.sum(np.exp(p) * (p - q)), rel=1e-4)
        assert entropy[n] == pytest.approx(-np.sum(np.exp(p) * p), rel=1e-4)


def test_a_policy_is_at_no_distance_from_itself():
    rows, samples = rows_and_samples()
    kl, _ = exact_kl(random_model(0), random_model(0), rows, samples, PAD, batch_size=2)
    np.testing.assert_allclose(kl, 0, atol=1e-6)


def test_the_proxy_is_the_normalised_score_at_end_of_text_whatever_the_batch():
    model = random_model(2, scalar_head=True)
    rows, samples = rows_and_samples()
    score = jax.jit(sequence_score)
    expected = [
        (float(score(model, *row_of(p + c), np.array([len(p + c) - 1]))[0]) - 0.5) / 2.0
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    expected[1] = -3.0  # has no end
    payer = RewardModel((model,), (Normalization(0.5, 2.0),))
    for size in (2, 64):
        found = proxy_scores(payer, rows, samples, -3.0, PAD, size)
        np.testing.assert_allclose(found, expected, atol=3e-5)


def test_a_reward_model_that_pays_no_number_is_told_of():
    rows, samples = rows_and_samples()
    payer = RewardModel((random_model(0, scalar_head=True),), (Normalization(float("nan"), 1.0),))
    with pytest.raises(UserError, match="not finite") as refused:
        proxy_scores(payer, rows, samples, -3.0, PAD)
    assert "2 of 3" in str(refused.value)  # the third has no end and is paid for that


def test_win_rate_by_hand_with_ties_as_halves():
    gold = np.array([1.0, 0.0])
    references = np.array([[0.0, 1.0, 2.0, -1.0], [0.0, 0.0, 1.0, -1.0]])
    rate, low, high = win_rate(gold, references)
    assert rate == pytest.approx(((2 + 0.5) / 4 + (1 + 1) / 4) / 2)
    assert low <= rate <= high


def test_a_policy_against_itself_wins_half():
    gold = np.random.default_rng(0).integers(0, 3, 400).astype(float)
    rate, low, high = win_rate(
        gold, np.random.default_rng(1).integers(0, 3, (400, 4)).astype(float)
    )
    assert low < 0.5 < high
    assert rate == pytest.approx(0.5, abs=0.06)


def test_the_interval_is_the_bootstraps_over_prompts():
    """95 % of the normal limit: wins of 500 prompts are independent numbers in [0, 1]."""
    rng = np.random.default_rng(2)
    gold, references = rng.normal(0.5, 1, 500), rng.normal(0, 1, (500, 4))
    rate, low, high = win_rate(gold, references, seed=1)
    wins = (gold[:, None] > references).mean(axis=1)
    half = 1.96 * wins.std() / np.sqrt(500)
    assert (low, high) == (
        pytest.approx(rate - half, abs=0.004),
        pytest.approx(rate + half, abs=0.004),
    )
    assert win_rate(gold, references, seed=1) == (rate, low, high)


@pytest.fixture(scope="module")
def evaluator(tiny_run) -> PolicyEvaluator:
    config = configfile.load(tiny_run / "config.toml")
    return PolicyEvaluator(Workspace(config, tiny_run, None, "float32"))


def test_the_reference_as_policy_has_no_kl_and_its_own_figures(evaluator):
    figures = evaluator(evaluator.reference, "development")
    assert figures["kl"] == pytest.approx(0, abs=1e-5)
    assert figures["entropy"] > 1
    assert figures["gold_win_rate_low"] <= 0.5 <= figures["gold_win_rate_high"]
    shares = [figures[name] for name in ("parse_share", "slip", "break", "no_end")]
    assert sum(shares) == pytest.approx(1)


def test_the_runs_figures_are_those_of_its_last_policy(evaluator, tiny_run):
    """nanochat#446's other half: what is reported can be read off the checkpoint again."""
    policy = evaluator.ws.load("rlhf", scalar_head=False)
    stored = json.loads((tiny_run / "rlhf" / "evaluation.json").read_text())
    assert evaluator(policy, "evaluation") == pytest.approx(stored, rel=1e-6)


def test_samples_before_and_after_lie_side_by_side(evaluator, tiny_run):
    rows = [
        json.loads(x) for x in (tiny_run / "rlhf" / "samples.jsonl").read_text().split("\n") if x
    ]
    assert [row["prompt"] for row in rows] == evaluator.prompts["evaluation"]
    stored = json.loads((tiny_run / "rlhf" / "evaluation.json").read_text())
    for key in ("proxy", "gold"):
        assert np.mean([row[f"{key}_after"] for row in rows]) == pytest.approx(
            stored[key], abs=1e-5
        )
    assert np.mean([row["kl"] for row in rows]) == pytest.approx(stored["kl"], rel=1e-5)


def test_a_judge_is_looked_for_where_it_is_read(tiny_run):
    ws = open_run(tiny_run)
    judge = ws.config.judge.model_copy(update={"name": "nowhere_at_all:score"})
    config = ws.config.model_copy(update={"judge": judge})
    evaluator = PolicyEvaluator(dataclasses.replace(ws, config=config))
    with pytest.raises(UserError, match="nowhere_at_all"):
        assert evaluator.judge
