"""What a run's objectives pay for, and whether what was computed is what the documents say."""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from minilm import backend, configfile
from minilm.audit.card import Card, card_of
from minilm.audit.checks import LANGUAGE_CHECKS, REWARD_CHECKS, Check, Checks, run_checks
from minilm.audit.plot import draw
from minilm.audit.policy import RLHF_CHECKS
from minilm.audit.records import environment_checks, record_checks
from minilm.audit.setting import SETTINGS, TRAINED
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import read_json, write_atomically, write_json
from minilm.stages.workspace import Workspace, open_run

CHECKS: dict[str, Checks] = {
    "pretrain": LANGUAGE_CHECKS,
    "reward": REWARD_CHECKS,
    "rlhf": RLHF_CHECKS,
}


@dataclasses.dataclass(frozen=True)
class Audit:
    """Cards by stage and all checks, in the order of the run."""

    cards: list[Card]
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]


def audit(run: Path) -> Audit:
    """Audits the finished stages of a run folder.

    Raises:
      UserError: not a run folder, or none of its stages is finished.
    """
    ws = open_run(run)
    stages = [s for s in TRAINED if (ws.stage(s) / "done.json").exists()]
    if not stages:
        raise UserError("no stage is finished there", where=run, hint="minilm run CONFIG")
    cards, checks = [], [*environment_checks(ws)]
    progress = Console(stderr=True, soft_wrap=True)
    for stage in stages:  # a minute or more each
        progress.print(f"audit: checks of {stage}", markup=False)
        card, found = audit_stage(ws, stage)
        cards += card
        checks += found
    return Audit(cards, checks)


def audit_stage(ws: Workspace, stage: str) -> tuple[list[Card], list[Check]]:
    """The card, where the stage can be set up, and the checks of one finished stage."""
    checks = list(record_checks(ws, stage))
    try:
        setting = SETTINGS[stage](ws)
    except UserError as error:
        return [], [*checks, Check(f"{stage}: it can be set up again", False, error.problem)]
    checks += run_checks(setting, CHECKS[stage])
    return [card_of(setting)], checks


def of_config(config: Config, name: str) -> Audit:
    """Audits what a config would do: its stages take one step each, in a folder thrown away.

    The cards are those of untrained models.
    """
    from minilm.run import run

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / name
        run(_short(config), out)
        return audit(out)


def _short(config: Config) -> Config:
    """The same objectives, model and batches, and as little else as they need."""

    def changed(section: Any, **values: Any) -> Any:
        return section.model_copy(update=values)

    corpus = config.corpus
    if corpus.kind == "fables":
        corpus = changed(corpus, documents=min(corpus.documents, 3000))
    steps = config.rlhf.prompts_per_step
    return changed(
        config,
        corpus=corpus,
        pretrain=changed(config.pretrain, steps=1, validation_documents=8, sample_count=8),
        prompts=changed(config.prompts, preferences=24, rlhf=steps, development=8, evaluation=16),
        reward=changed(config.reward, epochs=1),
        rlhf=changed(config.rlhf, steps=1),
    )


def audit_command(path: Path, *, as_json: bool, overrides: list[str]) -> int:
    """`minilm audit RUN|CONFIG`: prints cards and checks; 1 where a check failed, else 0.

    A run's audit is also written into its folder, as audit.json and audit.svg.
    """
    console = Console(soft_wrap=True, stderr=as_json)
    if path.is_file() or path.suffix == ".toml":
        found = of_config(configfile.load(path, overrides), path.stem)
    else:
        config = configfile.load(path / "config.toml", overrides)
        backend.configure(config.backend, read_json(path / "environment.json").get("choice"))
        found = audit(path)
        write_json(path / "audit.json", as_dict(found))
        write_atomically(path / "audit.svg", draw(found.cards).encode())
        Console(stderr=True).print(f"written: {path / 'audit.json'}, {path / 'audit.svg'}")
    if as_json:
        print(json.dumps(as_dict(found), indent=1, ensure_ascii=False))
    else:
        console.print(Group(*render(found)))
    return 1 if found.failed else 0


def as_dict(found: Audit) -> dict[str, Any]:
    """JSON-able."""
    cards = [
        c._asdict()
        | {"terms": [t._asdict() for t in c.terms], "groups": [g._asdict() for g in c.groups]}
        for c in found.cards
    ]
    return {
        "cards": cards,
        "checks": [c._asdict() for c in found.checks],
        "failed": len(found.failed),
    }


def render(found: Audit) -> Iterator[Any]:
    for card in found.cards:
        table = Table(
            "term",
            "weight",
            "loss",
            "of the loss",
            "of the gradient",
            title=f"{card.stage}: what is trained on",
            title_justify="left",
        )
        for t in card.terms:
            table.add_row(
                t.name,
                f"{t.weight:g}",
                f"{t.loss:.4g}",
                f"{t.loss_share:.1%}",
                f"{t.gradient_share:.1%}",
            )
        yield table
        for t in card.terms:
            yield f"{t.name}: {t.pays_for}\n  rewards  {t.rewards}\n  ignores  {t.ignores}"
        for pair, value in card.cosines.items():
            yield f"cosine of the gradients of {pair}: {value:.2f}"
        groups = Table("group", "of the elements", "of the loss", "of the gradient")
        for g in card.groups:
            groups.add_row(g.name, f"{g.elements:.1%}", f"{g.loss:.1%}", f"{g.gradient:.1%}")
        yield groups
        heavy = ", ".join(f"{name} {share:.1%}" for name, share in card.heaviest.items())
        yield f"most of the loss is paid at: {heavy}"
        yield from (f"! {flag}" for flag in card.flags)
        yield ""
    checks = Table("check", "", "found", title="integrity", title_justify="left")
    for check in found.checks:
        word = {True: "ok", False: "FAILED", None: "untested"}[check.passed]
        checks.add_row(check.name, word, check.said)
    yield checks
    passed = sum(check.passed is True for check in found.checks)
    untested = sum(check.passed is None for check in found.checks)
    more = f", {untested} had nothing to be tested by" if untested else ""
    yield f"{passed} of {len(found.checks)} checks passed{more}"
