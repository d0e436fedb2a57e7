"""`minilm blame`: whose fault is it? Each stage of a run in turn gives way to its oracle."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from minilm import backend
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import read_json, write_atomically, write_json
from minilm.run import run
from minilm.stages.policy import PolicyEvaluator
from minilm.stages.reward import paid_texts
from minilm.stages.workspace import Workspace, open_run
from minilm.studies import plots
from minilm.studies.curves import best_of_n, best_of_n_kl
from minilm.text.fables import complete

PROMPTS, SAMPLES = 48, 64
N = 32  # of best-of-n, the optimiser that can't fail: 2.5 nats, about what RLHF spends
CLEAN_RATERS = 1000  # so many votes that their share is the probability


class Swap(NamedTuple):
    """A stage, what took its place, and gold with it and without."""

    stage: str
    oracle: str
    before: float
    after: float

    @property
    def gap(self) -> float:
        return self.after - self.before


def blame_command(path: Path, out: Path | None) -> None:
    """Prints and writes blame.json and blame.png: how much gold each stage's oracle would add.

    Raises:
      UserError: not a finished run, or one without a judge.
    """
    ws, console = open_run(path), Console(soft_wrap=True)
    if not (ws.stage("rlhf") / "done.json").exists():
        raise UserError("RLHF is not finished there", where=path, hint="minilm run CONFIG")
    if ws.config.judge.name == "none":
        raise UserError("without a judge there is no gold to lose", where="judge.name")
    folder = out or path / "blame"
    choice = backend.configure(
        ws.config.backend, read_json(path / "environment.json").get("choice")
    )
    found = blame(ws, path, folder, choice)
    write_json(folder / "blame.json", found)
    write_atomically(folder / "blame.png", draw(found))
    for shown in render(found):
        console.print(shown)
    console.print(f"{folder / 'blame.json'}, {folder / 'blame.png'}", markup=False)


def blame(ws: Workspace, path: Path, folder: Path, choice: backend.Choice) -> dict[str, Any]:
    """Four swaps, each with the run's own budget; runs of the oracles are kept in `folder`.

    labels: the same pairs with the raters' true probabilities; reward model and RLHF again.
    reward: gold itself pays RLHF; over what clean labels already gain.
    optimiser: the best of N of the reference by the run's own reward model, in place of RLHF.
    start: the same best of N among stories that the grammar itself tells, in place of the model.
    """
    gold = read_json(ws.stage("rlhf") / "evaluation.json")["gold"]
    swaps = []
    labels = _with_clean_labels(ws.config)
    clean = gold
    if labels is not None:
        clean = _rerun(labels, path, folder / "labels", choice, only=None)
        swaps.append(Swap("labels", "every rater's true opinion", gold, clean))
    rlhf = ws.config.rlhf.model_copy(update={"judge_weight": 1.0, "learned_weight": 0.0})
    paid = ws.config.model_copy(update={"rlhf": rlhf})
    best = _rerun(paid, path, folder / "reward", choice, only="rlhf")
    swaps.append(Swap("reward model", "gold itself", max(clean, gold), best))
    found = _samplers(ws)
    swaps.append(
        Swap("optimiser", f"the best of {N} by the reward model", gold, found["reference"])
    )
    if "grammar" in found:
        oracle = f"the grammar, best of {N}"
        swaps.append(Swap("start", oracle, found["reference"], found["grammar"]))
    worst = max(swaps, key=lambda swap: swap.gap)
    return {
        "gold": gold,
        "kl": read_json(ws.stage("rlhf") / "evaluation.json")["kl"],
        "best_of": N,
        "best_of_kl": best_of_n_kl(N),
        "swaps": [swap._asdict() | {"gap": swap.gap} for swap in swaps],
        "blamed": worst.stage,
        "sentence": sentence(gold, worst),
    }


def sentence(gold: float, worst: Swap) -> str:
    """The verdict in words."""
    if worst.gap <= 0.05:
        return f"No stage holds this run back: no oracle adds more than 0.05 to gold {gold:.2f}."
    text = f"Most is lost at the {worst.stage}: with {worst.oracle} instead gold goes from "
    return f"{text}{worst.before:.2f} to {worst.after:.2f}.".replace("-", "−")


def _with_clean_labels(config: Config) -> Config | None:
    """The config whose raters err no more; None where they are not simulated."""
    if config.preferences.file:
        return None
    clean = {"raters": CLEAN_RATERS, "flip_rate": 0.0}
    return config.model_copy(update={"preferences": config.preferences.model_copy(update=clean)})


def _rerun(
    config: Config, path: Path, folder: Path, choice: backend.Choice, only: str | None
) -> float:
    """Gold on the evaluation prompts of a run that differs from the one in `path` in its config."""
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", {"choice": choice._asdict()})
    run(config, folder, init=path, only=only)
    return read_json(folder / "rlhf" / "evaluation.json")["gold"]


def _samplers(ws: Workspace) -> dict[str, float]:
    """Gold of the best of N by the reward model, of the reference's stories and the grammar's."""
    evaluator = PolicyEvaluator(ws)
    prompts = evaluator.prompts["evaluation"][:PROMPTS]
    repeated = [p for p in prompts for _ in range(SAMPLES)]
    scored = evaluator.score(evaluator.reference, repeated, seed=45)
    found = {"reference": _best(scored.proxy, scored.gold, len(prompts))}
    if ws.config.corpus.kind == "fables" and evaluator.judge is not None:
        size = ws.config.corpus.size
        told = [complete(p, (ws.config.seed, 46, i), size=size) for i, p in enumerate(repeated)]
        longest = ws.config.reward.max_tokens
        proxy = paid_texts(evaluator.reward_model, ws.tokenizer, repeated, told, longest)
        found["grammar"] = _best(proxy, evaluator.judge(repeated, told), len(prompts))
    return found


def _best(proxy: np.ndarray, gold: np.ndarray | None, prompts: int) -> float:
    by, value = (np.asarray(x, np.float64).reshape(prompts, -1) for x in (proxy, gold))
    return float(best_of_n(by, value, N).mean())


def render(found: dict[str, Any]) -> list[Any]:
    """A table and a sentence."""
    table = Table(title=f"gold {found['gold']:.2f} at KL {found['kl']:.2f}", title_justify="left")
    for column in ("stage", "its oracle", "gold before", "gold with it", "lost there"):
        table.add_column(column)
    for swap in found["swaps"]:
        cells = (f"{swap[key]:.2f}" for key in ("before", "after", "gap"))
        table.add_row(swap["stage"], swap["oracle"], *cells)
    note = f"best of {found['best_of']} spends {found['best_of_kl']:.1f} nats"
    return [table, note, found["sentence"]]


def draw(found: dict[str, Any]) -> bytes:
    """PNG: a bar a stage, from gold without its oracle to gold with it."""
    made, axes = plots.figure(7.0, 0.7 * len(found["swaps"]) + 1.4)
    ax = axes[0][0]
    for place, swap in enumerate(found["swaps"]):
        colour = plots.PROXY if swap["stage"] == found["blamed"] else plots.OTHER
        ax.barh(place, swap["gap"], left=swap["before"], color=colour, height=0.55)
        end = max(swap["before"], swap["after"])
        ax.text(end, place, f" {swap['gap']:+.2f}", va="center")
    ax.axvline(found["gold"], color="#444444", ls=(0, (4, 3)), lw=1.2, label="the run's gold")
    ax.set_yticks(range(len(found["swaps"])), [s["stage"] for s in found["swaps"]])
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(xlabel="gold", title="what each stage's oracle would add")
    ax.legend(loc="lower right")
    return plots.png(made)
