"""RLHF: rollout, score, KL to the frozen reference, update; the algorithm is a row."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from minilm import backend, checkpoint
from minilm.algorithms import (
    PTX,
    Algorithm,
    PolicyBatch,
    algorithm_of,
    next_kl_scale,
    objective,
    price,
)
from minilm.config import PretrainConfig, RLHFConfig
from minilm.errors import UserError
from minilm.generate import Samples, generate
from minilm.losses.language import next_token_cross_entropy
from minilm.losses.reduce import Mean, mean
from minilm.model import Transformer
from minilm.objective import Objective
from minilm.optim import make_optimizer, schedule
from minilm.rewards import RewardModel, learned_reward, shaped
from minilm.rollout import Outputs, Rollout, complete_rollout, completion_outputs
from minilm.stages.evaluate import prompt_rows
from minilm.stages.pretrain import forward as next_tokens
from minilm.stages.pretrain import training_batches
from minilm.stages.reward import load_reward_model
from minilm.stages.workspace import Workspace
from minilm.step import TrainState, init_state, make_train_step
from minilm.terms import configured
from minilm.text.batches import Batch
from minilm.text.corpora import split
from minilm.text.prompts import prompt_sets
from minilm.train import fit

# (prompts as rows, their completions) -> a score each, in standard deviations of the reference's.
type Judged = Callable[[np.ndarray, Samples], np.ndarray]


def rlhf(
    ws: Workspace, evaluate: Callable[[Transformer], dict], judged: Judged | None = None
) -> dict:
    """Fine-tunes the pretrained policy against the reward model. Returns the stage's summary.

    Args:
      evaluate: gives a policy's figures on the development prompts; the run hands it in, so that
        training itself can't see gold.
      judged: gold as a part of the reward, where `rlhf.judge_weight` asks for it.
    """
    config, sizes = ws.config.rlhf, ws.config.prompts
    algorithm = algorithm_of(config)
    optimizer = make_optimizer(config.optimizer, updates(config))
    policy = ws.load(ws.base, scalar_head=algorithm.critic)
    reference, reward_model = ws.load(ws.base, scalar_head=False), load_reward_model(ws)
    collect = collector(ws, reference, reward_model, judged)(config)
    aim = configured(objective(algorithm, config), "rlhf", ws.config, updates(config))
    ptx = pretraining_rows(ws, config.ptx_rows)
    step = make_step(config, aim, optimizer, collect, sizes.max_new_tokens, ptx)
    rate = schedule(config.optimizer, updates(config), config.optimizer.learning_rate)
    per_step = config.epochs * config.minibatches
    budget = config.kl_budget

    def rank(figures: Mapping[str, float]) -> float:
        """The later the better, within the budget; beyond it, worse than any."""
        inside = budget is None or figures["kl"] <= budget
        return -figures["step"] if inside else figures["step"] + 1

    _, record = fit(
        start_state(policy, optimizer),
        step,
        title="rlhf",
        steps=config.steps,
        loop=config,
        folder=ws.stage("rlhf"),
        metadata=ws.metadata("rlhf", scalar_head=algorithm.critic),
        files={"tokenizer.json": ws.tokenizer_file},
        track=ws.tracker("rlhf"),
        learning_rate=lambda k: rate(k * per_step),
        evaluate=lambda s: evaluate(s.model),
        best=None if budget is None else rank,
        patience=0 if budget is None else 1,
    )
    if budget is not None and record["kl"] > budget:
        hint = "lower rlhf.optimizer.learning_rate, raise rlhf.kl_coef, or look more often: "
        raise UserError(
            f"KL was {record['kl']:.2f} nats at the first evaluation already",
            where="rlhf.kl_budget",
            value=budget,
            hint=f"{hint}rlhf.evaluate_every",
        )
    return {"algorithm": config.algorithm, "seconds": record["seconds"]}


def start_state(policy: Transformer, optimizer) -> TrainState:
    """The first state: the KL coefficient is the config's."""
    state = init_state(policy, optimizer)
    return dataclasses.replace(state, extra=state.extra | {"kl_scale": jnp.float32(1)})


