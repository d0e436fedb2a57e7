"""The decoder against a plain float64 implementation, and what must not change its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm import model as m
from minilm.config import ModelConfig

VOCAB = 37
CONFIG = ModelConfig(
    num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    rope_base=100.0,
)  # fmt: skip
UNTIED = CONFIG.model_copy(update={"tie_embeddings": False})


def random_model(
    config: ModelConfig = CONFIG, *, compute_dtype: str = "float32", scalar_head: bool = False
) -> m.Transformer:
    """Every parameter drawn anew: the zero projections at the start would hide whole layers."""
    model = m.Transformer(
        config, VOCAB, compute_dtype=compute_dtype, scalar_head=scalar_head, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(1)

    def draw(x):
        if x.ndim == 1:
            return jnp.asarray(rng.normal(1.0, 0.3, x.shape), jnp.float32)
        return jnp.asarray(rng.normal(0.0, 0.4, x.shape), jnp.float32)

    return jax.tree.map(draw, model)


def decoder_float64(model: m.Transformer, tokens: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Logits of one row, written from the Qwen3 description: one token and one head at a time."""

    def array(param) -> np.ndarray:
        return np.asarray(param[...], np.float64)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + 1e-6) * scale

    def turn(x, position):
        # Channel i and channel i + H/2 are a complex number, turned by position · base^(−2i/H).
        half = len(x) // 2
        angle = position * config.rope_base ** (-2 * np.arange(half) / len(x))
        turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag])

    h, group = config.head_dim, config.num_heads // config.num_kv_heads
    stream = [array(model.embed_tokens)[t] for t in tokens]
    for layer in model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        normed = [norm(x, array(layer.input_layernorm)) for x in stream]
        q, k, v = (
            [(x @ array(w)).reshape(-1, h) for x in normed]
            for w in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        for t in range(len(stream)):
            heads = []
            for n in range(config.num_heads):
                query = turn(norm(q[t][n], array(attn.q_norm)), t)
                keys = [turn(norm(k[s][n // group], array(attn.k_norm)), s) for s in range(t + 1)]
                weights = np.exp([query @ key / np.sqrt(h) for key in keys])
                weights /= weights.sum()
                heads.append(sum(w * v[s][n // group] for s, w in enumerate(weights)))
            stream[t] = stream[t] + np.concatenate(heads) @ array(attn.o_proj)
        for t, x in enumerate(stream):
            y = norm(x, array(layer.post_attention_layernorm))
            gate = y @ array(mlp.gate_proj)
            gated = gate / (1 + np.exp(-gate)) * (y @ array(mlp.up_proj))
            stream[t] = x + gated @ array(mlp.down_proj)
    final = np.stack([norm(x, array(model.norm)) for x in stream])
    return final @ (array(model.embed_tokens).T if config.tie_embeddings else array(model.lm_head))


@jax.jit
def logits_of(model, tokens, segments):
    return m.logits(model, m.hidden_states(model, tokens, segments))


def tokens_of(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(2, VOCAB, shape), jnp.int32)


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_logits_equal_a_float64_implementation(config):
    model, tokens = random_model(config), tokens_of(2, 9)
    found = logits_of(model, tokens, jnp.ones_like(tokens))
    for row, expected in zip(found, tokens, strict=True):
        reference = decoder_float64(model, np.asarray(expected), config)
        np.testing.assert_allclose(row, reference, rtol=2e-4, atol=2e-4)


def test_multi_query_and_full_attention_equal_a_float64_implementation():
    for kv in (1, 4):
        config = CONFIG.model_copy(update={"num_kv_heads": kv})
        model, tokens = random_model(config), tokens_of(1, 6)
        found = logits_of(model, tokens, jnp.ones_like(tokens))[0]
        reference = decoder_float64(model, np.asarray(tokens[0]), config)
        np.testing.assert_allclose(found, reference, rtol=2e-4, atol=2e-4)


def test_a_token_sees_no_later_token():
    model, tokens = random_model(), tokens_of(1, 10)
    changed = tokens.at[0, 6].set(1 + tokens[0, 6] % (VOCAB - 1))
    ones = jnp.ones_like(tokens)
    before, after = logits_of(model, tokens, ones)[0], logits_of(model, changed, ones)[0]
    np.testing.assert_array_equal(before[:6], after[:6])
    assert np.abs(before[6:] - after[6:]).max(axis=1).min() > 1e-3  # and every later one sees it


def test_segments_are_isolated():
    """Packed documents do not see each other, though both lie in one row."""
    model, first, second = random_model(), tokens_of(1, 5), tokens_of(1, 7, seed=1)
    row = jnp.concatenate([first, second], axis=1)
    segments = jnp.asarray([[1] * 5 + [2] * 7], jnp.int32)
    packed = logits_of(model, row, segments)[0]
    alone = logits_of(model, second, jnp.ones_like(second))[0]
    np.testing.assert_allclose(packed[5:], alone, atol=2e-5)
    np.testing.assert_array_equal(
        packed[5:], logits_of(model, row.at[0, :5].set(3), segments)[0, 5:]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, tokens = random_model(), tokens_of(1, 8)
    alone = logits_of(model, tokens, jnp.ones_like(tokens))[0]
    widths = ((0, 0), (5, 0) if side == "left" else (0, 5))
    padded = jnp.pad(tokens, widths)
    segments = jnp.pad(jnp.ones_like(tokens), widths)
    real = slice(5, None) if side == "left" else slice(0, 8)
    np.testing.assert_allclose(logits_of(model, padded, segments)[0, real], alone, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_score_does_not_depend_on_padding(side):
    """trl#5338: the score was read at a padding token, so the batch's longest row moved it."""
    model, tokens = random_model(scalar_head=True), tokens_of(1, 8)
    alone = m.sequence_score(model, tokens, jnp.ones_like(tokens), jnp.array([7]))
    widths = ((0, 0), (4, 0) if side == "left" else (0, 4))
    last = jnp.array([11 if side == "left" else 7])
    padded = m.sequence_score(
        model, jnp.pad(tokens, widths), jnp.pad(jnp.ones_like(tokens), widths), last
    )
    np.testing.assert_allclose(padded, alone, atol=2e-5)


def test_prefill_and_decode_equal_the_whole_forward_pass():
    model, tokens = random_model(), tokens_of(2, 9)
    tokens = tokens.at[1, :3].set(0)  # the second row's prompt is left-padded
    whole = m.hidden_states(model, tokens, (tokens != 0).astype(jnp.int32))
    valid = jnp.pad(tokens[:, :5] != 0, ((0, 0), (0, 4)))
    hidden, cache = m.prefill(model, tokens[:, :5], tokens[:, :5] != 0, 9)
    np.testing.assert_allclose(hidden, whole[:, 4], atol=2e-5)
    for index in range(5, 9):
        valid = valid.at[:, index].set(True)
        hidden, cache = m.decode(model, tokens[:, index], jnp.int32(index), valid, cache)
        np.testing.assert_allclose(hidden, whole[:, index], atol=2e-5)


def test_at_the_start_every_block_is_the_identity_and_an_untied_head_predicts_uniformly():
    model = m.Transformer(UNTIED, VOCAB, rngs=nnx.Rngs(3))
    tokens = tokens_of(1, 6)
    hidden = m.hidden_states(model, tokens, jnp.ones_like(tokens))
    embedded = model.embed_tokens[...][tokens]
    np.testing.assert_allclose(hidden, m.rms_norm(embedded, model.norm[...]), atol=1e-6)
    np.testing.assert_array_equal(m.logits(model, hidden), 0)


def test_no_reference_is_shared():
    """Tied embeddings are one attribute used twice: two references would be trained apart."""
    for config in (CONFIG, UNTIED):
        assert not nnx.find_duplicates(m.Transformer(config, VOCAB, rngs=nnx.Rngs(0)))


def test_every_parameter_names_its_axes():
    model = m.Transformer(UNTIED, VOCAB, scalar_head=True, rngs=nnx.Rngs(0))
    params = dict(nnx.to_flat_state(nnx.state(model)))
    found = {".".join(map(str, path)): p.get_metadata("axes") for path, p in params.items()}
    layer = {
        "input_layernorm": ("embed",),
        "post_attention_layernorm": ("embed",),
        "self_attn.q_proj": ("embed", "heads"),
        "self_attn.k_proj": ("embed", "kv_heads"),
        "self_attn.v_proj": ("embed", "kv_heads"),
        "self_attn.o_proj": ("heads", "embed"),
        "self_attn.q_norm": ("head_dim",),
        "self_attn.k_norm": ("head_dim",),
        "mlp.gate_proj": ("embed", "mlp"),
        "mlp.up_proj": ("embed", "mlp"),
        "mlp.down_proj": ("mlp", "embed"),
    }
    assert found == {
        "embed_tokens": ("vocab", "embed"),
        "norm": ("embed",),
        "lm_head": ("embed", "vocab"),
        "score": ("embed",),
        **{f"layers.{i}.{name}": axes for i in range(2) for name, axes in layer.items()},
    }
    assert all(len(axes) == params[p].ndim for p, axes in zip(params, found.values(), strict=True))


def test_parameter_count_by_hand():
    # Embedding, a final norm, two layers: attention, QK-norm, SwiGLU, two norms.
    attention = 16 * (4 + 2 + 2) * 8 + 4 * 8 * 16
    layer = attention + 2 * 8 + 3 * 16 * 24 + 2 * 16
    tied = VOCAB * 16 + 16 + 2 * layer
    assert m.parameter_count(m.Transformer(CONFIG, VOCAB, rngs=nnx.Rngs(0))) == tied
    untied = jax.eval_shape(lambda: m.Transformer(UNTIED, VOCAB, rngs=nnx.Rngs(0)))
    assert m.parameter_count(untied) == tied + VOCAB * 16


def test_flops_by_hand():
    matrices = 2 * (16 * (4 + 2 + 2) * 8 + 4 * 8 * 16 + 3 * 16 * 24) + 16 * VOCAB
    # A token's forward pass: 2 a weight, and 2 · 2 · N · H · T a layer for scores and values.
    forward = 2 * matrices + 2 * 4 * 4 * 8 * 10
    assert m.flops_per_token(CONFIG, VOCAB, 10) == 3 * forward


def test_bfloat16_computes_near_float32_from_float32_parameters():
    wide = random_model(UNTIED)
    narrow = random_model(UNTIED, compute_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    tokens = tokens_of(2, 12)
    ones = jnp.ones_like(tokens)
    hidden = m.hidden_states(narrow, tokens, ones)
    assert hidden.dtype == jnp.bfloat16
    exact, found = logits_of(wide, tokens, ones), logits_of(narrow, tokens, ones)
    assert found.dtype == jnp.float32
    # bfloat16 keeps 8 bits: a relative error of 2^-8 a product, a handful of products deep.
    error = np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < 0.05


def test_cast_turns_matrices_alone_to_the_compute_dtype():
    model = m.cast(random_model(compute_dtype="bfloat16", scalar_head=True))
    dtypes = {x.ndim: x.dtype for x in jax.tree.leaves(model)}
    assert dtypes == {1: jnp.float32, 2: jnp.bfloat16}


def test_a_model_without_a_scalar_head_says_so():
    with pytest.raises(ValueError, match="no scalar head"):
        m.scalar(random_model(), jnp.zeros((1, 16)))


def test_a_wholly_masked_row_stays_finite():
    """A padding row in a batch attends to nothing but itself; NaN there would poison gradients."""
    model, tokens = random_model(), jnp.zeros((1, 6), jnp.int32)
    hidden, _ = m.prefill(model, tokens, jnp.zeros((1, 6), bool), 8)
    assert np.isfinite(hidden).all()
