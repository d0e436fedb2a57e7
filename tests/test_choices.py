"""Choices by name: what is found, what is fixed, and what is said of a mistake."""

import sys

import pytest

from minilm.choices import bind, choose, imported
from minilm.errors import UserError


def scale(x, *, factor, shift=0):
    return factor * x + shift


ROWS = {"scale": scale}


def test_a_row_is_found_by_name():
    assert choose(ROWS, "scale", "key") is scale


def test_options_are_fixed_and_defaults_stay():
    assert bind(ROWS, "scale", {"factor": 3}, "key")(2) == 6
    assert bind(ROWS, "scale", {"factor": 3, "shift": 1}, "key")(2) == 7


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("scael", {}, "key: unknown name 'scael'\n  allowed: scale\n  hint: did you mean 'scale'?"),
        ("scale", {"factro": 1}, "did you mean 'factor'?"),
        ("scale", {"x": 1, "factor": 1}, "'scale' has no option 'x'"),
        ("scale", {}, "'scale' needs the option 'factor'"),
        ("math:cosh", {"factor": 1}, "allowed: no options"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(name, options, said):
    with pytest.raises(UserError) as caught:
        bind(ROWS, name, options, "key")
    assert said in str(caught.value)


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_module.py").write_text("answer = 42\ndef score():\n    return answer\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p != str(tmp_path)])
    assert imported("my_own_module:score", "key")() == 42
    with pytest.raises(UserError, match="is not a function"):
        imported("my_own_module:answer", "key")
    with pytest.raises(UserError, match="has no function 'scores'"):
        imported("my_own_module:scores", "key")


@pytest.mark.parametrize("content", ["1 +", "raise RuntimeError('no')", "import nowhere_at_all"])
def test_a_module_that_does_not_run_is_a_users_error(tmp_path, monkeypatch, content):
    name = f"broken_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot import module"):
        imported(f"{name}:score", "key")
