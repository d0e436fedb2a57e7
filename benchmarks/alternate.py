"""Measures variants of one computation in turns, each in a process with its own XLA flags.

A shared machine changes its speed by more than what is to be told apart; so the variants take turns
of a fraction of a second, and are compared within a round.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilm import backend, memory
from minilm.config import Config


class Variant(NamedTuple):
    dtype: str
    flags: str


VARIANTS = {
    "float32": Variant("float32", ""),
    "bfloat16": Variant("bfloat16", ""),
    "bfloat16+flags": Variant("bfloat16", backend.FLAGS),
}


class Size(NamedTuple):
    """A model, as options laid over the config, and its vocabulary."""

    options: str
    vocab: int | None  # None: the config's


SIZES = {
    "config": Size("", None),
    # Those of ../shared/peers and of nanoGPT's GPT-2 small, with SwiGLU.
    "0.87M": Size(
        "--model.num-layers 4 --model.embed-dim 128 --model.num-heads 4 --model.num-kv-heads 4 "
        "--model.head-dim 32 --model.mlp-dim 384 --pretrain.sequence-length 128 "
        "--pretrain.batch-size 16 --pretrain.optimizer.name adamw",
        84,
    ),
    "12M": Size(
        "--model.num-layers 6 --model.embed-dim 384 --model.num-heads 6 --model.num-kv-heads 6 "
        "--model.head-dim 64 --model.mlp-dim 1024 --pretrain.sequence-length 256 "
        "--pretrain.batch-size 16 --pretrain.optimizer.name adamw",
        4096,
    ),
    "124M": Size(
        "--model.num-layers 12 --model.embed-dim 768 --model.num-heads 12 "
        "--model.num-kv-heads 12 --model.head-dim 64 --model.mlp-dim 2048 "
        "--pretrain.sequence-length 1024 --pretrain.batch-size 16 "
        "--pretrain.optimizer.name adamw",
        50304,
    ),
}


class Prepared(NamedTuple):
    """A compiled computation in a child process.

    Attributes:
      once: runs it once and waits for its end.
      facts: what is known before it runs, the compile time for instance.
    """

    once: Callable[[], None]
    facts: dict[str, float]


def arguments(description: str) -> argparse.Namespace:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--config", type=Path, default="configs/fables.toml", help="model and batch sizes")
    add("--size", choices=SIZES, default="config", help="another model's (default: the config's)")
    add("--peer", metavar="COMMAND", help="prints a JSON line of the same work; run in every round")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--rounds", type=int, default=12, help="turns of each variant (default: 12)")
    add("--seconds", type=float, default=0.6, help="of a turn (default: 0.6)")
    add("--plot", metavar="FILE", help="the same as a picture, .svg or .png")
    add("--quick", action="store_true", help="tiny sizes, to see that it runs")
    add("--child", metavar="DTYPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 2), 0.02
    return args


def load(args: argparse.Namespace) -> Config:
    """The config, with tiny sizes where `--quick` asks for them."""
    from minilm import configfile

    tiny = "--model.num-layers 1 --model.embed-dim 16 --model.num-heads 2 --model.num-kv-heads 2"
    tiny += " --model.head-dim 8 --model.mlp-dim 32 --tokenizer.vocab-size 260"
    tiny += " --pretrain.batch-size 2 --pretrain.sequence-length 16"
    words = tiny.split() if args.quick else SIZES[args.size].options.split()
    return configfile.load(args.config, words)


def vocabulary(args: argparse.Namespace, config: Config) -> int:
    return (None if args.quick else SIZES[args.size].vocab) or config.tokenizer.vocab_size


def measure(
    words: Sequence[str], variants: Sequence[str], rounds: int, peer: str | None = None
) -> dict[str, Any]:
    """What each variant's child said: its facts, and its turns; None where the child died.

    Args:
      words: the child's command line, without its dtype.
      peer: a command that takes its turn in every round; see `peer_seconds`.
    """
    with contextlib.ExitStack() as stack:
        # One after the other: compiling beside each other, they would time each other.
        children = {name: _Child(stack, words, VARIANTS[name]) for name in variants}
        others = []
        for _ in range(rounds):
            for child in children.values():
                child.turn()
            if peer:
                others.append({"seconds": peer_seconds(peer)})
        found: dict[str, Any] = {
            name: {**child.facts, "turns": child.turns} if child.facts and child.turns else None
            for name, child in children.items()
        }
        return found | ({"peer": {"turns": others}} if peer else {})


def peer_seconds(command: str) -> float:
    """Seconds of a step, or of a batch of completions, by what the peer's last line says.

    It is a JSON object with `ms_per_step`, `s_per_step`, or `tokens_per_s` with `batch` and `new`.
    """
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr[-2000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if "ms_per_step" in said:
        return said["ms_per_step"] / 1e3
    if "s_per_step" in said:
        return said["s_per_step"]
    return said["batch"] * said["new"] / said["tokens_per_s"]


def against_peer(results: dict[str, Any], rows: dict[str, Any]) -> None:
    """Adds to each variant's row how many times faster than the peer it was in the same round."""
    peer = results.pop("peer", None)
    for name, row in rows.items():
        if peer and row is not None:
            row["times_peer"] = speedup(results[name], peer)
            row["peer_seconds"] = median(peer, "seconds")