def last_kl_scale(ws: Workspace) -> Float[np.ndarray, ""]:
    """Where `rlhf.kl_target` had moved the price of a nat at the end, as a multiple of kl_coef."""
    return checkpoint.load_arrays(checkpoint.find(ws.stage("rlhf")), "extra.kl_scale")[
        "extra.kl_scale"
    ]


def pretraining_rows(ws: Workspace, count: int) -> Callable[[int], Batch] | None:
    """(n) -> `count` rows of the text that was trained on, for update n; None if none is mixed in.

    They are cut as the pretrained model's were, which may be another run's, and come in an order
    of RLHF's own: a function of both seeds and n.
    """
    config, seed = ws.config.rlhf, ws.config.seed
    if not config.ptx_coef:
        return None
    stored = checkpoint.metadata(checkpoint.find(ws.stage("pretrain")))["config"]["pretrain"]
    cut = PretrainConfig.model_validate_json(json.dumps(stored))
    ws = dataclasses.replace(ws, config=ws.config.model_copy(update={"pretrain": cut}))
    documents = split(ws.config.corpus, seed, ws.out / "cache").train
    order = int(np.random.default_rng((seed, 1000 + config.seed)).integers(2**32))
    return training_batches(ws, documents, count, order).__getitem__


def updates(config: RLHFConfig) -> int:
    """Optimizer updates of the whole stage."""
    return config.steps * config.epochs * config.minibatches


class Collected(NamedTuple):
    """A step's completions, and what an update reads of them."""

    samples: Samples
    rollout: Rollout
    scores: Float[Array, "B"]  # normalised, before any KL penalty
    batch: PolicyBatch
    metrics: dict[str, Mean]
    kl_scale: Float[Array, ""]  # of the next step


def collector(
    ws: Workspace, reference: Transformer, reward_model: RewardModel, judged: Judged | None = None
) -> Callable[[RLHFConfig], Callable[..., Collected]]:
    """A config's `collect` (see make_collect) on this run's RLHF prompts."""
    sizes, tokenizer = ws.config.prompts, ws.tokenizer
    prompts = prompt_sets(ws.config, tokenizer, ws.held_out()).rlhf

    def made(config: RLHFConfig):
        return make_collect(
            config,
            algorithm_of(config),
            reference,
            reward_model,
            prompt_rows(prompts, tokenizer, sizes.max_tokens),
            key=jax.random.fold_in(jax.random.key(ws.config.seed), 1000 + config.seed),
            max_new_tokens=sizes.max_new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            judged=judged,
        )

    return made


