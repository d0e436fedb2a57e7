"""The transformer: a Qwen3-type decoder with a language-model, value or scalar head, and a KV cache."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minilm.config import ModelConfig

NORM_EPS = 1e-6  # Qwen3's rms_norm_eps


class Attention(nnx.Module):
    """Grouped-query attention with QK-norm and rotary positions; kernels are [in, out]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, h = config.embed_dim, config.head_dim
        self.q_proj = _kernel(rngs, d, config.num_heads * h, ("embed", "heads"))
        self.k_proj = _kernel(rngs, d, config.num_kv_heads * h, ("embed", "kv_heads"))
        self.v_proj = _kernel(rngs, d, config.num_kv_heads * h, ("embed", "kv_heads"))
        # Projections back into the residual stream start at zero: each block is the identity.
        self.o_proj = nnx.Param(jnp.zeros((config.num_heads * h, d)), axes=("heads", "embed"))
        self.q_norm = nnx.Param(jnp.ones(h), axes=("head_dim",))
        self.k_norm = nnx.Param(jnp.ones(h), axes=("head_dim",))


class MLP(nnx.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f = config.embed_dim, config.mlp_dim
        self.gate_proj = _kernel(rngs, d, f, ("embed", "mlp"))
        self.up_proj = _kernel(rngs, d, f, ("embed", "mlp"))
        self.down_proj = nnx.Param(jnp.zeros((f, d)), axes=("mlp", "embed"))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = nnx.Param(jnp.ones(config.embed_dim), axes=("embed",))
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = nnx.Param(jnp.ones(config.embed_dim), axes=("embed",))
        self.mlp = MLP(config, rngs)


class Transformer(nnx.Module):
    """Decoder whose parameters are float32 and named and laid out as in Qwen3.

    Attributes:
      embed_tokens: [V, D]; also the output kernel when embeddings are tied.
      lm_head: [D, V], or None when tied.
      score: [D], the scalar head (reward or value), zero at first; None without one.
      compute_dtype: dtype of matrix products; reductions are float32 whatever it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        compute_dtype: str = "float32",
        scalar_head: bool = False,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.compute_dtype = compute_dtype
        d = config.embed_dim
        embedding = jax.random.normal(rngs.params(), (vocab_size, d)) * EMBED_STD
        self.embed_tokens = nnx.Param(embedding, axes=("vocab", "embed"))
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.Param(jnp.ones(d), axes=("embed",))
        self.lm_head = (
            None
            if config.tie_embeddings
            else nnx.Param(jnp.zeros((d, vocab_size)), axes=("embed", "vocab"))
        )
        self.score = nnx.Param(jnp.zeros(d), axes=("embed",)) if scalar_head else None


EMBED_STD = 0.02  # GPT-2's initialisation, Radford et al. (2019)


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer; a jit argument and result."""

    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]


def hidden_states(
    model: Transformer, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Final normalised hidden states, in the compute dtype.

    Args:
      segments: a token attends to earlier tokens of the same segment; padding has a segment of its
        own, so it changes nothing else. Rotary positions are relative: no reset is needed.
    """
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal[None] & (segments[:, :, None] == segments[:, None, :])
    return _run(model, tokens, jnp.arange(length), mask, None, 0)[0]


def logits(model: Transformer, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Next-token logits, float32."""
    if model.lm_head is None:
        return _dot(hidden, model.embed_tokens[...].T, jnp.float32)
    return _dot(hidden, model.lm_head[...], jnp.float32)


def scalar(model: Transformer, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Output of the scalar head, float32."""
    if model.score is None:
        raise ValueError("this model has no scalar head")
    return hidden.astype(jnp.float32) @ model.score[...].astype(jnp.float32)


def sequence_score(
    model: Transformer,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    last: Int[Array, "B"],
) -> Float[Array, "B"]:
    """The scalar head read at position `last` of each row: a completion's end-of-text token."""
    hidden = hidden_states(model, tokens, segments)
    return scalar(model, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])


def prefill(
    model: Transformer, tokens: Int[Array, "B P"], valid: Bool[Array, "B P"], capacity: int
) -> tuple[Float[Array, "B D"], Cache]:
    """Reads left-padded prompts; returns the last position's hidden state and the cache.

    Args:
      valid: False at padding, which nothing attends to.
      capacity: S, the positions the cache has room for.
    """
    batch, length = tokens.shape
    empty = jnp.zeros(
        (batch, capacity, model.config.num_kv_heads, model.config.head_dim), model.compute_dtype
    )
    cache = Cache((empty,) * model.config.num_layers, (empty,) * model.config.num_layers)
    mask = jnp.tril(jnp.ones((length, capacity), bool))[None]
    mask &= jnp.pad(valid, ((0, 0), (0, capacity - length)))[:, None, :]
    hidden, cache = _run(model, tokens, jnp.arange(length), mask, cache, 0)
    return hidden[:, -1], cache


def decode(
    model: Transformer,
    token: Int[Array, "B"],
    index: Int[Array, ""],
    valid: Bool[Array, "B S"],
    cache: Cache,
) -> tuple[Float[Array, "B D"], Cache]:
    """One more token at position `index` of every row, whose `valid` already includes it."""
    hidden, cache = _run(model, token[:, None], index[None], valid[:, None, :], cache, index)
    return hidden[:, 0], cache


def cast(model: Transformer) -> Transformer:
    """The same model with its matrices in the compute dtype, so that a loop converts them once."""
    dtype = jnp.dtype(model.compute_dtype)
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, model)


