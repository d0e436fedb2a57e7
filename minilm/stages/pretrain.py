"""Pretraining: text to tokenizer to next-token cross-entropy to a model that writes."""

import contextlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from minilm import backend, checkpoint, parallel
from minilm.config import TokenizerConfig
from minilm.files import write_json, write_jsonl
from minilm.losses.language import next_token_cross_entropy
from minilm.metrics import Progress
from minilm.model import Transformer, flops_per_token, hidden_states, logits, parameter_count
from minilm.objective import Chunked, Objective, Term
from minilm.optim import make_optimizer, schedule
from minilm.stages.evaluate import language_report, parse_report, sample, texts_of, token_losses
from minilm.stages.workspace import Workspace
from minilm.step import TrainState, init_state, make_train_step
from minilm.terms import configured
from minilm.text.batches import (
    Batch,
    Batches,
    Growth,
    batch_across,
    batch_of,
    count_tokens,
    growth_of,
    tokenize,
)
from minilm.text.corpora import Split, split
from minilm.text.fables import charges
from minilm.text.overlap import copied_shares
from minilm.text.store import Documents
from minilm.text.tokenizer import train_tokenizer
from minilm.train import fit

MILLION = 10**6
TOKENIZER_SAMPLE = 100 * MILLION  # characters: a byte-pair vocabulary changes little with more
SHOWN = 5 * MILLION  # characters, tokenised in a second or two
SAMPLE_BATCH = 64  # one shape, so that samples during training and at the end share a compilation


def _cross_entropy(outputs, batch: Batch):
    return next_token_cross_entropy(outputs, batch.targets)


def _right(outputs, batch: Batch):
    return (outputs.argmax(-1) == batch.targets).astype(np.float32)


LANGUAGE = Objective(
    (
        Term("cross_entropy", 1.0, _cross_entropy, lambda b: b.weights),
        Term("mean_token_accuracy", 0.0, _right, lambda b: b.weights),
    )
)


def forward(model: Transformer, batch: Batch):
    """Logits of every position."""
    return logits(model, hidden_states(model, batch.tokens, batch.segments))


def forward_of(chunk: int) -> Callable[[Transformer, Batch], Any]:
    """`forward`, or what makes its logits `chunk` positions at a time, if not 0."""
    if not chunk:
        return forward

    def chunked(model: Transformer, batch: Batch):
        hidden = hidden_states(model, batch.tokens, batch.segments)
        return Chunked(hidden, lambda part: logits(model, part), chunk)

    return chunked


def pretrain(ws: Workspace) -> dict:
    """Corpus, tokenizer, training, held-out evaluation. Returns the stage's summary."""
    started = time.monotonic()
    config, folder, seed = ws.config.pretrain, ws.stage("pretrain"), ws.config.seed
    documents = split(ws.config.corpus, seed, ws.out / "cache")
    if checkpoint.latest(folder / "checkpoints") is None:  # else the model knows its ids
        texts = (d.text for d in tokenizer_sample(documents.train, ws.config.tokenizer))
        train_tokenizer(ws.config.tokenizer, texts).save(ws.tokenizer_file)
    tokenizer, length = ws.tokenizer, config.sequence_length
    batches = training_batches(ws, documents.train)
    _tell_corpus(documents, batches, folder)
    write_jsonl(folder / "held_out.jsonl", (d._asdict() for d in documents.held_out))
    optimizer = make_optimizer(config.optimizer, config.steps)
    growth = growth_of(config)
    rows = growth.start // config.accumulation  # larger batches are multiples
    mesh = parallel.make_mesh(ws.config.parallel, ws.config.model, rows)
    objective, balancing = (
        configured(LANGUAGE, "pretrain", ws.config, config.steps),
        ws.config.balance,
    )
    update = make_train_step(
        forward_of(config.logits_chunk),
        objective,
        optimizer,
        accumulation=config.accumulation,
        balancing=balancing,
        ema_decay=config.ema_decay,
        log_layers=config.log_layers,
        mesh=mesh,
    )
    subset = documents.held_out[: config.validation_documents]
    key = jax.random.fold_in(jax.random.key(seed), 7)

    def start() -> TrainState:
        shape = {"compute_dtype": ws.compute_dtype, "rngs": nnx.Rngs(seed)}
        model = Transformer(ws.config.model, tokenizer.vocab_size, **shape)
        return init_state(model, optimizer, objective, balancing, ema_decay=config.ema_decay)

    def step(state: TrainState, k: int):
        state, found = update(state, parallel.read(mesh, batches, k))
        return state, found | ({"batch_size": growth.size(k)} if growth.steps else {})

    def evaluate(state: TrainState) -> dict:
        return language_report(parallel.whole(state.averaged), tokenizer, subset, max_length=length)

    def one_sample(state: TrainState) -> str:
        texts = _write(parallel.whole(state.averaged), ws, key, SAMPLE_BATCH)
        if ws.config.corpus.kind != "fables":
            return texts[0]
        share = parse_report(texts, ws.config.corpus.size)["parse_share"]
        return f"{texts[0]}  ({share:.0%} of {len(texts)} such stories parse)"

    state, record = fit(
        parallel.build(mesh, start),
        step,
        title="pretrain",
        steps=config.steps,
        loop=config,
        folder=folder,
        metadata=ws.metadata("pretrain"),
        files={"tokenizer.json": ws.tokenizer_file},
        track=ws.tracker("pretrain"),
        learning_rate=schedule(config.optimizer, config.steps, config.optimizer.learning_rate),
        tokens_before=lambda k: growth.before(k) * length,
        evaluate=evaluate,
        best="validation_loss",
        patience=config.patience,
        sample=one_sample,
        started=started,
    )
    return _report(parallel.whole(state.averaged), ws, documents, record, key)


