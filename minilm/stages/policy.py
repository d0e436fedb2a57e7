"""Measuring a policy on fixed prompts: proxy, gold, exact KL, parse share, win rate."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minilm.errors import UserError
from minilm.files import write_jsonl
from minilm.generate import Samples
from minilm.judges import Judge, configured
from minilm.losses.language import entropy, kl_divergence
from minilm.model import Transformer, hidden_states, logits
from minilm.rewards import RewardModel, learned_reward
from minilm.rollout import Rollout
from minilm.stages.evaluate import batched, parse_report, sample, texts_of
from minilm.stages.reward import load_reward_model
from minilm.stages.rlhf import Judged
from minilm.stages.workspace import Workspace
from minilm.text.prompts import prompt_sets


class Scored(NamedTuple):
    """N completions, their prompts as texts and left-padded rows, and what they score."""

    prompts: list[str]
    rows: np.ndarray
    samples: Samples
    texts: list[str]
    proxy: np.ndarray
    gold: np.ndarray | None  # None where there is no judge


class PolicyEvaluator:
    """Compares policies with the reference on the development or the evaluation prompts."""

    def __init__(self, ws: Workspace):
        self.ws = ws
        self.prompts = prompt_sets(ws.config, ws.tokenizer, ws.held_out())._asdict()
        self.reward_model = load_reward_model(ws)
        self.reference = ws.load(ws.base, scalar_head=False)

    @functools.cached_property
    def judge(self) -> Judge | None:
        """Imported where it is read: an audit has no need of it, and may not find it."""
        return configured(self.ws.config)

    @functools.cache  # noqa: B019  one evaluator a stage
    def references(self, prompt_set: str) -> Scored:
        """`rlhf.references` completions of the reference for each prompt of a set."""
        count = self.ws.config.rlhf.references
        prompts = [p for p in self.prompts[prompt_set] for _ in range(count)]
        return self.score(self.reference, prompts, seed=41)

    def __call__(
        self, policy: Transformer, prompt_set: str, samples_file: str | None = None
    ) -> dict[str, float | None]:
        """Figures of a policy at temperature 1, and under `reference/` those of the reference.

        kl and entropy are nats a completion, on the policy's own samples; length is in tokens.
        """
        ours = self.score(policy, self.prompts[prompt_set], seed=42)
        theirs = self.references(prompt_set)
        pad_id = self.ws.tokenizer.pad_id
        kl, ent = exact_kl(policy, self.reference, ours.rows, ours.samples, pad_id)
        figures = self._figures(ours) | {"kl": float(kl.mean()), "entropy": float(ent.mean())}
        if ours.gold is not None and theirs.gold is not None:
            reference_gold = theirs.gold.reshape(len(ours.texts), -1)
            rate, low, high = win_rate(ours.gold, reference_gold, seed=self.ws.config.seed)
            figures |= {"gold_win_rate": rate, "gold_win_rate_low": low, "gold_win_rate_high": high}
        figures |= {f"reference/{k}": v for k, v in self._figures(theirs).items()}
        if samples_file:
            self._write(samples_file, ours, theirs, kl)
        return figures

    def score(self, model: Transformer, prompts: Sequence[str], *, seed: int) -> Scored:
        return self.scored(prompts, self.complete(model, prompts, seed=seed))

    def complete(
        self, model: Transformer, prompts: Sequence[str], *, seed: int
    ) -> tuple[np.ndarray, Samples]:
        """A completion of each prompt, with the prompts as left-padded rows."""
        sizes = self.ws.config.prompts
        key = jax.random.fold_in(jax.random.key(self.ws.config.seed), seed)
        limits = {"max_prompt_tokens": sizes.max_tokens, "max_new_tokens": sizes.max_new_tokens}
        return sample(model, self.ws.tokenizer, prompts, key, **limits)

    def scored(self, prompts: Sequence[str], completed: tuple[np.ndarray, Samples]) -> Scored:
        """What was completed, with what it is paid."""
        (rows, samples), tokenizer = completed, self.ws.tokenizer
        texts = texts_of(samples, tokenizer)
        missing, pad = self.ws.config.rlhf.missing_eos_score, tokenizer.pad_id
        proxy = proxy_scores(self.reward_model, rows, samples, missing, pad)
        gold = None if self.judge is None else self.judge(list(prompts), texts)
        return Scored(list(prompts), rows, samples, texts, proxy, gold)

    @property
    def judge_paid(self) -> Judged | None:
        """Gold as a part of the reward, where `rlhf.judge_weight` asks for it."""
        return self.judged if self.ws.config.rlhf.judge_weight else None

    def judged(self, rows: np.ndarray, samples: Samples) -> np.ndarray:
        """Gold of completions in standard deviations of the reference's, as a part of a reward.

        Raises:
          ValueError: there is no judge.
        """
        known = self.references("development").gold
        if self.judge is None or known is None:
            raise ValueError("there is no judge to pay by")
        prompts = [self.ws.tokenizer.decode(row) for row in rows]
        samples = jax.tree.map(np.asarray, samples)
        gold = self.judge(prompts, texts_of(samples, self.ws.tokenizer))
        return ((gold - known.mean()) / max(float(known.std()), 1e-6)).astype(np.float32)

    def _figures(self, scored: Scored) -> dict[str, float | None]:
        figures = {
            "proxy": float(scored.proxy.mean()),
            "gold": None if scored.gold is None else float(scored.gold.mean()),
            "length": float(scored.samples.mask.sum(1).mean()),
            "ended": float(scored.samples.finished.mean()),
        }
        if self.ws.config.corpus.kind == "fables":
            whole = [p + t for p, t in zip(scored.prompts, scored.texts, strict=True)]
            figures |= parse_report(whole, self.ws.config.corpus.size)
        return figures

    def _write(self, name: str, ours: Scored, theirs: Scored, kl: np.ndarray) -> None:
        """Completions before and after, side by side."""
        every = len(theirs.texts) // len(ours.texts)
        columns = {
            "prompt": ours.prompts,
            "before": theirs.texts[::every],
            "after": ours.texts,
            "proxy_before": theirs.proxy[::every].tolist(),
            "proxy_after": ours.proxy.tolist(),
            "kl": kl.tolist(),
        }
        if ours.gold is not None and theirs.gold is not None:
            columns["gold_before"] = theirs.gold[::every].tolist()
            columns["gold_after"] = ours.gold.tolist()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        write_jsonl(self.ws.stage("rlhf") / name, rows)


def proxy_scores(
    reward_model: RewardModel,
    rows: np.ndarray,
    samples: Samples,
    missing_eos_score: float,
    pad_id: int,
    batch_size: int = 64,
) -> np.ndarray:
    """The normalised learned reward of each completion, as RLHF is paid.

    Raises:
      UserError: one is not finite.
    """

    def part(*arrays):
        return _proxy(reward_model, *arrays, missing_eos_score)

    arrays = (*_joined(rows, samples, pad_id), samples.mask, samples.finished)
    scores = batched(part, arrays, batch_size)
    if not np.isfinite(scores).all():
        problem = "the reward model pays amounts that are not finite"
        seen = f"{(~np.isfinite(scores)).sum()} of {len(scores)}"
        hint = "train it again, at a lower rate: --redo reward"
        raise UserError(problem, where="reward", value=seen, hint=hint)
    return scores


def _joined(rows: np.ndarray, samples: Samples, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments of prompts with their completions."""
    tokens = np.concatenate([rows, samples.tokens], axis=1)
    segments = np.concatenate([rows != pad_id, samples.mask], axis=1)
    return tokens, segments.astype(np.int32)