def _run(
    model: Transformer,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "T"],
    mask: Bool[Array, "#B #T S"],
    cache: Cache | None,
    start: int | Int[Array, ""],
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """All layers: over the tokens alone, or over the cache with the tokens written at `start`."""
    dtype = jnp.dtype(model.compute_dtype)
    x = model.embed_tokens[...].astype(dtype)[tokens]
    rotary = _rotary(positions, model.config)
    keys, values = [], []
    for i, layer in enumerate(model.layers):
        past = None if cache is None else (cache.keys[i], cache.values[i])
        out, (k, v) = _attend(layer, x, rotary, mask, past, start, model.config)
        x = x + out
        x = x + _mlp(layer, x)
        keys.append(k)
        values.append(v)
    hidden = rms_norm(x, model.norm[...])
    return hidden, None if cache is None else Cache(tuple(keys), tuple(values))


def _attend(
    layer: Block,
    x: Float[Array, "B T D"],
    rotary: tuple[Array, Array],
    mask: Bool[Array, "#B #T S"],
    past: tuple[Array, Array] | None,
    start: int | Int[Array, ""],
    config: ModelConfig,
) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
    attn, (batch, length, _) = layer.self_attn, x.shape
    n, kv, h = config.num_heads, config.num_kv_heads, config.head_dim
    # One product for Q, K and V: three small ones cost a fifth of the step more on CPU.
    kernel = jnp.concatenate(
        [
            attn.q_proj[...].astype(x.dtype),
            attn.k_proj[...].astype(x.dtype),
            attn.v_proj[...].astype(x.dtype),
        ],
        axis=1,
    )
    qkv = rms_norm(x, layer.input_layernorm[...]) @ kernel
    q, k, v = jnp.split(qkv.reshape(batch, length, n + 2 * kv, h), [n, n + kv], axis=2)
    q = _rotate(rms_norm(q, attn.q_norm[...]), rotary)
    k = _rotate(rms_norm(k, attn.k_norm[...]), rotary)
    if past is not None:
        k = jax.lax.dynamic_update_slice_in_dim(past[0], k, start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(past[1], v, start, axis=1)
    q = q.reshape(batch, length, kv, n // kv, h)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * h**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(batch, length, n * h)
    return out @ attn.o_proj[...].astype(x.dtype), (k, v)


def _mlp(layer: Block, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    mlp = layer.mlp
    kernel = jnp.concatenate(
        [mlp.gate_proj[...].astype(x.dtype), mlp.up_proj[...].astype(x.dtype)], axis=1
    )
    gate, up = jnp.split(rms_norm(x, layer.post_attention_layernorm[...]) @ kernel, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ mlp.down_proj[...].astype(x.dtype)


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"]) -> Float[Array, "*batch D"]:
    """x / rms(x) · scale, reduced in float32, in x's dtype. Zhang and Sennrich (2019), eq. 4."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)
    scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return (wide * inverse * scale).astype(x.dtype)


def _rotary(positions: Int[Array, "T"], config: ModelConfig) -> tuple[Array, Array]:
    """Cosine and sine [T, H/2] of the rotary angles, Su et al. (2021), eq. 34."""
    half = config.head_dim // 2
    frequencies = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Float[Array, "B T N H"], rotary: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    cos, sin = (jnp.expand_dims(r, (0, 2)) for r in rotary)  # [1, T, 1, H/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _dot(x: Array, kernel: Array, out_dtype) -> Array:
    return jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)


def _kernel(rngs: nnx.Rngs, fan_in: int, fan_out: int, axes: Sequence[str]) -> nnx.Param:
    """Normal with variance 1/fan_in: unit variance in, unit variance out."""
    return nnx.Param(
        jax.random.normal(rngs.params(), (fan_in, fan_out)) * fan_in**-0.5, axes=tuple(axes)
    )


def parameter_count(model: Transformer) -> int:
    """Parameters, tied ones counted once; works on abstract models too."""
    return sum(x.size for x in jax.tree.leaves(model))


def flops_per_token(config: ModelConfig, vocab_size: int, length: int) -> int:
    """Floating-point operations of a training step per token, forward and backward.

    6 per matrix parameter, and 12·L·N·H·T for attention: Chowdhery et al. (2022), PaLM, App. B.
    """
    d, h = config.embed_dim, config.head_dim
    attention = d * h * (2 * config.num_heads + 2 * config.num_kv_heads)
    matrices = config.num_layers * (attention + 3 * d * config.mlp_dim) + d * vocab_size
    return 6 * matrices + 12 * config.num_layers * config.num_heads * h * length
