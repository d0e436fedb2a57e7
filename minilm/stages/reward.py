"""The reward model: the pretrained model with a scalar head, read at end-of-text."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from minilm.errors import UserError
from minilm.files import read_json, write_json
from minilm.losses.preference import bradley_terry
from minilm.model import Transformer, hidden_states, logits, lowest_layers, scalar, sequence_score
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer, schedule
from minilm.rewards import Normalization, RewardModel
from minilm.stages.evaluate import batched, right_pad, sample, texts_of
from minilm.stages.preferences import load_pairs
from minilm.stages.statistics import cluster_interval, reliability, spearman
from minilm.stages.workspace import Workspace
from minilm.step import TrainState, init_state, make_train_step
from minilm.terms import check_grades, configured, reads_lists
from minilm.text.preferences import Pair, fitting, label_probabilities
from minilm.text.tokenizer import Tokenizer
from minilm.train import fit

REFERENCES = 256  # completions that set the scale of a reward learnt from users' pairs, to 6 %
ATTENDED = 64 * 512**2  # pairs of positions that a batch of texts to score has, a head
GROUP, MAX_GROUP = 8, 32  # completions scored together: four times the mean, 8 to 32
_scores = jax.jit(sequence_score)


class PairBatch(NamedTuple):
    """K completions each of M prompts, right-padded and scored once, and the pairs among them.

    So k completions serve k(k−1)/2 comparisons: Ouyang et al. (2022), arXiv:2203.02155, sec. 3.5.
    """

    tokens: Int[Array, "M K T"]
    segments: Int[Array, "M K T"]
    last: Int[Array, "M K"]  # position of each end-of-text
    first: Int[Array, "M Q"]  # index into K
    second: Int[Array, "M Q"]
    label: Float[Array, "M Q"]  # share of votes for the first
    rating: Float[Array, "M K"]  # the raters' own, else the share of votes that each has won
    weights: Float[Array, "M Q"]  # 0 at absent pairs


class Scores(NamedTuple):
    """What the objective's terms read; what none of them does is not computed."""

    first: Float[Array, "M Q"]
    second: Float[Array, "M Q"]
    every: Float[Array, "M K"]
    logits: Float[Array, "M K T V"]  # of the next token


