"""Measuring a policy on fixed prompts: proxy, gold, exact KL, parse share, win rate."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minilm.generate import Samples
from minilm.judges import configured
from minilm.losses.language import entropy, kl_divergence
from minilm.model import Transformer, hidden_states, logits
from minilm.rewards import Normalization, learned_reward
from minilm.rollout import Rollout
from minilm.stages.evaluate import parse_report, sample, texts_of
from minilm.stages.reward import load_normalization
from minilm.stages.workspace import Workspace, write_jsonl
from minilm.text.prompts import prompt_sets


class Scored(NamedTuple):
    """Completions of prompts with what proxy and gold say of them.

    Attributes:
      prompts: texts, one a completion; rows: their tokens, left-padded.
      gold: [N], or None where there is no judge.
    """

    prompts: list[str]
    rows: np.ndarray
    samples: Samples
    texts: list[str]
    proxy: np.ndarray
    gold: np.ndarray | None


class PolicyEvaluator:
    """Compares policies with the reference on the development or the evaluation prompts.

    The reference's completions are sampled and scored once a prompt set.
    """

    def __init__(self, ws: Workspace):
        self.ws = ws
        self.judge = configured(ws.config)
        self.prompts = prompt_sets(ws.config, ws.tokenizer, ws.held_out())._asdict()
        self.reward_model = ws.load("reward")
        self.normalization = load_normalization(ws)
        self.reference = ws.load("pretrain", scalar_head=False)

    @functools.cache  # noqa: B019  one evaluator a stage
    def references(self, prompt_set: str) -> Scored:
        """`rlhf.references` completions of the reference for each prompt of a set."""
        count = self.ws.config.rlhf.references
        prompts = [p for p in self.prompts[prompt_set] for _ in range(count)]
        return self.score(self.reference, prompts, seed=41)

    def __call__(
        self, policy: Transformer, prompt_set: str, samples_file: str | None = None
    ) -> dict[str, float | None]:
        """Figures of a policy, at temperature 1 without truncation.

        Returns:
          proxy, gold (means), kl (nats a completion, exact over the vocabulary, on the policy's
          own samples), entropy (nats a completion), length (tokens), ended (share), parse_share
          and failures on fables, gold_win_rate with its interval; the reference's proxy, gold and
          parse_share under `reference/`.
        """
        ours = self.score(policy, self.prompts[prompt_set], seed=42)
        theirs = self.references(prompt_set)
        kl, ent = exact_kl(
            policy, self.reference, ours.rows, ours.samples, self.ws.tokenizer.pad_id
        )
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
        config, tokenizer = self.ws.config, self.ws.tokenizer
        rows, samples = sample(
            model,
            tokenizer,
            prompts,
            jax.random.fold_in(jax.random.key(config.seed), seed),
            max_prompt_tokens=config.prompts.max_tokens,
            max_new_tokens=config.prompts.max_new_tokens,
        )
        texts = texts_of(samples, tokenizer)
        proxy = proxy_scores(
            self.reward_model,
            rows,
            samples,
            self.normalization,
            config.rlhf.missing_eos_score,
            tokenizer.pad_id,
        )
        gold = None if self.judge is None else self.judge(list(prompts), texts)
        return Scored(list(prompts), rows, samples, texts, proxy, gold)

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
        rows = []
        for i, prompt in enumerate(ours.prompts):
            row = {
                "prompt": prompt,
                "before": theirs.texts[i * every],
                "after": ours.texts[i],
                "proxy_before": float(theirs.proxy[i * every]),
                "proxy_after": float(ours.proxy[i]),
                "kl": float(kl[i]),
            }
            if ours.gold is not None and theirs.gold is not None:
                row |= {
                    "gold_before": float(theirs.gold[i * every]),
                    "gold_after": float(ours.gold[i]),
                }
            rows.append(row)
        write_jsonl(self.ws.stage("rlhf") / name, rows)


def proxy_scores(
    reward_model: Transformer,
    rows: np.ndarray,
    samples: Samples,
    normalization: Normalization,
    missing_eos_score: float,
    pad_id: int,
    batch_size: int = 64,
) -> np.ndarray:
    """The normalised learned reward of each completion, as RLHF is paid."""
    tokens = np.concatenate([rows, samples.tokens], axis=1)
    segments = np.concatenate([rows != pad_id, samples.mask], axis=1).astype(np.int32)
    (scores,) = _batched(
        lambda *parts: (_proxy(reward_model, *parts, normalization, missing_eos_score),),
        (tokens, segments, samples.mask, samples.finished),
        batch_size,
    )
    return scores


@jax.jit
def _proxy(reward_model, tokens, segments, mask, finished, normalization, missing_eos_score):
    zeros = jnp.zeros(mask.shape, jnp.float32)
    rollout = Rollout(tokens, segments, mask, zeros, zeros, None, finished)
    return learned_reward(
        reward_model, rollout, normalization=normalization, missing_eos_score=missing_eos_score
    )


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
    tokens = np.concatenate([prompts, samples.tokens], axis=1)
    segments = np.concatenate([prompts != pad_id, samples.mask], axis=1).astype(np.int32)
    kl, ent = _batched(
        lambda *parts: _exact_kl(model, reference, *parts),
        (tokens, segments, samples.mask),
        batch_size,
    )
    return kl, ent


def _batched(function, arrays: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """`function` over slices of one shape (the last padded with zeros), results joined."""
    results = []
    for start in range(0, len(arrays[0]), size):
        parts = [x[start : start + size] for x in arrays]
        short = size - len(parts[0])
        parts = [np.pad(x, ((0, short), *[(0, 0)] * (x.ndim - 1))) for x in parts]
        results.append([np.asarray(r)[: size - short] for r in function(*parts)])
    return [np.concatenate(x) for x in zip(*results, strict=True)]


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
