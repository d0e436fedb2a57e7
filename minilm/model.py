"""The transformer: a Qwen3-type decoder, its language-model and scalar heads, its KV cache."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from minilm.attention import attend, attend_cache
from minilm.config import ModelConfig
from minilm.errors import UserError

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

    `lm_head` is None where embeddings are tied, `score` [D] (reward or value) without a scalar
    head. `compute_dtype` is that of matrix products; reductions are float32 whatever it is.
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
        head = None if config.tie_embeddings else jnp.zeros((d, vocab_size))
        self.lm_head = None if head is None else nnx.Param(head, axes=("embed", "vocab"))
        self.score = nnx.Param(jnp.zeros(d), axes=("embed",)) if scalar_head else None


EMBED_STD = 0.02  # GPT-2's initialisation, Radford et al. (2019)


def lowest_layers(model: Transformer, count: int) -> Transformer:
    """The same model without what lies above its first `count` layers.

    Raises:
      UserError: it has no such number of layers.
    """
    have = model.config.num_layers
    if not 1 <= count <= have:
        problem = "the pretrained model has fewer layers"
        where = "reward.num_layers"
        raise UserError(problem, where=where, value=count, allowed=f"1 to {have}")
    model = nnx.merge(*nnx.split(model))  # the caller's stays as it is
    model.layers = nnx.List(list(model.layers)[:count])
    model.config = model.config.model_copy(update={"num_layers": count})
    return model


class Cache(NamedTuple):
    """Keys and values of the tokens so far, one array a layer.

    A token's are rows of H numbers: with H and S exchanged, writing a key would touch H lines of
    memory and take twice as long (docs/log.md).
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]


def hidden_states(
    model: Transformer, tokens: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Final normalised hidden states, in the compute dtype.

    A token attends to earlier tokens of its own segment; padding is a segment of its own. Rotary
    positions are relative, so they need no reset.
    """
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal[None] & (segments[:, :, None] == segments[:, None, :])
    return _run(model, tokens, _rotary(jnp.arange(length), model.config), mask)[0]


def logits(model: Transformer, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Next-token logits, float32."""
    kernel = model.embed_tokens[...].T if model.lm_head is None else model.lm_head[...]
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


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
    """Reads left-padded prompts (`valid` is False at padding); the cache has S = `capacity`.

    Returns the last position's hidden state and the cache.
    """
    length = tokens.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
    hidden, keys, values = _run(model, tokens, _rotary(jnp.arange(length), model.config), mask)
    room = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
    keys, values = (tuple(jnp.pad(x.swapaxes(1, 2), room) for x in rows) for rows in (keys, values))
    return hidden[:, -1], Cache(keys, values)


def decode(
    model: Transformer,
    token: Int[Array, "B"],
    index: Int[Array, ""],
    valid: Bool[Array, "B S"],
    cache: Cache,
) -> tuple[Float[Array, "B D"], Cache]:
    """One more token at position `index` of every row, whose `valid` already includes it."""
    mask = valid[:, None, :]
    # From a table, since a fused loop takes the sine of one angle anew for each row and head.
    table = _rotary(jnp.arange(valid.shape[1]), model.config)
    row = tuple(jax.lax.dynamic_slice_in_dim(angles, index, 1) for angles in table)
    hidden, keys, values = _run(model, token[:, None], row, mask, cache, index)
    return hidden[:, 0], Cache(keys, values)


def cast(model: Transformer) -> Transformer:
    """The same model with its matrices in the compute dtype, so that a loop converts them once."""
    dtype = jnp.dtype(model.compute_dtype)
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, model)


def _run(model: Transformer, tokens, rotary, mask, cache: Cache | None = None, index: Any = 0):
    """Hidden states; each layer's keys and values, of the tokens or of the cache with them.

    Residuals are [R, D] with R = BT: for products of three dimensions XLA's CPU backend transposes
    in the backward pass.
    """
    config, shape = model.config, tokens.shape
    x = model.embed_tokens[...].astype(model.compute_dtype)[tokens.reshape(-1)]

    def whole(x, layer: Block):
        q, k, v = _project(layer, x, shape, rotary, config)
        return _feed(layer, x, attend(q, k, v, mask, config.attention)), (k, v)

    def one(x, layer: Block, keys, values):
        q, k, v = _project(layer, x, shape, rotary, config)
        write = jax.lax.dynamic_update_slice_in_dim
        k = write(keys, k.swapaxes(1, 2), index, axis=2)
        v = write(values, v.swapaxes(1, 2), index, axis=2)
        return _feed(layer, x, attend_cache(q, k, v, mask)), (k, v)

    if cache is not None:
        kept = []
        for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
            x, both = one(x, layer, keys, values)
            kept.append(both)
    else:
        block = jax.checkpoint(whole) if config.remat else whole
        x, kept = _through(block, x, list(model.layers), config.scan_layers)
    keys, values = zip(*kept, strict=True)
    return rms_norm(x, model.norm[...]).reshape(*shape, -1), keys, values


