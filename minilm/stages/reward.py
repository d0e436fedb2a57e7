"""The reward model: the pretrained model with a scalar head, read at end-of-text."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minilm.errors import UserError
from minilm.losses.preference import bradley_terry
from minilm.model import Transformer, sequence_score
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer, schedule
from minilm.rewards import Normalization
from minilm.stages.preferences import load_pairs
from minilm.stages.workspace import Workspace, write_json
from minilm.text.preferences import Pair, pair_probabilities
from minilm.text.tokenizer import Tokenizer
from minilm.train import TrainState, fit, init_state, make_train_step

MAX_GROUP = 8  # completions of a prompt scored together; larger groups fall apart into pairs


class PairBatch(NamedTuple):
    """Completions of several prompts, each scored once, and the pairs among them.

    All pairs of a prompt share a batch, so k completions serve k(k−1)/2 comparisons in k passes:
    Ouyang et al. (2022), arXiv:2203.02155, section 3.5.

    Attributes:
      tokens, segments: [M, K, T], right-padded; last: [M, K], position of each end-of-text.
      first, second: [M, Q], indices into K; label: [M, Q], share of votes for the first;
      weights: [M, Q], 0 at absent pairs.
    """

    tokens: Int[Array, "M K T"]
    segments: Int[Array, "M K T"]
    last: Int[Array, "M K"]
    first: Int[Array, "M Q"]
    second: Int[Array, "M Q"]
    label: Float[Array, "M Q"]
    weights: Float[Array, "M Q"]


def forward(model: Transformer, batch: PairBatch) -> tuple[Array, Array]:
    """Scores of the first and second completion of every pair."""
    flat = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments)]
    scores = sequence_score(model, *flat, batch.last.reshape(-1)).reshape(batch.last.shape)
    return (
        jnp.take_along_axis(scores, batch.first, axis=1),
        jnp.take_along_axis(scores, batch.second, axis=1),
    )


PREFERENCE = Objective(
    (
        Term(
            "bradley_terry", 1.0, lambda o, b: bradley_terry(*o, label=b.label), lambda b: b.weights
        ),
        Term(
            "accuracy",
            0.0,
            lambda o, b: ((o[0] > o[1]) == (b.label > 0.5)).astype(jnp.float32),
            lambda b: b.weights,
        ),
        Term(
            "margin",
            0.0,
            lambda o, b: jnp.where(b.label > 0.5, o[0] - o[1], o[1] - o[0]),
            lambda b: b.weights,
        ),
    )
)


def reward(ws: Workspace) -> dict:
    """Trains on the train pairs, evaluates on the held-out ones, stores the normalisation."""
    config, tokenizer, folder = ws.config, ws.tokenizer, ws.stage("reward")
    train = _groups(load_pairs(ws, "train"), tokenizer, config.reward.max_tokens)
    held_out = load_pairs(ws, "held_out")
    per_epoch = -(-len(train) // config.reward.batch_size)
    steps = per_epoch * config.reward.epochs
    optimizer = make_optimizer(config.reward.optimizer, steps)
    update = make_train_step(
        forward, PREFERENCE, optimizer, accumulation=config.reward.accumulation
    )
    shape = _shape(train)

    def step(state: TrainState, k: int):
        epoch, place = divmod(k, per_epoch)
        order = np.random.default_rng((config.seed, 31, epoch)).permutation(len(train))
        size = config.reward.batch_size
        chosen = [train[i] for i in order[place * size : (place + 1) * size]]
        return update(state, _batch(chosen, size, shape))

    model = ws.load("pretrain", scalar_head=True)
    # A random head sends gradient into the trunk from the first step on; a zero one would not.
    key = jax.random.fold_in(jax.random.key(config.seed), 32)
    model.score[...] = jax.random.normal(key, model.score.shape) * model.config.embed_dim**-0.5
    state, record = fit(
        init_state(model, optimizer),
        step,
        title="reward",
        steps=steps,
        loop=config.reward,
        folder=folder,
        metadata=ws.metadata("reward", scalar_head=True),
        files={"tokenizer.json": ws.tokenizer_file},
        learning_rate=schedule(
            config.reward.optimizer, steps, config.reward.optimizer.learning_rate
        ),
    )
    evaluation, normalization = evaluate(state.model, held_out, ws)
    write_json(folder / "evaluation.json", evaluation | {"normalization": normalization._asdict()})
    return {k: v for k, v in evaluation.items() if not isinstance(v, list)} | {
        "seconds": record["seconds"]
    }


def evaluate(
    model: Transformer, pairs: Sequence[Pair], ws: Workspace
) -> tuple[dict, Normalization]:
    """The report card on held-out pairs.

    Accuracy and log-loss are expectations over one rater's label where its probability is known.

    Returns:
      accuracy with a 95 % interval over prompts, log_loss, ece, a reliability table
      (`reliability`: predicted, observed, count), gold_correlation (Spearman); and the raw score's
      mean and standard deviation over the distinct completions.
    """
    config = ws.config
    chosen, rejected = (
        score_texts(model, ws.tokenizer, [p.prompt for p in pairs], texts, config.reward.max_tokens)
        for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    )
    gap = (chosen - rejected).astype(np.float64)
    p = pair_probabilities(
        pairs,
        temperature=config.preferences.rater_temperature,
        flip_rate=config.preferences.flip_rate,
    )
    right = np.where(gap > 0, p, np.where(gap < 0, 1 - p, 0.5))
    losses = p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)
    low, high = _cluster_interval(right, [x.prompt for x in pairs])
    # Each pair is read both ways round, so that "chosen" itself tells the table nothing.
    predicted = 1 / (1 + np.exp(-np.concatenate([gap, -gap])))
    table = reliability(predicted, np.concatenate([p, 1 - p]))
    distinct = {
        (x.prompt, text): (score, gold)
        for x, a, b in zip(pairs, chosen, rejected, strict=True)
        for text, score, gold in ((x.chosen, a, x.gold_chosen), (x.rejected, b, x.gold_rejected))
    }
    scores = np.array([s for s, _ in distinct.values()], np.float64)
    golds = [g for _, g in distinct.values()]
    known = all(g is not None for g in golds)
    report = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": float(losses.mean()),
        "ece": float(sum(n * abs(a - b) for a, b, n in table) / sum(n for *_, n in table)),
        "gold_correlation": spearman(scores, np.array(golds, np.float64)) if known else None,
        "held_out_pairs": len(pairs),
        "reliability": [list(row) for row in table],
    }
    return report, Normalization(float(scores.mean()), float(max(scores.std(), 1e-6)))


def score_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_tokens: int,
    batch_size: int = 64,
) -> np.ndarray:
    """Raw rewards [N] of completions, in batches of one shape; longer texts are cut to fit."""
    rows = [encode(tokenizer, p, c)[:max_tokens] for p, c in zip(prompts, completions, strict=True)]
    width = _rounded(max(map(len, rows)))
    scores = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        tokens, segments, last = _right_pad(part, batch_size, width)
        scores.append(np.asarray(_scores(model, tokens, segments, last))[: len(part)])
    return np.concatenate(scores)


_scores = jax.jit(sequence_score)


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> list[int]:
    """start token, prompt, completion, end-of-text: as a rollout has them."""
    return [
        tokenizer.eos_id,
        *tokenizer.encode(prompt),
        *tokenizer.encode(completion),
        tokenizer.eos_id,
    ]


def load_normalization(ws: Workspace) -> Normalization:
    path = ws.stage("reward") / "evaluation.json"
    try:
        return Normalization(**json.loads(path.read_text())["normalization"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"no normalisation of the reward: {error}", where=path, hint="--redo reward"
        ) from error


def reliability(predicted: np.ndarray, observed: np.ndarray, bins: int = 10) -> list[tuple]:
    """(mean prediction, mean outcome, count) of each equal-width bin that is not empty."""
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    return [
        (
            float(predicted[places == b].mean()),
            float(observed[places == b].mean()),
            int((places == b).sum()),
        )
        for b in range(bins)
        if (places == b).any()
    ]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation with mid-ranks for ties."""

    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    a, b = ranks(a), ranks(b)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _cluster_interval(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; whole prompts are drawn, since their pairs agree."""
    names, index = np.unique(clusters, return_inverse=True)
    totals = np.bincount(index, values)
    counts = np.bincount(index)
    draws = np.random.default_rng(0).integers(len(names), size=(2000, len(names)))
    low, high = np.quantile(totals[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return float(low), float(high)


class _Group(NamedTuple):
    """Encoded completions of one prompt and the pairs among them: (first, second, label)."""

    rows: list[list[int]]
    pairs: list[tuple[int, int, float]]


def _groups(pairs: Sequence[Pair], tokenizer: Tokenizer, max_tokens: int) -> list[_Group]:
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    groups, long = [], 0
    for prompt, members in by_prompt.items():
        texts = {t for p in members for t in (p.chosen, p.rejected)}
        parts = [members] if len(texts) <= MAX_GROUP else [[p] for p in members]
        for part in parts:
            index: dict[str, int] = {}
            for p in part:
                index.setdefault(p.chosen, len(index))
                index.setdefault(p.rejected, len(index))
            rows = [encode(tokenizer, prompt, text) for text in index]
            if max(map(len, rows)) > max_tokens:
                long += 1
                continue
            labels = [(index[p.chosen], index[p.rejected], p.votes_chosen / p.votes) for p in part]
            groups.append(_Group(rows, labels))
    if not groups:
        raise UserError(
            f"all {long} groups of pairs are longer than the limit",
            where="reward.max_tokens",
            value=max_tokens,
        )
    return groups


def _shape(groups: Sequence[_Group]) -> tuple[int, int, int]:
    """(K, Q, T) that hold every group: one shape, one compilation."""
    return (
        max(len(g.rows) for g in groups),
        max(len(g.pairs) for g in groups),
        _rounded(max(len(r) for g in groups for r in g.rows)),
    )


def _batch(groups: Sequence[_Group], size: int, shape: tuple[int, int, int]) -> PairBatch:
    k, q, width = shape
    rows = [row for g in groups for row in g.rows + [[]] * (k - len(g.rows))]
    tokens, segments, last = _right_pad(rows, size * k, width)
    first, second = np.zeros((2, size, q), np.int32)
    label, weights = np.zeros((2, size, q), np.float32)
    for m, group in enumerate(groups):
        for n, (i, j, share) in enumerate(group.pairs):
            first[m, n], second[m, n], label[m, n], weights[m, n] = i, j, share, 1
    shaped = [x.reshape(size, k, *x.shape[1:]) for x in (tokens, segments, last)]
    return PairBatch(*shaped, first, second, label, weights)


def _right_pad(rows: Sequence[Sequence[int]], count: int, width: int):
    """Tokens and segments [count, width] and the last real position of each row (0 if empty)."""
    tokens, segments = np.zeros((2, count, width), np.int32)
    last = np.zeros(count, np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], segments[n, : len(row)] = row, 1
        last[n] = max(len(row) - 1, 0)
    return tokens, segments, last


def _rounded(length: int) -> int:
    return -(-length // 16) * 16
