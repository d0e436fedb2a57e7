"""A run: stages in order, each done once, resumed where interrupted, never silently mixed."""

import contextlib
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table

from minilm import backend, configfile
from minilm.choices import choose, imported
from minilm.config import Config
from minilm.errors import UserError
from minilm.files import digests, read_json, stage_folder, write_atomically, write_json
from minilm.pipeline import NAMES, Stage, stages_of

console = Console(soft_wrap=True)


def run(
    config: Config,
    out: Path,
    *,
    until: str | None = None,
    redo: str | None = None,
    init: Path | None = None,
    only: str | None = None,
) -> None:
    """Runs the stages that are not done.

    Args:
      out: the run folder itself.
      until: the last stage to run.
      redo: remake this stage and what follows; the old folders are kept beside.
      init: another run folder whose pretrained model is used, and its reward model where `only`
        is "rlhf" and the folder has none: so seeds and algorithms share one reward model; its pairs
        where `only` is "reward" and they were made with the same settings.
      only: one stage; `reward` makes the pairs too when there are none and no file is given.
    Raises:
      UserError: a finished stage was made from other config or inputs (the keys are named), a
        missing input, an unwritable folder, another process in the folder.
    """
    for option, name in (("--until", until), ("--redo", redo)):
        if name is not None:
            choose(dict.fromkeys(NAMES), name, option)
    if init is not None and not (stage_folder(init, "pretrain") / "done.json").exists():
        hint = f"the folder of a run whose pretraining is done; looked in {init.resolve()}"
        raise UserError("no finished pretrained model there", where="--init", hint=hint)
    if config.parallel.coordinator is not None:
        out = _joined(config, out, until, only)
    borrowed = ("pretrain",) if init else ()
    if init and (init / "sft" / "done.json").exists():
        borrowed += ("sft",)
    if init and only == "rlhf" and not (out / "reward" / "done.json").exists():
        borrowed = tuple(name for name in NAMES if name != "rlhf")
    if init and only == "reward" and not (out / "preferences").exists():
        lent = (*borrowed, "preferences")
        borrowed = lent if _lends_pairs(config, Place(out, init, lent)) else borrowed
    with _locked(out):
        _run_locked(config, Place(out, init, borrowed), until, redo, only)


def _joined(config: Config, out: Path, until: str | None, only: str | None) -> Path:
    """Joins the other processes; each but the first works in a folder of its own within `out`."""
    if (only or until) != "pretrain":
        raise UserError(
            "several processes pretrain; the other stages run in one",
            where="parallel.coordinator",
            hint="minilm pretrain CONFIG in each process, then minilm run CONFIG without it",
        )
    if config.backend.compute_dtype == "auto":
        problem, where = "several processes have to compute alike", "backend.compute_dtype"
        raise UserError(problem, where=where, value="auto", allowed="float32 or bfloat16")
    number = _function("minilm.parallel:start")(config.parallel)
    own = out / f"process_{number}" if number else out
    if number:  # nothing in it is read again: the first process saves
        shutil.rmtree(own, ignore_errors=True)
    return own


class Place(NamedTuple):
    """A run folder, and the stages that it takes from another run."""

    out: Path
    init: Path | None = None
    borrowed: tuple[str, ...] = ()

    def stage(self, name: str) -> Path:
        if self.init and name in self.borrowed:
            return stage_folder(self.init, name)
        return self.out / name


def _lends_pairs(config: Config, place: Place) -> bool:
    """Whether the other run's finished pairs are those that this config would make."""
    stage = next(s for s in stages_of(config) if s.name == "preferences")
    try:
        return fingerprint(stage, config, place)[1] == "done"
    except UserError:
        return False