def _through(block, x, layers: Sequence[Block], scan: bool):
    """The residuals after all layers, and what each gives beside them."""
    if scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        x, kept = jax.lax.scan(block, x, stacked)
        return x, [jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i in range(len(layers))]
    kept = []
    for layer in layers:
        x, given = block(x, layer)
        kept.append(given)
    return x, kept


def _feed(layer: Block, x: Float[Array, "R D"], attended: Float[Array, "B T NH"]):
    """Residuals after a layer, given what its attention read."""
    x = x + attended.reshape(len(x), -1) @ layer.self_attn.o_proj[...].astype(x.dtype)
    return x + _mlp(layer, x)


def _project(layer: Block, x: Float[Array, "R D"], shape, rotary, config: ModelConfig):
    """Queries [B, T, N, H], keys and values [B, T, K, H], normalised and turned."""
    attn, n, kv = layer.self_attn, config.num_heads, config.num_kv_heads
    # One product for Q, K and V: three small ones cost a fifth of the step more on CPU.
    kernels = (attn.q_proj, attn.k_proj, attn.v_proj)
    kernel = jnp.concatenate([kernel[...].astype(x.dtype) for kernel in kernels], axis=1)
    qkv = rms_norm(x, layer.input_layernorm[...]) @ kernel
    qkv = qkv.reshape(*shape, n + 2 * kv, config.head_dim)
    q, k, v = jnp.split(qkv, [n, n + kv], axis=2)
    q = _rotate(rms_norm(q, attn.q_norm[...]), rotary)
    return q, _rotate(rms_norm(k, attn.k_norm[...]), rotary), v


def _mlp(layer: Block, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    mlp = layer.mlp
    kernels = (mlp.gate_proj, mlp.up_proj)
    kernel = jnp.concatenate([kernel[...].astype(x.dtype) for kernel in kernels], axis=1)
    gate, up = jnp.split(rms_norm(x, layer.post_attention_layernorm[...]) @ kernel, 2, axis=-1)
    return swiglu(gate, up) @ mlp.down_proj[...].astype(x.dtype)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]):
    """silu(gate) · up, Shazeer (2020), arXiv:2002.05202, eq. 5.

    Its gradient by hand keeps the sigmoid; by JAX, XLA's CPU backend computes it anew in each of
    the fused loops, and the layer takes up to 1.6 times as long (docs/log.md).
    """
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate, up):
    share = jax.nn.sigmoid(gate)
    return gate * share * up, (gate, up, share)


def _swiglu_backward(kept, d_out):
    gate, up, share = kept
    return d_out * up * share * (1 + gate * (1 - share)), d_out * gate * share


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"]) -> Float[Array, "*batch D"]:
    """x / rms(x) · scale, reduced in float32, in x's dtype. Zhang and Sennrich (2019), eq. 4.

    Its gradient by hand, so that both of its sums can be products: see `_weighted_sum`.
    """
    return _rms_norm_forward(x, scale)[0]


def _rms_norm_forward(x, scale):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(_row_mean(wide * wide) + NORM_EPS)
    scaled = wide * inverse * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    return scaled.astype(x.dtype), (x, scale, inverse)


def _rms_norm_backward(kept, d_out):
    x, scale, inverse = kept
    wide, d_out = x.astype(jnp.float32) * inverse, d_out.astype(jnp.float32)
    rows = (d_out * wide).reshape(-1, x.shape[-1])
    d_scale = _weighted_sum("RD,R->D", rows, jnp.ones(len(rows)))
    d_wide = d_out * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
    d_x = inverse * (d_wide - wide * _row_mean(d_wide * wide))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


def _row_mean(x: Float[Array, "*batch D"]) -> Float[Array, "*batch 1"]:
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    return _weighted_sum("RD,D->R", rows, jnp.full(width, 1 / width)).reshape(*x.shape[:-1], 1)


def _weighted_sum(which: str, rows: Float[Array, "R D"], weights: Float[Array, "n"]) -> Array:
    """Of rows or of columns, as a product in float32: XLA's CPU backend takes so long for sums
    along an axis that norms were a third of a training step."""
    return jnp.einsum(which, rows, weights, precision="highest")


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


def _kernel(rngs: nnx.Rngs, fan_in: int, fan_out: int, axes: Sequence[str]) -> nnx.Param:
    """Normal with variance 1/fan_in: unit variance in, unit variance out."""
    kernel = jax.random.normal(rngs.params(), (fan_in, fan_out)) * fan_in**-0.5
    return nnx.Param(kernel, axes=tuple(axes))


def parameter_count(model: Transformer) -> int:
    """Parameters, tied ones counted once; works on abstract models too."""
    return sum(x.size for x in jax.tree.leaves(model))


def flops_per_token(config: ModelConfig, vocab_size: int, length: int) -> int:
    """Operations of a training step per token: 6 a matrix parameter, and attention's 12·L·N·H·T.

    Chowdhery et al. (2022), PaLM, App. B.
    """
    d, h = config.embed_dim, config.head_dim
    attention = d * h * (2 * config.num_heads + 2 * config.num_kv_heads)
    matrices = config.num_layers * (attention + 3 * d * config.mlp_dim) + d * vocab_size
    return 6 * matrices + 12 * config.num_layers * config.num_heads * h * length