@jax.jit
def _proxy(reward_model, tokens, segments, mask, finished, missing_eos_score):
    zeros = jnp.zeros(mask.shape, jnp.float32)
    rollout = Rollout(tokens, segments, mask, zeros, zeros, None, finished)
    return learned_reward(reward_model, rollout, missing_eos_score=missing_eos_score)


@jax.jit
def _exact_kl(model, reference, tokens, segments, mask):
    """Per completion: Σ_t KL(policy ‖ reference) and Σ_t entropy over its own tokens, in nats."""
    width = mask.shape[1]

    def scores(m):
        return logits(m, hidden_states(m, tokens[:, :-1], segments[:, :-1])[:, -width:])

    ours, theirs = scores(model), scores(reference)
    kl = jnp.sum(jnp.where(mask, kl_divergence(ours, theirs), 0.0), axis=1)
    return kl, jnp.sum(jnp.where(mask, entropy(ours), 0.0), axis=1)


def exact_kl(
    model: Transformer,
    reference: Transformer,
    prompts: np.ndarray,
    samples: Samples,
    pad_id: int,
    batch_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact full-vocabulary KL and entropy of each completion, at sampling temperature 1."""
    arrays = (*_joined(prompts, samples, pad_id), samples.mask)
    return batched(lambda *parts: _exact_kl(model, reference, *parts), arrays, batch_size)


def win_rate(
    gold: np.ndarray, reference_gold: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """P(policy beats reference) + P(tie)/2 and its 95 % bootstrap interval over prompts.

    Args:
      gold: [prompts], one completion each.
      reference_gold: [prompts, references].
    """
    ours = gold[:, None]
    wins = ((ours > reference_gold) + 0.5 * (ours == reference_gold)).mean(axis=1)
    draws = np.random.default_rng(seed).integers(len(wins), size=(resamples, len(wins)))
    low, high = np.quantile(wins[draws].mean(axis=1), [0.025, 0.975])
    return float(wins.mean()), float(low), float(high)
