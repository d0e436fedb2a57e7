"""How long a pretraining step takes, in float32 and in bfloat16 with and without XLA's flags.

uv run python benchmarks/train_step.py [--config CONFIG] [--size SIZE] [--peer COMMAND]
"""

import sys
import time

import alternate
import numpy as np

from minilm.config import Config


def prepare(config: Config, vocab: int, dtype: str) -> alternate.Prepared:
    """The step that training takes, on a batch of random tokens."""
    import jax
    from flax import nnx

    from minilm.model import Transformer
    from minilm.optim import make_optimizer
    from minilm.stages.pretrain import LANGUAGE, forward
    from minilm.step import init_state, make_train_step
    from minilm.text.batches import batch_of

    settings = config.pretrain
    rows = np.random.default_rng(0).integers(
        2, vocab, (settings.batch_size, settings.sequence_length + 1)
    )
    rows[:, ::100] = 1  # documents of 100 tokens
    batch = batch_of(rows)
    model = Transformer(config.model, vocab, compute_dtype=dtype, rngs=nnx.Rngs(0))
    optimizer = make_optimizer(settings.optimizer, settings.steps)
    state = init_state(model, optimizer)
    step = make_train_step(forward, LANGUAGE, optimizer, accumulation=settings.accumulation)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    facts = {"compile_seconds": time.perf_counter() - start}
    if memory := compiled.memory_analysis():  # what XLA sets aside for the step beside its state
        facts["step_mib"] = memory.temp_size_in_bytes / 2**20

    def once() -> None:
        nonlocal state
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))

    return alternate.Prepared(once, facts)


def main() -> None:
    args = alternate.arguments(__doc__ or "")
    config = alternate.load(args)
    if args.child:
        prepared = prepare(config, alternate.vocabulary(args, config), args.child)
        alternate.serve(prepared, args.child, args.seconds)
        return
    results = alternate.measure(sys.argv, args.variants, args.rounds, args.peer)

    from minilm.model import flops_per_token

    length, vocab = config.pretrain.sequence_length, alternate.vocabulary(args, config)
    tokens = config.pretrain.batch_size * length
    gflop = flops_per_token(config.model, vocab, length) * tokens / 1e9
    base = results.get("float32")
    rows = {}
    for name in args.variants:
        result = results[name]
        if result is None:
            rows[name] = None
            continue
        seconds = alternate.median(result, "seconds")
        rates = [gflop / t["seconds"] / t["peak_gflops"] for t in result["turns"]]
        rows[name] = {
            "milliseconds": 1e3 * seconds,
            "times_float32": alternate.speedup(result, base) if base else float("nan"),
            "tokens_per_second": tokens / seconds,
            "peak_gflops": alternate.median(result, "peak_gflops"),
            "share_of_peak": float(np.median(rates)),
            "compile_seconds": result["compile_seconds"],
            "step_mib": result.get("step_mib", float("nan")),
            "resident_mib": alternate.median(result, "resident_mib"),
        }
    alternate.against_peer(results, rows)
    sizes = {"tokens": tokens, "gflop": gflop, "rounds": args.rounds}
    alternate.show("train_step", rows, sizes, args.plot)


if __name__ == "__main__":
    main()
