"""Makes the bank of labelled training curves that the diagnosis is tested on.

uv run python benchmarks/curve_bank.py [--only LABEL ...] [--seeds N ...] [--out FOLDER]

Every file comes from training minilm's own model with its own step, and has one injected cause, or
none (`healthy`). Its name is LABEL-SEED.csv: even seeds are for setting thresholds, odd ones for
reporting.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from minilm import backend
from minilm.config import (
    BackendConfig,
    FablesCorpus,
    ModelConfig,
    OptimizerConfig,
    PydocCorpus,
    TokenizerConfig,
)
from minilm.model import Transformer
from minilm.optim import make_optimizer, schedule
from minilm.stages.evaluate import language_report
from minilm.stages.pretrain import LANGUAGE, forward
from minilm.step import TrainState, init_state, make_train_step
from minilm.text.batches import Batch, Batches, pack
from minilm.text.corpora import split
from minilm.text.store import Document, Documents
from minilm.text.tokenizer import Tokenizer, train_tokenizer

BANK = Path(__file__).parents[1] / "tests/data/curves"
SEEDS = range(6)
LENGTH, BATCH, RATE, STEPS = 64, 8, 1e-2, 300
MODELS = {
    "small": ModelConfig(
        num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64
    ),
    "large": ModelConfig(
        num_layers=2, embed_dim=48, num_heads=3, num_kv_heads=3, head_dim=16, mlp_dim=96
    ),
    "starved": ModelConfig(
        num_layers=1, embed_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, mlp_dim=4
    ),
}

type Rates = Callable[[np.ndarray], np.ndarray]  # the rate of each step -> another
type Spoil = Callable[[Batch, int], Batch]  # (batch, step) -> batch


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run; the defaults are a healthy one, and an injected cause is what differs from them."""

    model: str = "small"
    world: str = "small"  # of WORLDS
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    rate: float = RATE
    steps: int = STEPS
    log_every: int = 5
    documents: int | None = None  # of the training half; None: all
    period: int | None = None  # steps after which the loader hands out the same batches again
    rates: Rates = lambda rates: rates
    log_rates: bool = True  # log what the optimizer was given, else what it should have been
    batch: Spoil = lambda batch, step: batch
    start: Callable[[Transformer], Transformer] = lambda model: model
    backward: float = 1.0  # what the gradient is multiplied by between logits and model
    frozen: str | None = None  # parameters with this in their path stay as initialised
    weight_decay: float = 0.1
    judged_on: str | None = None  # the world of the validation; None: the run's own
    unit: float = 1.0  # what the validation loss is multiplied by


class World(NamedTuple):
    """Documents and a tokenizer."""

    train: Documents
    held_out: list[Document]
    tokenizer: Tokenizer


WORLDS: dict[str, Any] = {
    "small": (FablesCorpus(size="small", documents=3000, held_out=0.1), "bpe"),
    "full": (FablesCorpus(size="full", documents=600, held_out=0.2), "bpe"),
    "pydoc": (PydocCorpus(held_out=0.1), "bytes"),
}


@functools.cache
def world(name: str, seed: int) -> World:
    corpus, kind = WORLDS[name]
    train, held_out, _ = split(corpus, seed)
    texts = (d.text for d in train)
    return World(
        train, held_out, train_tokenizer(TokenizerConfig(kind=kind, vocab_size=384), texts)
    )


@functools.cache
def rows_of(name: str, seed: int, documents: int | None) -> np.ndarray:
    train, _, tokenizer = world(name, seed)
    texts = [d.text for d in train[:documents]]
    return pack([np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts)], LENGTH)


class Programmed(NamedTuple):
    """Optimizer state with the rates of all steps in it: one compiled step serves every rate."""

    inner: optax.OptState
    rates: jax.Array
    count: jax.Array


