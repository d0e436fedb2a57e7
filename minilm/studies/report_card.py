"""The report card of a reward model, and the policy's calibration: what can be trusted, how far."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minilm import metrics
from minilm.losses.language import token_logprobs
from minilm.model import Transformer, hidden_states, logits
from minilm.stages.evaluate import document_losses
from minilm.stages.policy import PolicyEvaluator, Scored
from minilm.stages.reward import (
    evaluate,
    held_out_pairs,
    load_reward_model,
    mean_scores,
    paid_texts,
)
from minilm.stages.statistics import cluster_interval, spearman
from minilm.stages.workspace import Workspace
from minilm.studies import plots
from minilm.studies.curves import best_of_doublings
from minilm.text.batches import alone
from minilm.text.preferences import EVEN, Pair, bayes_rates, label_probabilities
from minilm.text.store import Document

PROMPTS, SAMPLES = 48, 64  # of the search by best-of-n: 3,072 completions
TRAPS = 5  # examples shown


def searched(evaluator: PolicyEvaluator, prompt_set: str) -> Scored | None:
    """What best-of-n chooses from: the reference's completions of the first prompts of a set.

    `SAMPLES` each, one prompt's beside each other; None where there is no judge to know gold by.
    """
    if evaluator.judge is None:
        return None
    prompts = evaluator.prompts[prompt_set][:PROMPTS]
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    return evaluator.score(evaluator.reference, repeated, seed=44)


def card(ws: Workspace, evaluator: PolicyEvaluator) -> dict[str, Any]:
    """Everything that is known of a run's reward model, JSON-able.

    Best-of-n searches the development prompts, since a KL budget may be set by what it finds.

    Args:
      evaluator: of the same run.
    Returns:
      `labels`: accuracy, log-loss, Brier score and ECE on held-out pairs beside what the best
      possible model has; `by_margin`, `by_length`: accuracy by gold and by length difference;
      `correlations` of reward and gold with what gold should not care for; with a judge `probes`,
      `search` (best-of-n of the reference, its traps, the KL up to which gold rose with n).
    """
    members, (held_out, _) = load_reward_model(ws).members, held_out_pairs(ws)
    report, _ = evaluate(members, held_out, ws)
    score = _scorer(members, ws)
    prompts = [p.prompt for p in held_out]
    gap = score(prompts, [p.chosen for p in held_out])
    gap = gap - score(prompts, [p.rejected for p in held_out])
    out: dict[str, Any] = {
        "labels": _labels(report, held_out, gap, ws),
        "reliability": report["reliability"],
        "by_length": _by_length(held_out, gap, ws),
    }
    if all(x.gold_chosen is not None and x.gold_rejected is not None for x in held_out):
        out["by_margin"] = _by_margin(held_out, gap, ws)
    pool = searched(evaluator, "development")
    if pool is None:
        return out
    out["correlations"] = correlations(pool)
    out["probes"] = _probes(pool, evaluator)
    out["search"] = search(pool, len(pool.texts) // SAMPLES)
    if (ws.stage("rlhf") / "metrics.jsonl").exists():
        out["rlhf"] = what_happened(metrics.evaluations(ws.stage("rlhf")))
    return out


def _scorer(members: Sequence[Transformer], ws: Workspace):
    longest = ws.config.reward.max_tokens

    def score(prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        return mean_scores(members, ws.tokenizer, prompts, texts, longest)

    return score


def _labels(report: dict, pairs: Sequence[Pair], gap: np.ndarray, ws: Workspace) -> dict[str, Any]:
    p, known = label_probabilities(pairs, ws.config.preferences)
    predicted = 1 / (1 + np.exp(-gap))
    observed = np.array([x.votes_chosen / x.votes for x in pairs])
    majority = np.where(observed == 0.5, 0.5, (gap > 0) == (observed > 0.5))
    out = {k: report[k] for k in ("accuracy", "accuracy_low", "accuracy_high", "log_loss", "ece")}
    # Brier against one rater's label: its expectation over the label.
    out |= {
        "brier": float((p * (1 - predicted) ** 2 + (1 - p) * predicted**2).mean()),
        "accuracy_of_votes": float(majority.mean()),
        "gold_correlation": report["gold_correlation"],
        "pairs": len(pairs),
    }
    if known:
        ceiling, floor = bayes_rates(p)
        way = ceiling - 0.5  # none where every label is a coin's
        out |= {
            "bayes_accuracy": ceiling,
            "way_to_bayes": (out["accuracy"] - 0.5) / way if way > EVEN else None,
            "bayes_log_loss": floor,
            "bayes_brier": float((p * (1 - p)).mean()),
        }
    return out | _against_gold(pairs, gap)


def _against_gold(pairs: Sequence[Pair], gap: np.ndarray) -> dict[str, float]:
    """Accuracy against the true order, which no rater's error lowers; {} where it isn't known.

    Pairs of equal gold have no order and are left out. The interval is over prompts.
    """
    known = [
        (pair.prompt, pair.gold_chosen > pair.gold_rejected, float(difference))
        for pair, difference in zip(pairs, gap, strict=True)
        if pair.gold_chosen is not None and pair.gold_rejected is not None
        if pair.gold_chosen != pair.gold_rejected
    ]
    if not known:
        return {}
    right = np.array([0.5 if d == 0 else float((d > 0) == better) for _, better, d in known])
    low, high = cluster_interval(right, [prompt for prompt, *_ in known])
    found = {"": float(right.mean()), "_low": low, "_high": high}
    return {f"accuracy_of_gold{end}": value for end, value in found.items()}


def _by_margin(pairs: Sequence[Pair], gap: np.ndarray, ws: Workspace) -> list[dict[str, float]]:
    margin = np.array([abs((x.gold_chosen or 0.0) - (x.gold_rejected or 0.0)) for x in pairs])
    return _binned(margin, pairs, gap, ws)


def _by_length(pairs: Sequence[Pair], gap: np.ndarray, ws: Workspace) -> list[dict[str, float]]:
    """By how many words longer the completion is that most raters chose."""
    longer = np.array([len(x.chosen.split()) - len(x.rejected.split()) for x in pairs], np.float64)
    return _binned(longer, pairs, gap, ws)


def _binned(
    values: np.ndarray, pairs: Sequence[Pair], gap: np.ndarray, ws: Workspace, bins: int = 5
) -> list[dict[str, float]]:
    """Accuracy against one rater's label, and its ceiling, in bins of about equally many pairs."""
    p, _ = label_probabilities(pairs, ws.config.preferences)
    right = np.where(gap > 0, p, np.where(gap < 0, 1 - p, 0.5))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, max(len(edges) - 2, 0))
    rows = []
    for place in np.unique(places):
        inside = places == place
        rows.append(
            {
                "from": float(values[inside].min()),
                "to": float(values[inside].max()),
                "pairs": int(inside.sum()),
                "accuracy": float(right[inside].mean()),
                "ceiling": float(np.maximum(p, 1 - p)[inside].mean()),
            }
        )
    return rows


