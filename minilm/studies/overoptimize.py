"""`minilm overoptimize`: optimise against a learned reward until gold turns down, over seeds."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from minilm import backend, metrics
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import read_json, stage_folder, write_atomically, write_json
from minilm.generate import Samples
from minilm.run import run
from minilm.stages.policy import PolicyEvaluator
from minilm.stages.workspace import open_run
from minilm.studies import plots
from minilm.studies.curves import (
    Curve,
    Fit,
    best_budget,
    best_of_doublings,
    falls,
    fit_seeds,
    gao_fit,
    regrets,
    rises,
    stopped_at,
    stops,
    student_interval,
    until_best_proxy,
)

console = Console(soft_wrap=True)
# (reference, seed, n, limits, prompts) -> rows of the prompts, and the reference's completions.
type Drawn = dict[tuple[int | str, ...], tuple[np.ndarray, Samples]]
type Load = Callable[[Sequence[str]], Config]  # options laid over a config -> the Config


def overoptimize_command(load: Load, out: Path, init: Path | None) -> None:
    """Makes what is missing of a study in `out`, then study.json, overoptimize.png and a table.

    Every arm of `[study]` is its options laid over the config: one reward model, `study.seeds` RL
    runs against it that differ in `rlhf.seed`, and best-of-n of the reference. Each is a run
    folder, skipped when done and resumed where interrupted.

    Args:
      init: a finished run whose pretrained model is used; else `out/base` is pretrained.
    Raises:
      UserError: no judge, a seed alone, a mistake in an arm's options.
    """
    config = load([])
    if config.judge.name == "none":
        raise UserError("without a judge there is no gold to fall", where="judge.name")
    if config.study.seeds < 2:
        where = "study.seeds"
        raise UserError("intervals need at least two seeds", where=where, value=config.study.seeds)
    arms = {name: load(shlex.split(words)) for name, words in config.study.arms.items()}
    base = init or out / "base"
    found = read_json(base / "environment.json").get("choice") or read_json(
        out / "environment.json"
    ).get("choice")
    # Runs of one process share what JAX was started with; and arms may differ in nothing else.
    choice = backend.configure(config.backend, found)
    write_json(out / "environment.json", {"choice": choice._asdict()})
    if init is None:
        _prepared(base, choice)
        run(config, base, until="pretrain")
    drawn: Drawn = {}
    for name, arm in arms.items():
        folder = out / name
        _prepared(folder, choice)
        run(arm, folder, init=base, until="reward")
        _best_of(arm, folder, drawn)
        for seed in range(arm.study.seeds):
            console.rule(f"arm {name}, seed {seed} of {arm.study.seeds}")
            _prepared(folder / f"seed_{seed}", choice)
            changed = arm.model_copy(update={"rlhf": arm.rlhf.model_copy(update={"seed": seed})})
            run(changed, folder / f"seed_{seed}", init=folder, only="rlhf")
    study = read(out, arms)
    write_json(out / "study.json", study)
    write_atomically(out / "overoptimize.png", draw(out, arms, study))
    for shown in render(study):
        console.print(shown)
    console.print(f"{out / 'study.json'}, {out / 'overoptimize.png'}", markup=False)


def _prepared(folder: Path, choice: backend.Choice) -> None:
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", {"choice": choice._asdict()})


def _best_of(config: Config, folder: Path, drawn: Drawn) -> None:
    """Proxy and gold of `study.best_of` completions of the reference for some prompts.

    Args:
      drawn: what the arms before have drawn.
    """
    sizes = {"best_of": config.study.best_of, "prompts": config.study.best_of_prompts}
    path = folder / "best_of.json"
    reward = read_json(stage_folder(folder, "reward") / "done.json")["hash"]
    known = read_json(path)
    if {name: known.get(name) for name in (*sizes, "reward")} == sizes | {"reward": reward}:
        return
    evaluator = PolicyEvaluator(ws := open_run(folder))
    reference = read_json(ws.stage(ws.base) / "done.json")["hash"]
    prompts = evaluator.prompts["development"][: config.study.best_of_prompts]
    console.print(f"best of {config.study.best_of} completions of {len(prompts)} prompts")
    repeated = [p for p in prompts for _ in range(config.study.best_of)]
    limits = config.prompts.max_tokens, config.prompts.max_new_tokens
    what = reference, config.seed, config.study.best_of, *limits, *prompts
    if what not in drawn:
        drawn[what] = evaluator.complete(evaluator.reference, repeated, seed=43)
    scored = evaluator.scored(repeated, drawn[what])
    rows = {"proxy": scored.proxy, "gold": scored.gold}
    shaped = {k: np.round(v.reshape(len(prompts), -1), 4).tolist() for k, v in rows.items()}  # pyright: ignore
    write_json(path, sizes | {"reward": reward} | shaped)


def curve_of(run_folder: Path) -> Curve:
    """The evaluations of an RL run."""
    rows = metrics.evaluations(run_folder / "rlhf")
    parse = np.array([r["parse_share"] for r in rows]) if "parse_share" in rows[0] else None
    kl, proxy, gold = (np.array([r[name] for r in rows]) for name in ("kl", "proxy", "gold"))
    return Curve(np.array([r["step"] for r in rows]), kl, proxy, gold, parse)


def read(out: Path, arms: dict[str, Config]) -> dict[str, Any]:
    """What a finished study says, JSON-able: by arm the fall, the fits, best-of-n, budgets."""
    study: dict[str, Any] = {}
    for name, config in arms.items():
        seeds = range(config.study.seeds)
        study[name] = summary(
            [curve_of(out / name / f"seed_{seed}") for seed in seeds],
            read_json(out / name / "best_of.json"),
            config.study.kl_budgets,
        )
        reward = read_json(out / name / "reward" / "done.json")["summary"]
        bayes = read_json(out / name / "preferences" / "done.json")["summary"]["bayes_accuracy"]
        study[name] |= {
            "options": config.study.arms.get(name, ""),
            "accuracy": reward["accuracy"],
            "bayes_accuracy": bayes,
        }
    return study


def summary(
    curves: Sequence[Curve], sampled: dict[str, Any], budgets: Sequence[float]
) -> dict[str, Any]:
    """One arm's figures; `sampled` holds proxy and gold [prompts][samples] of the reference.

    Every seed is followed to its highest proxy: who sees nothing else would stop there. Regret is
    counted from the gold that a seed has where the other seeds say to stop: the best budget for all
    of them is chosen with the same figures that it would be judged by.
    """
    whole, curves = curves, [until_best_proxy(c) for c in curves]
    fall, rise = student_interval(falls(curves)), student_interval(rises(curves))
    stop = best_budget(curves)
    peaks = [float(c.gold[i]) for c, i in zip(curves, stops(curves), strict=True)]
    rows = []
    for budget in [*budgets, np.inf]:
        places = [stopped_at(c, budget) for c in curves]
        gold = [float(c.gold[i]) for c, i in zip(curves, places, strict=True)]
        regret = student_interval(regrets(curves, budget))
        rows.append(
            {
                "kl_budget": float(budget) if np.isfinite(budget) else None,
                "kl": float(np.mean([c.kl[i] for c, i in zip(curves, places, strict=True)])),
                "proxy": float(np.mean([c.proxy[i] for c, i in zip(curves, places, strict=True)])),
                "gold": float(np.mean(gold)),
                "regret": regret.mean,
                "regret_low": regret.low,
                "regret_high": regret.high,
            }
        )
    peak = float(np.mean([c.gold[stopped_at(c, stop)] for c in curves]))
    at_the_end = [float(c.gold[-1]) for c in whole]
    proxy, gold = (np.array(sampled[name], np.float64) for name in ("proxy", "gold"))
    best = best_of_doublings(proxy, gold)
    fitted = {
        name: gao_fit(
            np.array(best["kl"]), np.array(best[name]), best[name][0], "best_of_n"
        )._asdict()
        for name in ("gold", "proxy")
    }
    return {
        "seeds": [{k: v.tolist() for k, v in c._asdict().items() if v is not None} for c in whole],
        "fall": fall._asdict(),
        "falls": falls(curves),
        "proxy_rise": rise._asdict(),
        "turns": bool(fall.low > 0),
        "best_kl_budget": stop,
        "gold_at_best_budget": peak,
        "gold_at_the_others_budget": student_interval(peaks)._asdict(),
        "early_stopping": rows,
        "gold_at_the_last_step": float(np.mean(at_the_end)),
        "fits": {name: fit_seeds(curves, name) for name in ("gold", "proxy")},
        "best_of_n": best,
        "best_of_n_fits": fitted,
    }


def sentence(name: str, arm: dict[str, Any]) -> str:
    """What an arm shows, in words."""
    fall, rise = arm["fall"], arm["proxy_rise"]
    told = f"{fall['mean']:.2f} [{fall['low']:.2f}, {fall['high']:.2f}]"
    seeds, last = len(arm["seeds"]), arm["early_stopping"][-1]
    if arm["turns"]:
        text = f"gold fell by {told} over {seeds} seeds from where it was best (a KL budget of "
        text += f"{arm['best_kl_budget']:.1f} nats) to where proxy was highest, at KL "
        text += f"{last['kl']:.1f}; proxy rose by {rise['mean']:.2f} on the way"
    else:
        text = f"no fall of gold can be told from noise: {told} over {seeds} seeds, up to "
        text += f"KL {last['kl']:.1f}"
    n, gold = int(arm["best_of_n"]["n"][-1]), arm["best_of_n"]["gold"]
    turn = "still rising" if gold[-1] >= max(gold) - 0.01 else "past its peak"
    text = f"{name}: {text}; best of {n} reaches gold {_best_told(arm)}, {turn}."
    return text.replace("-", "−")


def _best_told(arm: dict[str, Any]) -> str:
    """Gold of best-of-n for the largest n, with its interval over prompts."""
    mean, low, high = (arm["best_of_n"][key][-1] for key in ("gold", "gold_low", "gold_high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def render(study: dict[str, Any]) -> list[Any]:
    """Tables and sentences for a terminal."""
    right = {"justify": "right"}
    arms = Table("", *study, title="over-optimisation", title_justify="left")

    def told(arm: dict[str, Any], name: str) -> str:
        return f"{arm[name]['mean']:.2f} [{arm[name]['low']:.2f}, {arm[name]['high']:.2f}]"

    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy of the reward model": lambda a: f"{a['accuracy']:.3f}",
        "its ceiling": lambda a: f"{a['bayes_accuracy']:.3f}" if a["bayes_accuracy"] else "–",
        "fall of gold": lambda a: told(a, "fall"),
        "rise of proxy meanwhile": lambda a: told(a, "proxy_rise"),
        "best KL budget, nats": lambda a: f"{a['best_kl_budget']:.1f}",
        "gold there, each seed by the others' budget": lambda a: told(
            a, "gold_at_the_others_budget"
        ),
        "gold at the highest proxy": lambda a: f"{a['early_stopping'][-1]['gold']:.2f}",
        "gold at the last step": lambda a: f"{a['gold_at_the_last_step']:.2f}",
        "gold of best-of-n, largest n": _best_told,
    }
    for name, cell in rows.items():
        arms.add_row(name, *(cell(arm) for arm in study.values()))
    shown: list[Any] = [arms]
    for name, arm in study.items():
        table = Table(
            *(Column(c, **right) for c in ("KL budget", "KL", "proxy", "gold", "regret")),  # pyright: ignore
            title=f"{name}: stopping at a KL budget",
            title_justify="left",
        )
        for row in arm["early_stopping"]:
            budget = "none" if row["kl_budget"] is None else f"{row['kl_budget']:g}"
            cells = (f"{row[key]:.2f}" for key in ("kl", "proxy", "gold", "regret"))
            interval = f" [{row['regret_low']:.2f}, {row['regret_high']:.2f}]"
            *before, regret = cells
            table.add_row(budget, *before, regret + interval)
        fits = "; ".join(
            f"{key}: α {f['alpha'][0]:.2f} [{f['alpha'][1]:.2f}, {f['alpha'][2]:.2f}], β "
            f"{f['beta'][0]:.2f} [{f['beta'][1]:.2f}, {f['beta'][2]:.2f}], R² {f['r2'][0]:.2f}"
            for key, f in arm["fits"].items()
        )
        shown += [table, f"d(α − β log d), d = √KL: {fits}", sentence(name, arm)]
    return shown


def draw(out: Path, arms: dict[str, Config], study: dict[str, Any]) -> bytes:
    """The study as a PNG."""
    curves = {
        name: [
            until_best_proxy(curve_of(out / name / f"seed_{s}")) for s in range(config.study.seeds)
        ]
        for name, config in arms.items()
    }
    fits = {
        name: {
            key: Fit(f["alpha"][0], f["beta"][0], f["start"][0], f["r2"][0], "rl")
            for key, f in arm["fits"].items()
        }
        for name, arm in study.items()
    }
    titles = {
        name: f"{name}: gold falls by {arm['fall']['mean']:.2f} "
        f"[{arm['fall']['low']:.2f}, {arm['fall']['high']:.2f}]"
        for name, arm in study.items()
    }
    best = {name: arm["best_of_n"] for name, arm in study.items()}
    return plots.over_optimization(curves, fits, best, titles)
