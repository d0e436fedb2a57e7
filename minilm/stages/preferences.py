"""Preferences: completions sampled from the pretrained model, all pairs labelled by raters."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from minilm.errors import UserError
from minilm.files import read_jsonl, write_json, write_jsonl
from minilm.judges import configured, rater_judge
from minilm.stages.evaluate import sample, texts_of
from minilm.stages.workspace import Workspace
from minilm.text.preferences import (
    Pair,
    bayes_rates,
    check_completions,
    check_worth_training_on,
    label_pairs,
    label_probabilities,
    pairs_from,
    rater_agreement,
    rows_of,
)
from minilm.text.prompts import prompt_sets

FEW = 400  # held-out pairs tell an accuracy to ±5 points


def preferences(ws: Workspace) -> dict:
    """Writes train.jsonl, held_out.jsonl (split by prompt) and datasheet.json."""
    config = ws.config.preferences
    pairs = users_pairs(Path(config.file)) if config.file else _simulated(ws)
    prompts = list(dict.fromkeys(p.prompt for p in pairs))
    if len(prompts) < 2:
        problem = "the pairs need at least two different prompts to be split by prompt"
        raise UserError(problem, where=config.file or "preferences", value=len(prompts))
    if not config.file:
        where = "judge.name" if config.rater_judge is None else "preferences.rater_judge"
        check_worth_training_on(pairs, where, config)
    order = np.random.default_rng((ws.config.seed, 21)).permutation(len(prompts))
    count = min(max(1, round(config.held_out * len(prompts))), len(prompts) - 1)
    held = {prompts[i] for i in order[:count]}
    train = [p for p in pairs if p.prompt not in held][: config.max_pairs]
    held_out = [p for p in pairs if p.prompt in held]
    if len(held_out) < FEW:
        points = min(98 / len(held_out) ** 0.5, 50)  # 1.96 · 0.5 / √n
        text = f"{len(held_out)} held-out pairs: they tell an accuracy to about ±{points:.0f} "
        Console().print(f"preferences: {text}points")
    folder = ws.stage("preferences")
    write_jsonl(folder / "train.jsonl", rows_of(train))
    write_jsonl(folder / "held_out.jsonl", rows_of(held_out))
    summary = {"pairs": len(train), "held_out_pairs": len(held_out), **describe(held_out, ws)}
    write_json(folder / "datasheet.json", summary)
    return summary


def describe(pairs: list[Pair], ws: Workspace) -> dict:
    """Bayes rates and agreement where the labels' probabilities are known, duplicates, biases."""
    config = ws.config.preferences
    p, known = label_probabilities(pairs, config)
    accuracy, log_loss = bayes_rates(p) if known else (None, None)
    gold = [g for pair in pairs for g in (pair.gold_chosen, pair.gold_rejected) if g is not None]
    better = [
        x.gold_chosen > x.gold_rejected
        for x in pairs
        if x.gold_chosen is not None and x.gold_rejected is not None
    ]
    return {
        "bayes_accuracy": accuracy,
        "bayes_log_loss": log_loss,
        "votes_agreement": float(np.mean([x.votes_chosen / x.votes for x in pairs])),
        "expected_agreement": float(rater_agreement(pairs, config).mean()) if known else None,
        "duplicates": len(pairs) - len({(x.prompt, frozenset(x[1:3])) for x in pairs}),
        "ties": float(np.mean([2 * x.votes_chosen == x.votes for x in pairs])),
        "gold_chosen_better": float(np.mean(better)) if better else None,
        "longer_chosen": float(np.mean([len(x.chosen) > len(x.rejected) for x in pairs])),
        "gold_std": float(np.std(gold)) if gold else None,
    }


def _simulated(ws: Workspace) -> list[Pair]:
    config, sizes, tokenizer = ws.config.preferences, ws.config.prompts, ws.tokenizer
    gold = configured(ws.config)
    if gold is None:
        raise UserError("there is no judge to label pairs", where="judge.name", value="none")
    prompts = prompt_sets(ws.config, tokenizer, ws.held_out()).preferences
    repeated = [p for p in prompts for _ in range(config.completions)]
    Console().print(f"sampling {config.completions} completions of {len(prompts):,} prompts each")
    key = jax.random.fold_in(jax.random.key(ws.config.seed), 22)
    dials: dict[str, Any] = {"batch_size": config.batch_size, "temperature": config.temperature}
    dials |= {"max_prompt_tokens": sizes.max_tokens, "max_new_tokens": sizes.max_new_tokens}
    _, samples = sample(ws.load(ws.base), tokenizer, repeated, key, **dials)
    texts = texts_of(samples, tokenizer)
    scores = gold(repeated, texts).reshape(len(prompts), -1)
    grouped = [texts[i : i + config.completions] for i in range(0, len(texts), config.completions)]
    rng = np.random.default_rng((ws.config.seed, 23))
    return label_pairs(prompts, grouped, scores, rng, config, _seen(ws, repeated, texts, scores))


def _seen(ws: Workspace, prompts: list[str], texts: list[str], gold: np.ndarray):
    """What raters judge by, [R, prompts, completions] of R raters; None where it is gold."""
    config = ws.config.preferences
    if config.rater_judge is None and not config.length_bias:
        return None
    judge = rater_judge(ws.config)
    seen = (gold if judge is None else judge(prompts, texts)).reshape(-1, *gold.shape)
    if config.raters % len(seen):
        text = f"{config.raters} votes a pair by {len(seen)} raters, so some have more than others"
        hint = f"--preferences.raters {len(seen)} gives each as many"
        Console().print(f"preferences: {text}; {hint}")
    words = np.array([len(text.split()) for text in texts], np.float64).reshape(gold.shape)
    return seen + config.length_bias * words


def users_pairs(path: Path) -> list[Pair]:
    """Pairs that somebody else has made; raises UserError where they will not do."""
    pairs = from_file(path)
    check_completions(pairs, str(path))
    check_worth_training_on(pairs, str(path))
    return pairs


def from_file(path: Path) -> list[Pair]:
    return pairs_from(read_jsonl(path), str(path))


def load_pairs(ws: Workspace, name: str) -> list[Pair]:
    """The stage's `train` or `held_out` pairs."""
    return from_file(ws.stage("preferences") / f"{name}.jsonl")
