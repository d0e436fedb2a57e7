"""How many completions a second come out, in float32 and in bfloat16 with and without XLA's flags.

    uv run python benchmarks/generate.py [--config CONFIG] [--size SIZE] [--peer COMMAND]

Every completion has all of its tokens: none stops early.
"""

import argparse
import sys
import time

import alternate

from minilm.config import Config

BATCH, PROMPT = 64, 16


def sizes(args: argparse.Namespace) -> tuple[int, int, int]:
    """Batch, tokens of a prompt, new tokens: a fable's 83, or the 48 of ../shared/peers."""
    return (2, 4, 4) if args.quick else (BATCH, PROMPT, 83 if args.size == "config" else 48)


def prepare(
    config: Config, vocab: int, dtype: str, batch: int, prompt: int, new: int
) -> alternate.Prepared:
    """One jitted call: prefill and decode."""
    import jax
    from flax import nnx

    from minilm.generate import generate
    from minilm.model import Transformer

    model = Transformer(config.model, vocab, compute_dtype=dtype, rngs=nnx.Rngs(0))
    prompts = jax.random.randint(jax.random.key(0), (batch, prompt), 2, vocab)
    keys = iter(jax.random.split(jax.random.key(1), 100_000))
    start = time.perf_counter()
    # No token is -1, so that no completion ends early.
    compiled = generate.lower(
        model, prompts, jax.random.key(1), max_new_tokens=new, eos_id=-1
    ).compile()
    facts = {"compile_seconds": time.perf_counter() - start}
    return alternate.Prepared(
        lambda: jax.block_until_ready(compiled(model, prompts, next(keys))), facts
    )


def main() -> None:
    args = alternate.arguments(__doc__ or "")
    config = alternate.load(args)
    batch, prompt, new = sizes(args)
    if args.child:
        vocab = alternate.vocabulary(args, config)
        prepared = prepare(config, vocab, args.child, batch, prompt, new)
        alternate.serve(prepared, args.child, args.seconds)
        return
    results = alternate.measure(sys.argv, args.variants, args.rounds, args.peer)
    base = results.get("float32")
    rows = {}
    for name in args.variants:
        result = results[name]
        if result is None:
            rows[name] = None
            continue
        seconds = alternate.median(result, "seconds")
        rows[name] = {
            "completions_per_second": batch / seconds,
            "times_float32": alternate.speedup(result, base) if base else float("nan"),
            "tokens_per_second": batch * new / seconds,
            "resident_mib": alternate.median(result, "resident_mib"),
            "peak_gflops": alternate.median(result, "peak_gflops"),
            "compile_seconds": result["compile_seconds"],
        }
    measured = {"batch": batch, "prompt_tokens": prompt, "new_tokens": new, "rounds": args.rounds}
    alternate.against_peer(results, rows)
    alternate.show("generate", rows, measured, args.plot)


if __name__ == "__main__":
    main()
