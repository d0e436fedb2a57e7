"""Supervised fine-tuning: next-token cross-entropy on the completions of a user's examples."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minilm import parallel
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import read_jsonl
from minilm.losses.language import next_token_cross_entropy
from minilm.model import Transformer
from minilm.optim import make_optimizer, schedule
from minilm.stages.evaluate import batched
from minilm.stages.pretrain import LANGUAGE, forward
from minilm.stages.workspace import Workspace
from minilm.step import TrainState, init_state, make_train_step
from minilm.terms import configured
from minilm.text.batches import Batch, Batches, batch_of, pack
from minilm.text.formats import example
from minilm.text.tokenizer import Tokenizer
from minilm.train import fit


def sft(ws: Workspace) -> dict:
    """Trains the pretrained model on the examples. Returns the stage's summary."""
    config, seed = ws.config.sft, ws.config.seed
    examples = examples_of(ws.config)
    held, rest = split(examples, config.held_out, np.random.default_rng((seed, 11)))
    held_out, train = (packed(x, ws.tokenizer, config.sequence_length) for x in (held, rest))
    steps = -(-len(train) * config.epochs // config.batch_size)
    optimizer = make_optimizer(config.optimizer, steps)
    objective, balancing = configured(LANGUAGE, "sft", ws.config, steps), ws.config.balance
    rows = config.batch_size // config.accumulation
    mesh = parallel.make_mesh(ws.config.parallel, ws.config.model, rows)
    update = make_train_step(
        forward,
        objective,
        optimizer,
        accumulation=config.accumulation,
        balancing=balancing,
        ema_decay=config.ema_decay,
        log_layers=config.log_layers,
        mesh=mesh,
    )
    make = functools.partial(completions_of, vocab_size=ws.tokenizer.vocab_size)
    batches = Batches(train, batch_size=config.batch_size, seed=seed, make=make)

    def start(model: Transformer) -> TrainState:
        return init_state(model, optimizer, objective, balancing, ema_decay=config.ema_decay)

    def step(state: TrainState, k: int):
        return update(state, parallel.read(mesh, batches, k))

    def evaluate(state: TrainState) -> dict[str, float]:
        model = parallel.whole(state.averaged)

        def sums(rows):
            return _sums(model, make(rows))

        loss, tokens = batched(sums, [held_out], config.batch_size).sum(0, np.float64)
        return {"validation_loss": loss / tokens}

    model = ws.load("pretrain", scalar_head=False)
    state, record = fit(
        parallel.build(mesh, start, model),
        step,
        title="sft",
        steps=steps,
        loop=config,
        folder=ws.stage("sft"),
        metadata=ws.metadata("sft"),
        files={"tokenizer.json": ws.tokenizer_file},
        track=ws.tracker("sft"),
        learning_rate=schedule(config.optimizer, steps, config.optimizer.learning_rate),
        tokens_before=lambda k: k * config.batch_size * config.sequence_length,
        evaluate=evaluate,
    )
    before = evaluate(init_state(ws.load("pretrain", scalar_head=False), optimizer))
    return {
        "examples": len(rest),
        "held_out_examples": len(held),
        "validation_loss_before": before["validation_loss"],
        **evaluate(state),
        "seconds": record["seconds"],
    }


def examples_of(config: Config) -> list[tuple[str, str]]:
    """Prompts and completions of the file.

    Raises:
      UserError: no file, fewer than two examples, or a row that is none.
    """
    path = config.sft.file
    if path is None:
        hint = "--sft.file FILE.jsonl, each line with a prompt and a completion"
        raise UserError("there are no examples to fine-tune on", where="sft.file", hint=hint)
    examples = [example(row, f"{path}:{n}") for n, row in enumerate(read_jsonl(Path(path)), 1)]
    if len(examples) < 2:
        problem = "one part of the examples is trained on and one held out"
        raise UserError(problem, where=path, value=len(examples), allowed="at least 2 examples")
    return examples


def split(
    examples: list[tuple[str, str]], share: float, rng: np.random.Generator
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Held-out examples and the others, of two or more: neither is empty.

    No prompt is in both, unless each has more examples than are to be held out: then they are split
    one by one. An example without a prompt counts as one of its own.

    Args:
      share: of the examples that is held out, at most.
    """
    groups: dict[object, list[tuple[str, str]]] = {}
    for number, (prompt, completion) in enumerate(examples):
        groups.setdefault(prompt or number, []).append((prompt, completion))
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    asked = list(groups.values())
    if min(map(len, asked)) > count:
        asked = [[e] for e in examples]
    held_out: list[tuple[str, str]] = []
    rest: list[tuple[str, str]] = []
    for i in rng.permutation(len(asked)):
        fits = len(held_out) + len(asked[i]) <= count
        (held_out if fits else rest).extend(asked[i])
    return held_out, rest


def packed(examples: list[tuple[str, str]], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Rows [N, length + 1] of examples; tokens of a prompt have the vocabulary's size added."""
    prompts, texts = (tokenizer.encode_batch([e[i] for e in examples]) for i in (0, 1))
    rows = [
        np.array([*(i + tokenizer.vocab_size for i in p), *t], np.int32)
        for p, t in zip(prompts, texts, strict=True)
    ]
    return pack(rows, length)


def completions_of(rows: np.ndarray, vocab_size: int) -> Batch:
    """A batch whose loss is on completions and their end-of-text alone."""
    batch = batch_of(rows % vocab_size)
    return batch._replace(weights=batch.weights * (rows[:, 1:] < vocab_size))


@jax.jit
def _sums(model, batch: Any) -> Float[Array, "B 2"]:
    """Of each row: the loss of its completions' tokens, and how many these are."""
    losses = next_token_cross_entropy(forward(model, batch), batch.targets)
    both = losses * batch.weights, jnp.asarray(batch.weights)
    return jnp.stack([jnp.sum(x, axis=1) for x in both], axis=1)
