"""A corpus larger than memory should hold, from a file to training: how fast, in how much memory.

uv run python benchmarks/tokenize_corpus.py [--gigabytes 2] [--form jsonl] [--out FILE]

The file is made of paragraphs of CPython's manual, drawn anew for each document. A child process
reads it, trains a tokenizer, tokenises, and takes two training steps; its peak is what the system
says at its end, JAX included.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

SEPARATOR = "\n\n\n"
PARAGRAPHS = 8  # of a document, which so has some 2,500 characters
KINDS = ("bpe", "characters", "bytes")
FORMS = ("txt", "whole", "jsonl", "csv", "parquet")


def documents(size: int, seed: int = 0) -> Iterator[str]:
    """Texts of `size` bytes in all, about."""
    known = [p for name in sorted(topics) for p in topics[name].split("\n\n") if p.strip()]
    random, number = np.random.default_rng(seed), 0
    while size > 0:
        chosen = random.integers(len(known), size=PARAGRAPHS)
        text = "\n\n".join((f"Note {number}", *(known[i].strip("\n") for i in chosen)))
        yield text
        size -= len(text.encode())
        number += 1


def make(path: Path, form: str, size: int) -> None:
    """Writes them in one of FORMS; "whole" is one document without any separator."""
    texts = documents(size)
    if form == "parquet":
        _parquet(path, texts)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        if form == "csv":
            rows.writerow(["text"])
        writers: dict[str, Callable[[str], Any]] = {
            "txt": lambda text: file.write(text + SEPARATOR),
            "whole": lambda text: file.write(text + "\n\n"),
            "jsonl": lambda text: file.write(json.dumps({"text": text}) + "\n"),
            "csv": lambda text: rows.writerow([text]),
        }
        for text in texts:
            writers[form](text)


def _parquet(path: Path, texts: Iterator[str]) -> None:
    """In row groups of a million rows, as pyarrow and pandas write them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": list(texts)}), path, row_group_size=10**6)


def child(file: Path, form: str, kind: Any, folder: Path) -> dict[str, float]:
    """Seconds of each part, tokens, and the peak of this process's resident memory in MiB."""
    from minilm.config import Config, PretrainConfig, TextCorpus, TokenizerConfig
    from minilm.run import run
    from minilm.stages.pretrain import tokenizer_sample
    from minilm.text.batches import count_tokens, tokenize
    from minilm.text.corpora import split
    from minilm.text.tokenizer import train_tokenizer

    separator = SEPARATOR if form == "txt" else None
    config = Config(
        corpus=TextCorpus(files=(str(file),), separator=separator, held_out=0.001),
        tokenizer=TokenizerConfig(kind=kind),
        pretrain=PretrainConfig(steps=2, log_every=1, sample_count=64, max_new_tokens=32),
    )
    start = time.perf_counter()
    train = split(config.corpus, config.seed, folder / "cache").train
    read = time.perf_counter()
    sample = tokenizer_sample(train, config.tokenizer)
    tokenizer = train_tokenizer(config.tokenizer, (d.text for d in sample))
    trained = time.perf_counter()
    length = config.pretrain.sequence_length
    rows = tokenize(train, tokenizer, length, folder / "cache", config.seed)
    done = time.perf_counter()
    before, tokens = peak(), count_tokens(rows)
    run(config, folder, until="pretrain")  # finds the rows
    return {
        "read_seconds": read - start,
        "tokenizer_seconds": trained - read,
        "tokenize_seconds": done - trained,
        "tokens": tokens,
        "characters": train.characters,
        "tokenizing_mib": before,
        "peak_mib": peak(),
    }


def peak() -> float:
    """MiB. Linux keeps it for the program alone, where `getrusage` counts its parent's fork too."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of text (default: 2)")
    parser.add_argument("--form", choices=FORMS, default="jsonl", help="default: jsonl")
    parser.add_argument("--kind", choices=KINDS, default="bpe", help="tokenizer (default: bpe)")
    parser.add_argument("--out", type=Path, help="takes the last line too")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.form, args.kind, args.child[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        suffix = "txt" if args.form == "whole" else args.form
        file = Path(folder) / f"corpus.{suffix}"
        make(file, args.form, round(args.gigabytes * 1e9))
        size = file.stat().st_size
        words = [sys.executable, __file__, "--form", args.form, "--kind", args.kind]
        words += ["--child", str(file), f"{folder}/run"]
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.rstrip().rpartition("\n")[2])
    row = {
        "mb_per_second": size / 1e6 / found["tokenize_seconds"],
        "tokens_per_second": found["tokens"] / found["tokenize_seconds"],
        "threads": int(os.environ.get("RAYON_NUM_THREADS", os.cpu_count() or 1)),
    }
    table = Table("quantity", "value", title=f"tokenize_corpus: {size / 1e6:,.1f} MB, {args.form}")
    for name, value in {**row, **found}.items():
        table.add_row(name.replace("_", " "), f"{value:,.1f}")
    Console().print(table)
    sizes = {"gigabytes": size / 1e9, "form": args.form, "kind": args.kind}
    line = json.dumps({"benchmark": "tokenize_corpus", **sizes, **row, **found})
    if args.out:
        args.out.write_text(f"{line}\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
