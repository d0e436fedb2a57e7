"""`minilm blame`: whose fault is it? Each stage of a run in turn gives way to its oracle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from minilm import backend
from minilm.config import Config, RLHFConfig
from minilm.errors import UserError
from minilm.files import read_json, write_atomically, write_json
from minilm.model import Transformer
from minilm.run import run
from minilm.stages.evaluate import texts_of
from minilm.stages.policy import PolicyEvaluator
from minilm.stages.reward import paid_texts
from minilm.stages.workspace import Workspace, open_run
from minilm.studies import plots
from minilm.studies.comparison import two_way_interval
from minilm.studies.curves import best_of_n, best_of_n_kl, most_n
from minilm.text.fables import complete

# Every policy and every oracle is measured on these prompts alone, with so many completions each.
PROMPTS, SAMPLES = 48, 64
LEAST_KL = 1.0  # nats that training spends if it does anything: the best of 6
# A gap that is worth a name, in standard deviations of gold among the reference's completions: no
# interval over prompts knows what another seed of RLHF changes. Cohen (1988): a small effect.
SMALL = 0.2
CLEAN_RATERS = 1000  # so many votes that their share is the probability

type PerPrompt = Float[np.ndarray, " P"]


class Swap(NamedTuple):
    """A stage, what took its place, gold with it and without, and the gap's 95 % interval."""

    stage: str
    oracle: str
    before: float
    after: float
    low: float
    high: float

    @property
    def gap(self) -> float:
        return self.after - self.before


def swap(stage: str, oracle: str, before: PerPrompt, after: PerPrompt) -> Swap:
    """A swap measured on the same prompts before and after; the bootstrap draws prompts anew."""
    _, low, high = two_way_interval((after - before)[None])
    return Swap(stage, oracle, float(before.mean()), float(after.mean()), low, high)


def blamed(swaps: Sequence[Swap], least: float) -> Swap | None:
    """The largest gap, if at least so large, among those whose interval lies above 0; else None."""
    sure = (found for found in swaps if found.low > 0 and found.gap >= least)
    return max(sure, key=lambda found: found.gap, default=None)


def budget(config: RLHFConfig, spent: float) -> float:
    """KL that the optimiser's oracle may spend, in nats: what the run was allowed, or did spend.

    With as much KL as it likes the best of n beats any healthy run, and would accuse it; with as
    little as a run of four steps spends it would accuse none. So it is what the run spent, but at
    least what it was allowed: its `kl_budget`, else its `kl_target`, else LEAST_KL.
    """
    allowed = config.kl_budget or config.kl_target or LEAST_KL
    return max(spent, allowed)


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
    """Four swaps, on the same prompts before and after; runs of the oracles are kept in `folder`.

    labels: the same pairs with the raters' true probabilities; reward model and RLHF again.
    reward: gold itself pays RLHF; over what clean labels already gain.
    optimiser: the best of n of the reference by the run's own reward model, in place of RLHF; n is
      the most that `budget` allows.
    start: the same best of n among stories that the grammar itself tells, in place of the model.
    """
    kl = read_json(ws.stage("rlhf") / "evaluation.json")["kl"]
    n = most_n(budget(ws.config.rlhf, kl), SAMPLES)
    evaluator = PolicyEvaluator(ws)
    judge = evaluator.judge
    if judge is None:
        raise ValueError("gold is what stages are blamed by: there must be a judge")
    prompts = [p for p in evaluator.prompts["evaluation"][:PROMPTS] for _ in range(SAMPLES)]

    def gold_of(policy: Transformer) -> PerPrompt:
        _, samples = evaluator.complete(policy, prompts, seed=45)
        texts = texts_of(samples, ws.tokenizer)
        return _by_prompt(judge(prompts, texts)).mean(axis=1)

    swaps = []
    gold = clean = gold_of(ws.load("rlhf", scalar_head=False))
    labels = _with_clean_labels(ws.config)
    if labels is not None:
        clean = gold_of(_rerun(labels, path, folder / "labels", choice, only=None))
        swaps.append(swap("labels", "every rater's true opinion", gold, clean))
    rlhf = ws.config.rlhf.model_copy(update={"judge_weight": 1.0, "learned_weight": 0.0})
    paid = ws.config.model_copy(update={"rlhf": rlhf})
    best = gold_of(_rerun(paid, path, folder / "reward", choice, only="rlhf"))
    without = clean if clean.mean() > gold.mean() else gold
    swaps.append(swap("reward model", "gold itself", without, best))
    found = _sampled(evaluator, prompts, n)
    oracle = f"the best of {n} by the reward model"
    swaps.append(swap("optimiser", oracle, gold, found.reference))
    if found.grammar is not None:
        swaps.append(swap("start", f"the grammar, best of {n}", found.reference, found.grammar))
    least = SMALL * found.spread
    worst = blamed(swaps, least)
    return {
        "gold": float(gold.mean()),
        "kl": kl,
        "prompts": len(gold),
        "best_of": n,
        "best_of_kl": best_of_n_kl(n),
        "least": least,
        "swaps": [s._asdict() | {"gap": s.gap} for s in swaps],
        "blamed": worst.stage if worst else None,
        "sentence": sentence(swaps, least),
    }


