"""The learned reward: where it is read, in which unit, and what has no end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm.config import ModelConfig, RLHFConfig
from minilm.model import Transformer, sequence_score
from minilm.rewards import Normalization, RewardModel, learned_reward, shaped
from minilm.rollout import Rollout

PAD, EOS, WIDTH = 0, 1, 7
CONFIG = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
UNIT = Normalization(0.0, 1.0)
PROMPTS = [[1, 5, 3], [1, 4], [1, 8, 2, 6], [1]]
COMPLETIONS = [[5, 6, EOS], [7, 2, 3, 4, 5, EOS], [EOS], [2, 2, 2, 2, 2, 2, 2]]  # the last: no end


def reward_model() -> Transformer:
    shape = jax.eval_shape(lambda: Transformer(CONFIG, 9, scalar_head=True, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), shape)


MODEL = reward_model()
pay = jax.jit(learned_reward, static_argnames="missing_eos_score")
score = jax.jit(sequence_score)


def of(*scales: Normalization, **how) -> RewardModel:
    """An ensemble of members that differ in their scales alone."""
    return RewardModel((MODEL,) * len(scales), scales, **how)


def rollout(prompts, completions, *, prompt_width: int) -> Rollout:
    tokens = np.full((len(prompts), prompt_width + WIDTH), PAD, np.int32)
    segments = np.zeros_like(tokens)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        place = slice(prompt_width - len(prompt), prompt_width + len(completion))
        tokens[row, place], segments[row, place] = prompt + completion, 1
    mask = segments[:, prompt_width:] == 1
    zeros = jnp.zeros(mask.shape)
    finished = np.array([c[-1] == EOS for c in completions])
    return Rollout(
        jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(mask), zeros, zeros, None,
        jnp.asarray(finished),
    )  # fmt: skip


def alone(prompt: list[int], completion: list[int]) -> float:
    """The score of one right-padded row at its last token, as the reward stage trains it."""
    row, segments = np.zeros((2, 1, 16), np.int32)
    whole = prompt + completion
    row[0, : len(whole)], segments[0, : len(whole)] = whole, 1
    return float(score(MODEL, row, segments, np.array([len(whole) - 1]))[0])


@pytest.mark.parametrize("prompt_width", [4, 9])
def test_the_score_is_read_at_end_of_text_whatever_the_padding_and_the_batch(prompt_width):
    """trl#5338, reward-bench#94: a score read at padding moved with the batch's longest row."""
    found = pay(
        of(UNIT), rollout(PROMPTS, COMPLETIONS, prompt_width=prompt_width),
        missing_eos_score=-3.0,
    )  # fmt: skip
    expected = [alone(p, c) for p, c in zip(PROMPTS[:3], COMPLETIONS[:3], strict=True)]
    np.testing.assert_allclose(found[:3], expected, atol=3e-5)
    assert np.ptp(expected) > 0.1  # the rows do differ


def test_a_completion_without_end_gets_the_fixed_score_in_normalised_units():
    found = pay(
        of(Normalization(5.0, 2.0)), rollout(PROMPTS, COMPLETIONS, prompt_width=4),
        missing_eos_score=-3.0,
    )  # fmt: skip
    assert float(found[3]) == -3.0


def test_scores_are_in_standard_deviations_of_the_reference():
    parts = rollout(PROMPTS, COMPLETIONS, prompt_width=4)
    raw = pay(of(UNIT), parts, missing_eos_score=-3.0)
    found = pay(of(Normalization(5.0, 2.0)), parts, missing_eos_score=-3.0)
    np.testing.assert_allclose(found[:3], (np.asarray(raw[:3]) - 5) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, lambda units: units.mean(0)),
        ({"combine": "worst"}, lambda units: units.min(0)),
        (
            {"combine": "penalized", "penalty": 0.5},
            lambda units: units.mean(0) - 0.5 * units.std(0),
        ),
    ],
)
def test_the_members_of_an_ensemble_are_one_in_units_of_their_own(how, expected):
    """Raw levels are arbitrary: a worst case of raw rewards would be that of one member alone."""
    scales = (Normalization(5.0, 2.0), Normalization(-100.0, 0.5), Normalization(0.1, 1.0))
    parts = rollout(PROMPTS, COMPLETIONS, prompt_width=4)
    raw = np.asarray(pay(of(UNIT), parts, missing_eos_score=-3.0), np.float64)
    units = np.stack([(raw - mean) / std for mean, std in scales])
    found = pay(of(*scales, **how), parts, missing_eos_score=-3.0)
    np.testing.assert_allclose(found[:3], expected(units)[:3], rtol=1e-5)
    assert float(found[3]) == -3.0


def test_a_reward_is_clipped_and_then_priced_by_length():
    parts = rollout(PROMPTS, COMPLETIONS, prompt_width=4)
    score = jnp.array([5.0, -5.0, 0.5, 1.0])
    config = RLHFConfig(reward_clip=2.0, length_penalty=0.1)
    lengths = np.array([len(c) for c in COMPLETIONS])
    expected = np.clip(score, -2, 2) - 0.1 * lengths
    np.testing.assert_allclose(shaped(score, parts, config), expected, rtol=1e-6)
    assert shaped(score, parts, RLHFConfig()) is score
