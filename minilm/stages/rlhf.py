"""RLHF: rollout, score, KL to the frozen reference, update; the algorithm is a row."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from minilm import backend
from minilm.algorithms import ALGORITHMS, Algorithm, PolicyBatch, objective, price
from minilm.choices import choose
from minilm.config import RLHFConfig
from minilm.errors import UserError
from minilm.generate import generate, left_pad
from minilm.losses.reduce import mean
from minilm.model import Transformer
from minilm.optim import make_optimizer, schedule
from minilm.rewards import Normalization, learned_reward
from minilm.rollout import complete_rollout, completion_outputs
from minilm.stages.reward import load_normalization
from minilm.stages.workspace import Workspace
from minilm.text.prompts import prompt_sets
from minilm.train import TrainState, fit, init_state, make_train_step


def rlhf(ws: Workspace, evaluate: Callable[[Transformer], dict[str, float | None]]) -> dict:
    """Fine-tunes the pretrained policy against the reward model.

    Args:
      evaluate: policy -> figures on the development prompts; the run hands it in, so that
        training itself can't see gold.
    Returns:
      The algorithm and the seconds of training.
    """
    config, tokenizer = ws.config, ws.tokenizer
    algorithm = choose(ALGORITHMS, config.rlhf.algorithm, "rlhf.algorithm")
    reference = ws.load("pretrain", scalar_head=False)
    reward_model = ws.load("reward")
    prompts = prompt_sets(config, tokenizer, ws.held_out()).rlhf
    optimizer = make_optimizer(config.rlhf.optimizer, updates(config.rlhf))
    policy = ws.load("pretrain", scalar_head=algorithm.critic)
    state = init_state(policy, optimizer)
    step = make_step(
        config.rlhf,
        algorithm,
        optimizer,
        reference,
        reward_model,
        load_normalization(ws),
        prompt_rows(prompts, tokenizer, config.prompts.max_tokens),
        key=jax.random.fold_in(jax.random.key(config.seed), 1000 + config.rlhf.seed),
        max_new_tokens=config.prompts.max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    rate = schedule(
        config.rlhf.optimizer, updates(config.rlhf), config.rlhf.optimizer.learning_rate
    )
    per_step = config.rlhf.epochs * config.rlhf.minibatches
    state, record = fit(
        state,
        step,
        title="rlhf",
        steps=config.rlhf.steps,
        loop=config.rlhf,
        folder=ws.stage("rlhf"),
        metadata=ws.metadata("rlhf", scalar_head=algorithm.critic),
        files={"tokenizer.json": ws.tokenizer_file},
        learning_rate=lambda k: rate(k * per_step),
        evaluate=lambda s: evaluate(s.model),
    )
    return {"algorithm": config.rlhf.algorithm, "seconds": record["seconds"]}


def updates(config: RLHFConfig) -> int:
    """Optimizer updates of the whole stage."""
    return config.steps * config.epochs * config.minibatches


def prompt_rows(prompts: Sequence[str], tokenizer, length: int) -> np.ndarray:
    """Prompts as left-padded rows [N, P], start token first."""
    encoded = [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    return left_pad(encoded, tokenizer.pad_id, length)


def make_step(
    config: RLHFConfig,
    algorithm: Algorithm,
    optimizer,
    reference: Transformer,
    reward_model: Transformer,
    normalization: Normalization,
    prompts: np.ndarray,
    *,
    key: jax.Array,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
):
    """(state, k) -> (state, metrics): one rollout and its updates, a function of (key, k) alone."""
    if config.group_size < 2 and not algorithm.critic:
        raise UserError(
            "a completion is compared with others of its prompt",
            where="rlhf.group_size",
            value=config.group_size,
            allowed="at least 2, or 1 with ppo",
        )
    size = config.prompts_per_step * config.group_size
    if size % (config.minibatches * config.accumulation):
        raise UserError(
            f"{size} completions a step do not split into {config.minibatches} minibatches of "
            f"{config.accumulation} parts",
            where="rlhf.minibatches",
        )
    width = max_new_tokens

    def forward(model: Transformer, batch: PolicyBatch):
        return completion_outputs(model, batch.tokens, batch.segments, width, config.temperature)

    update = make_train_step(
        forward, objective(algorithm, config), optimizer, accumulation=config.accumulation
    )

    @backend.keep
    @jax.jit
    def prepare(model, reference, reward_model, rows, samples):
        rollout = complete_rollout(
            model, reference, rows, samples, pad_id=pad_id, temperature=config.temperature
        )
        score = learned_reward(
            reward_model,
            rollout,
            normalization=normalization,
            missing_eos_score=config.missing_eos_score,
        )
        batch = price(algorithm, rollout, score, config)
        mask, one = rollout.mask, jnp.ones_like(score)
        lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
        gap = jnp.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
        groups = jnp.std(score.reshape(-1, config.group_size), axis=1)
        metrics = {
            "objective/kl": mean(jnp.sum(gap, axis=1), one),
            "objective/scores": mean(score, one),
            "objective/entropy": mean(-jnp.sum(rollout.logprobs, axis=1), one),
            "completions/mean_length": mean(lengths, one),
            "completions/clipped_ratio": mean(1.0 - rollout.finished.astype(jnp.float32), one),
            "reward_std": mean(groups, jnp.ones_like(groups)),
            "frac_reward_zero_std": mean(
                (groups < 1e-6).astype(jnp.float32), jnp.ones_like(groups)
            ),
        }
        return batch, metrics

    order = functools.partial(_prompt_order, len(prompts), config.prompts_per_step, config.seed)

    def step(state: TrainState, k: int):
        rows = np.repeat(prompts[order(k)], config.group_size, axis=0)
        samples = generate(
            state.model,
            jnp.asarray(rows),
            jax.random.fold_in(key, k),
            max_new_tokens=max_new_tokens,
            temperature=config.temperature,
            eos_id=eos_id,
            pad_id=pad_id,
        )
        batch, metrics = prepare(state.model, reference, reward_model, rows, samples)
        for epoch in range(config.epochs):
            for part in _minibatches(batch, size, config, k, epoch):
                state, latest = update(state, part)
                metrics = latest | metrics | _first(metrics, latest)
        return state, metrics

    return step


def _first(metrics: dict, latest: dict) -> dict:
    """Of a rollout's updates the losses of the last are kept, but the ratio of the first."""
    keep = {k for k in latest if not k.startswith("val/ratio")}
    return {k: latest[k] for k in keep} | {
        k: metrics.get(k, latest[k]) for k in latest if k not in keep
    }


def _minibatches(batch: PolicyBatch, size: int, config: RLHFConfig, k: int, epoch: int):
    if config.minibatches == 1:
        return [batch]
    rng = np.random.default_rng((config.seed, k, epoch))
    parts = rng.permutation(size).reshape(config.minibatches, -1)
    return [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in parts]


def _prompt_order(count: int, per_step: int, seed: int, k: int) -> np.ndarray:
    """Rows of step k: every prompt once before any comes again, shuffled anew each time round."""
    places = np.arange(k * per_step, (k + 1) * per_step)
    epochs = {e: np.random.default_rng((seed, e)).permutation(count) for e in set(places // count)}
    return np.array([epochs[p // count][p % count] for p in places])