def programmed(
    rates: Sequence[float] | np.ndarray, config: OptimizerConfig, *, frozen: str | None = None
):
    """minilm's optimizer at rate 1, its updates times the rate of the step: linear in it."""
    unit = config.model_copy(
        update={"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0}
    )
    inner = make_optimizer(unit, 1)

    def init(params):
        return Programmed(inner.init(params), jnp.asarray(rates, jnp.float32), jnp.int32(0))

    def update(updates, state, params=None):
        updates, after = inner.update(updates, state.inner, params)
        rate = state.rates[state.count]

        def move(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return 0.0 * x if frozen and frozen in name else rate * x

        updates = jax.tree_util.tree_map_with_path(move, updates)
        return updates, Programmed(after, state.rates, state.count + 1)

    return optax.GradientTransformation(init, update)


@functools.cache
def update_of(backward: float, frozen: str | None, weight_decay: float):
    """The training step; JAX compiles it once for each shape of model and batch."""

    def scaled(model: Transformer, batch: Batch):
        logits = forward(model, batch)
        kept = jax.lax.stop_gradient(logits)
        return kept + backward * (logits - kept)  # the same values, another gradient

    optimizer = programmed([], OptimizerConfig(weight_decay=weight_decay), frozen=frozen)
    return make_train_step(forward if backward == 1 else scaled, LANGUAGE, optimizer)


def jittered(rate: float, seed: int) -> float:
    """Each seed has a rate of its own, within a quarter of the recipe's."""
    return rate * 1.25 ** np.random.default_rng((seed, 9)).uniform(-1, 1)


def language_run(recipe: Recipe, seed: int) -> list[dict]:
    """Trains and returns the records as `minilm.train.fit` would log them."""
    home = world(recipe.world, seed)
    judged = world(recipe.judged_on or recipe.world, seed)
    batches = Batches(rows_of(recipe.world, seed, recipe.documents), batch_size=BATCH, seed=seed)
    rate = jittered(recipe.rate, seed)
    options = OptimizerConfig(
        learning_rate=rate, schedule=recipe.schedule, warmup_steps=10,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip
    horizon = max(STEPS, recipe.steps)  # a run that is too short breaks its schedule off
    should = np.asarray(schedule(options, horizon, rate)(np.arange(horizon)), np.float64)
    rates = recipe.rates(should.copy())
    model = Transformer(MODELS[recipe.model], home.tokenizer.vocab_size, rngs=nnx.Rngs(seed))
    state = init_state(recipe.start(model), programmed(rates, options))
    update = update_of(recipe.backward, recipe.frozen, recipe.weight_decay)

    def step(state: TrainState, k: int):
        place = k % recipe.period if recipe.period else k
        return update(state, recipe.batch(batches[place], k))

    def evaluate(state: Any) -> dict:
        report = language_report(
            state.model, home.tokenizer, judged.held_out[:96], max_length=LENGTH
        )
        loss = report["validation_loss"] or 0.0
        return {"validation_loss": loss * recipe.unit, "entropy_floor": report["entropy_floor"]}

    logged = rates if recipe.log_rates else should
    return record(state, step, recipe.steps, recipe.log_every, logged, evaluate, recipe.steps // 10)


LOGGED = ("loss", "grad_norm", "skipped_in_a_row")


def record(state, step, steps: int, log_every: int, rates, evaluate, evaluate_every) -> list[dict]:
    """minilm's loop without checkpoints: means of each window as totals over counts."""
    records, window = [{"step": 0, **evaluate(state)}], []
    for k in range(steps):
        state, metrics = step(state, k)
        window.append(metrics)
        if (k + 1) % log_every == 0:
            sums = jax.device_get(functools.reduce(_added, window))
            named = {name: float(m.value) for name, m in sums.items()}
            records.append({"step": k + 1, **named, "learning_rate": float(rates[k])})
            window = []
        if (k + 1) % evaluate_every == 0:
            records.append({"step": k + 1, **evaluate(state)})
    return records


def _added(a: Mapping, b: Mapping) -> dict:
    return {name: a[name] + b[name] for name in a}


# The causes


def constant(value: float, start: int) -> Rates:
    """From `start` on the rate is `value` times the peak."""
    return lambda rates: np.where(np.arange(len(rates)) < start, rates, value * rates.max())


def bursts(factor: float, *at: int) -> Rates:
    """Single steps at `factor` times the peak rate."""
    return lambda rates: np.where(np.isin(np.arange(len(rates)), at), factor * rates.max(), rates)


def garbage(*at: int) -> Spoil:
    """At some steps random tokens come instead of text."""

    def spoil(batch: Batch, step: int) -> Batch:
        if step not in at:
            return batch
        noise = np.random.default_rng(step).integers(2, 250, batch.targets.shape, np.int32)
        return batch._replace(targets=noise)

    return spoil


def broken_labels(*at: int) -> Spoil:
    """At some steps a token lies beyond the vocabulary, whose loss is NaN."""

    def spoil(batch: Batch, step: int) -> Batch:
        targets = batch.targets.copy()
        if step in at:
            targets[0, 0] = 100_000
        return batch._replace(targets=targets)

    return spoil


def gains(factor: float, *names: str) -> Callable[[Transformer], Transformer]:
    """The parameters whose path has one of the names in it, times a factor."""

    def start(model: Transformer) -> Transformer:
        def scale(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            return x * factor if any(n in name for n in names) else x

        return jax.tree_util.tree_map_with_path(scale, model)

    return start


VARIANTS: dict[str, tuple[Recipe, Recipe, Recipe]] = {  # seeds 0 and 1, 2 and 3, 4 and 5
    "overfitting": (
        Recipe(model="large", documents=32, schedule="constant"),
        Recipe(model="large", documents=48),
        Recipe(documents=20, schedule="cosine"),
    ),
    "repeated_data": (
        Recipe(period=12, log_every=4),
        Recipe(period=16, log_every=4, model="large"),
        Recipe(period=20, log_every=4, schedule="cosine"),
    ),
    "underfitting": (
        Recipe(model="starved"),
        Recipe(frozen="layers"),
        Recipe(frozen="self_attn", model="large"),
    ),
    "diverging": (
        Recipe(rates=lambda r: RATE * 1.025 ** np.arange(len(r))),
        Recipe(rates=constant(-1.0, 150), model="large"),
        Recipe(rates=constant(100.0, 120)),
    ),
    "spikes": (
        Recipe(rates=bursts(30.0, 71, 138, 213)),
        Recipe(batch=garbage(62, 118, 171, 240), model="large"),
        Recipe(rates=bursts(-20.0, 90, 200), schedule="cosine"),
    ),
    "learning_rate_too_high": (
        Recipe(rate=1.0),
        Recipe(rate=0.7, model="large", schedule="constant"),
        Recipe(rate=2.0, schedule="cosine"),
    ),
    "learning_rate_too_low": (
        Recipe(rate=1e-4),
        Recipe(rate=5e-5, model="large", schedule="constant"),
        Recipe(rate=3e-5, schedule="cosine"),
    ),
    "vanishing_gradients": (
        Recipe(backward=1e-11),
        Recipe(start=gains(0.0, "embed_tokens"), model="large"),
        Recipe(backward=1e-13, schedule="cosine"),
    ),
    "exploding_gradients": (
        Recipe(backward=1e4),
        Recipe(start=gains(100.0, "norm"), model="large"),
        Recipe(start=gains(200.0, "norm"), schedule="cosine"),
    ),
    "validation_mismatch": (
        Recipe(judged_on="full"),
        Recipe(unit=1 / np.log(2), model="large"),
        Recipe(judged_on="pydoc", schedule="cosine"),
    ),
    "nonfinite": (
        Recipe(batch=broken_labels(100, 101, 102, 170)),
        Recipe(rates=bursts(np.inf, 140), model="large"),
        Recipe(batch=broken_labels(*range(200, 300))),
    ),
    "plateau": (
        Recipe(rates=constant(1e-4, 50)),
        Recipe(rates=constant(0.0, 60), model="large", log_rates=False),
        Recipe(rates=constant(3e-4, 40), schedule="cosine"),
    ),
    "too_short": (
        Recipe(steps=60, log_every=1),
        Recipe(steps=50, log_every=1, model="large"),
        Recipe(steps=80, log_every=2, schedule="constant"),
    ),
}
HEALTHY: tuple[Recipe, ...] = (  # a seed each
    Recipe(), Recipe(), Recipe(model="large"), Recipe(model="large"),
    Recipe(schedule="cosine"), Recipe(schedule="cosine"), Recipe(schedule="wsd"),
    Recipe(schedule="wsd"), Recipe(rate=5e-3, schedule="constant", model="large"),
    Recipe(rate=3e-3, schedule="constant", steps=600, log_every=10),
    Recipe(world="pydoc", steps=900, log_every=15),
    Recipe(world="pydoc", steps=900, log_every=15, model="large"), Recipe(rate=5e-3, model="large"),
    Recipe(rate=2e-2), Recipe(log_every=10), Recipe(log_every=10, schedule="cosine"),
)  # fmt: skip


def language_recipes() -> Iterator[tuple[str, int, Callable[[], list[dict]]]]:
    """(label, seed, what makes the records) of every run."""
    for label, variants in VARIANTS.items():
        for seed in SEEDS:
            yield label, seed, functools.partial(language_run, variants[seed // 2], seed)
    for seed, recipe in enumerate(HEALTHY):
        yield "healthy", seed, functools.partial(language_run, recipe, seed)


def write(path: Path, records: list[dict]) -> None:
    """One small CSV; columns that say nothing (no update was skipped) are left out."""
    # A training record's names come first: it has the most.
    ordered = sorted(records, key=len, reverse=True)
    said = [name for r in ordered for name, value in r.items() if value is not None]
    names = dict.fromkeys(["step", *said])
    names.pop("cross_entropy", None)  # the same as the loss
    names.pop("mean_token_accuracy", None)
    if not any(r.get("skipped_in_a_row") for r in records):
        names.pop("skipped_in_a_row", None)
    lines = [",".join(names)]
    for r in records:
        cells = (r.get(name) for name in names)
        lines.append(",".join("" if c is None else f"{c:.4g}" for c in cells))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    from curve_bank_rl import policy_recipes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=None, metavar="LABEL")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, metavar="N")
    parser.add_argument("--out", type=Path, default=BANK)
    args = parser.parse_args()
    backend.configure(BackendConfig(compute_dtype="float32", xla_flags="none"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    for label, seed, make in [*language_recipes(), *policy_recipes()]:
        if (args.only and label not in args.only) or (args.seeds and seed not in args.seeds):
            continue
        start, path = time.perf_counter(), args.out / f"{label}-{seed:02}.csv"
        write(path, make())
        print(f"{path.name}  {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
