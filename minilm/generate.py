"""Sampling: prefill and decode with a KV cache in one jitted call, until all have ended."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from minilm.model import Cache, Transformer, cast, decode, logits, prefill

BLOCK = 64  # of the two-level inverse-CDF sampler: about the square root of a small vocabulary


class Samples(NamedTuple):
    """Completions of left-padded prompts."""

    tokens: Int[Array, "B R"]  # the pad token after the end
    mask: Bool[Array, "B R"]  # True at the completion's own tokens, its end-of-text included
    logprobs: Float[Array, "B R"]  # under the sampling distribution, 0 at padding
    finished: Bool[Array, "B"]  # whether end-of-text was sampled within R tokens


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, length: int) -> np.ndarray:
    """Token lists as an int32 array [B, length], padding before each prompt."""
    rows = np.full((len(prompts), length), pad_id, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return rows


DIALS = ("max_new_tokens", "temperature", "top_k", "top_p", "eos_id", "pad_id", "microbatch")


@functools.partial(jax.jit, static_argnames=DIALS)
def generate(
    model: Transformer,
    prompts: Int[Array, "B P"],
    key: Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int = 1,
    pad_id: int = 0,
    microbatch: int = 64,
) -> Samples:
    """Samples a completion of each left-padded prompt.

    Args:
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability (Holtzman et al. 2020).
      microbatch: rows decoded together: 64 rows' keys and values stay in a CPU's cache where those
        of 256 do not, and each part stops as soon as its own rows have ended.
    """
    draw = _sampler(temperature, top_k, top_p)
    weights = cast(model)
    batch = prompts.shape[0]
    parts = batch // microbatch if batch % microbatch == 0 else 1

    def part(args):
        state = _start(weights, args[0], args[1], max_new_tokens, pad_id)
        state = _advance(weights, state, draw, max_new_tokens, eos_id, pad_id)
        mask = state.valid[:, prompts.shape[1] :]
        return Samples(state.tokens.T, mask, state.logprobs.T, state.done)

    if parts == 1:
        return part((prompts, key))
    split = (prompts.reshape(parts, batch // parts, -1), jax.random.split(key, parts))
    samples = jax.lax.map(part, split)
    return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), samples)


class _Decoding(NamedTuple):
    """The loop's state; the uniforms of all steps are drawn before it starts."""

    step: Int[Array, ""]
    hidden: Float[Array, "B D"]
    cache: Cache
    valid: Bool[Array, "B S"]
    uniforms: Float[Array, "R B"]
    tokens: Int[Array, "R B"]
    logprobs: Float[Array, "R B"]
    done: Bool[Array, "B"]


def _start(model, prompts, key, max_new_tokens: int, pad_id: int) -> _Decoding:
    batch, length = prompts.shape
    shape = (max_new_tokens, batch)
    valid = prompts != pad_id
    hidden, cache = prefill(model, prompts, valid, length + max_new_tokens)
    valid = jnp.pad(valid, ((0, 0), (0, max_new_tokens)))
    uniforms, tokens = jax.random.uniform(key, shape), jnp.full(shape, pad_id, jnp.int32)
    done = jnp.zeros(batch, bool)
    return _Decoding(jnp.int32(0), hidden, cache, valid, uniforms, tokens, jnp.zeros(shape), done)


def _advance(model, state: _Decoding, draw, stop, eos_id: int, pad_id: int) -> _Decoding:
    """Decodes until step `stop` or until every row has ended."""
    length = state.valid.shape[1] - state.tokens.shape[0]

    def body(s: _Decoding) -> _Decoding:
        token, logprob = draw(logits(model, s.hidden), s.uniforms[s.step])
        token = jnp.where(s.done, pad_id, token)
        logprob = jnp.where(s.done, 0.0, logprob)
        index = length + s.step
        write = jax.lax.dynamic_update_index_in_dim
        valid = write(s.valid, ~s.done, index, 1)
        hidden, cache = decode(model, token, index, valid, s.cache)
        tokens = write(s.tokens, token, s.step, 0)
        logprobs = write(s.logprobs, logprob, s.step, 0)
        done = s.done | (token == eos_id)
        return _Decoding(s.step + 1, hidden, cache, valid, s.uniforms, tokens, logprobs, done)

    return jax.lax.while_loop(lambda s: (s.step < stop) & ~jnp.all(s.done), body, state)


