"""Held-out figures document by document, and samples in batches of one shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm.config import ModelConfig, TokenizerConfig
from minilm.generate import Samples, generate
from minilm.model import Transformer, hidden_states, logits
from minilm.stages import evaluate as e
from minilm.text.fables import stories
from minilm.text.store import Document
from minilm.text.tokenizer import train_tokenizer

TINY = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16
)  # fmt: skip
TOKENIZER = train_tokenizer(TokenizerConfig(kind="characters"), ["abcdefg é."])
TEXTS = ["abc de. ", "é", "gfedcba" * 5, "a b c. d"]  # one longer than 32 tokens


def random_model() -> Transformer:
    shape = jax.eval_shape(lambda: Transformer(TINY, TOKENIZER.vocab_size, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape).astype(x.dtype)), shape)


MODEL = random_model()


@jax.jit
def forward(model, tokens, segments):
    return logits(model, hidden_states(model, tokens, segments))


def charged(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Nats and right guesses of a text's tokens and its end, from the start token; one row."""
    ids = [TOKENIZER.eos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]
    row, segments = np.zeros((2, 1, 64), np.int32)
    row[0, : len(ids) - 1], segments[0, : len(ids) - 1] = ids[:-1], 1
    scores = np.asarray(forward(MODEL, row, segments), np.float64)[0, : len(ids) - 1]
    logprobs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return -logprobs[np.arange(len(ids) - 1), ids[1:]], scores.argmax(1) == ids[1:]


def test_documents_are_scored_alone_with_their_own_end():
    """maxtext#3040: padding of a batch, and the batch itself, must weigh nothing."""
    found = e.document_losses(MODEL, TOKENIZER, TEXTS, max_length=64)
    for n, text in enumerate(TEXTS):
        nats, right = charged(text)
        assert found.nats[n] == pytest.approx(nats.sum(), rel=1e-5)
        assert found.tokens[n] == len(TOKENIZER.encode(text)) + 1
        assert found.correct[n] == right.sum()


def test_windows_of_a_long_document_add_up_to_one_charge_a_token():
    found = e.document_losses(MODEL, TOKENIZER, TEXTS, max_length=32)
    assert found.tokens.tolist() == [len(TOKENIZER.encode(t)) + 1 for t in TEXTS]
    assert np.isfinite(found.nats).all()


def test_the_report_by_hand():
    documents = [Document(t, str(n), logprob=-3.0 - n) for n, t in enumerate(TEXTS)]
    report = e.language_report(MODEL, TOKENIZER, documents, max_length=64)
    nats = sum(charged(t)[0].sum() for t in TEXTS)
    tokens = sum(len(t) + 1 for t in TEXTS)  # a token a character, and the end
    characters, size = sum(map(len, TEXTS)), sum(len(t.encode()) for t in TEXTS)
    assert size > characters
    expected = {
        "validation_loss": nats / tokens,
        "validation_nats_per_character": nats / characters,
        "validation_bits_per_byte": nats / np.log(2) / size,
        "perplexity": np.exp(nats / tokens),
        "accuracy": sum(charged(t)[1].sum() for t in TEXTS) / tokens,
        "entropy_floor": (3 + 4 + 5 + 6) / tokens,
        "excess_loss": (nats - 18) / tokens,
        "excess_per_document": (nats - 18) / 4,
    }
    assert report == pytest.approx(expected, rel=1e-5)


def test_without_exact_logprobs_there_is_no_floor():
    documents = [Document("abc", "0", logprob=-3.0), Document("de", "1")]
    report = e.language_report(MODEL, TOKENIZER, documents, max_length=64)
    assert report["entropy_floor"] is report["excess_loss"] is report["excess_per_document"] is None


def test_token_losses_are_the_charges_of_one_text():
    for text in TEXTS[:3]:
        found = e.token_losses(MODEL, TOKENIZER, text)
        np.testing.assert_allclose(found, charged(text)[0], atol=1e-5)


def test_samples_come_in_the_order_of_the_prompts_whatever_the_last_batch_holds():
    """Five prompts in batches of two: the last is filled up, and what fills it is dropped."""
    prompts = ["a", "b c", "", "gfe", "é"]
    key = jax.random.key(3)
    rows, samples = e.sample(
        MODEL, TOKENIZER, prompts, key, max_prompt_tokens=5, max_new_tokens=6, batch_size=2
    )
    assert rows.shape == (5, 5)
    assert samples.tokens.shape == (5, 6)
    for row, prompt in zip(rows, prompts, strict=True):
        ids = [TOKENIZER.eos_id, *TOKENIZER.encode(prompt)]
        assert row.tolist() == [TOKENIZER.pad_id] * (5 - len(ids)) + ids
    for number, part in enumerate([[0, 1], [2, 3], [4, 4]]):
        alone = generate(
            MODEL, jnp.asarray(rows[part]), jax.random.fold_in(key, number), max_new_tokens=6,
            temperature=1.0, eos_id=TOKENIZER.eos_id, pad_id=TOKENIZER.pad_id,
        )  # fmt: skip
        np.testing.assert_array_equal(samples.tokens[part[0]], alone.tokens[0])
        np.testing.assert_allclose(samples.logprobs[part[0]], alone.logprobs[0], atol=1e-6)


def test_texts_are_the_completions_own_tokens():
    tokens = np.array([[*TOKENIZER.encode("ab"), TOKENIZER.eos_id, 5], TOKENIZER.encode("cdef")])
    mask = np.array([[True, True, True, False], [True] * 4])
    samples = Samples(tokens, mask, np.zeros((2, 4)), np.array([True, False]))
    assert e.texts_of(samples, TOKENIZER) == ["ab", "cdef"]


def test_parse_report_counts_stories_and_each_way_to_fail():
    good = [d.text for d in stories(0, 3, size="small")]
    cut = good[0][: len(good[0]) // 2]
    report = e.parse_report([*good, cut, "walrus"], "small")
    assert report["parse_share"] == pytest.approx(3 / 5)
    assert report["no_end"] == pytest.approx(1 / 5)
    assert report["break"] == pytest.approx(1 / 5)
    assert sum(report.values()) == pytest.approx(1)