class _Child:
    """One variant's process, and what it has said."""

    def __init__(self, stack: contextlib.ExitStack, words: Sequence[str], variant: Variant):
        self._process = subprocess.Popen(
            [sys.executable, *words, "--child", variant.dtype],
            # A cached program would make the compile time a lie. Pages as a run has them.
            env={
                **os.environ,
                **memory.environment(),
                "XLA_FLAGS": variant.flags,
                "JAX_ENABLE_COMPILATION_CACHE": "0",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        stack.enter_context(self._process)
        stack.callback(self._process.kill)
        self.facts, self.turns = self._read(), []

    def turn(self) -> None:
        if self._process.poll() is None and self.facts:
            print("go", file=self._process.stdin, flush=True)
            if said := self._read():
                self.turns.append(said)

    def _read(self) -> dict[str, float] | None:
        line = self._process.stdout.readline() if self._process.stdout else ""
        return json.loads(line) if line.startswith("{") else None


def serve(prepared: Prepared, dtype: str, seconds: float) -> None:
    """The child's side: facts first, then a turn for each line that it reads.

    A turn gives the median time of the computation and the rate of a square matrix product.
    """
    peak = matrix_product(dtype)
    peak.once()
    prepared.once()
    print(json.dumps(prepared.facts), flush=True)
    for _ in sys.stdin:
        turn = {
            "seconds": median_seconds(prepared.once, seconds),
            "peak_gflops": peak.facts["gflop"] / median_seconds(peak.once, seconds / 3),
            "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(turn), flush=True)


def matrix_product(dtype: str) -> Prepared:
    """What the machine can do at best: a large square product, as in `backend.matmul_rate`."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = backend.keep(jax.jit(lambda a, b: a @ b))
    return Prepared(lambda: jax.block_until_ready(product(x, x)), {"gflop": 2 * size**3 / 1e9})


def median_seconds(once: Callable[[], None], seconds: float) -> float:
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def speedup(result: dict[str, Any], base: dict[str, Any]) -> float:
    """Median over the rounds of how many times faster than `base` it was in the same round."""
    pairs = zip(base["turns"], result["turns"], strict=False)
    return statistics.median(b["seconds"] / r["seconds"] for b, r in pairs)


def median(result: dict[str, Any], name: str) -> float:
    return statistics.median(turn[name] for turn in result["turns"])


def show(
    title: str,
    rows: dict[str, dict[str, float] | None],
    sizes: dict[str, Any],
    plot: str | None = None,
    rate: str = "tokens_per_second",
) -> None:
    """A table, a picture if asked, and as the last line the same as JSON, with the machine."""
    from rich.console import Console
    from rich.table import Table

    columns = list(next((row for row in rows.values() if row), {}))
    table = Table(title=title, title_justify="left")
    table.add_column("variant")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in rows.items():
        cells = ["did not run here"] if row is None else [f"{row[c]:.4g}" for c in columns]
        table.add_row(name, *cells)
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)
    if plot:
        draw(title, rows, Path(plot), rate)
    print(json.dumps({"benchmark": title, **sizes, "variants": rows, "machine": backend.facts()}))


def draw(title: str, rows: dict[str, dict[str, float] | None], path: Path, rate: str) -> None:
    """Bars of one rate by variant, beside the peer's where one took part."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    ran = {name: row for name, row in rows.items() if row}
    rates = {name: row[rate] for name, row in ran.items()}
    for row in ran.values():
        if "times_peer" in row:
            rates["peer"] = row[rate] / row["times_peer"]
    figure, axes = plt.subplots(figsize=(6, 0.5 + 0.5 * len(rates)), layout="constrained")
    colors = ["tab:gray" if name == "peer" else "tab:blue" for name in rates]
    bars = axes.barh(list(rates), list(rates.values()), color=colors)
    axes.bar_label(bars, [f" {x:,.0f}" for x in rates.values()])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(title=title, xlabel=f"{rate.replace('_per_', ' per ')}, median of the rounds")
    figure.savefig(path)
    plt.close(figure)
