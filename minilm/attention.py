"""Attention, written so that each backend is fast: by hand for CPUs, cuDNN's for NVIDIA GPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minilm.choices import choose
from minilm.errors import UserError


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "M T S"],
    kind: str = "auto",
) -> Float[Array, "B T NH"]:
    """Softmax attention, a key head serving N / K query heads; softmax in float32.

    Args:
      mask: True where a query sees a key; M is B, or 1 for all rows alike.
      kind: a row of `KINDS`, or "auto": cuDNN's where a GPU can do it, else "plain".

    Raises:
      UserError: no such kind, or not on this machine.
    """
    if kind == "auto":  # with a mask cuDNN's gradient takes even lengths alone
        kind = "plain" if q.shape[1] % 2 or k.shape[1] % 2 else chosen(str(q.dtype), q.shape[-1])
    elif kind == "cudnn" and jax.default_backend() != "gpu":
        problem, where = "cuDNN needs an NVIDIA GPU", "model.attention"
        raise UserError(problem, where=where, value=kind, allowed="auto, plain, xla")
    return choose(KINDS, kind, "model.attention")(q, k, v, mask)


@functools.cache
def chosen(dtype: str, head_dim: int) -> str:
    """What "auto" is on this machine; cuDNN is asked by compiling a small case of it."""
    if jax.default_backend() != "gpu":
        return "plain"
    heads = jax.ShapeDtypeStruct((1, 64, 1, head_dim), dtype)
    mask = jax.ShapeDtypeStruct((1, 64, 64), bool)

    def loss(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return jnp.sum(_cudnn(q, k, v, mask).astype(jnp.float32))

    try:
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(heads, heads, heads, mask).compile()
    except (ValueError, RuntimeError):  # float32, an old card, no cuDNN
        return "plain"
    return "cudnn"


def _plain(q: Array, k: Array, v: Array, mask: Array) -> Array:
    batch, length, n, h = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, h).transpose(0, 2, 3, 1, 4)
    out = _attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, n * h)


@jax.custom_vjp
def _attention(q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], v: Any, mask: Any):
    """With its gradient by hand, which keeps the layouts: differentiated by JAX, XLA's CPU backend
    transposes what each product reads, and the oneDNN path takes 1.3 times as long."""
    return _attention_forward(q, k, v, mask)[0]


def _attention_forward(q, k, v, mask):
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32)
    weights = softmax(scores, mask[:, None, None], q.shape[-1]).astype(v.dtype)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
    return out, (q, k, v, weights, out)


def _attention_backward(kept, d_out):
    """Dao et al. (2022), arXiv:2205.14135, App. B.2: out · d_out is Σ weights · d_weights."""
    q, k, v, weights, out = kept
    d_v = jnp.einsum("BKGTS,BKGTH->BKSH", weights, d_out)
    d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", d_out, v, preferred_element_type=jnp.float32)
    wide = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    d_scores = weights.astype(jnp.float32) * (d_weights - jnp.sum(wide, axis=-1, keepdims=True))
    d_scores = (d_scores * q.shape[-1] ** -0.5).astype(q.dtype)
    d_q = jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k)
    d_k = jnp.einsum("BKGTS,BKGTH->BKSH", d_scores, q)
    return d_q, d_k, d_v, None


_attention.defvjp(_attention_forward, _attention_backward)


def _library(q: Array, k: Array, v: Array, mask: Array, implementation: str) -> Array:
    told: Any = implementation
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=told)
    return out.reshape(*q.shape[:2], -1)


_xla = functools.partial(_library, implementation="xla")
_cudnn = functools.partial(_library, implementation="cudnn")

KINDS = {"plain": _plain, "xla": _xla, "cudnn": _cudnn}


def attend_cache(
    q: Float[Array, "B 1 N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "B 1 S"],
) -> Float[Array, "B 1 NH"]:
    """The same for one query a row, by sums: on CPU products take longer (docs/log.md)."""
    batch, _, n, h = q.shape
    wide = q.reshape(batch, keys.shape[1], -1, 1, h).astype(jnp.float32)
    scores = jnp.sum(wide * keys[:, :, None].astype(jnp.float32), axis=-1)  # [B, K, G, S]
    weights = softmax(scores, mask[:, None], h)
    out = jnp.sum(weights[..., None] * values[:, :, None].astype(jnp.float32), axis=3)
    return out.reshape(batch, 1, n * h).astype(q.dtype)


def softmax(scores: Array, mask: Array, width: int) -> Array:
    """Of scores / √width over what the mask lets through."""
    return jax.nn.softmax(jnp.where(mask, scores * width**-0.5, -1e30), axis=-1)
