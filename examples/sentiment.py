"""Sentiment: a text classifier on minilm's transformer overfits, is seen to, and is stopped.

Two sources of five hundred texts each, few enough for some 100,000 parameters to learn by heart:

- *reviews* (synthetic): a film review is an idle sentence and three judgements of a part of the
  film, each of the writer's mood with probability 0.85. One may be turned round ("nobody could call
  the plot dull") or take its first half back ("although the plot was dull, the cast was superb").
  A text's sentiment is that of most of its judgements; the label to train on, a reader's stars,
  says the opposite in one review of ten. Held-out reviews are scored by the expectation over their
  stars: the lowest possible loss is 0.325 nats, and accuracy is about the text's sentiment.
- *manual* (real): passages of twenty words of the language reference that ships with CPython, read
  from files through the `text` corpus. Are they about statements, or about strings and containers?

Training runs in minilm's own loop, with a validation loss every few steps. The stages of a run have
the same curves, and `minilm diagnose` reads them in the same way.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import command, console, picture, show_card
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.table import Table

from minilm import checkpoint, metrics
from minilm.config import (
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    PydocCorpus,
    TextCorpus,
    TokenizerConfig,
)
from minilm.diagnose import Verdict, diagnose, render, should_stop
from minilm.files import write_jsonl
from minilm.losses.classification import binary_cross_entropy
from minilm.model import Transformer, sequence_score
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer, schedule
from minilm.step import init_state, make_train_step
from minilm.text.corpora import pydoc, split
from minilm.text.tokenizer import Tokenizer, train_tokenizer
from minilm.train import fit

WRONG_STARS = 0.1
MOOD = 0.85  # share of the judgements that are of the writer's mood
FLOOR = -(WRONG_STARS * np.log(WRONG_STARS) + (1 - WRONG_STARS) * np.log(1 - WRONG_STARS))
PATIENCE = 4  # evaluations
LENGTH = 48  # tokens
BATCH = 48
HEAD = 0.02
WIDTH = 48

PARTS = ("plot", "cast", "music", "dialogue", "ending", "camera work", "pace", "lighting")
GOOD = ("superb", "moving", "clever", "warm", "gripping", "graceful")
BAD = ("dull", "clumsy", "noisy", "lifeless", "confused", "tedious")
NAMES = ("Ada", "Bruno", "Chloe", "Dario", "Edith", "Farid", "Greta", "Hugo", "Irene", "Jonas")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
IDLE = (
    "{name} and I saw it on {day}.",
    "We went on {day}, since {name} had tickets.",
    "It rained on {day}, so {name} took me along.",
    "On {day} the seats were full, {name} said.",
)
# {a} and {b} are parts of the film, {x} a word of the judgement's sign and {y} one of the opposite.
JUDGEMENTS = (
    "The {a} was {x}.",
    "I found the {a} {x}.",
    "What a {x} {a} it had!",
    "The {a} stayed {x} to the end.",
    "Nobody could call the {a} {y}.",
    "Although the {a} was {y}, the {b} was {x}.",
)
STATEMENTS = (
    "assert", "assignment", "augassign", "break", "compound", "continue", "del", "global", "import",
    "nonlocal", "pass", "raise", "return",
)  # fmt: skip
CONTAINERS = ("formatstrings", "string-methods", "typesmapping", "typesseq")


class Review(NamedTuple):
    text: str
    label: float  # 1 is positive; between 0 and 1 it is a probability


class Batch(NamedTuple):
    """Right-padded texts from start token to end-of-text, where the head reads.

    segments is 1 at the text and 0 at padding.
    """

    tokens: Int[Any, "B T"]
    segments: Int[Any, "B T"]
    last: Int[Any, "B"]
    label: Float[Any, "B"]


class Source(NamedTuple):
    train: Sequence[Review]
    validation: Sequence[Review]
    test: Sequence[Review]
    floor: float | None  # nats, where the process is known


class Sizes(NamedTuple):
    train: int = 500
    held_out: int = 480  # half for validation, half for the test
    steps: int = 240
    evaluate_every: int = 20
    layers: int = 2
    sources: tuple[str, ...] = ("reviews", "manual")


QUICK = Sizes(96, 128, steps=60, evaluate_every=6, layers=1, sources=("reviews",))


def classify(model: Transformer, batch: Batch) -> Float[Array, "B"]:
    """Log-odds of a positive review."""
    return sequence_score(model, batch.tokens, batch.segments, batch.last)


def _each(batch: Batch):
    return jnp.ones(batch.label.shape)


OBJECTIVE = Objective(
    (
        Term("binary_cross_entropy", 1.0, lambda o, b: binary_cross_entropy(o, b.label), _each),
        Term("accuracy", 0.0, lambda o, b: ((o > 0) == (b.label > 0.5)).astype(jnp.float32), _each),
    )
)


@jax.jit
def _measure(model: Transformer, batch: Batch) -> dict[str, Array]:
    totals = OBJECTIVE.totals(classify(model, batch), batch)
    means = OBJECTIVE.means(totals, OBJECTIVE.counts(batch))
    return {name: mean.value for name, mean in means.items()}


class Run(NamedTuple):
    """What training on one source came to."""

    training: dict[int, float]  # the loss by step, mean since the last one
    validation: dict[int, float]
    best: int  # step of the checkpoint that was kept
    stopped: int  # step at which early stopping would have ended it
    verdicts: list[Verdict]
    at_best: dict[str, float]  # test loss and accuracy of that checkpoint, and
    at_last: dict[str, float]  # of the last step
    floor: float | None
    model: Transformer  # the best
    data: Batch  # the training texts


def write_review(random: np.random.Generator) -> Review:
    """A review of the sentiment that its judgements have."""

    def one(words):
        return words[random.integers(len(words))]

    signs = (random.random(3) < MOOD) == random.integers(2)
    sentences = [one(IDLE).format(name=one(NAMES), day=one(DAYS))]
    for sign in signs:
        x, y = (GOOD, BAD) if sign else (BAD, GOOD)
        a, b = random.choice(PARTS, 2, replace=False)
        sentences.append(one(JUDGEMENTS).format(a=a, b=b, x=one(x), y=one(y)))
    return Review(" ".join(sentences), float(signs.sum() >= 2))


def reviews(sizes: Sizes, seed: int) -> Source:
    """Reviews from the grammar: with a reader's stars to train on, with their expectation else."""
    random = np.random.default_rng((seed, 51))
    drawn = [write_review(random) for _ in range(sizes.train + sizes.held_out)]
    expected = [r._replace(label=abs(r.label - WRONG_STARS)) for r in drawn]
    train = [r._replace(label=float(random.random() < r.label)) for r in expected[: sizes.train]]
    rest = expected[sizes.train :]
    return Source(train, rest[::2], rest[1::2], float(FLOOR))


