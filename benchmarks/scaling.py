"""How fast a training step is by size, length and batch, and how the loss falls with compute.

    uv run python benchmarks/scaling.py [--config CONFIG] [--plot FILE] [--KEY VALUE ...]

Models of one depth and several widths are trained with the config's optimizer at a constant rate.
From each, runs of several budgets branch off whose rate falls to zero over the last fifth, so that
long and short runs share most of their steps: Hägele et al. (2024), arXiv:2405.18392. Through the
losses go two laws: L(C) = E + a C^−b on the runs that no cheaper one beats, and Chinchilla's
L(N, D) = E + A N^−α + B D^−β on all: Hoffmann et al. (2022), arXiv:2203.15556, section 3.3.

N counts parameters without the embedding, D the positions trained on, C all operations of a step
(`minilm.model.flops_per_token`). On fables E is known: the entropy of the held-out stories.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import alternate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from scipy.optimize import minimize
from scipy.special import huber, logsumexp, softmax
from train_step import prepare

from minilm import backend
from minilm.config import Config, OptimizerConfig
from minilm.configfile import load
from minilm.diagnose.curves import Curve
from minilm.diagnose.fits import PowerLaw, fit_power_law
from minilm.model import Transformer, flops_per_token, parameter_count
from minilm.optim import make_optimizer
from minilm.stages.evaluate import language_report
from minilm.stages.pretrain import LANGUAGE, forward
from minilm.step import TrainState, init_state, make_train_step
from minilm.text.batches import Batches, pack
from minilm.text.corpora import split
from minilm.text.tokenizer import train_tokenizer

HEAD = 32  # width of an attention head: wider models have more of them
DECAY = 0.2  # share of a run's steps in which its rate falls
DELTA = 1e-3  # of the Huber loss, as in Hoffmann et al.
# One fable a row, or the small models would be all attention; a warm-up for the shortest run.
BASE = (
    "--pretrain.sequence-length 112 --pretrain.batch-size 16 --pretrain.optimizer.warmup-steps 20"
)
QUICK = (
    "--corpus.size small --corpus.documents 300 --corpus.held-out 0.1 "
    "--tokenizer.vocab-size 300 --model.num-layers 1 --pretrain.optimizer.name adamw"
)


class Run(NamedTuple):
    """One trained model.

    Attributes:
      floor: exact entropy of the text it was judged on; None where it is unknown.
    """

    parameters: int
    tokens: int
    flops: float
    loss: float
    floor: float | None


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config", type=Path, default="configs/fables.toml", help="corpus, optimizer")
    add("--dims", type=int, nargs="+", default=[32, 64, 96, 128, 192], help=f"multiples of {HEAD}")
    add("--steps", type=int, nargs="+", default=[1600, 1200, 800, 500, 320],
        help="of each width's longest run")  # fmt: skip
    add("--budgets", type=int, default=4, help="runs a width, each half as long (default: 4)")
    add("--lengths", type=int, nargs="+", default=[112, 304], help="of the timed steps")
    add("--batches", type=int, nargs="+", default=[4, 16], help="of the timed steps")
    add("--rounds", type=int, default=5, help="turns of each timed step; 0: none (default: 5)")
    add("--seconds", type=float, default=0.5, help="of a turn (default: 0.5)")
    add("--resamples", type=int, default=200, help="of the bootstrap (default: 200)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--plot", type=Path, metavar="FILE", help="the same as a picture, .svg or .png")
    add("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args, overrides = parser.parse_known_args()
    if args.quick:
        args.dims, args.steps, args.budgets = [32, 64], [24, 16], 2
        args.lengths, args.batches = [16], [2]
        args.rounds, args.seconds, args.resamples = min(args.rounds, 2), 0.02, 4
    base = f"{BASE} {QUICK}" if args.quick else BASE
    if len(args.steps) != len(args.dims) or any(dim % HEAD for dim in args.dims):
        parser.error(f"--dims are multiples of {HEAD}, and --steps has one number for each")
    return args, [*base.split(), *overrides]


def of_width(config: Config, dim: int, **pretrain: Any) -> Config:
    """The config with a model of this width (MLPs 8/3 as wide) and other pretraining settings."""
    shape = {"embed_dim": dim, "num_heads": dim // HEAD, "num_kv_heads": dim // HEAD}
    shape |= {"head_dim": HEAD, "mlp_dim": -(-dim // 3) * 8}
    settings = config.pretrain.model_copy(update=pretrain)
    model = config.model.model_copy(update=shape)
    return config.model_copy(update={"model": model, "pretrain": settings})


def speeds(args: argparse.Namespace, config: Config, vocab: int) -> list[dict[str, float]]:
    """Tokens a second of a step by width, length and batch; turns make drift hit all alike."""
    if not args.rounds:
        return []
    dims = sorted({args.dims[0], args.dims[len(args.dims) // 2], args.dims[-1]})
    cells = list(itertools.product(dims, args.lengths, args.batches))
    sized = [of_width(config, d, sequence_length=t, batch_size=b) for d, t, b in cells]
    # A pool of batches would be no other work: the step is the same on random tokens.
    steps = [prepare(c, vocab, args.dtype) for c in _track(sized, "compiling")]
    peak = alternate.matrix_product(args.dtype)
    for step in (peak, *steps):
        step.once()
    turns, peaks = [[] for _ in cells], []
    for _ in _track(range(args.rounds), "timing"):
        peaks.append(peak.facts["gflop"] / alternate.median_seconds(peak.once, args.seconds))
        for found, step in zip(turns, steps, strict=True):
            found.append(alternate.median_seconds(step.once, args.seconds))
    rows = []
    for (dim, length, batch), shape, found in zip(cells, sized, turns, strict=True):
        gflops = flops_per_token(shape.model, vocab, length) * batch * length / 1e9
        shares = [gflops / seconds / best for seconds, best in zip(found, peaks, strict=True)]
        rate = batch * length / float(np.median(found))
        row = {"dim": dim, "length": length, "batch": batch, "tokens_per_second": rate}
        rows.append(row | {"share_of_peak": float(np.median(shares))})
    return rows


def losses(args: argparse.Namespace, config: Config, corpus: Any, tokenizer: Any) -> list[Run]:
    """Every width's runs: one at a constant rate, and from it a branch for each budget."""
    settings, vocab = config.pretrain, tokenizer.vocab_size
    length = settings.sequence_length
    ids = tokenizer.encode_batch([d.text for d in corpus.train])
    rows = pack([np.array(x, np.int32) for x in ids], length)
    batches = Batches(rows, batch_size=settings.batch_size, seed=config.seed)
    held_out = corpus.held_out[: settings.validation_documents]
    runs = []
    for dim, most in zip(args.dims, args.steps, strict=True):
        model = of_width(config, dim).model
        flops = flops_per_token(model, vocab, length)
        budgets = [most >> n for n in reversed(range(args.budgets))]
        shape = {"compute_dtype": args.dtype, "rngs": nnx.Rngs(config.seed)}
        start = Transformer(model, vocab, **shape)
        own = parameter_count(start) - vocab * dim
        for steps, state in zip(budgets, branches(config, start, batches, budgets), strict=True):
            report = language_report(state.model, tokenizer, held_out, max_length=length)
            tokens = steps * settings.batch_size * length
            floor, loss = report["entropy_floor"], float(report["validation_loss"] or 0)
            runs.append(Run(own, tokens, float(flops) * tokens, loss, floor))
            said = {"million_parameters": own / 1e6, "steps": steps, "loss": runs[-1].loss}
            Console(stderr=True).print("  ".join(f"{k} {v:.4g}" for k, v in said.items()))
    return runs


