"""The bank's RLHF runs: minilm's own rollouts and updates in a world of sixteen tokens.

A language is a random chain of tokens of which each has four successors. Gold pays for a share of
favoured tokens and fines steps that are not of the chain, so it is known; the proxy is a reward
model trained on pairs of the reference's completions, as in the pipeline.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from curve_bank import SEEDS, jittered, programmed, record
from flax import nnx

from minilm import checkpoint
from minilm.algorithms import ALGORITHMS, objective
from minilm.config import ModelConfig, OptimizerConfig, RLHFConfig
from minilm.generate import Samples, generate
from minilm.model import Transformer, sequence_score
from minilm.objective import Term
from minilm.rewards import Normalization, RewardModel
from minilm.stages import reward, rlhf
from minilm.stages.policy import proxy_scores
from minilm.stages.pretrain import LANGUAGE, forward
from minilm.step import init_state, make_train_step
from minilm.text.batches import batch_of

PAD, EOS, VOCAB, PROMPT, ROOM = 0, 1, 16, 3, 16
FAVOURED = (2, 3, 4)
END = 0.2  # probability that a token is the last
STEPS, TEST = 40, 128
SHAPE = ModelConfig(
    num_layers=1, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64
)
PLAIN = OptimizerConfig(weight_decay=0.0)


class Language(NamedTuple):
    """A chain, its pretrained model, prompts, and completions of the model to learn from."""

    legal: np.ndarray  # Bool [V, V]: which token may follow which
    reference: Transformer
    prompts: np.ndarray  # [N, P]
    rows: np.ndarray  # the prompts of `samples`
    samples: Samples


def gold_of(
    legal: np.ndarray, rows: np.ndarray, samples: Samples, judge: str = "plain"
) -> tuple[np.ndarray, np.ndarray]:
    """(gold, whether the completion is of the language and ends), one of each a row.

    To the moderate judge two favoured tokens in nine are best, and more is worse again.
    """
    mask = np.asarray(samples.mask)
    tokens = np.concatenate([rows[:, -1:], np.asarray(samples.tokens)], axis=1)
    wrong = ~legal[tokens[:, :-1], tokens[:, 1:]] & mask
    count = np.maximum(mask.sum(1), 1)
    favoured = (np.isin(tokens[:, 1:], FAVOURED) & mask).sum(1) / count
    ended = np.asarray(samples.finished)
    worth = {"plain": 4.0 * favoured, "moderate": 4.0 * favoured - 9.0 * favoured**2}[judge]
    gold = worth - 8.0 * wrong.sum(1) / count - 1.0 * ~ended
    return gold, ~wrong.any(1) & ended


@functools.cache
def language(seed: int) -> Language:
    rng = np.random.default_rng((seed, 1))
    chain = np.zeros((VOCAB, VOCAB))
    for token in range(2, VOCAB):
        others = rng.choice(np.arange(2, VOCAB), 4, replace=False)
        chain[token, others] = (1 - END) * rng.dirichlet(np.full(4, 3.0))
        chain[token, EOS] = END
    first = np.r_[0, 0, np.full(VOCAB - 2, 1 / (VOCAB - 2))]

    def text() -> list[int]:
        tokens = [int(rng.choice(VOCAB, p=first))]
        while tokens[-1] != EOS and len(tokens) < PROMPT + ROOM:
            tokens.append(int(rng.choice(VOCAB, p=chain[tokens[-1]])))
        return tokens

    rows = np.zeros((2000, PROMPT + ROOM + 1), np.int32)
    for row in rows:
        tokens = [EOS, *text()]
        row[: len(tokens)] = tokens
    model = Transformer(SHAPE, VOCAB, rngs=nnx.Rngs(seed))
    state: Any = init_state(model, programmed(np.linspace(1e-2, 1e-3, 250), PLAIN))
    for _ in range(250):
        state, _ = pretraining()(state, batch_of(rows[rng.integers(len(rows), size=32)]))
    prompts = np.stack([[EOS, a, rng.choice(VOCAB, p=_without_end(chain[a]))]
                        for a in rng.integers(2, VOCAB, 64)]).astype(np.int32)  # fmt: skip
    chosen = np.repeat(prompts, 16, axis=0)
    samples = _sampled(state.model, chosen, seed)
    return Language(chain > 0, state.model, prompts, chosen, samples)


def _without_end(probabilities: np.ndarray) -> np.ndarray:
    content = np.where(np.arange(VOCAB) == EOS, 0.0, probabilities)
    return content / content.sum()


@functools.cache
def pretraining():
    return make_train_step(forward, LANGUAGE, programmed([], PLAIN))


@functools.cache
def comparing():
    return make_train_step(reward.forward, reward.PREFERENCE, programmed([], PLAIN))


def _sampled(model: Transformer, prompts: np.ndarray, seed: int) -> Samples:
    key = jax.random.fold_in(jax.random.key(seed), 5)
    samples = generate(
        model, jnp.asarray(prompts), key, max_new_tokens=ROOM, eos_id=EOS, pad_id=PAD
    )
    return jax.tree.map(np.asarray, samples)


def with_head(model: Transformer) -> Transformer:
    """The same model with a scalar head of zeros."""
    known = checkpoint.flatten(model)
    wider = Transformer(SHAPE, VOCAB, scalar_head=True, rngs=nnx.Rngs(0))
    leaves = [known.get(name, leaf) for name, leaf in checkpoint.flatten(wider).items()]
    return jax.tree.unflatten(jax.tree.structure(wider), leaves)


@functools.cache
def reward_model(seed: int, pays: str, pairs: int) -> RewardModel:
    """Trained on Bradley-Terry votes of raters who see gold, contents alone, or length."""
    world = language(seed)
    rng = np.random.default_rng((seed, 2))
    gold, _ = gold_of(world.legal, world.rows, world.samples)
    mask = np.asarray(world.samples.mask)
    lengths = mask.sum(1).astype(np.float64)
    favoured = (np.isin(world.samples.tokens, FAVOURED) & mask).sum(1) / np.maximum(lengths, 1)
    worth = {"gold": gold, "content": 4.0 * favoured, "length": 0.5 * lengths}[pays]
    ended = np.flatnonzero(world.samples.finished)
    first, second = rng.choice(ended, (2, pairs))
    votes = rng.binomial(5, 1 / (1 + np.exp(-2 * (worth[first] - worth[second])))) / 5
    tokens = np.concatenate([world.rows, world.samples.tokens], axis=1)
    segments = (tokens != PAD).astype(np.int32)
    last = segments.sum(1).astype(np.int32) - 1
    model = with_head(world.reference)
    model.score[...] = jnp.asarray(  # pyright: ignore[reportOptionalSubscript]
        rng.normal(0, SHAPE.embed_dim**-0.5, SHAPE.embed_dim), jnp.float32
    )
    steps = 150
    state: Any = init_state(model, programmed(np.linspace(5e-3, 5e-4, steps), PLAIN))
    for _ in range(steps):
        n = rng.integers(pairs, size=32)
        both = np.stack([first[n], second[n]], axis=1)  # [M, K = 2]
        zero = np.zeros((32, 1), np.int32)
        batch = reward.PairBatch._make((
            tokens[both], segments[both], last[both], zero, zero + 1,
            votes[n][:, None].astype(np.float32), np.stack([votes[n], 1 - votes[n]], 1),
            np.ones((32, 1), np.float32),
        ))  # fmt: skip
        state, _ = comparing()(state, batch)
    scores = np.asarray(_scores(state.model, tokens[ended], segments[ended], last[ended]))
    scale = Normalization(float(scores.mean()), float(max(scores.std(), 1e-6)))
    return RewardModel((state.model,), (scale,))


_scores = jax.jit(sequence_score)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A run of RLHF; the defaults are healthy ones, an injected cause is what differs."""

    algorithm: str = "rloo"
    rate: float = 1e-3
    kl_coef: float = 0.1
    entropy: float = 0.0  # weight of the entropy in the loss; below 0 it is a bonus
    pays: str = "gold"
    pairs: int = 3000
    blind: bool = False  # the reward model gives 0 to everything
    offset: float = 0.0  # standard deviations by which all rewards are shifted
    temperature: float = 1.0
    value_coef: float = 0.1
    missing: float = -3.0  # score of a completion that does not end
    judge: str | None = "plain"  # whose gold is logged