def forward(model: Transformer, batch: PairBatch) -> Scores:
    """Scores of each completion, and of the first and second of every pair."""
    tokens, segments = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments))
    hidden = hidden_states(model, tokens, segments)
    last = batch.last.reshape(-1)[:, None, None]
    scores = scalar(model, jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    scores = scores.reshape(batch.last.shape)
    at = functools.partial(jnp.take_along_axis, scores, axis=1)
    told = logits(model, hidden).reshape(*batch.tokens.shape, -1)
    return Scores(at(batch.first), at(batch.second), scores, told)


def _bradley_terry(scores: Scores, batch: PairBatch):
    return bradley_terry(scores.first, scores.second, label=batch.label)


def _right(scores: Scores, batch: PairBatch):
    return ((scores.first > scores.second) == (batch.label > 0.5)).astype(jnp.float32)


def _margin(scores: Scores, batch: PairBatch):
    gap = scores.first - scores.second
    return jnp.where(batch.label > 0.5, gap, -gap)


PREFERENCE = Objective(
    (
        Term("bradley_terry", 1.0, _bradley_terry, lambda b: b.weights),
        Term("accuracy", 0.0, _right, lambda b: b.weights),
        Term("margin", 0.0, _margin, lambda b: b.weights),
    )
)


def reward(ws: Workspace) -> dict:
    """Trains on the train pairs, evaluates on the held-out ones, stores the normalisation."""
    pairs, (held_out, unread) = training_pairs(ws), held_out_pairs(ws)
    members, seconds, left_out = [], 0.0, 0
    for number, folder in enumerate(member_folders(ws.stage("reward"), ws.config.reward.members)):
        batches = Pairs(ws, pairs, number)
        if not number and (batches.left_out or unread):
            text = f"reward: {batches.left_out} of {len(pairs)} pairs to train on and {unread} of "
            text += f"{len(held_out) + unread} held out are longer than reward.max_tokens = "
            Console().print(f"{text}{ws.config.reward.max_tokens}, and left out")
        model, taken = _train(ws, batches, number, folder)
        members, seconds, left_out = [*members, model], seconds + taken, batches.left_out
        evaluation, scores = evaluate([model], held_out, ws)
        if ws.config.preferences.file:  # completions of somebody else's
            prompts = list(dict.fromkeys(p.prompt for p in held_out))
            scores = _reference_scores(model, prompts, ws)
        scale = Normalization(float(scores.mean()), float(max(scores.std(), 1e-6)))
        write_json(folder / "evaluation.json", evaluation | {"normalization": scale._asdict()})
    folder = ws.stage("reward")
    if len(members) > 1:
        evaluation, _ = evaluate(members, held_out, ws)
        own = {"normalization": load_normalization(folder)._asdict()}
        write_json(folder / "evaluation.json", evaluation | own)
    stored = read_json(folder / "evaluation.json").items()
    figures = {name: value for name, value in stored if not isinstance(value, list | dict)}
    return figures | {"pairs_left_out": left_out, "held_out_left_out": unread, "seconds": seconds}


def training_pairs(ws: Workspace) -> list[Pair]:
    return load_pairs(ws, "train")[: ws.config.reward.max_pairs]


def held_out_pairs(ws: Workspace) -> tuple[list[Pair], int]:
    """The held-out pairs as short as training's, since a text that was cut is another; the rest."""
    pairs = load_pairs(ws, "held_out")
    found = fitting(pairs, ws.tokenizer, ws.config.reward.max_tokens, "held-out pairs")
    return found, len(pairs) - len(found)


def member_folders(folder: Path, members: int) -> list[Path]:
    """Where an ensemble's members are: the first in the stage's own folder."""
    return [folder, *(folder / f"member_{n}" for n in range(1, members))]


def load_reward_model(ws: Workspace) -> RewardModel:
    """What a finished reward stage pays with."""
    names = [str(p) for p in member_folders(Path("reward"), ws.config.reward.members)]
    scales = tuple(load_normalization(ws.stage(name)) for name in names)
    how = ws.config.rlhf
    return RewardModel(tuple(map(ws.load, names)), scales, how.ensemble, how.ensemble_penalty)


def _train(ws: Workspace, batches: "Pairs", number: int, folder: Path) -> tuple[Transformer, float]:
    """A member of the ensemble, by number, and the seconds it took."""
    config, seed = ws.config.reward, ws.config.seed
    steps = batches.steps
    optimizer = make_optimizer(config.optimizer, steps)
    objective, balancing = configured(PREFERENCE, "reward", ws.config, steps), ws.config.balance
    update = make_train_step(
        forward,
        objective,
        optimizer,
        accumulation=config.accumulation,
        balancing=balancing,
        ema_decay=config.ema_decay,
        log_layers=config.log_layers,
    )

    def step(state: TrainState, k: int):
        return update(state, batches[k])

    model = ws.load(ws.base, scalar_head=True)
    if config.num_layers is not None:
        model = lowest_layers(model, config.num_layers)
    # A random head sends gradient into the trunk from the first step on; a zero one would not.
    key = jax.random.fold_in(jax.random.key(seed), 32)
    width = model.config.embed_dim
    key = jax.random.fold_in(key, number) if number else key
    model.score[...] = jax.random.normal(key, (width,)) * width**-0.5  # pyright: ignore
    state, record = fit(
        init_state(model, optimizer, objective, balancing, ema_decay=config.ema_decay),
        step,
        title="reward",
        steps=steps,
        loop=config,
        folder=folder,
        metadata=ws.metadata("reward", scalar_head=True)
        | {"model": model.config.model_dump(mode="json")},
        files={"tokenizer.json": ws.tokenizer_file},
        track=ws.tracker(f"reward/member_{number}" if number else "reward"),
        learning_rate=schedule(config.optimizer, steps, config.optimizer.learning_rate),
    )
    return state.averaged, record["seconds"]


class Pairs:
    """Batch k of the training pairs, shuffled anew each epoch.

    Attributes:
      steps: of all epochs.
      left_out: pairs with a text longer than `reward.max_tokens`.
    """

    def __init__(self, ws: Workspace, pairs: Sequence[Pair], member: int = 0):
        config = ws.config.reward
        lists = reads_lists(ws.config)
        self._groups = _groups(pairs, ws.tokenizer, config.max_tokens, lists=lists)
        check_grades(ws.config, [x for group in self._groups for x in group.ratings])
        self._size, self._shape = config.batch_size, _shape(self._groups)
        self._seed, self._member = ws.config.seed, (member,) if member else ()
        self._per_epoch = -(-len(self._groups) // self._size)
        self.steps = self._per_epoch * config.epochs
        self.left_out = len(pairs) - sum(len(group.pairs) for group in self._groups)

    def __getitem__(self, step: int) -> PairBatch:
        epoch, place = divmod(step, self._per_epoch)
        rng = np.random.default_rng((self._seed, 31, epoch, *self._member))
        order = rng.permutation(len(self._groups))
        places = order[place * self._size : (place + 1) * self._size]
        return _batch([self._groups[i] for i in places], self._size, self._shape)


def evaluate(
    members: Sequence[Transformer], pairs: Sequence[Pair], ws: Workspace
) -> tuple[dict, Float[np.ndarray, " N"]]:
    """The report card on held-out pairs, and the raw scores of their distinct completions.

    Accuracy and log-loss are expectations over one rater's label where its probability is known.
    Accuracy's 95 % interval is over prompts; `reliability` holds (predicted, observed, count). An
    ensemble is read by the mean of its raw scores.
    """
    prompts, longest = [p.prompt for p in pairs], ws.config.reward.max_tokens
    chosen, rejected = (
        mean_scores(members, ws.tokenizer, prompts, texts, longest)
        for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    )
    gap = chosen - rejected
    p, _ = label_probabilities(pairs, ws.config.preferences)
    right = np.where(gap > 0, p, np.where(gap < 0, 1 - p, 0.5))
    losses = p * np.logaddexp(0, -gap) + (1 - p) * np.logaddexp(0, gap)
    low, high = cluster_interval(right, prompts)
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
    return report, scores


def _reference_scores(model: Transformer, prompts: list[str], ws: Workspace) -> np.ndarray:
    """Raw scores of a completion, uncut, of each of some prompts by the model before RLHF."""
    tokenizer, sizes = ws.tokenizer, ws.config.prompts
    order = np.random.default_rng((ws.config.seed, 33)).permutation(len(prompts))
    prompts = [prompts[i] for i in sorted(order[:REFERENCES])]
    key = jax.random.fold_in(jax.random.key(ws.config.seed), 33)
    longest = _rounded(max(map(len, tokenizer.encode_batch(prompts))) + 1)
    limits = {"max_prompt_tokens": longest, "max_new_tokens": sizes.max_new_tokens}
    reference = ws.load(ws.base, scalar_head=False)
    texts = texts_of(sample(reference, tokenizer, prompts, key, **limits)[1], tokenizer)
    return score_texts(model, tokenizer, prompts, texts, longest + sizes.max_new_tokens + 1)


def score_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_tokens: int | None,
    batch_size: int = 64,
) -> np.ndarray:
    """Raw rewards [N], in batches of one shape; longer texts are cut before their end-of-text.

    Without a limit all are read to their end: rotary positions have no last one. Then texts of like
    length share a shape, and long ones come in small batches: attention's memory goes by length².
    """
    rows = [encode(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    if max_tokens is not None:
        rows = [r if len(r) <= max_tokens else [*r[: max_tokens - 1], r[-1]] for r in rows]
    kinds = np.array([0 if max_tokens else len(row).bit_length() for row in rows])
    scores = np.empty(len(rows), np.float32)
    for places in (np.flatnonzero(kinds == kind) for kind in np.unique(kinds)):
        width = _rounded(max(len(rows[i]) for i in places))
        size = max(1, min(batch_size, ATTENDED // width**2))
        padded = right_pad([rows[i] for i in places], len(places), width)
        scores[places] = batched(functools.partial(_scores, model), padded, size)
    return scores


def mean_scores(
    members: Sequence[Transformer],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
    max_tokens: int,
) -> Float[np.ndarray, " N"]:
    """Raw rewards [N], the mean over an ensemble's members, in nats of log-odds."""
    told = tokenizer, prompts, completions, max_tokens
    return np.mean([score_texts(m, *told).astype(np.float64) for m in members], axis=0)


def paid_texts(
    reward_model: RewardModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    completions: Sequence[str],
) -> np.ndarray:
    """Rewards [N] as RLHF pays them: read whole, normalised, an ensemble's members combined."""
    told = tokenizer, prompts, completions, None
    return np.asarray(reward_model.combined([score_texts(m, *told) for m in reward_model.members]))


def encode(tokenizer: Tokenizer, prompt: str, completion: str) -> list[int]:
    """start token, prompt, completion, end-of-text: as a rollout has them."""
    end = tokenizer.eos_id
    return [end, *tokenizer.encode(prompt), *tokenizer.encode(completion), end]


def load_normalization(folder: Path) -> Normalization:
    """What a finished reward stage has stored in its folder."""
    path = folder / "evaluation.json"
    try:
        return Normalization(**read_json(path)["normalization"])
    except (KeyError, TypeError) as error:
        problem = "no normalisation of the reward: the stage has not been evaluated"
        raise UserError(problem, where=path, hint="--redo reward") from error


class _Group(NamedTuple):
    """Encoded completions of one prompt and the pairs among them."""

    rows: list[list[int]]
    pairs: list[tuple[int, int, float]]  # first, second, label
    ratings: list[float]


def _groups(
    pairs: Sequence[Pair], tokenizer: Tokenizer, max_tokens: int, *, lists: bool = False
) -> list[_Group]:
    """Pairs by prompt, the long left out; one far larger than most, to whose shape all others would
    be padded, falls apart into pairs, unless they are `lists`."""
    by_prompt: dict[str, list[Pair]] = {}
    for pair in fitting(pairs, tokenizer, max_tokens):
        by_prompt.setdefault(pair.prompt, []).append(pair)
    groups, sizes = [], {k: len({t for p in ps for t in p[1:3]}) for k, ps in by_prompt.items()}
    most = min(max(GROUP, 4 * float(np.mean([*sizes.values()]))), MAX_GROUP)
    for prompt, members in by_prompt.items():
        for part in [members] if lists or sizes[prompt] <= most else [[p] for p in members]:
            index = {t: i for i, t in enumerate(dict.fromkeys(t for p in part for t in p[1:3]))}
            labels = [(index[p.chosen], index[p.rejected], p.votes_chosen / p.votes) for p in part]
            encoded = [encode(tokenizer, prompt, text) for text in index]
            groups.append(_Group(encoded, labels, _ratings(part, index)))
    return groups


def _ratings(pairs: Sequence[Pair], index: dict[str, int]) -> list[float]:
    """Of each completion: what its rater gave it, else the mean share of votes that it won."""
    given, won = {}, [[] for _ in index]
    for p in pairs:
        share = p.votes_chosen / p.votes
        won[index[p.chosen]].append(share)
        won[index[p.rejected]].append(1 - share)
        given |= {p.chosen: p.rating_chosen, p.rejected: p.rating_rejected}
    known = all(rating is not None for rating in given.values())
    return [given[t] if known else float(np.mean(won[i])) for t, i in index.items()]


def _shape(groups: Sequence[_Group]) -> tuple[int, int, int]:
    """(K, Q, T) that hold every group: one shape, one compilation."""
    rows, pairs = max(len(g.rows) for g in groups), max(len(g.pairs) for g in groups)
    return rows, pairs, _rounded(max(len(r) for g in groups for r in g.rows))


def _batch(groups: Sequence[_Group], size: int, shape: tuple[int, int, int]) -> PairBatch:
    k, q, width = shape
    rows = [row for g in groups for row in g.rows + [[]] * (k - len(g.rows))]
    arrays = right_pad(rows, size * k, width)
    first, second = np.zeros((2, size, q), np.int32)
    label, weights = np.zeros((2, size, q), np.float32)
    rating = np.zeros((size, k), np.float32)
    for m, group in enumerate(groups):
        rating[m, : len(group.ratings)] = group.ratings
        for n, (i, j, share) in enumerate(group.pairs):
            first[m, n], second[m, n], label[m, n], weights[m, n] = i, j, share, 1
    shaped = (x.reshape(size, k, *x.shape[1:]) for x in arrays)
    return PairBatch._make((*shaped, first, second, label, rating, weights))


def _rounded(length: int) -> int:
    return -(-length // 16) * 16
