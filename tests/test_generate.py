"""Sampling against recomputation without a cache, and the draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from minilm import generate as g
from minilm.config import ModelConfig
from minilm.model import Transformer, hidden_states, logits

VOCAB, EOS, PAD = 12, 1, 0
CONFIG = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
PROMPTS = [[1, 5, 3, 7, 2], [1, 4], [1, 9, 9, 6, 2, 8, 5, 4, 7, 3, 3, 10, 11, 6, 2, 9], [1]]
ROWS = g.left_pad(PROMPTS * 4, PAD, 16)
LENGTH = 10


def random_model() -> Transformer:
    shape = jax.eval_shape(lambda: Transformer(CONFIG, VOCAB, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), shape)


MODEL = random_model()


@jax.jit
def forward(model, tokens, segments):
    return logits(model, hidden_states(model, tokens, segments))


def scores_after(tokens: list[int]) -> np.ndarray:
    """Logits of the next token of an unpadded list, read without cache or left padding."""
    row, segments = np.zeros((2, 1, 32), np.int32)
    row[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
    return np.asarray(forward(MODEL, row, segments), np.float64)[0, len(tokens) - 1]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def sample(rows=ROWS, seed=0, **options):
    options = {"max_new_tokens": LENGTH, "eos_id": EOS, "pad_id": PAD} | options
    samples = g.generate(MODEL, jnp.asarray(rows), jax.random.key(seed), **options)
    return jax.tree.map(np.asarray, samples)


def completion(samples: g.Samples, row: int) -> list[int]:
    return samples.tokens[row][samples.mask[row]].tolist()


def test_left_pad_puts_padding_before_the_prompt():
    assert g.left_pad([[5, 6], [7]], 0, 3).tolist() == [[0, 5, 6], [0, 0, 7]]


def test_greedy_with_the_cache_is_greedy_without_it():
    """Prompts of four lengths in one batch: each gives what it gives alone, recomputed anew."""
    samples = sample(temperature=0.0)
    for row, prompt in enumerate(PROMPTS * 4):
        tokens, expected = list(prompt), []
        while len(expected) < LENGTH and EOS not in expected:
            expected.append(int(np.argmax(scores_after(tokens))))
            tokens.append(expected[-1])
        assert completion(samples, row) == expected


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_sampling_distribution(temperature):
    """trl#4159: log-probabilities kept without the temperature put the first ratio off 1."""
    top_k = 3 if temperature != 1 else 0
    samples = sample(temperature=temperature, top_k=top_k)
    for row, prompt in enumerate(PROMPTS * 4):
        tokens = list(prompt)
        for place, token in enumerate(completion(samples, row)):
            scores = scores_after(tokens) / temperature
            scores[np.argsort(scores)[: -top_k or 0]] = -np.inf
            expected = log_softmax(scores)[token]
            assert samples.logprobs[row, place] == pytest.approx(expected, abs=1e-5)
            tokens.append(token)


