"""What a rollout records is what the update will recompute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minilm.config import ModelConfig
from minilm.generate import Samples, generate, left_pad
from minilm.model import Transformer, hidden_states, logits
from minilm.rollout import complete_rollout, completion_outputs

VOCAB, PAD, EOS, WIDTH = 9, 0, 1, 6
CONFIG = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
PROMPTS = [[1, 5, 3, 7], [1, 4], [1, 8, 2], [1]] * 4
ROWS = left_pad(PROMPTS, PAD, 5)


def random_model(seed: int, *, scalar_head: bool = False) -> Transformer:
    shape = jax.eval_shape(
        lambda: Transformer(CONFIG, VOCAB, scalar_head=scalar_head, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), shape)


POLICY, REFERENCE = random_model(0, scalar_head=True), random_model(1)


@jax.jit
def hidden_and_logits(model, tokens, segments):
    hidden = hidden_states(model, tokens, segments)
    return hidden, logits(model, hidden)


def forward(model, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and logits of one unpadded list."""
    row, segments = np.zeros((2, 1, 16), np.int32)
    row[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
    return tuple(np.asarray(x, np.float64)[0, : len(tokens)] for x in hidden_and_logits(
        model, row, segments
    ))  # fmt: skip


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


outputs = jax.jit(completion_outputs, static_argnums=(3, 4))
complete = jax.jit(complete_rollout, static_argnames=("pad_id", "temperature"))


@functools.cache
def rollout_at(temperature: float):
    samples = generate(
        POLICY, jnp.asarray(ROWS), jax.random.key(0), max_new_tokens=WIDTH,
        temperature=temperature, eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    return complete(POLICY, REFERENCE, ROWS, samples, pad_id=PAD, temperature=temperature)


def test_the_updates_forward_pass_repeats_the_rollouts_logprobs():
    """trl#4159, #6789: the temperature of one but not of the other puts the ratio off 1."""
    rollout = rollout_at(0.7)
    real = np.asarray(rollout.mask)
    found = outputs(POLICY, rollout.tokens, rollout.segments, WIDTH, 0.7)
    ratio = np.exp(np.asarray(found.logprobs - rollout.logprobs))[real]
    np.testing.assert_allclose(ratio, 1, atol=1e-4)
    other = outputs(POLICY, rollout.tokens, rollout.segments, WIDTH, 1.0)
    assert np.abs(np.asarray(other.logprobs - rollout.logprobs))[real].max() > 0.1


def test_reference_logprobs_values_and_entropy_are_those_of_each_row_alone():
    """Logits before a token say its log-probability; the critic's value is read there too."""
    temperature = 0.7
    rollout = jax.tree.map(np.asarray, rollout_at(temperature))
    found = outputs(POLICY, rollout.tokens, rollout.segments, WIDTH, temperature)
    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.mask[row].sum())
        own = rollout.tokens[row, -WIDTH:][:length].tolist()
        before = slice(len(prompt) - 1, len(prompt) - 1 + length)
        reference = log_softmax(forward(REFERENCE, prompt + own)[1][before] / temperature)
        np.testing.assert_allclose(
            rollout.ref_logprobs[row, :length], reference[np.arange(length), own], atol=1e-5
        )
        hidden, scores = forward(POLICY, prompt + own)
        value = hidden[before] @ np.asarray(POLICY.score[...], np.float64)
        np.testing.assert_allclose(rollout.values[row, :length], value, atol=1e-4)
        logprobs = log_softmax(scores[before] / temperature)
        entropy = -np.sum(np.exp(logprobs) * logprobs, axis=-1)
        np.testing.assert_allclose(found.entropy[row, :length], entropy, atol=1e-5)


def test_a_rollout_holds_prompt_and_completion_and_which_tokens_are_real():
    rollout = jax.tree.map(np.asarray, rollout_at(0.7))
    np.testing.assert_array_equal(rollout.tokens[:, :5], ROWS)
    np.testing.assert_array_equal(rollout.segments[:, :5], ROWS != PAD)
    np.testing.assert_array_equal(rollout.segments[:, 5:], rollout.mask)
    ended = (rollout.tokens[:, 5:] == EOS) & rollout.mask
    np.testing.assert_array_equal(rollout.finished, ended.any(axis=1))


def test_a_padding_token_that_was_sampled_is_a_token_like_any_other():
    """Its id says padding, its mask says real: what counts is the mask."""
    tokens = np.array([[4, PAD, 5, EOS, PAD, PAD]], np.int32)
    mask = np.array([[True, True, True, True, False, False]])
    samples = Samples(
        jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros((1, WIDTH)), jnp.array([True])
    )
    rollout = complete(POLICY, REFERENCE, ROWS[:1], samples, pad_id=PAD, temperature=0.7)
    prompt = PROMPTS[0]
    scores = forward(REFERENCE, [*prompt, 4, PAD, 5, EOS])[1][len(prompt) - 1 : -1]
    expected = log_softmax(scores / 0.7)[np.arange(4), [4, PAD, 5, EOS]]
    np.testing.assert_allclose(rollout.ref_logprobs[0, :4], expected, atol=1e-5)


def test_without_a_critic_there_are_no_values():
    arrays = [((2, WIDTH), int), ((2, WIDTH), bool), ((2, WIDTH), float), ((2,), bool)]
    samples = Samples(*(jnp.zeros(shape, kind) for shape, kind in arrays))
    rollout = jax.eval_shape(
        lambda rows, samples: complete_rollout(
            REFERENCE, REFERENCE, rows, samples, pad_id=PAD, temperature=1.0
        ),
        ROWS[:2],
        samples,
    )
    assert rollout.values is None
