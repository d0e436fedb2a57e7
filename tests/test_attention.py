"""Every way to attend against a plain float64 softmax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm.attention import KINDS, attend, attend_cache, chosen
from minilm.errors import UserError

RUNS_HERE = [kind for kind in KINDS if kind != "cudnn"]  # which tests/test_gpu.py asks for
B, T, N, K, H = 2, 5, 4, 2, 8


def drawn(seed: int = 0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, N, H))
    k, v = rng.normal(size=(2, B, T, K, H))
    segments = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 2]])
    mask = np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None])
    return q, k, v, mask


def reference(q, k, v, mask) -> np.ndarray:
    """One row, head and query at a time."""
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for n in range(N):
            keys, values = k[b, :, n // (N // K)], v[b, :, n // (N // K)]
            for t in range(T):
                seen = np.flatnonzero(mask[b, t])
                scores = keys[seen] @ q[b, t, n] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ values[seen] / weights.sum()
    return out.reshape(B, T, N * H)


@pytest.mark.parametrize("kind", RUNS_HERE)
def test_it_is_the_softmax_attention_of_float64(kind):
    q, k, v, mask = drawn()
    wide = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out = jax.jit(attend, static_argnums=4)(*wide, jnp.asarray(mask), kind)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("kind", RUNS_HERE)
def test_its_gradient_is_that_of_float64(kind):
    """Central differences along a random direction of queries, keys and values together."""
    q, k, v, mask = drawn(1)
    rng = np.random.default_rng(2)
    ways, pay = [rng.normal(size=x.shape) for x in (q, k, v)], rng.normal(size=(B, T, N * H))

    def paid(*xs):
        return jnp.sum(attend(*xs, jnp.asarray(mask), kind) * jnp.asarray(pay, jnp.float32))

    wide = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    gradients = jax.jit(jax.grad(paid, argnums=(0, 1, 2)))(*wide)
    slope = sum(np.sum(np.asarray(g) * w) for g, w in zip(gradients, ways, strict=True))
    ends = [
        np.sum(reference(*(x + s * w for x, w in zip((q, k, v), ways, strict=True)), mask) * pay)
        for s in (1e-6, -1e-6)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_one_query_on_a_cache_reads_what_the_whole_reads():
    q, k, v, _ = drawn(3)
    mask = np.ones((B, T, T), bool)
    wide = [jnp.asarray(x, jnp.float32) for x in (q[:, -1:], k, v)]
    keys, values = (x.swapaxes(1, 2) for x in wide[1:])
    out = attend_cache(wide[0], keys, values, jnp.asarray(mask[:, -1:]))
    np.testing.assert_allclose(out[:, 0], reference(q, k, v, mask)[:, -1], atol=2e-6)


def test_a_cpu_attends_plainly():
    assert jax.default_backend() == "cpu"
    assert chosen("bfloat16", 64) == "plain"


def test_cudnn_without_a_gpu_is_a_users_mistake():
    q, k, v, mask = (jnp.asarray(x) for x in drawn())
    with pytest.raises(UserError, match="NVIDIA GPU"):
        attend(q, k, v, mask, "cudnn")


def test_an_odd_length_is_never_given_to_cudnn(monkeypatch):
    """JAX refuses the gradient of a masked one; RLHF's rows are of any length."""
    monkeypatch.setattr("minilm.attention.chosen", lambda dtype, head_dim: "cudnn")
    q, k, v, mask = drawn()
    wide = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out = attend(*wide, jnp.asarray(mask))
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=2e-6)


def test_a_misspelt_kind_is_named():
    q, k, v, mask = (jnp.asarray(x) for x in drawn())
    with pytest.raises(UserError, match=r"did you mean 'plain'"):
        attend(q, k, v, mask, "plan")
