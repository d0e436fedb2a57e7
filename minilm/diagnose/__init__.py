"""What a run's curves say: verdicts with evidence, confidence, remedy and the next command."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm import configfile
from minilm.config import RLHFConfig
from minilm.diagnose import rl, verdicts
from minilm.diagnose.curves import FEWEST, Curves, collect, load
from minilm.diagnose.fits import best_step, should_stop
from minilm.diagnose.frame import Evidence, Finding, Verdict
from minilm.diagnose.remedies import REMEDIES
from minilm.errors import UserError
from minilm.files import init_of, read_json
from minilm.pipeline import STAGES

__all__ = [
    "ALARMS", "HEALTHY", "Evidence", "Verdict", "alarms", "best_step", "diagnose",
    "diagnose_command", "healthy", "render", "should_stop",
]  # fmt: skip

HEALTHY = frozenset({"improving", "converged"})
# What can be said while a run goes on; that it is too short, or too slow, its end has to show.
ALARMS = frozenset({
    "nonfinite", "vanishing_gradients", "exploding_gradients", "learning_rate_too_high",
    "diverging", "spikes", "validation_mismatch", "overfitting", "zero_reward_variance",
    "value_function_failure", "entropy_collapse", "length_gaming", "reward_hacking", "kl_blow_up",
})  # fmt: skip

type Source = Path | str | Iterable[Mapping[str, Any]]


def diagnose(source: Source) -> list[Verdict]:
    """The verdicts on a run, causes before their consequences; at least one a stage.

    Args:
      source: a run folder (all its stages), a stage folder, a `metrics.jsonl`, a CSV or TSV with
        columns for step, training and validation loss, or records: dicts of numbers with a step.
    Returns:
      What is wrong, by stage; where nothing is, `improving` or `converged`.
    Raises:
      UserError: no metrics there, columns that cannot be told, or too few points of any curve.

    >>> records = [{"step": k, "loss": 3 / (1 + k) ** 0.1} for k in range(1, 200, 4)]
    >>> [verdict.name for verdict in diagnose(records)]
    ['improving']
    """
    if isinstance(source, Path | str):
        found, folder = load(source), Path(source)
        config = next(
            (p for p in (folder, *folder.parents[:2]) if (p / "config.toml").exists()), None
        )
        name = "CONFIG" if config is None else str(config / "config.toml")
    else:
        found, name = {"": collect(source)}, "CONFIG"
    return [v for stage, curves in found.items() for v in _of_stage(curves, stage, name)]


def healthy(found: Iterable[Verdict]) -> bool:
    """Whether nothing is wrong.

    >>> healthy([Verdict("improving", 0.9, (), "", "")])
    True
    """
    return all(verdict.name in HEALTHY for verdict in found)


def alarms(records: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    """What is wrong with a run that is still going on; nothing where it is too young to tell."""
    try:
        return [verdict for verdict in diagnose(records) if verdict.name in ALARMS]
    except UserError:
        return []


def _of_stage(curves: Curves, stage: str, config: str) -> list[Verdict]:
    policy = rl.is_policy(curves)
    room = rl if policy else verdicts
    findings: dict[str, Finding] = {}
    for name, rule in room.RULES.items():
        reasons = room.EXPLAINED_BY.get(name, frozenset())
        explained = reasons & findings.keys() or ("*" in reasons and findings)
        if not explained and (found := rule(curves)):
            findings[name] = found
    if not findings:
        last = room.course(curves)
        if last is None:
            names = ", ".join(f"{len(c.steps)} of {n}" for n, c in curves.series.items())
            raise UserError(
                f"too few points to judge a curve: {names or 'none that is finite'}",
                where=curves.source or None,
                allowed=f"at least {FEWEST} of a loss or a reward",
                hint="log more often: log_every",
            )
        findings = dict([last])
    return [_verdict(name, f, curves, stage, config) for name, f in findings.items()]


def _verdict(name: str, found: Finding, curves: Curves, stage: str, config: str) -> Verdict:
    remedy = REMEDIES[name]
    truths = (curves.series.get(name) for name in ("validation", "gold", "parse_share"))
    measured = next((curve for curve in truths if curve is not None), None)
    best = curves.last_step
    if measured is not None:
        sign = 1 if "validation" in curves.series else -1
        best = best_step(measured.steps, sign * measured.values)
    known = stage if stage in ("pretrain", "sft", "reward", "rlhf") else "pretrain"
    settings = _settings(config, known)
    kl_coef = settings.kl_coef if isinstance(settings, RLHFConfig) else 0.0
    end = max(curves.last_step, 1.0)
    words = {
        "stage": known,
        "config": config,
        "run": str(Path(config).parent) if config != "CONFIG" else "RUN",
        "best_step": f"{max(best, 1):.0f}",
        "to_best": _length(known, settings, best, end),
        "twice": _length(known, settings, 2 * end, end),
        "kl_coef": f"{max(3 * kl_coef, 0.1):.2g}",
    }
    command = remedy.command
    if command.startswith("minilm lr-range") and known != "pretrain":  # which alone it trains
        change = 3.0 if name in ("learning_rate_too_low", "plateau") else 0.3
        command = f"minilm run {{config}} --redo {{stage}} {_rate(known, settings, change)}"
    command = command.format_map(words)
    # What is remade begins with the first stage that an option is for.
    changed = set(re.findall(r" --(\w+)\.", command))
    first = next((row.name for row in STAGES if changed & {*row.sections}), known)
    command = re.sub(r"--redo \w+", f"--redo {first}", command)
    if config != "CONFIG" and command.startswith("minilm run "):
        command = _in_place(command, Path(words["run"]), first)
    return Verdict(name, found.confidence, found.evidence, remedy.text, command, stage)


def _in_place(command: str, run: Path, first: str) -> str:
    """The command for a run's own folder, with the run that it takes its earlier stages from."""
    command += f" --out {run}"  # else a new folder would be named after config.toml
    if first == "pretrain" or (init := init_of(run)) is None:
        return command
    lent = read_json(run / "environment.json").get("borrowed", ())
    needed = {"rlhf": "reward", "reward": "preferences"}.get(first)
    if needed in lent:  # `minilm run` would make its own
        command = command.replace("minilm run ", f"minilm {first} ", 1)
    return f"{command} --init {os.path.relpath(init)}"