def tokenizer_sample(documents: Documents, config: TokenizerConfig) -> Documents:
    """What a tokenizer is trained on: of a huge corpus a part; all of it, where letters count."""
    return documents if config.kind == "characters" else documents.spread(TOKENIZER_SAMPLE)


def training_batches(
    ws: Workspace, documents: Documents, size: int | Growth | None = None, order: int | None = None
) -> Batches:
    """What is trained on, step by step.

    Args:
      size: rows of a batch; None: the config's.
      order: seed of the rows' order; None: the run's. Which rows there are does not depend on it.
    """
    config, seed = ws.config.pretrain, ws.config.seed
    length, cache = config.sequence_length, ws.out / "cache"
    characters = documents.characters
    # What is done in a second needs no line.
    long = characters > SHOWN
    shown = Progress("tokenize, million characters", characters // MILLION) if long else None
    with shown or contextlib.nullcontext():

        def tell(read: int) -> None:
            if shown:
                shown.update(read // MILLION, {})

        rows = tokenize(documents, ws.tokenizer, length, cache=cache, seed=seed, tell=tell)
        tell(characters)
    make = batch_of if config.document_attention else batch_across
    size, order = growth_of(config) if size is None else size, seed if order is None else order
    return Batches(rows, batch_size=size, seed=order, make=make)


def _tell_corpus(documents: Split, batches: Batches, folder: Path) -> None:
    """Writes corpus.json and says the same in a line."""
    tokens = count_tokens(batches.rows)
    characters = documents.train.characters
    report = {**documents.report, "tokens": tokens, "characters_per_token": characters / tokens}
    write_json(folder / "corpus.json", report)
    copies = {"exact": report["exact_duplicates"], "near": report["near_duplicates"]}
    told = "".join(f"; {n:,} {kind} duplicates" for kind, n in copies.items() if n)
    count, held_out = report["training_documents"], report["held_out_documents"]
    width = report["characters_per_token"]
    text = f"{count:,} documents to train on, {tokens:,} tokens of {width:.2f} characters"
    Console().print(f"corpus: {text}; {held_out:,} held out{told}")


def _report(model, ws: Workspace, documents: Split, record: dict, key) -> dict:
    held_out = documents.held_out
    corpus, config, tokenizer = ws.config.corpus, ws.config.pretrain, ws.tokenizer
    folder, length = ws.stage("pretrain"), config.sequence_length
    summary = language_report(model, tokenizer, held_out, max_length=length)
    texts = _write(model, ws, key, config.sample_count)
    write_jsonl(folder / "samples.jsonl", [{"text": t} for t in texts])
    lengths = [len(ids) for ids in tokenizer.stream(d.text for d in held_out)]
    usual = np.argmin([abs(n - min(100, length - 1)) for n in lengths])
    text = held_out[usual].text
    if corpus.kind != "fables":
        text = text[: 4 * length]
    whole = tokenizer.encode(text)
    ids = whole[: length - 1]
    losses = token_losses(model, tokenizer, text)[: len(ids) + (ids == whole)]  # the end's, if any
    loss_map = {"tokens": tokenizer.tokens(ids), "model": losses}
    if corpus.kind == "fables":
        summary |= parse_report(texts, corpus.size)
        exact = charges(text, size=corpus.size)
        ends = np.cumsum([0, *(len(tokenizer.decode([i])) for i in ids)])
        loss_map["exact"] = [float(sum(exact[a:b])) for a, b in itertools.pairwise(ends)]
    write_json(folder / "loss_map.json", loss_map)
    compared = [texts, [d.text for d in held_out]]
    copied, usual = copied_shares(compared, (d.text for d in documents.train))
    speed = record.get("tokens_per_second")
    flops = flops_per_token(ws.config.model, tokenizer.vocab_size, length) * (speed or 0.0)
    return {
        **summary,
        "copied": copied,
        "copied_held_out": usual,
        "parameters": parameter_count(model),
        "vocab_size": tokenizer.vocab_size,
        "held_out_documents": len(held_out),
        "tokens_per_second": speed,
        "flop_utilization": flops / backend.matmul_rate(ws.compute_dtype) / 1e9,
        "seconds": record["seconds"],
    }


def _write(model, ws: Workspace, key, count: int) -> list[str]:
    """`count` samples from the start token alone, temperature 1, no truncation."""
    limits = {"max_prompt_tokens": 1, "max_new_tokens": ws.config.pretrain.max_new_tokens}
    samples = sample(model, ws.tokenizer, [""] * count, key, **limits, batch_size=SAMPLE_BATCH)[1]
    return texts_of(samples, ws.tokenizer)