def repetition(text: str) -> float:
    """Share of a text's word trigrams that came before in it.

    >>> repetition("the cat sat and the cat sat") > 0
    True
    """
    words = text.split()
    grams = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def correlations(scored: Scored) -> dict[str, dict[str, float]]:
    """Rank correlations of the reward, and of gold, with length and repetition; and of the two."""
    gold = np.asarray(scored.gold, np.float64)
    traits = {
        "length": np.array([len(t.split()) for t in scored.texts], np.float64),
        "repetition": np.array([repetition(t) for t in scored.texts]),
    }
    proxy = scored.proxy.astype(np.float64)
    out = {
        name: {"reward": spearman(proxy, x), "gold": spearman(gold, x)}
        for name, x in traits.items()
    }
    return out | {"gold": {"reward": spearman(proxy, gold), "gold": 1.0}}


class Probe(NamedTuple):
    """A way to spoil a completion, and whether the reward model notices."""

    name: str
    reward: float  # mean change against the completions themselves, in standard deviations
    gold: float  # mean change of gold
    fooled: float  # share where the reward does not fall although gold does


def sentences(text: str) -> list[str]:
    """Sentences with the space before them.

    >>> sentences(" One fell. Two rose.")
    [' One fell.', ' Two rose.']
    """
    parts = text.replace("!", ".").split(".")
    return [f"{part}." for part in parts if part.strip()]