def manual(sizes: Sizes, seed: int) -> Source:
    """Passages of CPython's manual: 1 is about statements, 0 about strings and containers."""
    topics = {d.id.removeprefix("pydoc/"): d.text for d in pydoc(PydocCorpus(), seed)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{label}.jsonl" for label in (0, 1)]
        for file, names in zip(files, (CONTAINERS, STATEMENTS), strict=True):
            write_jsonl(file, ({"text": p} for n in names for p in passages(topics[n])))
        parts = split(TextCorpus(files=tuple(map(str, files)), held_out=0.4), seed)
    train, rest = (
        [Review(d.text, float(Path(d.id.partition("#")[0]).stem)) for d in documents]
        for documents in (parts.train, parts.held_out)
    )
    chosen = np.random.default_rng((seed, 53)).permutation(len(train))[: sizes.train]
    rest = rest[: sizes.held_out]
    return Source([train[i] for i in chosen], rest[::2], rest[1::2], None)


def passages(text: str, words: int = 20) -> list[str]:
    """The text in pieces of so many words."""
    parts = text.split()
    return [" ".join(parts[i : i + words]) for i in range(0, len(parts) - words, words)]


SOURCES = {"reviews": reviews, "manual": manual}


def batch_of(texts: Sequence[Review], tokenizer: Tokenizer, length: int) -> Batch:
    """All of the texts; a longer one is cut before its end-of-text."""
    end = tokenizer.eos_id
    rows = [
        [end, *ids[: length - 2], end] for ids in tokenizer.encode_batch([t.text for t in texts])
    ]
    tokens, segments = np.full((2, len(rows), length), tokenizer.pad_id, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], segments[n, : len(row)] = row, 1
    last = np.array([len(row) - 1 for row in rows], np.int32)
    return Batch(tokens, segments, last, np.array([t.label for t in texts], np.float32))


def train(source: Source, sizes: Sizes, folder: Path, title: str, seed: int = 0) -> Run:
    """Trains past the best step, keeps that step's checkpoint, and asks what the curves say."""
    tokenizer = train_tokenizer(TokenizerConfig(), (r.text for r in source.train))
    data, validation, test = (batch_of(part, tokenizer, LENGTH) for part in source[:3])
    optimizer = OptimizerConfig(
        learning_rate=2e-3, beta2=0.99, warmup_steps=20, schedule="constant"
    )
    every = sizes.evaluate_every
    loop = LoopConfig(
        optimizer=optimizer, log_every=5, evaluate_every=every, checkpoint_every=every,
        keep_checkpoints=1,
    )  # fmt: skip
    updates = make_optimizer(optimizer, sizes.steps)
    update = make_train_step(classify, OBJECTIVE, updates)
    config = ModelConfig(
        num_layers=sizes.layers, embed_dim=WIDTH, num_heads=3, num_kv_heads=3, head_dim=16,
        mlp_dim=128,
    )  # fmt: skip
    model = Transformer(config, tokenizer.vocab_size, scalar_head=True, rngs=nnx.Rngs(seed))
    # Through RMSNorm, small embeddings get large gradients: at pretraining's 0.02 the diagnosis
    # says "exploding gradients", and clipping decides every step.
    model.embed_tokens[...] = 20 * model.embed_tokens[...]
    # A random head sends gradient into the layers from the first step on; a zero one would not.
    head = HEAD * jax.random.normal(jax.random.key(seed), (WIDTH,))
    model.score[...] = head  # pyright: ignore[reportOptionalSubscript]

    def step(state, k):
        rows = np.random.default_rng((seed, 52, k)).permutation(len(data.label))[:BATCH]
        return update(state, jax.tree.map(lambda x: x[rows], data))

    def evaluate(state):
        found = _measure(state.model, validation)
        return {
            "validation_loss": float(found["binary_cross_entropy"]),
            "validation_accuracy": float(found["accuracy"]),
        }

    state, _ = fit(
        init_state(model, updates),
        step,
        title=title,
        steps=sizes.steps,
        loop=loop,
        folder=folder,
        metadata={},
        files={},
        learning_rate=schedule(optimizer, sizes.steps, optimizer.learning_rate),
        evaluate=evaluate,
        best="validation_loss",
    )
    records = metrics.read(folder / "metrics.jsonl")
    curve = {r["step"]: r["validation_loss"] for r in records if r["kind"] == "eval"}
    steps, losses = list(curve), list(curve.values())
    training = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    ends = (n for n in range(1, len(steps) + 1) if should_stop(steps[:n], losses[:n], PATIENCE))
    kept = {checkpoint.metadata(p)["best"]: p for p in (folder / "checkpoints").glob("step_*")}
    best = checkpoint.restore(kept[min(kept)], state.model, prefix="model")
    at_best, at_last = (
        {name: float(value) for name, value in _measure(m, test).items()}
        for m in (best, state.model)
    )
    return Run(
        training=training,
        validation=curve,
        best=checkpoint.metadata(kept[min(kept)])["step"],
        stopped=steps[next(ends, len(steps)) - 1],
        verdicts=diagnose(records),
        at_best=at_best,
        at_last=at_last,
        floor=source.floor,
        model=best,
        data=data,
    )


def figures(sizes: Sizes = Sizes(), seed: int = 0) -> dict[str, Run]:  # noqa: B008  immutable
    with tempfile.TemporaryDirectory() as folder:
        return {
            name: train(SOURCES[name](sizes, seed), sizes, Path(folder) / name, name, seed)
            for name in sizes.sources
        }


def table(found: dict[str, Run]) -> Table:
    out = Table(
        "source", "model of", "step", "training loss", "test loss", "test accuracy", "least loss",
        title="sentiment: the same run, stopped early and at its end (nats a text)",
    )  # fmt: skip
    for name, run in found.items():
        for kind, step, at in (
            ("the best step", run.best, run.at_best),
            ("the last step", max(run.training), run.at_last),
        ):
            losses = (f"{run.training[step]:.3f}", f"{at['binary_cross_entropy']:.3f}")
            floor = f"{run.floor:.3f}" if run.floor else "unknown"
            cells = (*losses, f"{at['accuracy']:.1%}", floor)
            out.add_row(name, kind, str(step), *cells)
    return out


def drawing(found: dict[str, Run], path: Path) -> None:
    """The curves, the best step, and where early stopping would have ended it."""
    with picture(path) as figure:
        for ax, (name, run) in zip(
            figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
        ):
            ax.plot(*zip(*run.training.items(), strict=True), label="training")
            ax.plot(*zip(*run.validation.items(), strict=True), label="validation")
            ax.axvline(run.best, color="C2", ls=":", label="best step")
            ax.axvline(run.stopped, color="C3", ls=":", label="early stopping")
            if run.floor:
                ax.axhline(run.floor, color="0.3", ls="--", lw=1, label="least possible")
            ax.set(title=name, xlabel="step", ylabel="nats a text", ylim=(0, None))
            ax.legend(fontsize=7)


def study(out: Path, quick: bool) -> dict[str, Run]:
    """Sentiment: a classifier overfits; the diagnosis says so, early stopping saves what it had."""
    found = figures(QUICK if quick else Sizes())
    for name, run in found.items():
        outputs = np.asarray(jax.jit(classify)(run.model, run.data))
        wrong = (outputs > 0) != (run.data.label > 0.5)
        groups = {"texts it has wrong": wrong, "texts it has right": ~wrong}
        console.print(f"\n{name}, training texts at the best step:")
        show_card(name, run.model, OBJECTIVE, run.data, groups, classify)
        console.print(render(run.verdicts))
        console.print(f"early stopping, patience {PATIENCE}: at step {run.stopped}")
    drawing(found, out / "sentiment.svg")
    console.print(table(found))
    return found


if __name__ == "__main__":
    command(study)
