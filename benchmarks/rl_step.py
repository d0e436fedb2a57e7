"""How many completions a second an RL step makes, scores and learns from, and what each part takes.

    uv run python benchmarks/rl_step.py [--size SIZE] [--peer COMMAND] [--rounds N] [--quick]

GRPO on 64 completions of 48 tokens, 8 of each prompt of 16, none of which ends early; a reward
model of the policy's own size. PEER prints its seconds a step, as ../shared/peers/torch_peer.py.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import alternate

from minilm.config import Config


def sizes(quick: bool) -> tuple[int, int, int]:
    """Prompts a step, tokens of a prompt, new tokens; a group has 8 completions."""
    return (1, 4, 4) if quick else (8, 16, 48)


def prepare(config: Config, vocab: int, dtype: str, quick: bool) -> alternate.Prepared:
    """A whole step; its parts are timed once, at the start, one after the other."""
    import jax
    import numpy as np
    from flax import nnx

    from minilm.algorithms import ALGORITHMS, objective
    from minilm.model import Transformer
    from minilm.optim import make_optimizer
    from minilm.rewards import Normalization, RewardModel
    from minilm.stages.rlhf import make_collect, make_step, start_state

    count, prompt, new = sizes(quick)
    settings = {"algorithm": "grpo", "prompts_per_step": count, "group_size": 8}
    rl = config.rlhf.model_copy(update=settings)
    algorithm = ALGORITHMS["grpo"]

    def model(seed: int, *, scalar: bool = False) -> Transformer:
        shape = {"compute_dtype": dtype, "scalar_head": scalar}
        return Transformer(config.model, vocab, **shape, rngs=nnx.Rngs(seed))

    prompts = np.random.default_rng(0).integers(2, vocab, (64, prompt)).astype(np.int32)
    # No token is -1, so that no completion ends early.
    ids: dict[str, Any] = {"max_new_tokens": new, "eos_id": -1, "pad_id": 0}
    payer = RewardModel((model(1, scalar=True),), (Normalization(0.0, 1.0),))
    frozen = (model(0), payer)
    collect = make_collect(rl, algorithm, *frozen, prompts, key=jax.random.key(0), **ids)
    optimizer = make_optimizer(rl.optimizer, 100_000)
    step = make_step(rl, objective(algorithm, rl), optimizer, collect, new)
    state, number = start_state(model(0), optimizer), 0

    def once() -> None:
        nonlocal state, number
        state, metrics = step(state, number)
        number += 1
        jax.block_until_ready((state, metrics))

    start = time.perf_counter()
    once()
    facts = {"compile_seconds": time.perf_counter() - start}
    once()
    seconds = {
        "step": _median(once),
        "rollout_and_scoring": _median(lambda: jax.block_until_ready(collect(state.model, 0))),
        "rollout": _median(_rollout(state.model, prompts, count, ids)),
    }
    facts |= {
        "rollout_share": seconds["rollout"] / seconds["step"],
        "scoring_share": (seconds["rollout_and_scoring"] - seconds["rollout"]) / seconds["step"],
        "update_share": (seconds["step"] - seconds["rollout_and_scoring"]) / seconds["step"],
    }
    return alternate.Prepared(once, facts)


def _rollout(model, prompts, count: int, ids: dict) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    from minilm.generate import generate

    rows, key = jnp.asarray(prompts[:count].repeat(8, axis=0)), jax.random.key(0)
    return lambda: jax.block_until_ready(generate(model, rows, key, temperature=1.0, **ids))


def _median(once: Callable[[], object], times: int = 5) -> float:
    once()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        once()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[times // 2]


def main() -> None:
    args = alternate.arguments(__doc__ or "")
    config = alternate.load(args)
    if args.child:
        prepared = prepare(config, alternate.vocabulary(args, config), args.child, args.quick)
        alternate.serve(prepared, args.child, args.seconds)
        return
    results = alternate.measure(sys.argv, args.variants, args.rounds, args.peer)
    count, prompt, new = sizes(args.quick)
    base, rows = results.get("float32"), {}
    for name in args.variants:
        result = results[name]
        if result is None:
            rows[name] = None
            continue
        seconds = alternate.median(result, "seconds")
        parts = ("rollout_share", "scoring_share", "update_share", "compile_seconds")
        rows[name] = {
            "completions_per_second": 8 * count / seconds,
            "milliseconds": 1e3 * seconds,
            "times_float32": alternate.speedup(result, base) if base else float("nan"),
            **{part: result[part] for part in parts},
        }
    alternate.against_peer(results, rows)
    measured = {"completions": 8 * count, "prompt_tokens": prompt, "new_tokens": new}
    measured |= {"size": args.size, "rounds": args.rounds}
    alternate.show("rl_step", rows, measured, args.plot, "completions_per_second")


if __name__ == "__main__":
    main()