def make_collect(
    config: RLHFConfig,
    algorithm: Algorithm,
    reference: Transformer,
    reward_model: RewardModel,
    prompts: np.ndarray,
    *,
    key: jax.Array,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    judged: Judged | None = None,
) -> Callable[..., Collected]:
    """(policy, k, kl_scale = 1) -> the rollout of step k, scored and priced.

    It is a function of these and the key.
    """
    temperature = config.temperature
    nat = config.kl_coef if algorithm.kl else 0.0

    @backend.keep
    @jax.jit
    def prepare(model, reference, reward_model, rows, samples, gold, kl_scale):
        rollout = complete_rollout(
            model, reference, rows, samples, pad_id=pad_id, temperature=temperature
        )
        missing = config.missing_eos_score
        learned = learned_reward(reward_model, rollout, missing_eos_score=missing)
        score = config.learned_weight * learned + config.judge_weight * gold
        score = shaped(score, rollout, config)
        batch = price(algorithm, rollout, score, config, kl_scale)
        mask, one = rollout.mask, jnp.ones_like(score)
        ended = rollout.finished.astype(jnp.float32)
        lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
        gap = jnp.where(mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
        kl = mean(jnp.sum(gap, axis=1), one)
        metrics = {
            "objective/kl": kl,
            "objective/kl_coef": Mean(nat * kl_scale, jnp.float32(1)),
            "objective/scores": mean(score, one),
            "reward/learned": mean(learned, one),
            "reward/judge": mean(gold, one),
            "objective/entropy": mean(-jnp.sum(rollout.logprobs, axis=1), one),
            "completions/mean_length": mean(lengths, one),
            "completions/clipped_ratio": mean(1.0 - ended, one),
        }
        if config.group_size > 1:
            groups = jnp.std(score.reshape(-1, config.group_size), axis=1)
            every = jnp.ones_like(groups)
            alike = (groups < 1e-6).astype(jnp.float32)
            spread = {"reward_std": mean(groups, every), "frac_reward_zero_std": mean(alike, every)}
            metrics |= spread
        following = next_kl_scale(kl_scale, kl.value, len(score), config)
        return Collected(samples, rollout, score, batch, metrics, following)

    def collect(model: Transformer, k: int, kl_scale: Any = 1.0) -> Collected:
        order = _prompt_order(len(prompts), config.prompts_per_step, config.seed, k)
        rows = np.repeat(prompts[order], config.group_size, axis=0)
        samples = generate(
            model,
            jnp.asarray(rows),
            jax.random.fold_in(key, k),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_id=eos_id,
            pad_id=pad_id,
        )
        gold = np.zeros(len(rows), np.float32) if judged is None else judged(rows, samples)
        scale = jnp.asarray(kl_scale, jnp.float32)
        return prepare(model, reference, reward_model, rows, samples, gold, scale)

    return collect


def make_forward(config: RLHFConfig, width: int) -> Callable[[Transformer, PolicyBatch], Outputs]:
    """(model, batch) -> what the objective's terms read: of the last `width` tokens, and of the
    pretraining rows, which no temperature divides."""

    def forward(model: Transformer, batch: PolicyBatch) -> Outputs:
        outputs = completion_outputs(model, batch.tokens, batch.segments, width, config.temperature)
        if batch.ptx is None:
            return outputs
        found = next_token_cross_entropy(next_tokens(model, batch.ptx), batch.ptx.targets)
        return outputs._replace(ptx=found)

    return forward


def make_step(
    config: RLHFConfig,
    aim: Objective,
    optimizer,
    collect: Callable[..., Collected],
    width: int,
    ptx: Callable[[int], Batch] | None = None,
):
    """(state, k) -> (state, metrics): one rollout of `width` tokens at most, and its updates.

    Args:
      ptx: (n) -> the pretraining rows of update n; see `pretraining_rows`.
    """
    size, parts = config.prompts_per_step * config.group_size, config.accumulation
    apart = {PTX: config.ptx_clip} if PTX in aim.trained else {}
    if set(aim.trained) == set(apart):
        problem, hint = "nothing else is trained, so there is nothing to clip by", "run sft instead"
        raise UserError(problem, where="rlhf.ptx_coef", value=config.ptx_coef, hint=hint)
    forward, dials = make_forward(config, width), {"accumulation": parts, "apart": apart}
    update = make_train_step(forward, aim, optimizer, **dials)

    def step(state: TrainState, k: int):
        collected = collect(state.model, k, state.extra["kl_scale"])
        batch, metrics = collected.batch, collected.metrics
        extra = state.extra | {"kl_scale": collected.kl_scale}
        state = dataclasses.replace(state, extra=extra)
        for epoch in range(config.epochs):
            for n, part in enumerate(_minibatches(batch, size, config, k, epoch)):
                number = (k * config.epochs + epoch) * config.minibatches + n
                rows = None if ptx is None else ptx(number)
                state, latest = update(state, part._replace(ptx=rows))
                metrics = _joined(metrics, latest)
        return state, metrics

    return step


def _joined(metrics: dict, latest: dict) -> dict:
    """Means over all updates of a rollout; but the ratio stays that of the first, which is 1."""
    added = {k: metrics[k] + v for k, v in latest.items() if k in metrics and "ratio" not in k}
    return latest | metrics | added


def _minibatches(batch: PolicyBatch, size: int, config: RLHFConfig, k: int, epoch: int):
    if config.minibatches == 1:
        return [batch]
    rng = np.random.default_rng((config.seed, k, epoch))
    parts = rng.permutation(size).reshape(config.minibatches, -1)
    return [jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in parts]


def _prompt_order(count: int, per_step: int, seed: int, k: int) -> np.ndarray:
    """Rows of step k: every prompt once before any comes again, shuffled anew each time round."""
    places = range(k * per_step, (k + 1) * per_step)
    rounds = {place // count for place in places}
    epochs = {e: np.random.default_rng((seed, e)).permutation(count) for e in rounds}
    return np.array([epochs[p // count][p % count] for p in places])