def policy_run(recipe: Policy, seed: int) -> list[dict]:
    """Trains and returns the records as the stage would log them."""
    world, algorithm = language(seed), ALGORITHMS[recipe.algorithm]
    scorer = reward_model(seed, recipe.pays, recipe.pairs)
    mean, std = scorer.scales[0]
    scorer = RewardModel(scorer.members, (Normalization(mean - recipe.offset * std, std),))
    if recipe.blind:
        scorer = RewardModel((with_head(world.reference),), (Normalization(0.0, 1.0),))
    config = RLHFConfig(
        prompts_per_step=8, group_size=8, steps=STEPS, temperature=recipe.temperature,
        missing_eos_score=recipe.missing,
    ).model_copy(  # signs that a config refuses are what some runs are spoiled by
        update={"kl_coef": recipe.kl_coef, "value_coef": recipe.value_coef}
    )  # fmt: skip
    policy = with_head(world.reference) if algorithm.critic else world.reference
    collect = rlhf.make_collect(
        config, algorithm, world.reference, scorer, world.prompts,
        key=jax.random.key(seed), max_new_tokens=ROOM, eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    aim = objective(algorithm, config)
    if recipe.entropy:
        bonus = Term("loss/entropy", recipe.entropy, lambda o, b: o.entropy, aim.terms[0].over)
        aim = aim._replace(terms=(*aim.terms, bonus))
    rates = np.linspace(1.0, 0.1, STEPS) * jittered(recipe.rate, seed)
    step = rlhf.make_step(config, aim, programmed([], PLAIN), collect, ROOM)
    state = init_state(policy, programmed(rates, PLAIN))
    prompts = np.repeat(world.prompts, TEST // len(world.prompts), axis=0)

    def evaluate(state) -> dict:
        samples = _sampled(state.model, prompts, seed + 100)
        proxy = proxy_scores(scorer, prompts, samples, config.missing_eos_score, PAD)
        figures = {"proxy": proxy.mean()}
        if recipe.judge:
            gold, parses = gold_of(world.legal, prompts, samples, recipe.judge)
            figures |= {"gold": gold.mean(), "parse_share": parses.mean()}
        return {name: float(value) for name, value in figures.items()}

    records = record(state, step, STEPS, 1, rates, evaluate, 8)
    return [{k: v for k, v in r.items() if k in KEPT} for r in records]


KEPT = (
    "step", "objective/scores", "objective/kl", "policy/entropy_avg", "completions/mean_length",
    "completions/clipped_ratio", "reward_std", "frac_reward_zero_std", "loss/value", "grad_norm",
    "proxy", "gold", "parse_share", "skipped_in_a_row",
)  # fmt: skip
VARIANTS: dict[str, tuple[Policy, Policy, Policy]] = {  # seeds 0 and 1, 2 and 3, 4 and 5
    "kl_blow_up": (
        Policy(kl_coef=-0.25, rate=3e-3),
        Policy("ppo", entropy=-5.0, rate=6e-3),
        Policy("grpo", entropy=-5.0, rate=6e-3, judge=None),
    ),
    "entropy_collapse": (
        Policy(entropy=2.0, rate=3e-3),
        Policy("grpo", entropy=2.0, rate=3e-3),
        Policy("ppo", entropy=1.0, rate=3e-3, judge=None),
    ),
    "length_gaming": (
        Policy(pays="length", kl_coef=0.02, rate=3e-3, missing=2.0),
        Policy("grpo", pays="length", kl_coef=0.02, rate=3e-3, missing=2.0),
        Policy("ppo", pays="length", kl_coef=0.02, rate=2e-3, missing=2.0, judge=None),
    ),
    "reward_hacking": (
        Policy(pays="content", judge="moderate", kl_coef=0.0, rate=3e-3),
        Policy("grpo", pays="content", judge="moderate", kl_coef=0.0, rate=3e-3),
        Policy("ppo", pays="content", judge="moderate", kl_coef=0.0, rate=3e-3),
    ),
    "value_function_failure": (
        Policy("ppo", value_coef=0.0, rate=3e-3),
        Policy("ppo", value_coef=-1.0, rate=2e-3),
        Policy("ppo", offset=10.0),
    ),
    "zero_reward_variance": (
        Policy(blind=True, missing=0.0),
        Policy("grpo", temperature=0.02),
        Policy("ppo", blind=True, missing=0.0, judge=None),
    ),
}
HEALTHY = (
    Policy(), Policy(), Policy("grpo"), Policy("grpo"), Policy("ppo"), Policy("ppo"),
    Policy("grpo", kl_coef=0.2), Policy("ppo", judge=None),
)  # fmt: skip


def policy_recipes() -> Iterator[tuple[str, int, Callable[[], list[dict]]]]:
    """(label, seed, what makes the records) of every run; healthy ones count on from 50."""
    for label, variants in VARIANTS.items():
        for seed in SEEDS:
            yield label, seed, functools.partial(policy_run, variants[seed // 2], seed)
    for seed, recipe in enumerate(HEALTHY):
        yield "healthy", 50 + seed, functools.partial(policy_run, recipe, seed)
