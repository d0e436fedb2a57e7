"""The decoder against a plain float64 implementation, and what must not change its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm import model as m
from minilm.config import ModelConfig
from minilm.errors import UserError

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
def forward(model, tokens, segments):
    hidden = m.hidden_states(model, tokens, segments)
    return hidden, m.logits(model, hidden)


def logits_of(model, tokens, segments) -> np.ndarray:
    return np.asarray(forward(model, tokens, segments)[1])


def tokens_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, VOCAB, shape).astype(np.int32)


def padded(tokens: np.ndarray, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments with padding on both sides."""
    widths = ((0, 0), (left, right))
    return np.pad(tokens, widths), np.pad(np.ones_like(tokens), widths)


# One shape for all, [2, 12], so that each kind of model compiles once.
TOKENS = tokens_of(2, 12)
ONES = np.ones_like(TOKENS)
MULTI_QUERY = CONFIG.model_copy(update={"num_kv_heads": 1})
FULL = UNTIED.model_copy(update={"num_kv_heads": 4})


@pytest.mark.parametrize(
    "config", [CONFIG, UNTIED, MULTI_QUERY, FULL],
    ids=["grouped_tied", "grouped_untied", "multi_query_tied", "full_untied"],
)  # fmt: skip
def test_logits_equal_a_float64_implementation(config):
    model = random_model(config)
    found = logits_of(model, TOKENS, ONES)
    for row, tokens in zip(found, TOKENS, strict=True):
        reference = decoder_float64(model, tokens, config)
        np.testing.assert_allclose(row, reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("config", [CONFIG, FULL], ids=["grouped_tied", "full_untied"])
def test_the_gradient_is_that_of_the_float64_implementation(config):
    """Norm, attention and SwiGLU have gradients by hand: central differences along one random
    direction for each parameter tell a wrong one by its name."""
    model, rng = random_model(config), np.random.default_rng(2)
    tokens, weights = TOKENS[0], rng.normal(size=(TOKENS.shape[1], VOCAB))

    def loss(model):
        both = forward(model, TOKENS, ONES)[1]
        return jnp.sum(both[0] * jnp.asarray(weights, jnp.float32))

    leaves, structure = jax.tree.flatten(model)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    for i, gradient in enumerate(jax.tree.leaves(jax.jit(jax.grad(loss))(model))):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [np.asarray(x, np.float64) for x in leaves]
            moved[i] = moved[i] + step * direction
            moved_model = jax.tree.unflatten(structure, moved)
            ends.append(np.sum(decoder_float64(moved_model, tokens, config) * weights))
        expected = (ends[0] - ends[1]) / 2e-5
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        error = np.sum(np.asarray(gradient) * direction) - expected
        assert abs(error) < 1e-4 * size, names[i]


def test_a_token_sees_no_later_token():
    model, changed = random_model(), TOKENS.copy()
    changed[:, 6] = 2 + (TOKENS[:, 6] - 1) % (VOCAB - 2)
    before, after = logits_of(model, TOKENS, ONES), logits_of(model, changed, ONES)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).max(axis=2).min() > 1e-3  # every later one sees it


def test_segments_are_isolated():
    """Packed documents do not see each other, though both lie in one row."""
    model = random_model()
    segments = np.where(np.arange(12) < 5, 1, 2)[None].repeat(2, 0).astype(np.int32)
    packed = logits_of(model, TOKENS, segments)
    other = TOKENS.copy()
    other[:, :5] = 3
    np.testing.assert_array_equal(packed[:, 5:], logits_of(model, other, segments)[:, 5:])
    alone = logits_of(model, *padded(TOKENS[:, 5:], 0, 5))
    np.testing.assert_allclose(packed[:, 5:], alone[:, :7], atol=3e-5)


def test_padding_changes_nothing_on_either_side():
    model, tokens = random_model(), TOKENS[:, :8]
    alone = np.stack([decoder_float64(model, row, CONFIG) for row in tokens])
    for left in (0, 1, 4):
        found = logits_of(model, *padded(tokens, left, 4 - left))[:, left : left + 8]
        np.testing.assert_allclose(found, alone, rtol=2e-4, atol=2e-4)