def _run_locked(config, place: Place, until, redo, only) -> None:
    out, init, borrowed = place
    chosen = _chosen(config, place, until, only)
    if init is not None:
        _check_same_world(config, init)
        chosen = [s for s in chosen if s.name != "pretrain"]
        if not chosen:
            raise UserError("gives the pretrained model: there is nothing to do", where="--init")
    names = [stage.name for stage in chosen]
    if redo is not None:
        choose(dict.fromkeys(names), redo, "--redo")
    remade = NAMES[NAMES.index(redo) :] if redo else ()
    for stage in chosen:
        for need in stage.needs:
            folder = place.stage(need)
            if need not in names and not (folder / "done.json").exists():
                raise UserError(
                    f"{stage.name} needs the result of {need}, which is not there",
                    where=folder,
                    hint=f"`minilm {need} CONFIG` or `minilm run CONFIG` makes it; "
                    "--init RUN takes that of a finished run",
                )
    plan = {}
    # Those built on too: a finished one that was made from other config is refused.
    for stage in stages_of(config)[bool(init) :]:
        if NAMES.index(stage.name) > NAMES.index(names[-1]):
            break
        state = "new" if stage.name in remade else fingerprint(stage, config, place)[1]
        if stage.name in names:
            plan[stage.name] = state
    todo = [name for name, state in plan.items() if state != "done"]
    if config.parallel.coordinator is not None:  # what is done, the first process knows
        todo = _function("minilm.parallel:told_by_first")(todo)
        if not (todo or _function("minilm.parallel:is_first")()):
            return
    if not todo:
        console.print(f"nothing changed: {', '.join(names)} are done in {out}")
        if read_json(out / "summary.json") != _summary(out) or not (out / "report.html").exists():
            _write_results(out)  # killed before it could
        _print_summary(_summary(out))
        return
    _function("minilm.stages.preflight:check")(config, todo)
    for name in remade:
        _set_aside(out, name)
    write_atomically(out / "config.toml", configfile.dump(config).encode())
    environment = _environment(config, place)
    console.print(f"compute: {environment['compute_dtype']}; {environment['reason']}")
    _print_plan(plan, out, config, environment)

    from minilm.stages.workspace import Workspace

    ws = Workspace(config, *place[:2], environment["compute_dtype"], borrowed)
    for stage in (s for s in chosen if s.name in todo):
        made_from, _ = fingerprint(stage, config, place)
        write_json(ws.stage(stage.name) / "started.json", made_from)
        console.rule(stage.name)
        start = time.perf_counter()
        try:
            summary = _function(stage.run)(ws)
        except KeyboardInterrupt:
            console.print(f"page so far: {_write_page(out)}")
            raise
        done = made_from | {"summary": summary, "wall_seconds": time.perf_counter() - start}
        write_json(ws.stage(stage.name) / "done.json", done)
        page = _write_results(out)
    _print_summary(_summary(out))
    console.print(f"summary: {out / 'summary.json'}\npage:    {page}")


def _write_results(out: Path) -> str:
    """The page and, last, summary.json: by which a later call sees that both are written."""
    page = _write_page(out)
    write_json(out / "summary.json", _summary(out))
    return page


def _write_page(out: Path) -> str:
    """Where the page is; one that cannot be made costs no run."""
    try:
        return str(_function("minilm.report:write")(out))
    except Exception as error:
        return f"not written: {error!r} (`minilm report {out}` tries again)"


def rlhf_and_evaluation(ws) -> dict:
    """RLHF, then the last policy measured once on the evaluation prompts."""
    from minilm.stages.policy import PolicyEvaluator
    from minilm.stages.rlhf import rlhf

    evaluator = PolicyEvaluator(ws)
    trained = rlhf(ws, lambda model: evaluator(model, "development"), evaluator.judge_paid)
    figures = evaluator(ws.load("rlhf", scalar_head=False), "evaluation", "samples.jsonl")
    write_json(ws.stage("rlhf") / "evaluation.json", figures)
    for name in ("gold", "proxy", "parse_share", "length"):
        trained |= {f"{name}_before": figures.get(f"reference/{name}")}
        trained |= {f"{name}_after": figures.get(name)}
    plain = ("gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "kl", "entropy")
    return trained | {name: figures.get(name) for name in plain}


def _chosen(config: Config, place: Place, until: str | None, only: str | None) -> list[Stage]:
    known = stages_of(config)
    if config.sft.file is None and "sft" in (until, only):
        hint = "--sft.file FILE.jsonl, each line with a prompt and a completion"
        raise UserError("there are no examples to fine-tune on", where="sft.file", hint=hint)
    if only == "reward" and not (place.stage("preferences") / "done.json").exists():
        return [s for s in known if s.name in ("preferences", "reward")]
    if only is not None:
        return [s for s in known if s.name == only]
    last = NAMES.index(until) if until else len(NAMES)
    return [s for s in known if NAMES.index(s.name) <= last]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process a run folder; flock, since a PID file outlives SIGKILL."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write the run folder: {error.strerror}", where="--out", value=str(out)
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "another process works in this run folder", where="--out", value=str(out)
            ) from None
        yield


