"""Schedules at fixed points, who is moved by what, and updates against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm.checkpoint import flatten
from minilm.config import ModelConfig, OptimizerConfig
from minilm.model import Transformer
from minilm.optim import (
    global_norm,
    is_layer_matrix,
    make_optimizer,
    moving_average,
    norms_by_layer,
    relative_norms,
    schedule,
)

TINY = ModelConfig(
    num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=12,
    tie_embeddings=False,
)  # fmt: skip
LAYER_MATRICES = {
    f"layers.0.{name}"
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip
OTHERS = {
    "embed_tokens", "lm_head", "norm", "score",
    "layers.0.input_layernorm", "layers.0.post_attention_layernorm",
    "layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm",
}  # fmt: skip


SHAPE = jax.eval_shape(lambda: Transformer(TINY, 10, scalar_head=True, rngs=nnx.Rngs(0)))


def drawn(scale: float, seed: int) -> Transformer:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(x.dtype), SHAPE)


def model() -> Transformer:
    return drawn(1.0, seed=0)


def gradients(scale: float) -> Transformer:
    return drawn(scale, seed=1)


def config(**options) -> OptimizerConfig:
    plain = {"schedule": "constant", "learning_rate": 0.1, "weight_decay": 0.0}
    return OptimizerConfig(**(plain | options))


def change(options: OptimizerConfig, grads: Transformer, steps: int = 1) -> dict[str, np.ndarray]:
    """What `steps` updates with the same gradient add to each parameter."""
    optimizer, params = make_optimizer(options, 10), model()
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
    before, after = flatten(model()), flatten(params)
    return {k: np.asarray(after[k]) - np.asarray(before[k]) for k in before}


# Peak 2, 100 steps, of which 10 warm up, down to a tenth. Closed forms at (step, rate).
RISE = [(0, 2 / 11), (5, 2 * 6 / 11), (10, 2.0)]
POINTS = {
    "constant": [*RISE, (55, 2.0), (100, 2.0)],
    "linear": [*RISE, (55, 1.1), (100, 0.2), (120, 0.2)],
    "cosine": [*RISE, (55, 1.1), (32.5, 0.2 + 0.9 * (1 + np.sqrt(0.5))), (100, 0.2)],
    "wsd": [*RISE, (82, 2.0), (91, 1.1), (100, 0.2)],  # the last fifth of the 90 falls
}


@pytest.mark.parametrize("name", POINTS)
def test_schedule_at_fixed_points(name):
    rate = schedule(
        OptimizerConfig(
            schedule=name, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2
        ),
        100,
        2.0,
    )  # fmt: skip
    found = [float(rate(step)) for step, _ in POINTS[name]]
    np.testing.assert_allclose(found, [value for _, value in POINTS[name]], rtol=1e-5)


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("warmup", [0, 3, 500])
def test_the_first_step_moves_and_the_rate_never_exceeds_its_peak(name, warmup):
    """A warm-up from 0 wastes the first batch; one longer than the run must not break it."""
    rate = schedule(OptimizerConfig(schedule=name, warmup_steps=warmup), 20, 0.5)
    rates = np.array([float(rate(k)) for k in range(20)])
    assert rates[0] > 0
    assert rates.max() <= 0.5 * (1 + 1e-6)


def test_matrices_of_the_layers_by_name():
    mask = flatten(is_layer_matrix(model()))
    assert {name for name, chosen in mask.items() if chosen} == LAYER_MATRICES
    assert {name for name, chosen in mask.items() if not chosen} == OTHERS


def test_muon_takes_the_layers_matrices_and_adam_the_rest():
    """optax.contrib.muon alone would take the embedding and head too, being two-dimensional.

    Told apart by what they do: Adam's first step is the learning rate times the sign of the
    gradient, times 1 + β1 / (1 + β1) since Optax gives Adam Muon's Nesterov momentum; Muon's
    makes all singular values nearly equal.
    """
    moved = change(config(name="muon", muon_learning_rate=0.1, clip_norm=1e9), gradients(1.0))
    sign = 0.1 * (1 + 0.9 / 1.9)
    by_adam = {name for name, x in moved.items() if np.allclose(np.abs(x), sign, rtol=1e-3)}
    assert by_adam == OTHERS
    for name in LAYER_MATRICES:
        values = np.linalg.svd(moved[name], compute_uv=False)
        assert values.max() < 2 * values.min()  # Newton-Schulz of five steps ends in [0.7, 1.2]
        # Consistent update RMS, arXiv:2502.16982, eq. 4: a factor 0.2 √max(in, out).
        expected = 0.1 * 0.2 * np.sqrt(max(moved[name].shape))
        assert values.mean() == pytest.approx(expected, rel=0.25)


def test_muons_weight_decay_falls_on_the_layers_matrices_alone():
    """With a gradient of zero only decay moves a parameter: by −rate · decay · value."""
    zeros = drawn(0.0, seed=0)
    moved = change(config(name="muon", muon_learning_rate=0.1, weight_decay=0.5), zeros)
    values = flatten(model())
    for key in OTHERS:
        np.testing.assert_array_equal(moved[key], 0, err_msg=key)
    for key in LAYER_MATRICES:
        np.testing.assert_allclose(moved[key], -0.05 * values[key], rtol=1e-4, err_msg=key)


def test_adamw_equals_numpy():
    """Three steps: bias-corrected moments, decoupled decay on matrices, clipping by global norm."""
    grads = gradients(1.0)
    options = config(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-3, clip_norm=0.5)
    moved = change(options, grads, steps=3)
    flat = {k: np.asarray(v, np.float64) for k, v in flatten(grads).items()}
    norm = np.sqrt(sum(np.sum(g**2) for g in flat.values()))
    for key, value in flatten(model()).items():
        g = flat[key] * min(1, 0.5 / norm)
        start = x = np.asarray(value, np.float64)
        m = v = np.zeros_like(x)
        for t in (1, 2, 3):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            x = x - 0.1 * (step + (0.1 * x if key in LAYER_MATRICES else 0))
        np.testing.assert_allclose(moved[key], x - start, atol=3e-6, err_msg=key)


def test_global_norm_is_the_norm_of_all_leaves_together():
    tree = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[0.0, 4.0]], jnp.bfloat16)}
    assert float(global_norm(tree)) == 5.0


def test_norms_are_told_layer_by_layer():
    norms = {k: float(v) for k, v in norms_by_layer(model()).items()}
    assert norms.keys() == {"embed_tokens", "layers.0", "norm", "lm_head", "score"}
    flat = flatten(model())
    inside = [np.asarray(v, np.float64) for k, v in flat.items() if k.startswith("layers.0.")]
    assert norms["layers.0"] == pytest.approx(np.sqrt(sum(np.sum(v**2) for v in inside)), rel=1e-6)
    halved = jax.tree.map(lambda x: x / 2, model())
    ratios = relative_norms(halved, model())
    assert {k: round(float(v), 6) for k, v in ratios.items()} == dict.fromkeys(norms, 0.5)
    still = jax.tree.map(jnp.zeros_like, model())
    assert all(float(v) == 0 for v in relative_norms(halved, still).values())


def test_the_moving_average_forgets_its_start_and_then_keeps_its_decay():
    rng, average, expected = np.random.default_rng(0), jnp.zeros(3), np.zeros(3)
    for k in range(40):
        x = rng.normal(0, 1, 3).astype(np.float32)
        kept = min(0.8, (1 + k) / (10 + k))
        expected = kept * expected + (1 - kept) * x.astype(np.float64)
        average = moving_average(average, jnp.asarray(x), 0.8, jnp.int32(k))
    np.testing.assert_allclose(average, expected, atol=1e-6)