def test_sequence_score_does_not_depend_on_padding():
    """trl#5338: the score was read at a padding token, so the batch's longest row moved it."""
    model = random_model(scalar_head=True)
    score = jax.jit(m.sequence_score)
    tokens = TOKENS[:, :8]
    scores = [
        score(model, *padded(tokens, left, 4 - left), np.full(2, left + 7)) for left in (0, 1, 4)
    ]
    np.testing.assert_allclose(scores[1:], [scores[0]] * 2, atol=3e-5)
    # and it is the head's product with the hidden state at the last real token
    hidden = np.asarray(forward(model, *padded(tokens, 0, 4))[0], np.float64)[:, 7]
    np.testing.assert_allclose(scores[0], hidden @ np.asarray(model.score[...]), rtol=1e-5)


def test_prefill_and_decode_equal_the_whole_forward_pass():
    model, tokens = random_model(), TOKENS.copy()
    tokens[1, :3] = 0  # the second row's prompt is left-padded
    whole = forward(model, tokens, (tokens != 0).astype(np.int32))[0]
    prompt = tokens[:, :5]
    hidden, cache = jax.jit(m.prefill, static_argnums=3)(model, prompt, prompt != 0, 12)
    np.testing.assert_allclose(hidden, whole[:, 4], atol=3e-5)
    decode = jax.jit(m.decode)
    for index in range(5, 12):
        valid = (tokens != 0) & (np.arange(12) <= index)
        hidden, cache = decode(model, tokens[:, index], jnp.int32(index), valid, cache)
        np.testing.assert_allclose(hidden, whole[:, index], atol=3e-5)


def test_at_the_start_every_block_is_the_identity_and_an_untied_head_predicts_uniformly():
    model = m.Transformer(UNTIED, VOCAB, rngs=nnx.Rngs(3))
    hidden, scores = forward(model, TOKENS, ONES)
    embedded = np.asarray(model.embed_tokens[...])[TOKENS]
    rms = np.sqrt(np.mean(embedded**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(hidden, embedded / rms, atol=1e-5)
    np.testing.assert_array_equal(scores, 0)


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
    wide = random_model()
    narrow = random_model(compute_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}
    exact = logits_of(wide, TOKENS, ONES)
    hidden, found = forward(narrow, TOKENS, ONES)
    assert (hidden.dtype, found.dtype) == (jnp.bfloat16, jnp.float32)
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


def test_a_row_of_padding_alone_stays_finite():
    """It attends to nothing at all; a NaN there would reach every gradient."""
    model = random_model()
    empty = np.zeros((2, 5), np.int32)
    hidden, _ = jax.jit(m.prefill, static_argnums=3)(model, empty, empty > 0, 12)
    assert np.isfinite(hidden).all()


def test_the_lowest_layers_are_the_models_own_and_the_model_stays():
    model = random_model(scalar_head=True)
    low = m.lowest_layers(model, 1)
    assert (low.config.num_layers, len(low.layers)) == (1, 1)
    assert (model.config.num_layers, len(model.layers)) == (2, 2)
    ours, theirs = (x.layers[0].mlp.up_proj[...] for x in (low, model))
    np.testing.assert_array_equal(ours, theirs)
    assert low.score is not None
    with pytest.raises(UserError, match="fewer layers"):
        m.lowest_layers(model, 3)


BOTH = {"remat": True, "scan_layers": True}


@pytest.mark.parametrize(
    "how", [{"remat": True}, {"scan_layers": True}, BOTH, {"attention": "xla"}]
)
def test_how_a_model_is_computed_changes_neither_losses_nor_gradients(how):
    model, other = random_model(), random_model(CONFIG.model_copy(update=how))
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 9)), jnp.int32)
    segments = jnp.asarray([[0] * 9, [0] * 4 + [1] * 5], jnp.int32)
    weights = jnp.asarray(rng.normal(size=(2, 9, VOCAB)), jnp.float32)

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        return jnp.sum(m.logits(model, m.hidden_states(model, tokens, segments)) * weights)

    (plain, d_plain), (found, d_found) = loss(model), loss(other)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(d_plain), jax.tree.leaves(d_found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_from_scanned_layers_is_that_of_layers_in_turn(scan):
    model = random_model(CONFIG.model_copy(update={"scan_layers": scan}))
    plain = random_model()
    tokens = jnp.asarray(np.random.default_rng(6).integers(1, VOCAB, (2, 4)), jnp.int32)
    found, told = (m.prefill(x, tokens, tokens > 0, 7) for x in (model, plain))
    for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
