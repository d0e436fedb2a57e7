"""A run: stages in order, each done once, resumed where interrupted, never silently mixed."""

import contextlib
import fcntl
import hashlib
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from minilm import backend, checkpoint, configfile
from minilm.choices import choose
from minilm.config import Config
from minilm.errors import UserError

console = Console(soft_wrap=True)


class Stage(NamedTuple):
    """A row of the pipeline.

    Attributes:
      needs: stages whose results it reads.
      sections: of the config; with the needs' hashes and the files read they make its hash.
      run: "module:function", taking a Workspace and returning the stage's summary.
    """

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    run: str


STAGES = (
    Stage(
        "pretrain",
        (),
        ("seed", "corpus", "tokenizer", "model", "backend", "pretrain"),
        "minilm.stages.pretrain:pretrain",
    ),
    Stage(
        "preferences",
        ("pretrain",),
        ("seed", "prompts", "judge", "preferences"),
        "minilm.stages.preferences:preferences",
    ),
    Stage("reward", ("pretrain", "preferences"), ("seed", "reward"), "minilm.stages.reward:reward"),
    Stage(
        "rlhf",
        ("pretrain", "reward"),
        ("seed", "prompts", "judge", "rlhf"),
        "minilm.run:rlhf_and_evaluation",
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


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
      init: another run folder whose pretrained model is used.
      only: one stage; `reward` makes the pairs too when there are none and no file is given.
    Raises:
      UserError: a finished stage was made from other config or inputs (the keys are named), a
        missing input, an unwritable folder, another process in the folder.
    """
    for option, name in (("--until", until), ("--redo", redo)):
        if name is not None:
            choose(dict.fromkeys(NAMES), name, option)
    if init is not None and not (init / "pretrain" / "done.json").exists():
        raise UserError("no finished pretrained model there", where="--init", value=str(init))
    with _locked(out):
        _run_locked(config, out, until, redo, init, only)


def _run_locked(config, out: Path, until, redo, init: Path | None, only) -> None:
    chosen = _chosen(out, until, only)
    if init is not None:
        _check_same_world(config, init)
        chosen = [s for s in chosen if s.name != "pretrain"]
        if not chosen:
            raise UserError("gives the pretrained model: there is nothing to do", where="--init")
    if redo is not None:
        choose({stage.name: stage for stage in chosen}, redo, "--redo")
        _set_aside(out, redo)
    plan = [(stage, *_fingerprint(stage, config, out, init)) for stage in chosen]
    todo = [stage.name for stage, _, state in plan if state != "done"]
    if not todo:
        console.print(f"nothing changed: {', '.join(s.name for s in chosen)} are done in {out}")
        if _read_json(out / "summary.json") != _summary(out) or not (out / "report.html").exists():
            _write_results(out)  # killed before it could
        _print_summary(_summary(out))
        return
    _check_ahead(config, out, init, todo)
    checkpoint.write_atomically(out / "config.toml", configfile.dump(config).encode())
    environment = _environment(config, out, init)
    console.print(f"compute: {environment['compute_dtype']}; {environment['reason']}")
    _print_plan(plan, config, environment)

    from minilm.stages.workspace import Workspace, write_json

    ws = Workspace(config, out, init, environment["compute_dtype"])
    for stage in chosen:
        made_from, state = _fingerprint(stage, config, out, init)
        if state == "done":
            continue
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


def _check_ahead(config: Config, out: Path, init: Path | None, todo: list[str]) -> None:
    """What would otherwise be found out after the pretraining."""
    from minilm.algorithms import ALGORITHMS
    from minilm.judges import configured
    from minilm.stages.preferences import from_file

    for stage in (s for s in STAGES if s.name in todo):
        for need in stage.needs:
            folder = (init if init and need == "pretrain" else out) / need
            if need not in todo and not (folder / "done.json").exists():
                raise UserError(
                    f"{stage.name} needs the result of {need}, which is not there",
                    where=folder,
                    hint=f"run `minilm {need} CONFIG` first, or `minilm run CONFIG`",
                )
    if "rlhf" in todo:
        choose(ALGORITHMS, config.rlhf.algorithm, "rlhf.algorithm")
    if "preferences" in todo and config.preferences.file:
        from_file(Path(config.preferences.file))
    elif "preferences" in todo and config.judge.name == "none":
        hint = "name a judge, or give your own pairs: --preferences.file FILE.jsonl"
        raise UserError("there is no judge to label pairs", where="judge.name", hint=hint)
    if {"preferences", "rlhf"} & set(todo) and (gold := configured(config)):
        if config.judge.name == "fables" and config.corpus.kind != "fables":
            hint = 'name "length", your "module:function" or "none", or stop at --until pretrain'
            raise UserError("knows fables alone", where="judge.name", value="fables", hint=hint)
        try:
            gold(["Once upon a time"], [" a fox slept."])
        except Exception as error:  # of the user's function, or of its options
            raise UserError(f"the judge failed: {error!r}", where="judge") from error


def _write_results(out: Path) -> str:
    """summary.json and the page."""
    from minilm.stages.workspace import write_json

    write_json(out / "summary.json", _summary(out))
    return _write_page(out)


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
    from minilm.stages.workspace import write_json

    evaluator = PolicyEvaluator(ws)
    trained = rlhf(ws, lambda model: evaluator(model, "development"))
    figures = evaluator(ws.load("rlhf", scalar_head=False), "evaluation", "samples.jsonl")
    write_json(ws.stage("rlhf") / "evaluation.json", figures)
    names = {
        "gold_win_rate": "gold_win_rate",
        "gold_win_rate_low": "gold_win_rate_low",
        "gold_win_rate_high": "gold_win_rate_high",
        "gold_before": "reference/gold",
        "gold_after": "gold",
        "proxy_before": "reference/proxy",
        "proxy_after": "proxy",
        "kl": "kl",
        "parse_share_before": "reference/parse_share",
        "parse_share_after": "parse_share",
        "entropy": "entropy",
        "length_before": "reference/length",
        "length_after": "length",
    }
    return trained | {name: figures.get(key) for name, key in names.items()}


def _chosen(out: Path, until: str | None, only: str | None) -> list[Stage]:
    if only == "reward" and not (out / "preferences" / "done.json").exists():
        return [s for s in STAGES if s.name in ("preferences", "reward")]
    if only is not None:
        return [s for s in STAGES if s.name == only]
    return list(STAGES[: NAMES.index(until) + 1]) if until else list(STAGES)


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


def _fingerprint(stage: Stage, config: Config, out: Path, init: Path | None) -> tuple[dict, str]:
    """What a stage is made from, and "done", "started" or "new".

    Raises:
      UserError: what is in the folder was made from something else.
    """
    made_from: dict = {
        "sections": configfile.sections(config, stage.sections),
        "inputs": _files_read(stage.name, config),
    }
    for need in stage.needs:
        path = (init if init and need == "pretrain" else out) / need / "done.json"
        made_from["inputs"][need] = _read_json(path).get("hash", "missing")
    text = json.dumps(made_from, sort_keys=True)
    made_from["hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    for name, state in (("done.json", "done"), ("started.json", "started")):
        stored = _read_json(out / stage.name / name)
        if not stored:
            continue
        if stored["hash"] == made_from["hash"]:
            return made_from, state
        keys = configfile.changed_keys(stored["sections"], made_from["sections"])
        keys += [
            f"the input {k}" for k, v in made_from["inputs"].items() if stored["inputs"].get(k) != v
        ]
        raise UserError(
            f"stage {stage.name} was {state} with other settings; changed: {', '.join(keys)}",
            where=out / stage.name,
            hint=f"--redo {stage.name} remakes it and what follows (the old folder is kept); "
            "--out DIR starts another run",
        )
    return made_from, "new"


def _files_read(stage: str, config: Config) -> dict[str, str]:
    """Digests of the user's files that a stage reads."""
    paths: list[str] = []
    if stage == "pretrain" and config.corpus.kind == "text":
        from minilm.text.corpora import matches

        paths = sorted({str(p) for pattern in config.corpus.files for p in matches(pattern)})
    if stage == "preferences" and config.preferences.file:
        paths = [config.preferences.file]
    digests = {}
    for path in paths:
        if Path(path).is_file():
            with Path(path).open("rb") as file:
                digests[path] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return digests


def _check_same_world(config: Config, init: Path) -> None:
    """The pretrained model's corpus, tokenizer and shape must be this config's."""
    names = ("seed", "corpus", "tokenizer", "model")
    stored = _read_json(init / "pretrain" / "done.json")["sections"]
    keys = configfile.changed_keys(
        {k: stored[k] for k in names}, configfile.sections(config, names)
    )
    if keys:
        raise UserError(
            f"the pretrained model there was made with other settings: {', '.join(keys)}",
            where="--init",
            value=str(init),
        )


def _set_aside(out: Path, redo: str) -> None:
    for name in NAMES[NAMES.index(redo) :]:
        folder = out / name
        if not folder.exists():
            continue
        number = 1
        while (kept := out / f"{name}.old{number}").exists():
            number += 1
        if name == "pretrain" and (out / "tokenizer.json").exists():
            # First: left behind by a kill, it would serve the new model.
            (out / "tokenizer.json").rename(folder / "tokenizer.json")
        folder.rename(kept)
        console.print(f"kept the old {name} as {kept}")


def _environment(config: Config, out: Path, init: Path | None) -> dict:
    """The backend's choice, made once a run, and what the machine is and gives right now."""
    path = out / "environment.json"
    stored = _read_json(path)
    choice = backend.configure(config.backend, stored.get("choice"))
    from minilm.stages.workspace import write_json

    environment = {
        "choice": choice._asdict(),
        **choice._asdict(),
        **backend.facts(),
        "init": str(init) if init else None,
        "matmul_gflops": backend.matmul_rate(choice.compute_dtype),
    }
    write_json(path, environment)
    return environment


def _summary(out: Path) -> dict:
    stages = {n: _read_json(out / n / "done.json").get("summary") for n in NAMES}
    environment = _read_json(out / "environment.json")
    return {k: v for k, v in stages.items() if v} | {"environment": environment}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read: {error}", where=path, hint="delete it to remake it"
        ) from None


def _function(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    return vars(importlib.import_module(module))[attribute]


def _print_plan(plan, config: Config, environment: dict) -> None:
    from minilm.estimate import minutes

    table = Table(title="stages", title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("minutes expected", justify="right")
    for stage, _, state in plan:
        expected = "" if state == "done" else f"{minutes(stage.name, config, environment):.1f}"
        word = {"done": "done, unchanged", "started": "to be resumed", "new": ""}[state]
        table.add_row(stage.name, word, expected)
    console.print(table)


def _print_summary(summary: dict) -> None:
    table = Table(title="results", title_justify="left")
    table.add_column("stage")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for stage in NAMES:
        for key, value in (summary.get(stage) or {}).items():
            if value is not None:
                text = f"{value:.4g}" if isinstance(value, float) else str(value)
                table.add_row(stage, key, text)
    console.print(table)