def branches(config: Config, model: Transformer, batches: Batches, budgets: Sequence[int]):
    """Yields, for each budget in rising order, the state of a run of so many steps."""
    settings = config.pretrain.optimizer
    optimizer = falling(settings, max(budgets))
    step = make_train_step(forward, LANGUAGE, optimizer)

    def advance(state: TrainState, stop: int) -> TrainState:
        for k in range(int(state.step), stop):
            state, _ = step(state, batches[k])
        return state

    trunk = init_state(model, optimizer)
    for steps in budgets:
        warmup = min(settings.warmup_steps, steps - 1)
        span = max(round((steps - warmup) * DECAY), 1)  # as the schedule "wsd" has it
        trunk = advance(trunk, steps - span)
        branch = jax.tree.map(jnp.copy, trunk)  # a step donates its state
        inner, count, _, _ = branch.opt_state
        fall = (inner, count, jnp.float32(steps), jnp.float32(span))
        yield advance(dataclasses.replace(branch, opt_state=fall), steps)


def falling(settings: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The config's optimizer at a constant rate, times a factor whose fall is in the state.

    So all budgets share one program. AdamW's and Muon's updates, weight decay included, are linear
    in the rate, so a factor on the update is one on the rate.
    """
    inner = make_optimizer(settings.model_copy(update={"schedule": "constant"}), steps)

    def init(params: Any) -> Any:  # inner state, updates made, end and length of the fall
        return inner.init(params), jnp.float32(0), jnp.float32(jnp.inf), jnp.float32(1)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, after = inner.update(updates, state[0], params)
        _, count, end, span = state
        factor = jnp.clip((end - count) / span, 0.0, 1.0)
        return jax.tree.map(lambda u: factor * u, updates), (after, count + 1, end, span)

    return optax.GradientTransformation(init, update)


def frontier(runs: Sequence[Run]) -> list[Run]:
    """The runs that are better than all that cost as much or less, in order of cost."""
    kept: list[Run] = []
    for run in sorted(runs, key=lambda r: (r.flops, r.loss)):
        if not kept or run.loss < kept[-1].loss:
            kept.append(run)
    return kept


UNIT = 1e12  # of compute in L(C): operations


def compute_law(runs: Sequence[Run]) -> PowerLaw:
    """L(C) of the frontier, C in 10^12 operations, by least squares."""
    best = frontier(runs)
    cost, loss = np.array([r.flops for r in best]) / UNIT, np.array([r.loss for r in best])
    return fit_power_law(Curve(cost, loss))


class Chinchilla(NamedTuple):
    """L(N, D) = floor + a N^−alpha + b D^−beta."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float

    def at(self, parameters: Any, tokens: Any) -> Any:
        return self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta


def chinchilla_law(runs: Sequence[Run], near: Chinchilla | None = None) -> Chinchilla:
    """The law with the least Huber loss of log L, from many starts, or from one that is near."""
    x = np.log([[r.parameters, r.tokens] for r in runs])
    y = np.log([r.loss for r in runs])
    middle = x.mean(axis=0)  # exponents and scales then hardly depend on each other

    def error(p: np.ndarray) -> tuple[float, np.ndarray]:
        """With its gradient: the terms' shares of the predicted loss are the slopes of its log."""
        parts = np.column_stack([np.full(len(y), p[0]), p[1:3] - p[3:] * (x - middle)])
        rest = logsumexp(parts, axis=1) - y
        pull = np.clip(rest / DELTA, -1, 1)[:, None] * softmax(parts, axis=1)
        slopes = np.concatenate([pull.sum(0), -(pull[:, 1:] * (x - middle)).sum(0)])
        return float(np.sum(huber(DELTA, rest))) / DELTA, slopes

    if near is None:
        shares, exponents = np.log([0.1, 0.4, 0.8]), (0.2, 0.5, 1.0)
        grid = itertools.product(y.min() + shares, y.mean() + shares, exponents, exponents)
        starts = [np.array([e, a, a, α, β]) for e, a, α, β in grid]
    else:
        logs = np.log([near.a, near.b]) - np.array([near.alpha, near.beta]) * middle
        starts = [np.array([np.log(near.floor), *logs, near.alpha, near.beta])]
    bounds = [(-12.0, y.min()), (-12.0, 6.0), (-12.0, 6.0), (0.02, 3.0), (0.02, 3.0)]
    clipped = [np.clip(start, *np.transpose(bounds)) for start in starts]
    dials = {"method": "L-BFGS-B", "bounds": bounds, "options": {"maxiter": 500}}
    found = [minimize(error, start, jac=True, **dials) for start in clipped]
    e, a, b, α, β = min(found, key=lambda r: r.fun).x
    scales = np.exp(np.array([a, b]) + np.array([α, β]) * middle)
    return Chinchilla(float(np.exp(e)), float(scales[0]), float(α), float(scales[1]), float(β))


def fits(runs: Sequence[Run], resamples: int) -> dict[str, Any]:
    """Both laws with intervals: leaving one run out (L(C)), 95 % over resampled runs (L(N, D))."""
    law, others = compute_law(runs), []
    for n in range(len(runs)):
        others.append(compute_law([*runs[:n], *runs[n + 1 :]]))
    whole, rng = chinchilla_law(runs), np.random.default_rng(0)
    drawn = [[runs[i] for i in rng.integers(len(runs), size=len(runs))] for _ in range(resamples)]
    again = [chinchilla_law(part, whole) for part in _track(drawn, "bootstrap")]
    rest = [np.log(whole.at(r.parameters, r.tokens) / r.loss) for r in runs]
    found: dict[str, Any] = {
        "compute": _with_intervals(law, others, (0.0, 1.0)) | {"frontier": len(frontier(runs))},
        "chinchilla": _with_intervals(whole, again, (0.025, 0.975))
        | {"rms_log_error": float(np.sqrt(np.mean(np.square(rest))))},
        "optimal_parameters_exponent": whole.beta / (whole.alpha + whole.beta),
    }
    known = runs[0].floor
    if known is not None:
        best = frontier(runs)
        excess = np.log([[r.flops / UNIT, r.loss - known] for r in best])
        slope, at_one = np.polyfit(excess[:, 0], excess[:, 1], 1)
        found["exact_floor"] = known
        found["excess"] = {"scale": float(np.exp(at_one)), "exponent": float(-slope)}
        found["lowest_excess"] = min(r.loss for r in runs) - known
    return found


def _with_intervals(law: Any, others: Sequence[Any], ends: tuple[float, float]) -> dict[str, Any]:
    low, high = np.quantile(np.array(others), ends, axis=0)
    return {
        name: {"value": value, "low": float(a), "high": float(b)}
        for name, value, a, b in zip(law._fields, law, low, high, strict=True)
    }


def _track(items: Sequence[Any], title: str) -> Any:
    return track(items, title, console=Console(stderr=True), transient=True)


def show(speed: Sequence[dict], runs: Sequence[Run], found: dict[str, Any]) -> None:
    """Three tables: speeds, losses, laws."""
    tables = [_numbers(name.replace("_", " ") for name in speed[0])] if speed else []
    for row in speed:
        cells = (f"{x:,.3g}" if x < 1 else f"{x:,.0f}" for x in row.values())
        tables[0].add_row(*cells)
    names = ("million parameters", "million tokens", "10^12 operations", "loss", "above the floor")
    table, best = _numbers(names), frontier(runs)
    for run in runs:
        loss = f"{run.loss:.4f}" + (" *" if run in best else "  ")
        above = "" if run.floor is None else f"{run.loss - run.floor:.4f}"
        sizes = (run.parameters / 1e6, run.tokens / 1e6, run.flops / UNIT)
        table.add_row(*(f"{x:.3g}" for x in sizes), loss, above)
    laws = _numbers(("law", "of", "value", "low", "high"))
    for name in ("compute", "chinchilla"):
        for key, value in found[name].items():
            if isinstance(value, dict):
                laws.add_row(name, key, *(f"{x:.4g}" for x in value.values()))
    if "exact_floor" in found:
        laws.add_row("exact", "floor", f"{found['exact_floor']:.4g}")
    console = Console()
    for each in (*tables, table, laws):
        (console if console.is_terminal else Console(width=110)).print(each)


def _numbers(names: Iterable[str]) -> Table:
    return Table(*(Column(name, justify="right") for name in names))


def draw(path: Path, speed: Sequence[dict], runs: Sequence[Run], found: dict[str, Any]) -> None:
    """Tokens a second by width; losses by compute with L(C); the same above the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for length, batch in sorted({(row["length"], row["batch"]) for row in speed}):
        own = [row for row in speed if (row["length"], row["batch"]) == (length, batch)]
        rates = [row["tokens_per_second"] for row in own]
        left.plot([row["dim"] for row in own], rates, "o-", label=f"{batch} × {length}")
    left.set(
        xscale="log", yscale="log", xlabel="model width", title="tokens per second of training"
    )
    best, law = frontier(runs), compute_law(runs)
    floor = runs[0].floor
    base = law.floor if floor is None else floor
    span = np.geomspace(best[0].flops, best[-1].flops * 4, 100)
    fitted = np.array([law.at(c / UNIT) for c in span])
    for size in sorted({r.parameters for r in runs}):
        own = [r for r in runs if r.parameters == size]
        for axes, shift in ((middle, 0.0), (right, base)):
            label = f"{size / 1e6:.2g} M parameters"
            axes.plot([r.flops for r in own], [r.loss - shift for r in own], "o-", label=label)
    middle.plot(span, fitted, "k:", label="L(C), fitted")
    middle.axhline(law.floor, color="0.6", ls=":", label="its floor")
    if floor is not None:
        middle.axhline(floor, color="tab:red", lw=1, label="exact floor")
    right.plot(span, fitted - base, "k:")
    for axes in (middle, right):
        axes.set(xscale="log", xlabel="operations of training")
    middle.set(title="held-out loss, nats a token")
    right.set(yscale="log", title=f"above the {'fitted' if floor is None else 'exact'} floor")
    for axes in (left, middle):
        axes.legend(frameon=False, fontsize=7)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    args, overrides = arguments()
    config = load(args.config, overrides)
    began = time.perf_counter()
    corpus = split(config.corpus, config.seed)
    tokenizer = train_tokenizer(config.tokenizer, (d.text for d in corpus.train))
    speed = speeds(args, config, tokenizer.vocab_size)
    runs = losses(args, config, corpus, tokenizer)
    found = fits(runs, args.resamples)
    show(speed, runs, found)
    if args.plot:
        draw(args.plot, speed, runs, found)
    rows = {"speeds": speed, "runs": [run._asdict() for run in runs], "fits": found}
    took = {"seconds": time.perf_counter() - began, "machine": backend.facts()}
    print(json.dumps({"benchmark": "scaling", **rows, **took}))


if __name__ == "__main__":
    main()
