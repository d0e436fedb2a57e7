"""`minilm oracle`: every RL algorithm beside the exact optimum of a language that can be listed."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from minilm import backend
from minilm.algorithms import ALGORITHMS, algorithm_of, objective, price
from minilm.choices import choose
from minilm.config import BackendConfig, OptimizerConfig, RLHFConfig
from minilm.files import write_atomically, write_json
from minilm.generate import generate
from minilm.losses.reduce import mean
from minilm.model import Transformer
from minilm.optim import make_optimizer
from minilm.rollout import complete_rollout
from minilm.stages.rlhf import Collected, make_step, start_state
from minilm.studies import exact, plots

STEPS, EVERY = 300, 5
BETA = 0.25  # price of a nat
# Rates that bring every algorithm to rest within STEPS.
SETTINGS = RLHFConfig(
    prompts_per_step=8,
    group_size=8,
    kl_coef=BETA,
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.0, eps=1e-5),
)
# What a row of the table lays over SETTINGS: an algorithm, and what it is given beside.
ROWS: dict[str, dict[str, Any]] = {name: {"algorithm": name} for name in ALGORITHMS} | {
    "ppo": {"algorithm": "ppo", "value_coef": 1.0},  # the critic has to learn first
    "grpo, k2": {"algorithm": "grpo", "kl_estimator": "k2"},
}


class Course(NamedTuple):
    """An algorithm on its way: exact figures every EVERY steps."""

    steps: list[int]
    kl: list[float]
    reward: list[float]


class Problem(NamedTuple):
    """The language, its reference and what each completion is worth."""

    world: exact.World
    reference: Transformer
    logprobs: np.ndarray
    reward: np.ndarray
    table: jax.Array  # the same by `place`


def problem(seed: int = 0, *, vocab: int = 4, length: int = 4) -> Problem:
    """Rewards are standard normal; so a completion's worth says nothing of its neighbours'."""
    world = exact.world(vocab, length)
    reference = exact.model_of(world, seed + 1)
    reward = np.random.default_rng(seed).normal(size=len(world.tokens))
    table = np.zeros(vocab**length, np.float32)
    table[np.asarray(exact.place(jnp.asarray(world.tokens), vocab))] = reward
    found = exact.logprobs(reference, world)
    return Problem(world, reference, found, reward, jnp.asarray(table))


def train(name: str, task: Problem, config: RLHFConfig = SETTINGS, steps: int = STEPS) -> Course:
    """Runs one of ROWS on the problem with minilm's own rollout, pricing and step.

    Raises:
      UserError: no such row; a price of KL that its algorithm can't have.
    """
    config = config.model_copy(update=choose(ROWS, name, "row"))
    algorithm = algorithm_of(config)
    width, count = task.world.width, config.prompts_per_step * config.group_size
    prompts = jnp.full((count, 1), exact.PROMPT, jnp.int32)
    ids = {"eos_id": exact.EOS, "pad_id": exact.EOS}

    @backend.keep
    @jax.jit
    def prepare(model, reference, samples):
        rollout = complete_rollout(
            model, reference, prompts, samples, pad_id=exact.EOS, temperature=1.0
        )
        score = task.table[exact.place(samples.tokens, task.world.vocab)]
        batch = price(algorithm, rollout, score, config)
        metrics = {"objective/scores": mean(score, jnp.ones_like(score))}
        return Collected(samples, rollout, score, batch, metrics, jnp.float32(1))

    def collect(model, k: int, kl_scale: Any) -> Collected:
        del kl_scale  # fixed
        key = jax.random.fold_in(jax.random.key(config.seed), k)
        samples = generate(model, prompts, key, max_new_tokens=width, **ids)
        return prepare(model, task.reference, samples)

    start = task.reference
    if algorithm.critic:
        start = exact.model_of(task.world, 0, critic=True)
        leaves = jax.tree.leaves(task.reference)
        start = _with_head(start, leaves)
    optimizer = make_optimizer(config.optimizer, steps)
    state = start_state(start, optimizer)
    step = make_step(config, objective(algorithm, config), optimizer, collect, width)
    path = Course([], [], [])
    for k in range(steps + 1):
        if k % EVERY == 0:
            now = exact.logprobs(state.model, task.world)
            path.steps.append(k)
            path.kl.append(exact.kl(now, task.logprobs))
            path.reward.append(exact.expected(now, task.reward))
        if k < steps:
            state, _ = step(state, k)
    return path


def _with_head(model: Transformer, leaves: list) -> Transformer:
    """The reference's parameters, and a value head of zeros."""
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    others = iter(leaves)
    old, structure = jax.tree.flatten(model)
    new = [
        jnp.zeros_like(x) if "score" in n else next(others) for n, x in zip(names, old, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def frontier(task: Problem) -> dict[str, list[float]]:
    """KL and E[r] of π* over β, the most reward that any policy has at that KL."""
    betas = np.geomspace(8.0, 0.04, 60)
    best = [exact.optimal(task.logprobs, task.reward, b) for b in betas]
    return {
        "beta": betas.tolist(),
        "kl": [exact.kl(p, task.logprobs) for p in best],
        "reward": [exact.expected(p, task.reward) for p in best],
    }


def best_of_n(task: Problem) -> dict[str, list[float]]:
    """The same of best-of-n, exactly."""
    counts = [1, 2, 4, 8, 16, 32, 64]
    found = [exact.best_of_n(task.logprobs, task.reward, n) for n in counts]
    return {
        "n": [float(n) for n in counts],
        "kl": [exact.kl(p, task.logprobs) for p in found],
        "reward": [exact.expected(p, task.reward) for p in found],
    }


def compare(
    task: Problem, names: list[str], steps: int = STEPS, config: RLHFConfig = SETTINGS
) -> dict[str, Any]:
    """Every algorithm's path and how much of its objective's optimum it reaches, JSON-able.

    `share` is J = E[r] − β KL gained over the reference's, as a share of what π* gains; `gap` is
    the reward that it leaves on the table at the KL it spent.
    """
    optimum = exact.optimal(task.logprobs, task.reward, BETA)
    start = exact.expected(task.logprobs, task.reward)
    most = exact.expected(optimum, task.reward) - BETA * exact.kl(optimum, task.logprobs) - start
    bound = frontier(task)
    rows: dict[str, Any] = {}
    for name in track(names, "oracle", console=Console(stderr=True), transient=True):
        path = train(name, task, config, steps)
        kl, reward = path.kl[-1], path.reward[-1]
        there = float(np.interp(kl, bound["kl"], bound["reward"]))
        rows[name] = path._asdict() | {
            "share": (reward - BETA * kl - start) / most,
            "gap": there - reward,
        }
    return {
        "beta": BETA,
        "completions": len(task.world.tokens),
        "start": start,
        "optimum": {
            "kl": exact.kl(optimum, task.logprobs),
            "reward": exact.expected(optimum, task.reward),
        },
        "frontier": bound,
        "best_of_n": best_of_n(task),
        "algorithms": rows,
    }


def draw(found: dict[str, Any]) -> bytes:
    """PNG: an algorithm a panel, its path under the frontier, the optimum as a star."""
    names = list(found["algorithms"])
    columns = 3
    rows = -(-len(names) // columns)
    made, axes = plots.figure(3.1 * columns, 2.9 * rows, rows, columns)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    limit = 1.05 * max(max(r["kl"]) for r in found["algorithms"].values())
    limit = max(limit, 1.3 * found["optimum"]["kl"])
    for ax, name in zip(axes.flat, names, strict=False):
        row, bound, best = found["algorithms"][name], found["frontier"], found["best_of_n"]
        ax.plot(bound["kl"], bound["reward"], color="#444444", lw=1.2, label="most possible")
        ax.plot(best["kl"], best["reward"], "o", ms=3.5, color=plots.OTHER, label="best-of-n")
        ax.plot(row["kl"], row["reward"], ".-", color=plots.PROXY, ms=4, label=name)
        ax.plot(*found["optimum"].values(), "*", ms=12, color=plots.GOLD, label="its optimum")
        ax.set(xlim=(-0.05, limit), title=f"{name}: {row['share']:.0%}")
    for ax in axes[-1]:
        ax.set_xlabel("exact KL, nats")
    for row in axes:
        row[0].set_ylabel("exact E[reward]")
    axes[0][0].legend()
    return plots.png(made)


def oracle_command(out: Path, names: list[str], steps: int) -> None:
    """`minilm oracle`: prints a table; oracle.json and oracle.png in `out`.

    Args:
      names: rows, or algorithms, each of which brings all its rows.
    """
    backend.configure(BackendConfig(compute_dtype="float32"))
    for name in names:
        choose(ROWS, name, "--algorithms")
    names = [row for row, laid in ROWS.items() if not {row, laid["algorithm"]}.isdisjoint(names)]
    console, task = Console(soft_wrap=True), problem()
    found = compare(task, names, steps)
    right: Any = {"justify": "right"}
    table = Table(title=f"{found['completions']} completions, β {BETA:g}", title_justify="left")
    table.add_column("")
    for column in ("KL", "mean reward", "of the optimum", "below the frontier"):
        table.add_column(column, **right)
    table.add_row("reference", "0.000", f"{found['start']:.3f}", "0%", "")
    best = found["optimum"]
    table.add_row("optimum", f"{best['kl']:.3f}", f"{best['reward']:.3f}", "100%", "0.000")
    for name, row in found["algorithms"].items():
        cells = (f"{row['kl'][-1]:.3f}", f"{row['reward'][-1]:.3f}", f"{row['share']:.0%}")
        table.add_row(name, *cells, f"{row['gap']:.3f}")
    console.print(table)
    write_json(out / "oracle.json", found)
    write_atomically(out / "oracle.png", draw(found))
    console.print(f"{out / 'oracle.json'}, {out / 'oracle.png'}", markup=False)
