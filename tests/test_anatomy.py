"""A closer look at checkpoints: of each kind of model, in a run and alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from minilm import anatomy, checkpoint, spectra
from minilm.config import ModelConfig, TokenizerConfig
from minilm.errors import UserError
from minilm.files import write_jsonl
from minilm.model import Transformer, hidden_states
from minilm.text.tokenizer import train_tokenizer

LAYERS = 3
BYTES = train_tokenizer(TokenizerConfig(kind="bytes"), [])
WORDS = train_tokenizer(
    TokenizerConfig(kind="bpe", vocab_size=270), ["the fox and the fox and the fox"] * 9
)
TEXTS = ["A fox.", "A bear sat by the river", "x"]
KINDS = {  # name: (tied, scalar head, stage)
    "tied": (True, False, "pretrain"),
    "untied": (False, False, "rlhf"),
    "policy with critic": (True, True, "rlhf"),
    "reward": (True, True, "reward"),
    "untied reward": (False, True, "reward"),
}
LANGUAGE = [name for name, kind in KINDS.items() if kind[2] != "reward"]
kinds = pytest.mark.parametrize("kind", KINDS)


def new_model(kind: str = "tied", vocab: int = BYTES.vocab_size) -> Transformer:
    """Random numbers everywhere, zeros and ones of the initialisation too."""
    tied, head, _ = KINDS[kind]
    config = ModelConfig(
        num_layers=LAYERS, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24,
        tie_embeddings=tied,
    )  # fmt: skip
    shape = jax.eval_shape(lambda: Transformer(config, vocab, scalar_head=head, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shape)


def save(folder, model: Transformer, kind: str = "tied", tokenizer=BYTES, **extra):
    facts = {
        "stage": KINDS[kind][2],
        "model": model.config.model_dump(mode="json"),
        "vocab_size": len(model.embed_tokens[...]),
        "compute_dtype": "bfloat16",
        "scalar_head": KINDS[kind][1],
    }
    files = {}
    if tokenizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / "tokenizer.json")
        files = {"tokenizer.json": folder / "tokenizer.json"}
    return checkpoint.save(folder, 5, {"model": model} | extra, facts, keep=1, files=files)


def text(renderable, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@kinds
def test_every_matrix_has_figures_and_no_vector_has(kind, tmp_path):
    model = new_model(kind)
    found = anatomy.spectra(anatomy.read(save(tmp_path, model, kind)))
    arrays = {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(model).items()}
    assert found.keys() == {name for name, array in arrays.items() if array.ndim == 2}
    assert ("lm_head" in found) == (not KINDS[kind][0])
    for name, figures in found.items():
        assert (figures.rows, figures.columns) == arrays[name].shape
        assert figures.largest == pytest.approx(np.linalg.norm(arrays[name], 2), rel=1e-5)


def test_where_there_is_an_average_it_is_what_is_looked_at(tmp_path):
    model = new_model()
    average = jax.tree.map(lambda x: 2 * x, model)
    weights = anatomy.read(save(tmp_path, model, extra={"average": average}))
    assert weights.averaged
    np.testing.assert_array_equal(weights.arrays["norm"], 2 * np.asarray(model.norm[...]))
    assert "Averaged weights" in text(anatomy.render(weights.path, spectra=True))


def test_without_a_model_there_is_nothing_to_look_at(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"w": np.ones(3)}, {}, keep=1)
    with pytest.raises(UserError, match="holds no model"):
        anatomy.read(path)


def test_nearest_tokens_are_those_planted_near(tmp_path):
    model = new_model("untied")
    a, b, c = BYTES.encode("abc")
    embedding, head = np.array(model.embed_tokens[...]), np.array(model.lm_head[...])
    embedding[b] = 3 * embedding[a]
    head[:, c] = 0.1 * head[:, a]
    model.embed_tokens = nnx.Param(jnp.asarray(embedding))
    model.lm_head = nnx.Param(jnp.asarray(head))
    weights = anatomy.read(save(tmp_path, model, "untied"))
    by_embedding, by_head = anatomy.neighbours(weights, "a", 3)
    assert (by_embedding.token, by_embedding.matrix) == ("a", "embed_tokens")
    assert by_embedding.nearest[0] == ("b", pytest.approx(1.0))
    assert (by_head.matrix, by_head.nearest[0]) == ("lm_head", ("c", pytest.approx(1.0)))
    assert len(by_head.nearest) == 3
    page = text(anatomy.render(weights.path, nearest="a"))
    assert "Nearest to 'a'" in page
    assert page.split()[page.split().index("cosine") :][:3] == ["cosine", "lm_head", "cosine"]


def test_a_tied_model_has_one_list(tmp_path):
    assert len(anatomy.neighbours(anatomy.read(save(tmp_path, new_model())), "a")) == 1


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("xy", ["not one token but 2", "split into 'x' 'y'"]),
        ("fox", ["split into", "' fox', with a space before it, is one"]),
        (" fox fox", ["not one token but 2", "split into ' fox' ' fox'"]),
        ("", ["not one token but 0", "give a text"]),
    ],
)
def test_a_text_that_is_not_one_token_is_told_how_it_is_split(word, told, tmp_path):
    weights = anatomy.read(save(tmp_path, new_model(vocab=WORDS.vocab_size), tokenizer=WORDS))
    assert anatomy.neighbours(weights, " fox")[0].token == " fox"
    with pytest.raises(UserError) as error:
        anatomy.neighbours(weights, word)
    assert all(part in str(error.value) for part in ["--nearest", *told]), error.value


def test_nearest_tokens_need_a_tokenizer(tmp_path):
    weights = anatomy.read(save(tmp_path, new_model(), tokenizer=None))
    with pytest.raises(UserError, match="no tokenizer"):
        anatomy.neighbours(weights, "a")
    assert anatomy.sample_neighbours(weights) == []


def test_the_sample_is_words_and_else_letters():
    words = WORDS.tokens(anatomy.sample_tokens(WORDS, 2))
    assert {"the", "fox", "and"} >= {word.strip() for word in words} and len(set(words)) == 2
    letters = anatomy.sample_tokens(BYTES, 12)
    assert all(piece.isalnum() for piece in BYTES.tokens(letters))
    assert len(set(letters)) == 12 and letters == sorted(letters)


def test_the_sample_has_a_list_for_each_token(tmp_path):
    weights = anatomy.read(save(tmp_path, new_model()))
    found = anatomy.sample_neighbours(weights, 5)
    assert [n.token for n in found] == BYTES.tokens(anatomy.sample_tokens(BYTES, 5))
    assert {len(n.nearest) for n in found} == {anatomy.NEIGHBOURS}


def padded(rows: list[list[int]]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows], np.int32)


@kinds
def test_units_see_what_the_whole_model_gives_them(kind, monkeypatch):
    """The reference is what the forward pass of the whole model hands to its own activation."""
    model, seen = new_model(kind), []
    tokens = padded([[1, *BYTES.encode(text)] for text in TEXTS])
    real = tokens != 0
    found = list(anatomy.mlp_inputs(model, tokens, real))
    monkeypatch.setattr(
        "minilm.model.swiglu",
        lambda gate, up: seen.append((np.asarray(gate), np.asarray(up))) or jax.nn.silu(gate) * up,
    )
    hidden_states(model, jnp.asarray(tokens), jnp.asarray(real.astype(np.int32)))
    assert len(found) == len(seen) == LAYERS
    for layer, x, (gate, up) in zip(model.layers, found, seen, strict=True):
        kept = real.reshape(-1)
        for kernel, expected in ((layer.mlp.gate_proj, gate), (layer.mlp.up_proj, up)):
            np.testing.assert_allclose(x @ np.asarray(kernel[...]), expected[kept], atol=1e-4)


def test_padding_does_not_touch_what_units_see():
    model, rows = new_model(), [[1, *BYTES.encode(text)] for text in TEXTS]
    tokens = padded(rows)
    together = list(anatomy.mlp_inputs(model, tokens, tokens != 0))
    alone = [
        list(anatomy.mlp_inputs(model, np.array([row], np.int32), np.ones((1, len(row)), bool)))
        for row in rows
    ]
    for number, x in enumerate(together):
        np.testing.assert_allclose(x, np.concatenate([a[number] for a in alone]), atol=1e-5)


def mute(model: Transformer, layer: int, unit: int) -> Transformer:
    """One unit adds nothing, whatever it reads."""
    mlp = model.layers[layer].mlp
    mlp.down_proj = nnx.Param(mlp.down_proj[...].at[unit].set(0.0))
    return model


@kinds
def test_a_unit_without_output_is_dead_on_held_out_text(kind, tmp_path):
    stage = tmp_path / KINDS[kind][2]
    path = save(stage / "checkpoints", mute(new_model(kind), 1, 7), kind)
    (tmp_path / "pretrain").mkdir(exist_ok=True)
    write_jsonl(tmp_path / "pretrain" / "held_out.jsonl", [{"text": t} for t in TEXTS])
    units = anatomy.hidden_units(anatomy.read(path))
    assert units.source == anatomy.HELD_OUT
    assert units.positions == sum(1 + len(t) for t in TEXTS)
    assert [len(layer) for layer in units.layers] == [24] * LAYERS
    assert [np.flatnonzero(spectra.dead(layer)).tolist() for layer in units.layers] == [[], [7], []]
    assert np.mean([layer.mean() for layer in units.layers]) > 0.7


def test_a_member_of_an_ensemble_finds_the_runs_text(tmp_path):
    path = save(tmp_path / "reward" / "member_1" / "checkpoints", new_model("reward"), "reward")
    (tmp_path / "pretrain").mkdir()
    write_jsonl(tmp_path / "pretrain" / "held_out.jsonl", [{"text": "x" * 999}])
    units = anatomy.hidden_units(anatomy.read(path))
    assert (units.source, units.positions) == (anatomy.HELD_OUT, anatomy.LENGTH)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_alone_a_language_model_writes_its_own_text(kind, tmp_path):
    path = save(tmp_path, mute(new_model(kind), 0, 3), kind, tokenizer=None)
    units = anatomy.hidden_units(anatomy.read(path))
    assert units.source == anatomy.SAMPLES
    assert anatomy.TEXTS <= units.positions <= anatomy.TEXTS * anatomy.LENGTH
    assert spectra.dead(units.layers[0]).tolist() == [i == 3 for i in range(24)]


def test_alone_a_reward_model_is_judged_by_its_weights_and_says_so(tmp_path):
    path = save(tmp_path, mute(new_model("reward"), 2, 0), "reward")
    units = anatomy.hidden_units(anatomy.read(path))
    assert units.source == anatomy.DIRECTIONS
    assert spectra.dead(units.layers[2]).tolist() == [True, *[False] * 23]
    page = " ".join(text(anatomy.render(path, dead_units=True)).split())
    assert "4,096 random directions (no text to be had: weights alone)" in page
    assert " 2 24 1 0 " in page


def test_an_untrained_model_uses_no_unit(tmp_path):
    config = new_model().config
    path = save(tmp_path, Transformer(config, BYTES.vocab_size, rngs=nnx.Rngs(0)))
    units = anatomy.hidden_units(anatomy.read(path))
    assert all(spectra.dead(layer).all() for layer in units.layers)


def test_a_checkpoint_that_does_not_say_its_model_is_a_users_error(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"norm": np.ones(2)}}, {}, keep=1)
    with pytest.raises(UserError, match="does not say what model"):
        anatomy.hidden_units(anatomy.read(path))


def test_what_is_asked_for_is_shown_and_fits_a_terminal(tmp_path):
    path = save(tmp_path, new_model())
    page = text(anatomy.render(path, spectra=True, dead_units=True))
    assert (
        "Nearest" not in page and "Hidden units on" in page and "…" not in page.replace("4 … 4", "")
    )
    embed = np.asarray(new_model().embed_tokens[...], np.float64)
    (line,) = [x.split() for x in page.splitlines() if x.split()[:1] == ["embed_tokens"]]
    assert line[:3] == ["embed_tokens", "258x16", f"{np.linalg.norm(embed, 2):.3g}"]
    assert page.count("gate_proj") == LAYERS


def test_what_is_not_finite_is_shown_as_such(tmp_path):
    model = new_model()
    mlp = model.layers[1].mlp
    mlp.gate_proj = nnx.Param(mlp.gate_proj[...].at[0, 0].set(jnp.nan))
    page = text(anatomy.render(save(tmp_path, model), spectra=True, dead_units=True))
    assert "16x24" in page and "nan" in page and "not finite" in page