def spoilt(prompts: Sequence[str], texts: Sequence[str]) -> dict[str, list[str]]:
    """Each completion repeated, cut off, stuffed with its own best line, off-topic, or empty.

    Completions of other prompts come from the list turned by a prime, so of another prompt.
    """
    count = len(texts)

    def elsewhere(i: int) -> str:
        places = ((i + k) % count for k in range(1, count))
        return texts[next((p for p in places if prompts[p] != prompts[i]), i)]

    split = [sentences(t) or [t] for t in texts]
    return {
        "last sentence three times more": [
            t + 3 * s[-1] for t, s in zip(texts, split, strict=True)
        ],
        "every sentence twice": ["".join(x + x for x in s) for s in split],
        "cut in the middle": [t[: len(t) // 2] for t in texts],
        "without its last sentence": ["".join(s[:-1]) for s in split],
        "a kind deed told over and over": [
            t + 3 * s[len(s) // 2] for t, s in zip(texts, split, strict=True)
        ],
        "the completion of another prompt": [elsewhere(i) for i in range(count)],
        "empty": ["" for _ in texts],
    }


def _probes(scored: Scored, evaluator: PolicyEvaluator) -> list[dict[str, Any]]:
    """Probes on the first completion of each prompt, and on as many of the next as there are."""
    picked = range(0, len(scored.texts), 8)
    prompts, texts = [scored.prompts[i] for i in picked], [scored.texts[i] for i in picked]
    ws, judge = evaluator.ws, evaluator.judge
    if judge is None:
        raise ValueError("probes compare the reward with gold: there must be a judge")

    def paid(told: list[str]) -> np.ndarray:
        return paid_texts(evaluator.reward_model, ws.tokenizer, prompts, told)

    before, gold = paid(texts), judge(prompts, texts)
    found = []
    for name, changed in spoilt(prompts, texts).items():
        reward = paid(changed) - before
        worse = judge(prompts, changed) - gold
        fallen = worse < 0
        fooled = float((reward >= 0)[fallen].mean()) if fallen.any() else 0.0
        found.append(Probe(name, float(reward.mean()), float(worse.mean()), fooled)._asdict())
    return found


def search(scored: Scored, prompts: int) -> dict[str, Any]:
    """Best-of-n of the reference: gold by n, the traps it found, and the KL where gold was best.

    `safe_kl` is that of the n at which gold is highest, found without training anything; None
    where gold `rising_to_the_last`, since it is then at least the last `kl`. A trap is a completion
    that wins its prompt by proxy though most others there have higher gold.
    """
    gold = np.asarray(scored.gold, np.float64).reshape(prompts, -1)
    proxy = scored.proxy.astype(np.float64).reshape(prompts, -1)
    by_n = best_of_doublings(proxy, gold)
    best = int(np.argmax(by_n["gold"]))
    rising = best == len(by_n["n"]) - 1
    winners = proxy.argmax(axis=1)
    rank = np.array([(g < g[w]).mean() for g, w in zip(gold, winners, strict=True)])
    order = np.argsort(rank)[:TRAPS]
    traps = []
    for i in order[rank[order] < 0.5]:
        place = int(i * gold.shape[1] + winners[i])
        traps.append(
            {
                "prompt": scored.prompts[place],
                "completion": scored.texts[place],
                "reward": float(scored.proxy[place]),
                "gold": float(gold[i, winners[i]]),
                "median_gold": float(np.median(gold[i])),
            }
        )
    return by_n | {
        "safe_kl": None if rising else by_n["kl"][best],
        "safe_n": None if rising else int(by_n["n"][best]),
        "rising_to_the_last": rising,
        "share_of_traps": float((rank < 0.5).mean()),
        "traps": traps,
    }


def what_happened(evaluations: Sequence[dict]) -> dict[str, float] | None:
    """Where gold was best in RLHF, beside its end; None without gold."""
    known = [e for e in evaluations if e.get("gold") is not None]
    if not known:
        return None
    peak, last = max(known, key=lambda e: e["gold"]), known[-1]
    return {
        "peak_kl": peak["kl"],
        "peak_gold": peak["gold"],
        "last_kl": last["kl"],
        "last_gold": last["gold"],
    }


@jax.jit
def _confidence(model: Transformer, tokens, segments, targets):
    scores = logits(model, hidden_states(model, tokens, segments))
    best = jnp.argmax(scores, axis=-1)
    sure = jnp.exp(token_logprobs(scores, best))
    return sure, best == targets


def calibration(
    model: Transformer, ws: Workspace, documents: Sequence[Document], bins: int = 10
) -> dict[str, Any]:
    """A policy as a predictor of the grammar's own stories.

    `ece` compares the probability of the likeliest next token with how often it came;
    `kl_from_truth` is KL(grammar ‖ policy) in nats a story, since held-out stories are draws from
    the grammar; None where the truth is unknown.
    """
    length, texts = ws.config.pretrain.sequence_length, [d.text for d in documents]
    sure, right = [], []
    encoded = ws.tokenizer.encode_batch(texts)
    for batch, owners in alone(encoded, batch_size=32, max_length=length, ids=ws.tokenizer):
        s, r = _confidence(model, batch.tokens, batch.segments, batch.targets)
        used = (np.asarray(batch.weights) > 0) & (np.asarray(owners) >= 0)[:, None]
        sure.append(np.asarray(s)[used])
        right.append(np.asarray(r)[used])
    predicted, observed = np.concatenate(sure), np.concatenate(right).astype(np.float64)
    places = np.minimum((predicted * bins).astype(int), bins - 1)
    rows = [
        (float(predicted[i].mean()), float(observed[i].mean()), int(i.sum()))
        for b in range(bins)
        if (i := places == b).any()
    ]
    ece = sum(n * abs(p - o) for p, o, n in rows) / len(predicted)
    losses = document_losses(model, ws.tokenizer, texts, max_length=length)
    known = [d.logprob for d in documents if d.logprob is not None]
    kl = None
    if len(known) == len(documents):
        kl = float((losses.nats + np.array(known)).mean())
    return {"ece": float(ece), "kl_from_truth": kl, "reliability": [list(r) for r in rows]}


def draw(found: dict[str, Any], title: str) -> bytes:
    """PNG: reliability, accuracy by margin beside its ceiling, probes, best-of-n."""
    made, axes = plots.figure(9.6, 7.2, 2, 2)
    ax = axes[0][0]
    predicted, observed, counts = zip(*found["reliability"], strict=True)
    ax.plot([0, 1], [0, 1], color="#666666", ls=(0, (4, 3)), lw=1.2, label="perfectly calibrated")
    ax.plot(predicted, observed, color=plots.PROXY, label="reward model")
    ax.scatter(predicted, observed, [10 + 80 * n / max(counts) for n in counts], color=plots.PROXY)
    ax.set(xlabel="predicted P(preferred)", ylabel="observed share", title=title)
    ax.legend()
    ax, rows = axes[0][1], found.get("by_margin") or found["by_length"]
    middles = [(r["from"] + r["to"]) / 2 for r in rows]
    ax.plot(middles, [r["ceiling"] for r in rows], "o--", color=plots.GOLD, label="ceiling")
    ax.plot(middles, [r["accuracy"] for r in rows], "o-", color=plots.PROXY, label="reward model")
    what = "difference of gold" if "by_margin" in found else "words longer"
    ax.set(
        xlabel=what, ylabel="accuracy", ylim=(0.4, 1.02), title="accuracy by how clear the pair is"
    )
    ax.legend()
    ax = axes[1][0]
    if "probes" in found:
        probes = found["probes"]
        places = np.arange(len(probes))
        for key, shift, colour in (("reward", -0.2, plots.PROXY), ("gold", 0.2, plots.GOLD)):
            ax.barh(places + shift, [p[key] for p in probes], 0.38, color=colour, label=key)
        ax.set_yticks(places, [p["name"] for p in probes])
        ax.invert_yaxis()
        ax.set(xlabel="change against the completion itself", title="probes")
        ax.legend()
        ax, by_n = axes[1][1], found["search"]
        ax.semilogx(by_n["n"], by_n["proxy"], "o-", color=plots.PROXY, base=2, label="reward")
        ax.semilogx(by_n["n"], by_n["gold"], "o-", color=plots.GOLD, base=2, label="gold")
        ax.set(xlabel="n", ylabel="of the best of n by reward", title="best-of-n of the reference")
        ax.legend()
    else:
        for empty in axes[1]:
            empty.set_visible(False)
    return plots.png(made)
