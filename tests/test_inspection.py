"""What a checkpoint holds is read without a model, and the figures are right."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from minilm import checkpoint
from minilm.config import TokenizerConfig
from minilm.errors import UserError
from minilm.inspection import describe, diff, render, render_diff
from minilm.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(TokenizerConfig(kind="bytes"), [])


def tree(**changes) -> dict:
    arrays = {
        "embed": np.arange(12, dtype=np.float32).reshape(4, 3),
        "layers": [{"q_proj": np.full((3, 2), i + 1, np.float32)} for i in range(11)],
    }
    return {
        "model": arrays | changes,
        "opt_state": {"mu": np.ones(5, np.float32)},
        "step": np.array(7),
    }


def save(folder: Path, state: dict, config: dict | None = None, step: int = 7) -> Path:
    tokenizer = folder.parent / "tokenizer.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    TOKENIZER.save(tokenizer)
    config = {"seed": 0, "model": {"num_layers": 11}} if config is None else config
    facts = {"config": config, "metrics": {"loss": 0.25}, "stage": "pretrain"}
    files = {"tokenizer.json": tokenizer}
    return checkpoint.save(folder, step, state, facts, keep=9, files=files)


def text(renderable, width: int = 120) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_figures_of_an_array_are_those_of_numpy(tmp_path):
    description = describe(save(tmp_path / "checkpoints", tree()))
    row = description.parameters[0]
    assert (row.key, row.shape, row.dtype, row.size) == ("model.embed", (4, 3), "float32", 12)
    assert row.norm == pytest.approx(sum(i * i for i in range(12)) ** 0.5)


def test_the_model_is_told_from_the_rest(tmp_path):
    path = save(tmp_path / "checkpoints", tree())
    description = describe(path)
    assert [row.key for row in description.parameters][:3] == [
        "model.embed",
        "model.layers.0.q_proj",
        "model.layers.1.q_proj",
    ]
    assert description.parameters[-1].key == "model.layers.10.q_proj"
    assert [row.key for row in description.others] == ["opt_state.mu", "step"]
    assert sum(row.size for row in description.parameters) == 12 + 11 * 6
    assert description.path == path
    facts = {"step": 7, "metrics": {"loss": 0.25}, "stage": "pretrain"}
    assert facts.items() <= description.metadata.items()


def test_the_tokenizer_is_told_from_its_file(tmp_path):
    facts = {"kind": "bytes", "size": 258, "special": "<|pad|> <|endoftext|>"}
    assert describe(save(tmp_path / "checkpoints", tree())).tokenizer == facts


def test_a_run_folder_will_do(tmp_path):
    path = save(tmp_path / "pretrain" / "checkpoints", tree())
    assert describe(tmp_path).path == path


def test_the_page_shows_the_tree_with_shapes_norms_and_shares(tmp_path):
    page = text(render(describe(save(tmp_path / "checkpoints", tree()))))
    assert ["parameters", "78"] in [line.split() for line in page.splitlines()]
    assert "loss=0.25" in page
    assert "num_layers=11" in page
    assert "size=258" in page
    (embed,) = [line.split() for line in page.splitlines() if line.split()[:1] == ["embed"]]
    assert embed == ["embed", "4x3", "float32", "22.49", "15.4%"]
    (layers,) = [line.split() for line in page.splitlines() if line.split()[:1] == ["layers"]]
    assert layers == ["layers", "84.6%"]
    assert "2 arrays of optimizer and counters, 6 numbers" in page
    assert "opt_state" not in page


def test_the_optimizer_is_shown_when_asked_for(tmp_path):
    page = text(render(describe(save(tmp_path / "checkpoints", tree())), optimizer=True))
    assert "opt_state" in page
    assert "scalar" in page  # the step


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_called_out(tmp_path, value):
    broken = np.array([1, value], np.float32)
    page = text(render(describe(save(tmp_path / "checkpoints", tree(embed=broken)))))
    assert "NOT FINITE" in page
    assert "model.embed" in page


def test_a_checkpoint_without_config_tokenizer_or_model_can_be_read(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": np.ones(3)}, {}, keep=1)
    page = text(render(describe(path), optimizer=True))
    assert "w" in page


def test_a_difference_names_what_changed_and_by_how_much(tmp_path):
    embed = tree()["model"]["embed"]
    a = save(tmp_path / "a" / "checkpoints", tree(head=np.ones(2), bias=np.ones(4, np.float32)))
    b = save(
        tmp_path / "b" / "checkpoints",
        tree(embed=embed * np.float32(1.5), score=np.ones(2), bias=np.ones(4)),
        config={"seed": 1, "model": {"num_layers": 11}, "extra": True},
    )
    difference = diff(a, b)
    assert difference.only_a == ("model.head",)
    assert difference.only_b == ("model.score",)
    assert difference.reshaped == (("model.bias", "float32[4]", "float64[4]"),)
    ((key, relative),) = difference.changed
    assert (key, relative) == ("model.embed", pytest.approx(0.5))
    assert difference.equal == 11 + 2
    assert difference.config == (("extra", None, True), ("seed", 0, 1))
    page = text(render_diff(difference))
    assert "only in a: model.head" in page
    assert "only in b: model.score" in page
    assert "config seed: 0 in a, 1 in b" in page
    assert "1 arrays changed, 13 equal bit for bit" in page
    assert "0.5" in page


def test_the_largest_change_comes_first_and_zero_to_something_is_infinite(tmp_path):
    a = save(tmp_path / "a" / "checkpoints", tree(x=np.zeros(2), y=np.ones(2), z=np.ones(2)))
    b = save(tmp_path / "b" / "checkpoints", tree(x=np.ones(2), y=np.ones(2) * 1.1, z=-np.ones(2)))
    changed = diff(a, b).changed
    assert [key for key, _ in changed] == ["model.x", "model.z", "model.y"]
    assert [value for _, value in changed] == pytest.approx([np.inf, 2.0, 0.1])


def test_the_same_checkpoint_differs_in_nothing(tmp_path):
    a = save(tmp_path / "a" / "checkpoints", tree(embed=np.array([np.nan, 1.0])))
    difference = diff(a, a)
    assert (difference.changed, difference.config, difference.equal) == ((), (), 14)


def test_no_checkpoint_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        describe(tmp_path)


def test_inspection_does_without_flax(tmp_path):
    path = save(tmp_path / "checkpoints", tree())
    code = (
        "import sys; from pathlib import Path; from minilm.inspection import describe;"
        f"describe(Path({str(path)!r})); print('flax' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout.strip(), found.stderr) == ("False", "")