def _settings(config: str, stage: str) -> Any:
    """The stage's section of a run's config; None where there is no such file."""
    try:
        return dict(configfile.load(config))[stage]
    except UserError:
        return None


def _length(stage: str, settings: Any, step: float, end: float) -> str:
    """The option that ends a stage of `end` steps at `step`; of one that is told in passes over its
    data and cannot be shorter, a lower rate."""
    if stage in ("pretrain", "rlhf"):
        return f"--{stage}.steps {max(step, 1):.0f}"
    epochs = settings.epochs if settings else 1
    wanted = max(round(epochs * step / end), 1)
    if wanted == epochs:
        return _rate(stage, settings, 0.3)
    return f"--{stage}.epochs {wanted}"


def _rate(stage: str, settings: Any, change: float) -> str:
    rate = change * (settings.optimizer.learning_rate if settings else 1e-3)
    return f"--{stage}.optimizer.learning-rate {rate:.2g}"


def _json(found: Sequence[Verdict]) -> str:
    """One JSON object: `healthy`, and the verdicts; what is not finite is null."""

    def number(value: float | None) -> float | None:
        return value if value is not None and abs(value) < float("inf") else None

    rows = []
    for verdict in found:
        told = [e._asdict() | {"value": number(e.value)} for e in verdict.evidence]
        rows.append(verdict._asdict() | {"evidence": told})
    return json.dumps({"healthy": healthy(found), "verdicts": rows}, indent=1, ensure_ascii=False)


def render(found: Sequence[Verdict]) -> Any:
    """The verdicts for a terminal, a panel a stage."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    stages: dict[str, list[Text]] = {}
    for verdict in found:
        colour = "green" if verdict.name in HEALTHY else "yellow"
        text = Text()
        text.append(verdict.name.replace("_", " "), style=f"bold {colour}")
        text.append(f"  confidence {verdict.confidence:.2f}\n")
        text.append("".join(f"  {told}\n" for told in verdict.evidence))
        text.append(f"{verdict.remedy}\n")
        text.append("next: ", style="dim").append(verdict.command)
        stages.setdefault(verdict.stage, []).append(text)
    panels = [
        Panel(Group(*_parted(texts)), title=stage or None, title_align="left")
        for stage, texts in stages.items()
    ]
    return Group(*panels)


def _parted(texts: list[Any]) -> list[Any]:
    """With an empty line between them."""
    return [part for text in texts for part in ("", text)][1:]


def diagnose_command(path: Path, *, as_json: bool) -> None:
    """`minilm diagnose PATH`: prints the verdicts, `--json` as one object."""
    from rich.console import Console

    found = diagnose(path)
    if as_json:
        print(_json(found))
    else:
        Console().print(render(found))