def test_stops_at_end_of_text_which_counts_as_the_completions_own():
    samples = sample(seed=0)
    ended = samples.tokens == EOS
    assert 0 < samples.finished.mean() < 1  # both kinds are there to be looked at
    np.testing.assert_array_equal(samples.finished, ended.any(axis=1))
    for tokens, mask, logprobs, finished in zip(*samples, strict=True):
        length = np.argmax(tokens == EOS) + 1 if finished else LENGTH
        np.testing.assert_array_equal(mask, np.arange(LENGTH) < length)
        assert (tokens[length:] == PAD).all()
        assert (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()


def test_the_same_key_gives_the_same_samples_and_another_does_not():
    first, again, other = sample(seed=1), sample(seed=1), sample(seed=2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.tokens != other.tokens).any()
    assert (first.tokens[:4] != first.tokens[4:8]).any()  # equal prompts draw apart


def test_a_second_call_is_not_compiled_again():
    sample(seed=5)
    before = g.generate._cache_size()
    sample(ROWS[::-1].copy(), seed=6)
    assert g.generate._cache_size() == before


def test_microbatches_are_separate_calls_with_keys_of_their_own():
    whole = sample(seed=4, microbatch=1)
    for row, key in enumerate(jax.random.split(jax.random.key(4), len(ROWS))):
        options = {"max_new_tokens": LENGTH, "eos_id": EOS, "pad_id": PAD}
        alone = g.generate(MODEL, jnp.asarray(ROWS[row : row + 1]), key, **options)
        np.testing.assert_array_equal(whole.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(whole.mask[row], alone.mask[0])
        np.testing.assert_allclose(whole.logprobs[row], alone.logprobs[0], atol=1e-5)


def test_stream_gives_the_tokens_of_generate():
    prompt = PROMPTS[0]
    options = {"max_new_tokens": LENGTH, "eos_id": EOS, "pad_id": PAD}
    whole = g.generate(MODEL, jnp.asarray(ROWS[:1]), jax.random.key(8), **options)
    expected = [t for t in whole.tokens[0][np.asarray(whole.mask)[0]].tolist() if t != EOS]
    parts = list(g.stream(MODEL, prompt, jax.random.key(8), chunk=4, **options))
    assert [t for part in parts for t in part] == expected
    assert all(len(part) <= 4 for part in parts)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_impossible_dials_are_refused(options):
    with pytest.raises(ValueError, match=r"temperature|top_p"):
        sample(**options)


@pytest.mark.parametrize("vocab", [5, 64, 150])
def test_categorical_draws_with_the_softmax_frequencies(vocab):
    """Chi-square over 40,000 draws, at a false alarm in 10,000 (normal limit of the statistic)."""
    rng = np.random.default_rng(vocab)
    scores = rng.normal(0, 1.0, vocab)
    draws = 40_000
    uniform = jax.random.uniform(jax.random.key(vocab), (draws,))
    many = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (draws, vocab))
    tokens, logprobs = jax.jit(g.categorical)(many, uniform)
    expected = np.exp(log_softmax(scores))
    np.testing.assert_allclose(logprobs, np.log(expected)[tokens], atol=2e-5)
    counts = np.bincount(tokens, minlength=vocab)
    chi_square = np.sum((counts - draws * expected) ** 2 / (draws * expected))
    # Wilson and Hilferty (1931): the cube root of chi²/n is normal; 3.72 standard deviations.
    freedom = vocab - 1
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 3.72


# One fixed shape, so that hypothesis looks for cases and not for compilations.
WIDE = 2 * g.BLOCK + 9
categorical = jax.jit(g.categorical)


@given(
    st.sets(st.integers(0, WIDE - 1), min_size=1, max_size=12),
    st.sampled_from([0.0, 1e-7, 0.25, 0.5, 1 - 2**-23, 1 - 2**-24]),
    st.integers(0, 2**31),
)
def test_categorical_never_draws_what_has_no_probability(possible, uniform, seed):
    """The largest uniform and the rounding of cumulative sums are where a zero would be drawn."""
    scores = np.full((4, WIDE), -np.inf, np.float32)
    drawn = np.random.default_rng(seed).normal(0, 8, (4, len(possible)))
    scores[:, sorted(possible)] = drawn
    tokens, logprobs = categorical(scores, np.full(4, uniform, np.float32))
    assert set(np.asarray(tokens).tolist()) <= possible
    assert np.isfinite(logprobs).all()


def nucleus(probabilities: np.ndarray, top_p: float) -> set[int]:
    """Tokens in falling order until their probabilities reach `top_p`, the last one included."""
    kept, total = set(), 0.0
    for token in np.argsort(-probabilities):
        if total >= top_p:
            break
        kept.add(int(token))
        total += probabilities[token]
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (0, 0.3), (3, 1.0), (4, 0.5), (0, 1e-6), (1, 1.0)]
)
def test_truncation_keeps_the_set_of_a_plain_implementation(top_k, top_p):
    """All that may be drawn, found by sweeping the uniform, with its renormalised probability."""
    rng = np.random.default_rng(7)
    scores, temperature = rng.normal(0, 2, VOCAB), 0.8
    kept = np.log(np.exp(log_softmax(scores / temperature)))
    if top_k:
        kept[np.argsort(kept)[:-top_k]] = -np.inf
    kept = log_softmax(kept)
    allowed = nucleus(np.exp(kept), top_p) & set(np.flatnonzero(np.isfinite(kept)).tolist())
    total = np.logaddexp.reduce([kept[t] for t in allowed])
    sweep = np.linspace(0, 1, 2000, endpoint=False, dtype=np.float32)
    draw = jax.jit(g._sampler(temperature, top_k, top_p))
    tokens, logprobs = draw(np.tile(scores.astype(np.float32), (2000, 1)), sweep)
    assert set(np.asarray(tokens).tolist()) == allowed
    np.testing.assert_allclose(logprobs, kept[tokens] - total, atol=1e-5)
