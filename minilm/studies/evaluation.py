"""`minilm evaluate RUN…`: report cards, win rates, what each KL bought, completions in colour."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from minilm import backend
from minilm.algorithms import algorithm_of
from minilm.errors import UserError
from minilm.files import read_json, stage_folder, write_atomically, write_json
from minilm.report.page import environment
from minilm.stages.policy import PolicyEvaluator, Scored
from minilm.stages.rlhf import Collected, collector, last_kl_scale
from minilm.stages.workspace import Workspace, open_run
from minilm.studies import comparison, report_card
from minilm.studies.curves import best_of_n, best_of_n_kl, most_n
from minilm.studies.overoptimize import curve_of
from minilm.text.tokenizer import Tokenizer

SHOWN = 6  # prompts on the page of completions
STORIES = 256  # held-out stories that the policy's calibration is read on


def evaluate_command(runs: Sequence[Path], out: Path | None, *, as_json: bool) -> None:
    """Writes card.json and .png of each reward model; of policies comparison.json, frontier.png and
    completions.html; into `out`, or the first run's folder `evaluation`.

    Raises:
      UserError: a path without config, or a run without a finished reward stage.
    """
    console = Console(soft_wrap=True, stderr=as_json)
    spaces = {run: open_run(run) for run in runs}
    for run, ws in spaces.items():
        if not (ws.stage("reward") / "done.json").exists():
            hint = "minilm run CONFIG, or minilm reward CONFIG"
            raise UserError("there is no finished reward model to evaluate", where=run, hint=hint)
    first = read_json(runs[0] / "environment.json").get("choice")
    backend.configure(spaces[runs[0]].config.backend, first)
    folder = out or runs[0] / "evaluation"
    found = evaluate(spaces, folder, console)
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for shown in render(found):
        console.print(shown)
    console.print(f"written into {folder}", markup=False)


def evaluate(spaces: dict[Path, Workspace], folder: Path, console: Console) -> dict[str, Any]:
    """The work of `minilm evaluate`; returns what card.json and comparison.json hold."""
    cards, policies, pools = {}, {}, {}  # a pool: what best-of-n chooses from, of each run
    for number, (run, ws) in enumerate(spaces.items()):
        evaluator, reward = PolicyEvaluator(ws), _digest(ws)
        if reward not in cards:  # runs that share a reward model share its card
            console.print(f"{run}: report card of the reward model", markup=False)
            cards[reward] = {"run": str(run)} | report_card.card(ws, evaluator)
            name = "card" if number == 0 else f"card_{number + 1}"
            write_json(folder / f"{name}.json", cards[reward])
            picture = report_card.draw(cards[reward], f"reward model of {run.name}")
            write_atomically(folder / f"{name}.png", picture)
        if (ws.stage("rlhf") / "done.json").exists():
            console.print(f"{run}: its policy on the evaluation prompts", markup=False)
            policies[run] = _policy(ws, evaluator)
            if (key := paid(ws)) not in pools:
                pools[key] = report_card.searched(evaluator, "evaluation")
            if len(policies) == 1:
                page = completions(ws, evaluator)
                write_atomically(folder / "completions.html", page.encode())
    out: dict[str, Any] = {"cards": list(cards.values())}
    if policies:
        known = {run: pools[paid(spaces[run])] for run in policies}
        out["comparison"] = compare(spaces, policies, known)
        write_json(folder / "comparison.json", out["comparison"])
        arms = comparison.arms({run: spaces[run].config for run in policies})
        if all(scored.gold is not None for scored, _, _ in policies.values()):
            curves = {arm: [curve_of(run) for run in runs] for arm, runs in arms.items()}
            write_atomically(folder / "frontier.png", comparison.frontier(curves))
    return out


def _digest(ws: Workspace) -> str:
    return read_json(ws.stage("reward") / "done.json")["hash"]


def paid(ws: Workspace) -> str:
    """What decides which completions best-of-n has to choose from, and what each is worth."""
    config = ws.config
    dials = config.rlhf.ensemble, config.rlhf.ensemble_penalty, config.rlhf.missing_eos_score
    return repr((config.seed, _digest(ws), config.prompts, config.judge, dials))


def _policy(ws: Workspace, evaluator: PolicyEvaluator) -> tuple[Scored, Scored, dict[str, Any]]:
    """A policy's completions, the reference's, and its calibration before and after RLHF."""
    policy = ws.load("rlhf", scalar_head=False)
    ours = evaluator.score(policy, evaluator.prompts["evaluation"], seed=42)
    theirs = evaluator.references("evaluation")
    documents = ws.held_out()[:STORIES]
    known = {
        "before": report_card.calibration(evaluator.reference, ws, documents),
        "after": report_card.calibration(policy, ws, documents),
    }
    return ours, theirs, known


def compare(
    spaces: dict[Path, Workspace],
    policies: dict[Path, tuple[Scored, Scored, dict]],
    pools: dict[Path, Scored | None],
) -> dict[str, Any]:
    """Arms (runs alike but for seeds) with their win rates; pairs of arms on the same prompts.

    Args:
      pools: for each run, what its reward model would choose the best of n from; of runs for which
        it is not the same no best-of-n is told.
    """
    arms = comparison.arms({run: spaces[run].config for run in policies})
    rows, golds = {}, {}
    for arm, runs in arms.items():
        scored = [policies[run] for run in runs]
        figures = [read_json(stage_folder(run, "rlhf") / "evaluation.json") for run in runs]
        row: dict[str, Any] = {
            "runs": [str(run) for run in runs],
            "kl": float(np.mean([f["kl"] for f in figures])),
            "proxy": float(np.mean([ours.proxy.mean() for ours, _, _ in scored])),
            "calibration": scored[0][2],
        }
        if all(ours.gold is not None for ours, _, _ in scored):
            gold = np.stack([np.asarray(ours.gold, np.float64) for ours, _, _ in scored])
            reference = np.stack(
                [
                    np.asarray(theirs.gold, np.float64).reshape(gold.shape[1], -1)
                    for _, theirs, _ in scored
                ]
            )
            rate = comparison.against_reference(gold, reference)
            row |= {"gold": float(gold.mean()), "gold_win_rate": rate._asdict()}
            golds[arm] = gold
            pool = pools[runs[0]]
            if pool and all(pools[run] is pool for run in runs):
                row["best_of_n"] = _best_of_n(row["kl"], gold, reference, pool)
        if all("parse_share" in f for f in figures):
            row["parse_share"] = float(np.mean([f["parse_share"] for f in figures]))
            row["parse_share_before"] = float(
                np.mean([f["reference/parse_share"] for f in figures])
            )
        rows[arm] = row
    prompts = {arm: policies[runs[0]][0].prompts for arm, runs in arms.items()}
    names = list(golds)
    pairs = [
        {"first": a, "second": b, "win_rate": comparison.between(golds[a], golds[b])._asdict()}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if prompts[a] == prompts[b]
    ]
    return {"arms": rows, "between": pairs}


def _best_of_n(kl: float, gold: np.ndarray, reference: np.ndarray, pool: Scored) -> dict[str, Any]:
    """What the same reward model gives without training, at no more KL than an arm.

    Args:
      gold: of the arm, [seeds, prompts].
      reference: gold of the reference, [seeds, prompts, completions].
      pool: completions of the first of these prompts.
    Returns:
      Figures of best-of-n, and under `arm_…` those of the arm, on the prompts of the pool.
    """
    told = np.asarray(pool.gold, np.float64).reshape(-1, report_card.SAMPLES)
    proxy, prompts = pool.proxy.astype(np.float64).reshape(told.shape), len(told)
    n, gold, reference = most_n(kl, report_card.SAMPLES), gold[:, :prompts], reference[:, :prompts]
    rate = comparison.best_of_n_wins(proxy, told, reference[0], n)
    lost = [comparison.best_of_n_wins(proxy, told, one[:, None], n) for one in gold]
    return {
        "n": n,
        "kl": best_of_n_kl(n),
        "prompts": prompts,
        "gold": float(best_of_n(proxy, told, n).mean()),
        "gold_win_rate": comparison.two_way_interval(rate[None])._asdict(),
        "arm_gold": float(gold.mean()),
        "arm_gold_win_rate": comparison.against_reference(gold, reference)._asdict(),
        "beaten": comparison.two_way_interval(1 - np.stack(lost))._asdict(),
    }


def completions(ws: Workspace, evaluator: PolicyEvaluator) -> str:
    """A page: the same prompts completed before and after RLHF, token by token.

    Colour: log π(token) − log π_ref(token), red where the policy has made a token likelier, blue
    where less likely. Underline: the advantage that the algorithm would give the completion.
    """
    before, after = (
        _rows(collected, ws.tokenizer, ws.config.rlhf.group_size, evaluator)
        for collected in collected_as_paid(ws, evaluator)
    )
    template = environment().get_template("completions.html.j2")
    rows = zip(before, after, strict=True)
    name = "/".join(ws.out.resolve().parts[-2:])
    return template.render(run=name, rows=list(rows), algorithm=ws.config.rlhf.algorithm)


def collected_as_paid(ws: Workspace, evaluator: PolicyEvaluator) -> tuple[Collected, Collected]:
    """A rollout of the first policy of RLHF and of the last, each priced as it was then.

    Gold is paid where the run pays it; the price of a nat is where `rlhf.kl_target` had moved it.
    """
    config = ws.config.rlhf
    payers = evaluator.reference, evaluator.reward_model, evaluator.judge_paid
    collect = collector(ws, *payers)(config)
    start = ws.load(ws.base, scalar_head=algorithm_of(config).critic)
    return collect(start, 0), collect(ws.load("rlhf"), 0, last_kl_scale(ws))


def _rows(
    collected: Collected, tokenizer: Tokenizer, group: int, evaluator: PolicyEvaluator
) -> list[dict[str, Any]]:
    """The first completion of each of the first prompts, with what is shown of its tokens."""
    rollout, batch = jax.device_get((collected.rollout, collected.batch))
    width, found = rollout.mask.shape[1], []
    for i in range(0, min(SHOWN * group, len(rollout.mask)), group):
        mask, prompt = rollout.mask[i], rollout.tokens[i, :-width]
        ids = rollout.tokens[i, -width:][mask]
        gap = (rollout.logprobs - rollout.ref_logprobs)[i][mask]
        advantages = batch.advantages[i][mask]
        text = tokenizer.decode(prompt[rollout.segments[i, :-width] > 0])
        told = tokenizer.decode(ids)
        gold = None if evaluator.judge is None else float(evaluator.judge([text], [told])[0])
        tokens = [
            {
                "text": tokenizer.decode([int(t)]) or "⟨end⟩",
                "colour": shade(float(g)),
                "line": underline(float(a)),
                "title": f"log π/π_ref {g:+.2f}, advantage {a:+.2f}",
            }
            for t, g, a in zip(ids, gap, advantages, strict=True)
        ]
        score, kl = float(np.asarray(collected.scores)[i]), float(gap.sum())
        found.append({"prompt": text, "tokens": tokens, "score": score, "kl": kl, "gold": gold})
    return found


def shade(gap: float) -> Markup:
    """Background for a log-ratio: red above 0, blue below, fully coloured at 3 nats."""
    strength = min(1.0, abs(gap) / 3) ** 0.7
    colour = "213,94,0" if gap > 0 else "0,114,178"
    return Markup(f"rgba({colour},{0.75 * strength:.2f})")


def underline(advantage: float) -> Markup:
    """Border under a token: green for an advantage above 0, red below, thicker for more."""
    if abs(advantage) < 0.05:
        return Markup("none")
    width = min(4.0, 1 + 1.5 * math.sqrt(abs(advantage)))
    return Markup(f"{width:.1f}px solid {'#009e73' if advantage > 0 else '#c0392b'}")


def render(found: dict[str, Any]) -> list[Any]:
    """Tables for a terminal."""
    shown: list[Any] = []
    for card in found["cards"]:
        shown += _render_card(card)
    if "comparison" in found:
        shown += _render_comparison(found["comparison"])
    return shown


def _render_card(card: dict[str, Any]) -> list[Any]:
    labels = card["labels"]
    table = Table("reward model", "", "best possible", title=card["run"], title_justify="left")
    interval = f" [{labels['accuracy_low']:.3f}, {labels['accuracy_high']:.3f}]"
    best = {key: labels.get(f"bayes_{key}") for key in ("accuracy", "log_loss", "brier")}
    told = {k: "–" if v is None else f"{v:.3f}" for k, v in best.items()}
    table.add_row("accuracy", f"{labels['accuracy']:.3f}{interval}", told["accuracy"])
    if labels.get("way_to_bayes") is not None:
        table.add_row("way from 0.5 to there", f"{labels['way_to_bayes']:.0%}", "100%")
    if "accuracy_of_gold" in labels:
        mean, low, high = (labels[f"accuracy_of_gold{end}"] for end in ("", "_low", "_high"))
        table.add_row("accuracy against gold", f"{mean:.3f} [{low:.3f}, {high:.3f}]", "1")
    table.add_row("accuracy against votes", f"{labels['accuracy_of_votes']:.3f}", "")
    table.add_row("log-loss, nats", f"{labels['log_loss']:.3f}", told["log_loss"])
    table.add_row("Brier score", f"{labels['brier']:.3f}", told["brier"])
    table.add_row("calibration error", f"{labels['ece']:.3f}", "0")
    shown: list[Any] = [table]
    for key, what in (("by_margin", "difference of gold"), ("by_length", "words longer")):
        if key in card:
            table = Table(what, "pairs", "accuracy", "ceiling")
            for r in card[key]:
                cells = (f"{r['accuracy']:.3f}", f"{r['ceiling']:.3f}")
                table.add_row(f"{r['from']:.2g} to {r['to']:.2g}", str(r["pairs"]), *cells)
            shown.append(table)
    if "correlations" not in card:
        return shown
    table = Table("rank correlation with", "reward", "gold")
    for name, row in card["correlations"].items():
        table.add_row(name, f"{row['reward']:.2f}", f"{row['gold']:.2f}")
    probes = Table("probe", "reward changes", "gold changes", "fooled")
    for p in card["probes"]:
        cells = (f"{p['reward']:+.2f}", f"{p['gold']:+.2f}", f"{p['fooled']:.0%}")
        probes.add_row(p["name"], *cells)
    found = card["search"]
    text = "best-of-n of the reference says: safe up to "
    if found["rising_to_the_last"]:
        text += f"at least KL {found['kl'][-1]:.2f} nats (gold rises to the last n, best of "
        text += f"{found['n'][-1]:.0f})"
    else:
        text += f"KL {found['safe_kl']:.2f} nats (best of {found['safe_n']})"
    if happened := card.get("rlhf"):
        text += f"; in RLHF gold was best at KL {happened['peak_kl']:.2f}"
        text += f" and ended at KL {happened['last_kl']:.2f}"
    text += f"; {found['share_of_traps']:.0%} of the winners are traps"
    return [*shown, table, probes, text]


def _render_comparison(found: dict[str, Any]) -> list[Any]:
    table = Table("policies", "runs", "KL", "gold", "win rate against the reference", "parses")
    shown: list[Any] = [table]
    for arm, row in found["arms"].items():
        rate = row.get("gold_win_rate")
        told = "–" if rate is None else _told(rate)
        gold = "–" if "gold" not in row else f"{row['gold']:.2f}"
        parse = "–"
        if "parse_share" in row:
            parse = f"{row['parse_share_before']:.2f} → {row['parse_share']:.2f}"
        table.add_row(arm, str(len(row["runs"])), f"{row['kl']:.2f}", gold, told, parse)
        if plain := row.get("best_of_n"):
            text = f"{arm}: on {plain['prompts']} prompts gold {plain['arm_gold']:.2f}, win rate "
            text += f"{_told(plain['arm_gold_win_rate'])}; the best of {plain['n']} by the same "
            text += f"reward model ({plain['kl']:.2f} nats) gold {plain['gold']:.2f}, win rate "
            text += f"{_told(plain['gold_win_rate'])}; the policy beats it in "
            shown.append(text + _told(plain["beaten"]))
        before, after = row["calibration"]["before"], row["calibration"]["after"]
        text = f"{arm}: calibration error on the corpus {before['ece']:.4f} → {after['ece']:.4f}"
        if after["kl_from_truth"] is not None:
            text += f", KL(grammar ‖ policy) {before['kl_from_truth']:.2f} → "
            text += f"{after['kl_from_truth']:.2f} nats a story"
        shown.append(text)
    for pair in found["between"]:
        rate = pair["win_rate"]
        shown.append(f"{pair['first']} beats {pair['second']} in {_told(rate)}")
    return shown


def _told(rate: dict[str, float]) -> str:
    return f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