def stream(
    model: Transformer,
    prompt: Sequence[int],
    key: Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int = 1,
    pad_id: int = 0,
    chunk: int = 8,
) -> Iterator[list[int]]:
    """The tokens that `generate` gives for one prompt, as they come, `chunk` at a time."""
    weights = cast(model)
    # A multiple of 16, so that prompts of many lengths share a compilation.
    rows = left_pad([prompt], pad_id, -(-len(prompt) // 16) * 16)
    state = _start_jit(weights, jnp.asarray(rows), key, max_new_tokens, pad_id)
    dials = (temperature, top_k, top_p, eos_id, pad_id)
    for begin in range(0, max_new_tokens, chunk):
        state = _advance_jit(weights, state, jnp.int32(min(begin + chunk, max_new_tokens)), *dials)
        new = np.asarray(state.tokens)[begin : int(state.step), 0].tolist()
        ended = bool(state.done[0])
        yield [t for t in new if not (ended and t == eos_id)]
        if ended:
            return


_start_jit = jax.jit(_start, static_argnums=(3, 4))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _advance_jit(model, state, stop, temperature, top_k, top_p, eos_id, pad_id):
    return _advance(model, state, _sampler(temperature, top_k, top_p), stop, eos_id, pad_id)


def _sampler(temperature: float, top_k: int, top_p: float):
    """(logits [B, V], uniform [B]) -> (token [B], log-probability [B])."""
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"need top_k >= 0 and 0 < top_p <= 1, got {top_k} and {top_p}")
    if temperature == 0:
        return _greedy

    def draw(scores, uniform):
        scores = scores / temperature
        if 0 < top_k < scores.shape[-1]:
            floor = jax.lax.top_k(scores, top_k)[0][:, -1:]
            scores = jnp.where(scores < floor, -jnp.inf, scores)
        if top_p < 1:
            scores = _nucleus(scores, top_p)
        return categorical(scores, uniform)

    return draw


def _greedy(scores, uniform):
    del uniform
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    logprobs = jax.nn.log_softmax(scores, axis=-1)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]


def _nucleus(scores: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    ordered = jnp.sort(scores, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    floor = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scores < floor, -jnp.inf, scores)


def categorical(
    scores: Float[Array, "B V"], uniform: Float[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Token and log-probability, drawn by inverse CDF: a uniform a row, not V Gumbel variates.

    Block sums choose the block, a cumulative sum inside it the token, never one of probability 0.
    """
    batch, vocab = scores.shape
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(batch, -1, BLOCK)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    total = ends[:, -1:]
    target = uniform[:, None] * total
    block = _first_beyond(ends, target, jnp.sum(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    before = jnp.take_along_axis(ends, block[:, None], axis=1)
    before = before - jnp.sum(inside, axis=-1, keepdims=True)
    offset = _first_beyond(before + jnp.cumsum(inside, axis=-1), target, inside)
    chosen = jnp.take_along_axis(inside, offset[:, None], axis=1)
    return block * BLOCK + offset, jnp.log(chosen / total)[:, 0]


def _first_beyond(ends, target, weights) -> Int[Array, "B"]:
    """First index whose end lies beyond the target; rounding never leaves the positive weights."""
    index = jnp.sum((ends <= target).astype(jnp.int32), axis=-1)
    positive = weights > 0
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1).astype(jnp.int32)
    index = jnp.minimum(index, last)
    # `before` is a difference of sums: its rounding may land on a weight of zero; step on from it.
    later = positive & (jnp.arange(weights.shape[-1])[None, :] >= index[:, None])
    return jnp.argmax(later, axis=-1).astype(jnp.int32)
