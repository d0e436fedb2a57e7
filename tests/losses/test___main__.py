"""docs/losses.md is what its generator writes, and has every loss."""

import re
from pathlib import Path

import pytest

from minilm.losses import LOSSES
from minilm.losses.__main__ import page, write
from minilm.losses.docstrings import explain
from minilm.losses.pictures import PICTURES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_docstrings_say():
    assert (DOCS / "losses.md").read_text("utf-8") == page(), "run `python -m minilm.losses`"


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_an_entry_with_a_picture(name):
    text = (DOCS / "losses.md").read_text("utf-8")
    entry = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
    assert entry is not None
    assert f"](losses/{name}.svg)" in entry[1]
    for row in ("use", "rewards", "ignores", "arguments", "returns", "reference"):
        assert re.search(rf"^\| {row} \| .+ \|$", entry[1], re.M), row
    assert explain(LOSSES[name]).formula in entry[1]


def test_every_table_of_the_page_has_as_many_cells_in_each_row():
    text = (DOCS / "losses.md").read_text("utf-8")
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_writing_makes_the_page_and_removes_pictures_of_no_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("minilm.losses.__main__.PICTURES", {"l1": PICTURES["l1"]})
    (tmp_path / "losses").mkdir()
    for name in ("gone.svg", "notes.txt"):
        (tmp_path / "losses" / name).write_text("x")
    write(tmp_path)
    assert sorted(p.name for p in (tmp_path / "losses").iterdir()) == ["l1.svg", "notes.txt"]
    assert (tmp_path / "losses.md").read_text("utf-8").startswith("# Losses\n")