def sentence(swaps: Sequence[Swap], least: float) -> str:
    """The verdict in words."""
    worst = blamed(swaps, least)
    shown = worst or max(swaps, key=lambda found: found.gap)
    gap = f"{shown.gap:.2f} [{shown.low:.2f}, {shown.high:.2f}]"
    if worst is None:
        text = f"No stage can be blamed: no oracle adds {least:.2f} or more for certain; the most, "
        text += f"{gap}, is that of the {shown.stage}."
    else:
        text = f"Most is lost at the {shown.stage}: with {shown.oracle} instead gold goes from "
        text += f"{shown.before:.2f} to {shown.after:.2f}, by {gap}."
    return text.replace("-", "−")


def _with_clean_labels(config: Config) -> Config | None:
    """The config whose raters neither err nor like anything but gold; None without simulated ones.

    `coverage` and `max_pairs` stay: the pairs are the same.
    """
    if config.preferences.file:
        return None
    clean: dict[str, Any] = {"raters": CLEAN_RATERS, "flip_rate": 0.0, "tie_band": 0.0}
    clean |= {"rater_judge": None, "length_bias": 0.0, "position_bias": 0.0}
    return config.model_copy(update={"preferences": config.preferences.model_copy(update=clean)})


def _rerun(
    config: Config, path: Path, folder: Path, choice: backend.Choice, only: str | None
) -> Transformer:
    """The policy of a run that differs from the one in `path` in its config."""
    if not (folder / "environment.json").exists():
        write_json(folder / "environment.json", {"choice": choice._asdict()})
    run(config, folder, init=path, only=only)
    return open_run(folder).load("rlhf", scalar_head=False)


class Sampled(NamedTuple):
    """Gold of the best of n by the reward model; its spread over all the reference's stories."""

    reference: PerPrompt
    grammar: PerPrompt | None  # None where no grammar is known
    spread: float


def _sampled(evaluator: PolicyEvaluator, prompts: list[str], n: int) -> Sampled:
    scored = evaluator.score(evaluator.reference, prompts, seed=45)
    gold = _by_prompt(scored.gold)
    reference, spread = best_of_n(_by_prompt(scored.proxy), gold, n), float(gold.std())
    config, tokenizer = evaluator.ws.config, evaluator.ws.tokenizer
    if config.corpus.kind != "fables" or evaluator.judge is None:
        return Sampled(reference, None, spread)
    size = config.corpus.size
    told = [complete(p, (config.seed, 46, i), size=size) for i, p in enumerate(prompts)]
    proxy = paid_texts(evaluator.reward_model, tokenizer, prompts, told)
    judged = _by_prompt(evaluator.judge(prompts, told))
    return Sampled(reference, best_of_n(_by_prompt(proxy), judged, n), spread)


def _by_prompt(values: np.ndarray | None) -> Float[np.ndarray, "P S"]:
    return np.asarray(values, np.float64).reshape(-1, SAMPLES)


def render(found: dict[str, Any]) -> list[Any]:
    """A table and a sentence."""
    table = Table(title=f"gold {found['gold']:.2f} at KL {found['kl']:.2f}", title_justify="left")
    for column in ("stage", "its oracle", "gold before", "gold with it", "lost there"):
        table.add_column(column)
    for s in found["swaps"]:
        lost = f"{s['gap']:.2f} [{s['low']:.2f}, {s['high']:.2f}]"
        table.add_row(s["stage"], s["oracle"], f"{s['before']:.2f}", f"{s['after']:.2f}", lost)
    note = f"the best of {found['best_of']} spends {found['best_of_kl']:.2f} nats; "
    note += f"intervals (95 %) are over {found['prompts']} prompts"
    return [table, note, found["sentence"]]


def draw(found: dict[str, Any]) -> bytes:
    """PNG: a bar a stage, from gold without its oracle to gold with it, and the gap's interval."""
    made, axes = plots.figure(7.0, 0.7 * len(found["swaps"]) + 1.4)
    ax = axes[0][0]
    for place, s in enumerate(found["swaps"]):
        colour = plots.PROXY if s["stage"] == found["blamed"] else plots.OTHER
        ax.barh(place, s["gap"], left=s["before"], color=colour, height=0.55)
        ends = [s["before"] + s["low"], s["before"] + s["high"]]
        ax.plot(ends, [place, place], color="#444444", lw=1.2)
        end = max(s["before"], s["after"], *ends)
        ax.text(end, place, f" {s['gap']:+.2f}", va="center")
    ax.axvline(found["gold"], color="#444444", ls=(0, (4, 3)), lw=1.2, label="the run's gold")
    ax.set_yticks(range(len(found["swaps"])), [s["stage"] for s in found["swaps"]])
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(xlabel="gold", title="what each stage's oracle would add")
    ax.legend(loc="lower right")
    return plots.png(made)
