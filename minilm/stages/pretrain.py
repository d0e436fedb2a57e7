"""Pretraining: text to tokenizer to next-token cross-entropy to a model that writes."""

import jax
import numpy as np
from flax import nnx

from minilm.losses.language import next_token_cross_entropy
from minilm.model import Transformer, hidden_states, logits
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer, schedule
from minilm.stages.evaluate import language_report, parse_report, sample, texts_of, token_losses
from minilm.stages.workspace import Workspace, write_json, write_jsonl
from minilm.text.batches import Batch, Batches, tokenize
from minilm.text.corpora import Document, split
from minilm.text.fables import charges
from minilm.text.tokenizer import Tokenizer, train_tokenizer
from minilm.train import TrainState, fit, init_state, make_train_step

SAMPLE_BATCH = 64  # one shape, so that samples during training and at the end share a compilation

LANGUAGE = Objective(
    (
        Term(
            "cross_entropy",
            1.0,
            lambda outputs, batch: next_token_cross_entropy(outputs, batch.targets),
            lambda batch: batch.weights,
        ),
        Term(
            "mean_token_accuracy",
            0.0,
            lambda outputs, batch: (outputs.argmax(-1) == batch.targets).astype(np.float32),
            lambda batch: batch.weights,
        ),
    )
)


def forward(model: Transformer, batch: Batch):
    """Logits of every position."""
    return logits(model, hidden_states(model, batch.tokens, batch.segments))


def pretrain(ws: Workspace) -> dict:
    """Corpus, tokenizer, training, held-out evaluation. Returns the stage's summary."""
    config, folder = ws.config, ws.stage("pretrain")
    documents = split(config.corpus, config.seed)
    if not ws.tokenizer_file.exists():
        train_tokenizer(config.tokenizer, (d.text for d in documents.train)).save(ws.tokenizer_file)
    tokenizer = ws.tokenizer
    length = config.pretrain.sequence_length
    rows = tokenize(documents.train, tokenizer, length, cache=ws.out / "cache", seed=config.seed)
    write_jsonl(folder / "held_out.jsonl", [d._asdict() for d in documents.held_out])
    batches = Batches(rows, batch_size=config.pretrain.batch_size, seed=config.seed)
    optimizer = make_optimizer(config.pretrain.optimizer, config.pretrain.steps)
    model = Transformer(
        config.model,
        tokenizer.vocab_size,
        compute_dtype=ws.compute_dtype,
        rngs=nnx.Rngs(config.seed),
    )
    update = make_train_step(
        forward, LANGUAGE, optimizer, accumulation=config.pretrain.accumulation
    )
    subset = documents.held_out[: config.pretrain.validation_documents]
    key = jax.random.fold_in(jax.random.key(config.seed), 7)

    def step(state: TrainState, k: int):
        return update(state, batches[k])

    def evaluate(state: TrainState) -> dict:
        return language_report(state.model, tokenizer, subset, max_length=length)

    def one_sample(state: TrainState) -> str:
        texts = _write(state.model, ws, tokenizer, key, SAMPLE_BATCH)
        if config.corpus.kind != "fables":
            return texts[0]
        share = parse_report(texts, config.corpus.size)["parse_share"]
        return f"{texts[0]}  ({share:.0%} of {len(texts)} such stories parse)"

    state, record = fit(
        init_state(model, optimizer),
        step,
        title="pretrain",
        steps=config.pretrain.steps,
        loop=config.pretrain,
        folder=folder,
        metadata=ws.metadata("pretrain"),
        files={"tokenizer.json": ws.tokenizer_file},
        learning_rate=schedule(
            config.pretrain.optimizer,
            config.pretrain.steps,
            config.pretrain.optimizer.learning_rate,
        ),
        tokens_per_step=config.pretrain.batch_size * length,
        evaluate=evaluate,
        best="validation_loss",
        sample=one_sample,
    )
    return _report(state.model, ws, tokenizer, documents.held_out, record, key)


def _report(model, ws: Workspace, tokenizer, held_out: list[Document], record: dict, key) -> dict:
    config, folder = ws.config, ws.stage("pretrain")
    length = config.pretrain.sequence_length
    summary = language_report(model, tokenizer, held_out, max_length=length)
    texts = _write(model, ws, tokenizer, key, config.pretrain.sample_count)
    write_jsonl(folder / "samples.jsonl", [{"text": t} for t in texts])
    fables = config.corpus.kind == "fables"
    if fables:
        summary |= parse_report(texts, config.corpus.size)
    shown = min(held_out, key=lambda d: abs(len(tokenizer.encode(d.text)) - 100))
    text = shown.text[: 4 * length] if not fables else shown.text
    ids = tokenizer.encode(text)[: length - 1]
    pieces = [tokenizer.decode([i]) for i in ids]
    loss_map = {"tokens": tokenizer.tokens(ids), "model": token_losses(model, tokenizer, text)}
    if fables:
        exact = charges(text, size=config.corpus.size)
        ends = np.cumsum([len(p) for p in pieces])
        loss_map["exact"] = [
            float(sum(exact[e - len(p) : e])) for e, p in zip(ends, pieces, strict=True)
        ]
    write_json(folder / "loss_map.json", loss_map)
    return {
        **summary,
        "parameters": sum(x.size for x in jax.tree.leaves(model)),
        "vocab_size": tokenizer.vocab_size,
        "held_out_documents": len(held_out),
        "tokens_per_second": record.get("tokens_per_second"),
        "seconds": record["seconds"],
    }


def _write(model, ws: Workspace, tokenizer: Tokenizer, key, count: int) -> list[str]:
    """`count` samples from the start token alone, temperature 1, no truncation."""
    _, samples = sample(
        model,
        tokenizer,
        [""] * count,
        key,
        max_prompt_tokens=1,
        max_new_tokens=ws.config.pretrain.max_new_tokens,
        batch_size=SAMPLE_BATCH,
    )
    return texts_of(samples, tokenizer)
