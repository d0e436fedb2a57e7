"""What the documents say is so: commands parse, names exist, links lead somewhere."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minilm import cli, metrics
from minilm.algorithms import ALGORITHMS, objective
from minilm.config import RLHFConfig
from minilm.terms import PENALTIES, TERMS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/README.md"])
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code_of(text: str) -> list[str]:
    """Lines of the code blocks, without comments, and inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [re.sub(r"\s+#.*", "", line) for line in lines] + spans


def commands(text: str) -> list[str]:
    """What follows `minilm` or a script's name; a script is written as its command."""
    found = []
    for code in code_of(text):
        for part in code.split("&&"):
            if match := re.search(r"(?:^|[\s/])minilm ([a-z-].*)", part):
                found.append(match[1])
            if match := re.search(r"scripts/(\w+?)(?:_checkpoint)?\.py (.*)", part):
                found.append(f"{match[1]} {match[2]}")
    return found


COMMANDS = sorted({c for page in PAGES for c in commands(page.read_text(encoding="utf-8"))})


@pytest.fixture
def nothing_runs(monkeypatch):
    """Commands parse their words and then do nothing."""

    def nothing(*args, **options):
        return 0

    functions = {
        "minilm.run": ("run",),
        "minilm.handle": ("generate_command", "score_command"),
        "minilm.estimate": ("model_command",),
        "minilm.selftest": ("selftest_command",),
        "minilm.report": ("write",),
        "minilm.audit": ("audit_command",),
        "minilm.diagnose": ("diagnose_command",),
        "minilm.lr_range": ("lr_range_command",),
        "minilm.studies.overoptimize": ("overoptimize_command",),
        "minilm.studies.evaluation": ("evaluate_command",),
        "minilm.studies.oracle": ("oracle_command",),
        "minilm.studies.blame": ("blame_command",),
        "minilm.inspection": ("describe", "render", "diff", "render_diff"),
        "minilm.anatomy": ("render",),
        "minilm.report.inspection": ("write",),
    }
    for module, names in functions.items():
        fake = SimpleNamespace(**dict.fromkeys(names, nothing))
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(module, fake, raising=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_a_page_names_parses(command: str, nothing_runs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.replace("CONFIG", "configs/quick.toml").replace("…", "x"))
    if len(words) == 1 and words[0] in cli.COMMANDS:
        return  # its name alone, in a sentence
    try:
        code = cli.main(words)
    except SystemExit as exit:  # --help
        code = exit.code
    assert code == 0, capsys.readouterr().err


def test_commands_are_found_in_blocks_and_in_sentences():
    text = "Try `minilm report\nRUN`.\n```sh\npip install uv && uv run minilm run A  # all\n```\n"
    text += "```\nuv run python scripts/inspect_checkpoint.py B\n```"
    assert commands(text) == ["run A", "inspect B", "report RUN"]


@by_page
def test_every_link_leads_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    targets = [link.partition("#")[0] for link in links if "://" not in link]
    assert [t for t in targets if t and not (page.parent / t).exists()] == []


@by_page
def test_every_file_of_the_project_that_a_page_names_exists(page: Path):
    names = re.findall(r"`((?:minilm|configs|scripts|docs|data|benchmarks|tests)/[\w./]+)`",
                       page.read_text(encoding="utf-8"))  # fmt: skip
    assert [n for n in names if not (ROOT / n).exists()] == []


@by_page
def test_every_figure_has_been_measured(page: Path):
    assert "MEASURE" not in page.read_text(encoding="utf-8")


@by_page
def test_no_path_of_a_machine_stands_in_a_page(page: Path):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?:/home|/root|/Users|/tmp|/work|[A-Z]:\\)[/\\]\w+", text) == []


def test_the_readme_is_short_and_begins_with_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "pip install uv && uv run minilm run configs/fables.toml\nuv run pytest\n" in text


def documented() -> set[str]:
    """Names in the first column of the tables of docs/metrics.md."""
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs/metrics.md").read_text("utf-8"), re.M)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def logged(run: Path) -> set[str]:
    """Every name that a run writes down, and those of algorithms that it does not use."""
    records = [r for f in run.glob("*/metrics.jsonl") for r in metrics.read(f)]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    evaluation = json.loads((run / "rlhf/evaluation.json").read_text(encoding="utf-8"))
    terms = [t for a in ALGORITHMS.values() for t in objective(a, RLHFConfig(ptx_coef=0.1)).terms]
    names = {name for row in [*records, *summary.values(), evaluation] for name in row}
    return (names | {t.name for t in terms}) - {"step", "kind", "choice", "nonfinite"}


def test_every_metric_that_a_run_logs_is_documented(tiny_run: Path):
    assert sorted(logged(tiny_run) - documented()) == []


def test_every_documented_metric_is_logged(tiny_run: Path):
    assert sorted(documented() - logged(tiny_run)) == []


def test_every_term_that_a_config_may_add_is_named_in_the_docs():
    text = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    names = {name for rows in TERMS.values() for name in rows} | set(PENALTIES)
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
