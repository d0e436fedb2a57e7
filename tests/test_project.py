"""What holds the project together: floors, pinned versions, one set of commands everywhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DIRECT = [
    Requirement(line)
    for line in PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pip_and_uv_are_given_the_same_pinned():
    for_uv = PROJECT["tool"]["uv"]["constraint-dependencies"]
    assert for_uv == [f"{name}=={version}" for name, version in pinned().items()]


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_a_direct_dependency_has_both_bounds_and_a_tested_version_within(requirement: Requirement):
    assert {spec.operator for spec in requirement.specifier} == {">=", "<"}
    assert pinned()[requirement.name] in requirement.specifier


def test_nothing_is_pinned_that_is_not_a_direct_dependency():
    assert pinned().keys() == {requirement.name for requirement in DIRECT}


def test_every_file_imports_only_from_floors_below():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_readmes_test_command_through_one_script():
    assert "uv run pytest" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "run: .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_no_file_of_the_package_outgrows_a_screenful_of_screens():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "minilm").rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}


def test_the_changelog_has_an_entry_for_the_version_or_what_is_unreleased():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert "Unreleased" in headings or PROJECT["project"]["version"] in headings
