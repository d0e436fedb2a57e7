"""Measures variants of one computation in turns, each in a process with its own XLA flags.

A shared machine changes its speed by more than what is to be told apart; so the variants take turns
of a fraction of a second, and are compared within a round.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minilm import backend
from minilm.config import Config


class Variant(NamedTuple):
    dtype: str
    flags: str


VARIANTS = {
    "float32": Variant("float32", ""),
    "bfloat16": Variant("bfloat16", ""),
    "bfloat16+flags": Variant("bfloat16", backend.FLAGS),
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
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--rounds", type=int, default=12, help="turns of each variant (default: 12)")
    add("--seconds", type=float, default=0.6, help="of a turn (default: 0.6)")
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
    return configfile.load(args.config, tiny.split() if args.quick else [])


def measure(words: Sequence[str], variants: Sequence[str], rounds: int) -> dict[str, Any]:
    """What each variant's child said: its facts, and its turns; None where the child died.

    Args:
      words: the child's command line, without its dtype.
    """
    with contextlib.ExitStack() as stack:
        # One after the other: compiling beside each other, they would time each other.
        children = {name: _Child(stack, words, VARIANTS[name]) for name in variants}
        for _ in range(rounds):
            for child in children.values():
                child.turn()
        return {
            name: {**child.facts, "turns": child.turns} if child.facts and child.turns else None
            for name, child in children.items()
        }


class _Child:
    """One variant's process, and what it has said."""

    def __init__(self, stack: contextlib.ExitStack, words: Sequence[str], variant: Variant):
        self._process = subprocess.Popen(
            [sys.executable, *words, "--child", variant.dtype],
            # A cached program would make the compile time a lie.
            env={**os.environ, "XLA_FLAGS": variant.flags, "JAX_ENABLE_COMPILATION_CACHE": "0"},
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
            "seconds": _median(prepared.once, seconds),
            "peak_gflops": peak.facts["gflop"] / _median(peak.once, seconds / 3),
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


def _median(once: Callable[[], None], seconds: float) -> float:
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


def show(title: str, rows: dict[str, dict[str, float] | None], sizes: dict[str, Any]) -> None:
    """A table, and as the last line the same as JSON, with the machine."""
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
    print(json.dumps({"benchmark": title, **sizes, "variants": rows, "machine": backend.facts()}))
