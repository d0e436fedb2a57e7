"""A checkpoint's page is whole, safe and the same each time, for each kind of model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from markupsafe import Markup

from minilm import anatomy, checkpoint, cli
from minilm.config import ModelConfig, TokenizerConfig
from minilm.errors import UserError
from minilm.files import write_jsonl
from minilm.model import Transformer
from minilm.report import plots
from minilm.report.inspection import write
from minilm.text.tokenizer import train_tokenizer

BYTES = train_tokenizer(TokenizerConfig(kind="bytes"), [])
KINDS = {"pretrain": (True, False), "rlhf": (False, True), "reward": (True, True)}
kinds = pytest.mark.parametrize("stage", KINDS)


def save(folder, stage="pretrain", *, tokenizer=BYTES, broken=False, layers=2, **facts):
    """A checkpoint of random numbers; unit 3 of layer 1 adds nothing."""
    tied, head = KINDS[stage]
    config = ModelConfig(
        num_layers=layers, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
        tie_embeddings=tied,
    )  # fmt: skip
    shape = jax.eval_shape(
        lambda: Transformer(config, BYTES.vocab_size, scalar_head=head, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shape)
    mlp = model.layers[1].mlp
    mlp.down_proj = nnx.Param(mlp.down_proj[...].at[3].set(0.0))
    if broken:
        mlp.gate_proj = nnx.Param(mlp.gate_proj[...].at[0, 0].set(jnp.nan))
    facts = {
        "stage": stage, "model": config.model_dump(mode="json"), "vocab_size": BYTES.vocab_size,
        "compute_dtype": "float32", "scalar_head": head, "steps": 9,
        "config": {"seed": 7, "corpus": {"kind": "text"}}, **facts,
    }  # fmt: skip
    files = {}
    if tokenizer:
        folder.mkdir(parents=True)
        tokenizer.save(folder / "tokenizer.json")
        files = {"tokenizer.json": folder / "tokenizer.json"}
    return checkpoint.save(folder, 5, {"model": model}, facts, keep=1, files=files)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures left empty, for tests of the text: drawing is what takes the time."""
    monkeypatch.setattr(plots, "_svg", lambda *args: Markup("<svg></svg>"))


def page_of(path, file=None, **options) -> str:
    return write(path, file, **options).read_text(encoding="utf-8")


def words(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@kinds
def test_a_checkpoint_gives_one_self_contained_file(stage, tmp_path):
    path = save(tmp_path / "alone", stage)
    page = page_of(path)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|<script|src=", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', page)) <= set(ids)
    assert not re.search(r"\b(nan|Undefined|Markup)\b", words(page))
    assert page.count("<figure>") == 6  # spectra and weights, two each; the ends; the units
    for tag in ("div", "section", "details", "table", "figure", "svg", "span"):
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), tag


@kinds
def test_figures_of_the_checkpoint_stand_in_the_page(stage, tmp_path, undrawn):
    tied, head = KINDS[stage]
    said = words(page_of(save(tmp_path / "alone", stage), token="Q"))
    assert "2 layers of width 16" in said and "step 5 of 9" in said
    assert ("head tied to the embedding" in said) == tied
    assert ("a scalar head" in said) == head and ("lm_head 16x258" in said) == (not tied)
    assert "dead hidden units 1 of 48" in said
    assert "layer 1 1 dead, 0 always, of 24" in said
    assert "'Q'" in said.replace("&#39;", "'")
    sources = {"reward": anatomy.DIRECTIONS}
    assert sources.get(stage, anatomy.SAMPLES) in said.replace("&#39;", "'")
    assert "config seed 7" in said and "config corpus kind=text" in said
    spectra = anatomy.spectra(anatomy.read(tmp_path / "alone"))
    for name, s in spectra.items():
        assert f"{name} {s.rows}x{s.columns} {s.largest:.3g} {s.smallest:.3g}" in said


def test_in_a_run_the_page_lies_beside_the_stage_and_units_see_its_text(tmp_path, undrawn):
    path = save(tmp_path / "run" / "pretrain" / "checkpoints")
    write_jsonl(tmp_path / "run" / "pretrain" / "held_out.jsonl", [{"text": "abcdefg"}])
    for given in (path, tmp_path / "run" / "pretrain", tmp_path / "run"):
        file = tmp_path / "run" / "inspection.html"
        file.unlink(missing_ok=True)
        assert write(given) == file
    said = words(file.read_text(encoding="utf-8"))
    assert "run/pretrain" in said and "On 8 positions of held-out text" in said


def test_elsewhere_the_page_lies_beside_the_checkpoint_or_where_one_says(tmp_path, undrawn):
    path = save(tmp_path / "alone")
    assert write(path) == tmp_path / "alone" / "inspection.html"
    assert write(path, tmp_path / "there" / "x.html").exists()
    with pytest.raises(UserError, match="cannot write"):
        write(path, tmp_path / "alone")


def test_the_same_checkpoint_gives_the_same_page(tmp_path):
    path = save(tmp_path / "alone")
    assert page_of(path) == page_of(path, tmp_path / "again.html")


def test_what_is_not_finite_is_called_out_and_the_page_is_there(tmp_path):
    said = words(page_of(save(tmp_path / "alone", broken=True)))
    assert "Not finite: model.layers.1.mlp.gate_proj" in said
    assert "layers.1.mlp.gate_proj 16x24 not finite" in said
    assert "layer 1 not finite" in said


def test_without_a_tokenizer_the_page_says_so(tmp_path, undrawn):
    path = save(tmp_path / "alone", tokenizer=None)
    assert "no tokenizer, or one without words" in words(page_of(path))
    with pytest.raises(UserError, match="no tokenizer"):
        write(path, token="a")


def test_texts_cannot_break_out(tmp_path, undrawn):
    bad = "<script>alert(1)</script>\x1b"
    page = page_of(save(tmp_path / "alone", note=bad))
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page


def test_a_deep_model_folds_its_tables_and_draws_five_layers(tmp_path):
    page = page_of(save(tmp_path / "alone", layers=9))
    assert "<details open>" not in page
    for number in (0, 2, 4, 6, 8):
        assert f">layer {number}</text>" in page
    assert ">layer 1</text>" not in page


def test_the_command_prints_where_the_page_is(tmp_path, undrawn, capsys):
    path = save(tmp_path / "alone")
    assert cli.main(["inspect", str(path), "--html", str(tmp_path / "x.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.html'}\n"
    assert cli.main(["inspect", str(path), "--nearest", "ab", "--html"]) == 2
    assert "split into 'a' 'b'" in capsys.readouterr().err