def fingerprint(stage: Stage, config: Config, place: Place) -> tuple[dict, str]:
    """What a stage is made from, and "done", "started" or "new".

    Raises:
      UserError: what is in the folder was made from something else.
    """
    made_from: dict = {
        "sections": configfile.sections(config, stage.sections),
        "inputs": _files_read(stage.name, config),
    }
    for need in stage.needs:
        made_from["inputs"][need] = read_json(place.stage(need) / "done.json").get(
            "hash", "missing"
        )
    text = json.dumps(made_from, sort_keys=True)
    made_from["hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = place.stage(stage.name)
    done, started = (read_json(folder / name) for name in ("done.json", "started.json"))
    stored, state = (done, "done") if done else (started, "started")
    if stored and stored["hash"] == made_from["hash"]:
        return made_from, state
    keys = inputs = []
    if stored:
        keys = _changed(stored["sections"], config, stage.sections)
        inputs = configfile.changed_keys(stored["inputs"], made_from["inputs"])
        if not keys + inputs:
            return made_from | {"hash": stored["hash"]}, state
    # What has only begun, and saved nothing, is begun again: its settings may have been mended.
    if not done and not any((folder / "checkpoints").glob("step_*")):
        return made_from, "new"
    keys += [f"the input {name}" for name in inputs]
    # A misspelt name is better told as one than as a change.
    _function("minilm.stages.preflight:check")(config, [stage.name])
    raise UserError(
        f"stage {stage.name} was {state} with other settings; changed: {', '.join(keys)}",
        where=folder,
        hint=f"--redo {stage.name} remakes it and what follows (the old folder is kept); "
        "--out DIR starts another run",
    )


def _changed(stored: dict, config: Config, names: Sequence[str]) -> list[str]:
    """Keys of the named sections that differ from those stored.

    A key that an older minilm did not have changes nothing while it has its default.
    """
    keys = configfile.changed_keys(
        {name: stored[name] for name in names if name in stored}, configfile.sections(config, names)
    )
    known = dict(configfile.leaves(stored))
    return [key for key in keys if key in known or key not in configfile.defaults(config)]


def _files_read(stage: str, config: Config) -> dict[str, str]:
    """Digests of the user's files that a stage reads."""
    own = {"pretrain": config.tokenizer, "sft": config.sft, "preferences": config.preferences}
    paths = [own[stage].file] if stage in own and own[stage].file else []
    if stage == "pretrain" and config.corpus.kind == "text":
        from minilm.text.corpora import matches

        paths += sorted({str(p) for pattern in config.corpus.files for p in matches(pattern)})
    elif not paths and stage in ("preferences", "rlhf"):
        judges = {"judge.name": config.judge.name}
        if stage == "preferences":
            judges["preferences.rater_judge"] = config.preferences.rater_judge or ""
        for key, name in judges.items():
            if ":" in name:
                imported(name, key)
                file = vars(sys.modules[name.partition(":")[0]]).get("__file__")
                paths += [file] if file else []  # one that is built in has none
    return digests(paths)


def _check_same_world(config: Config, init: Path) -> None:
    """The pretrained model's corpus, with its files, tokenizer and shape must be this config's."""
    names = ("seed", "corpus", "tokenizer", "model")
    stored = read_json(stage_folder(init, "pretrain") / "done.json")
    keys = _changed(stored["sections"], config, names)
    with contextlib.suppress(UserError):  # no such text here: only `rlhf.ptx_coef` reads it again
        keys += configfile.changed_keys(stored["inputs"], _files_read("pretrain", config))
    if keys:
        problem = f"the pretrained model there was made with other settings: {', '.join(keys)}"
        raise UserError(problem, where="--init", value=str(init))


def _set_aside(out: Path, name: str) -> None:
    folder = out / name
    if folder.exists():
        numbered = (out / f"{name}.old{number}" for number in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        folder.rename(kept)
        console.print(f"kept the old {name} as {kept}")


def _environment(config: Config, place: Place) -> dict:
    """The backend's choice, made once a run, and what the machine is and gives right now."""
    path = place.out / "environment.json"
    first = read_json(path).get("choice")
    choice = backend.configure(config.backend, first)
    init = place.init and place.init.resolve()  # `..` goes by where a link leads
    environment = {
        # The first stays: a process in which JAX had started before it was asked had no choice.
        "choice": first or choice._asdict(),
        **choice._asdict(),
        **backend.facts(),
        "init": str(place.init) if place.init else None,
        "init_from_here": init and os.path.relpath(init, place.out.resolve()),
        "borrowed": place.borrowed,
        "matmul_gflops": backend.matmul_rate(choice.compute_dtype),
    }
    write_json(path, environment)
    return environment


def _summary(out: Path) -> dict:
    stages = {n: read_json(out / n / "done.json").get("summary") for n in NAMES}
    environment = read_json(out / "environment.json")
    return {k: v for k, v in stages.items() if v} | {"environment": environment}


def _function(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    return vars(importlib.import_module(module))[attribute]


def _print_plan(plan, out: Path, config: Config, environment: dict) -> None:
    from minilm.estimate import minutes

    table = Table("stage", "state", Column("minutes expected", justify="right"), title="stages")
    for name, state in plan.items():
        left = 1 - _share_done(out / name) if state == "started" else 1
        expected = "" if state == "done" else f"{left * minutes(name, config, environment):.1f}"
        word = {"done": "done, unchanged", "started": "to be resumed", "new": ""}[state]
        table.add_row(name, word, expected)
    console.print(table)


def _share_done(folder: Path) -> float:
    from minilm import checkpoint

    if (found := checkpoint.latest(folder / "checkpoints")) is None:
        return 0.0
    facts = checkpoint.metadata(found)
    return facts["step"] / facts["steps"]


def _print_summary(summary: dict) -> None:
    table = Table("stage", "figure", Column("value", justify="right"), title="results")
    table.caption = "docs/metrics.md says what each is"
    for stage in NAMES:
        for key, value in (summary.get(stage) or {}).items():
            if value is not None:
                text = f"{value:.4g}" if isinstance(value, float) else str(value)
                table.add_row(stage, key, text)
    console.print(table)
