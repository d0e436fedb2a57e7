"""Files: read with mistakes named, written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from minilm import files
from minilm.errors import UserError
from minilm.files import read_json, read_jsonl, write_atomically, write_json, write_jsonl


def test_json_lines_survive_any_text(tmp_path):
    """U+2028 and its like end a line for str.splitlines, but not in JSON Lines."""
    rows = [{"text": "a\u2028b\u0085c\nd\x0ce"}, {"text": "“é” 😀", "logprob": -1.5}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize(
    ("content", "where", "said"),
    [
        (b'{"a": 1}\n{"a": \n', ":2", "not JSON"),
        (b'\n{"a": 1}\n[1]\n', ":3", "not a JSON object"),
        (b'{"a": "\xff"}\n', "", "cannot read"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, where, said):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_jsonl(path)
    assert str(caught.value.where) == f"{path}{where}"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="missing file") as caught:
        read_jsonl(tmp_path / "none.jsonl")
    assert caught.value.where == tmp_path / "none.jsonl"


def test_a_value_that_json_has_not_leaves_the_file(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "deep" / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "deep" / "x.json").read_text()) == {"a": 1}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_what_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "x.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_leaves_the_old_content(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "summary.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_an_object_is_read_a_missing_file_is_empty_and_anything_else_named(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path) == {}
    write_json(path, {"a": [1, None]})
    assert read_json(path) == {"a": [1, None]}
    for content in ("[1]", "{", "\ufeff"):
        path.write_text(content)
        with pytest.raises(UserError, match="JSON") as caught:
            read_json(path)
        assert caught.value.where == path


def found(run: Path) -> Path:
    place = files.init_of(run)
    assert place is not None
    return place.resolve()


def test_a_run_finds_the_one_it_started_from(tmp_path, monkeypatch):
    """From any folder, moved together, moved alone, and as older runs have stored it."""
    base, run = tmp_path / "runs" / "base", tmp_path / "runs" / "study" / "seed_0"
    (base / "pretrain").mkdir(parents=True)
    run.mkdir(parents=True)
    typed = {"init": "runs/base", "init_from_here": "../../base"}
    write_json(run / "environment.json", typed)
    monkeypatch.chdir(tmp_path / "runs" / "study")
    assert files.stage_folder(run, "pretrain").samefile(base / "pretrain")
    (tmp_path / "runs").rename(tmp_path / "kept")
    run, base = tmp_path / "kept" / "study" / "seed_0", tmp_path / "kept" / "base"
    assert found(run) == base
    alone = tmp_path / "alone"
    run.rename(alone)
    base.rename(tmp_path / "base")
    assert found(alone) == tmp_path / "base"
    write_json(alone / "environment.json", {"init": str(tmp_path / "base")})
    assert found(alone) == tmp_path / "base"
    write_json(alone / "environment.json", {"init": None, "init_from_here": None})
    assert files.init_of(alone) is None
