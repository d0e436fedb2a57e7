"""Measuring a language model: held-out loss document by document, sampled texts, how they parse."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from minilm.generate import Samples, generate, left_pad
from minilm.losses.language import next_token_cross_entropy
from minilm.model import Transformer, hidden_states, logits
from minilm.text.batches import Batch, alone
from minilm.text.fables import parse
from minilm.text.store import Document
from minilm.text.tokenizer import Tokenizer


class DocumentLosses(NamedTuple):
    """Per document: total nats, predicted tokens (its end-of-text included), right guesses."""

    nats: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


@jax.jit
def _row_losses(model: Transformer, batch: Batch):
    scores = logits(model, hidden_states(model, batch.tokens, batch.segments))
    losses = next_token_cross_entropy(scores, batch.targets) * batch.weights
    right = jnp.where(jnp.argmax(scores, axis=-1) == batch.targets, batch.weights, 0.0)
    return losses, jnp.sum(batch.weights, axis=1), jnp.sum(right, axis=1)


def document_losses(
    model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int
) -> DocumentLosses:
    """Each document scored alone, from the start token, its own end-of-text included."""
    totals = np.zeros((3, len(texts)))
    tokens = tokenizer.stream(texts)
    for batch, owners in alone(tokens, batch_size=32, max_length=max_length, ids=tokenizer):
        losses, counts, right = jax.device_get(_row_losses(model, batch))
        real = owners >= 0
        for total, rows in zip(totals, (losses.sum(1), counts, right), strict=True):
            np.add.at(total, owners[real], rows[real].astype(np.float64))
    return DocumentLosses(*totals)


def language_report(
    model: Transformer, tokenizer: Tokenizer, documents: Sequence[Document], *, max_length: int
) -> dict[str, float | None]:
    """Held-out metrics over whole documents; losses in nats a token.

    `entropy_floor` and the excess over it are None where a document lacks its log-probability.
    """
    texts = [d.text for d in documents]
    losses = document_losses(model, tokenizer, texts, max_length=max_length)
    nats, count = losses.nats.sum(), losses.tokens.sum()
    loss = nats / count
    known = [d.logprob for d in documents if d.logprob is not None]
    floor = -sum(known) / count if len(known) == len(documents) else None
    return {
        "validation_loss": loss,
        "validation_nats_per_character": nats / sum(map(len, texts)),
        "validation_bits_per_byte": nats / np.log(2) / sum(len(t.encode()) for t in texts),
        "perplexity": float(np.exp(min(loss, 700.0))),
        "accuracy": losses.correct.sum() / count,
        "entropy_floor": floor,
        "excess_loss": None if floor is None else loss - floor,
        "excess_per_document": None if floor is None else (loss - floor) * count / len(texts),
    }


def token_losses(model: Transformer, tokenizer: Tokenizer, text: str) -> list[float]:
    """What the loss charges for each token of a text and for its end-of-text, in nats."""
    ids = tokenizer.encode(text)
    length = -(-(len(ids) + 1) // 32) * 32
    ((batch, _),) = alone([ids], batch_size=1, max_length=length, ids=tokenizer)
    return [float(x) for x in jax.device_get(_row_losses(model, batch)[0])[0][: len(ids) + 1]]


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    key: jax.Array,
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> tuple[np.ndarray, Samples]:
    """Prompts as left-padded rows [N, P], start token first, and their completions, as NumPy."""
    rows = prompt_rows(prompts, tokenizer, max_prompt_tokens)
    numbers = itertools.count()

    def part(prompts):
        return generate(
            model,
            jnp.asarray(prompts),
            jax.random.fold_in(key, next(numbers)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )

    return rows, batched(part, [rows], batch_size)


def prompt_rows(prompts: Sequence[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Prompts as left-padded rows [N, P], start token first."""
    encoded = [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    return left_pad(encoded, tokenizer.pad_id, length)


def batched(function: Callable, arrays: Sequence, size: int):
    """`function` over slices of `size` rows, so one compilation serves all; its results joined.

    The last slice is filled up with its last row, and what that row gives is dropped.
    """
    results = []
    for start in range(0, len(arrays[0]), size):
        parts = [x[start : start + size] for x in arrays]
        count = len(parts[0])
        parts = [np.concatenate([x, np.repeat(x[-1:], size - count, axis=0)]) for x in parts]
        results.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], function(*parts)))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *results)


def right_pad(
    rows: Sequence[Sequence[int]], count: int, width: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Tokens, segments and the last real position of each row (0 if empty), for B = `count`."""
    tokens, segments = np.zeros((2, count, width), np.int32)
    last = np.zeros(count, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], segments[n, : len(row)] = row, 1
        last[n] = max(len(row) - 1, 0)
    return tokens, segments, last


def texts_of(samples: Samples, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(t[m]) for t, m in zip(samples.tokens, samples.mask, strict=True)]


def parse_report(texts: Sequence[str], size: str) -> dict[str, float]:
    """Shares of texts that parse, and of each way to fail."""
    failures = [parse(text, size=size).failure for text in texts]
    share = {name: failures.count(name) / len(texts) for name in ("slip", "break", "no_end")}
    return {"parse_share": failures.count(None) / len(texts), **share}
