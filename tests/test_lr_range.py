"""The range test: what is read off a curve, the optimizer under it, and a run of it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from minilm import configfile, lr_range
from minilm.checkpoint import flatten
from minilm.config import ModelConfig, OptimizerConfig
from minilm.errors import UserError
from minilm.model import Transformer
from minilm.optim import make_optimizer

RATES = np.geomspace(1e-5, 10.0, 121)
TINY = ModelConfig(
    num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, head_dim=8, mlp_dim=8
)  # fmt: skip


def curve(best: float, edge: float) -> np.ndarray:
    """A loss that falls about `best` and blows up about `edge`."""
    fall = 3 / (1 + (best / RATES) ** 2)
    return 6 - fall + (RATES / edge) ** 3


@pytest.mark.parametrize(("best", "edge"), [(1e-3, 1.0), (1e-2, 0.5), (0.1, 10.0)])
def test_the_suggestion_lies_on_the_fall_and_a_decade_below_the_edge(best, edge):
    noise = np.random.default_rng(0).normal(0, 0.02, len(RATES))
    test = lr_range.read_off(RATES, curve(best, edge) + noise)
    assert best / 4 < test.steepest < 4 * best
    if test.edge is not None:
        assert edge / 3 < test.edge < 4 * edge
        assert test.suggestion <= test.edge / 10
    assert test.suggestion <= test.steepest


def test_a_loss_that_is_not_a_number_is_an_edge():
    losses = curve(1e-3, 1e9)
    losses[90] = math.nan
    test = lr_range.read_off(RATES, losses)
    assert test.edge == RATES[90]
    assert len(test.smooth) == 90


def test_an_edge_close_above_the_fall_pulls_the_suggestion_down():
    test = lr_range.read_off(RATES, curve(1e-2, 3e-2))
    assert test.edge is not None
    assert test.suggestion == test.edge / 10 < test.steepest


def test_noise_alone_suggests_nothing():
    noise = np.random.default_rng(1).normal(6, 0.3, len(RATES))
    with pytest.raises(UserError, match="the loss fell at no rate"):
        lr_range.read_off(RATES, noise)
    with pytest.raises(UserError, match="finite at 3 rates only"):
        lr_range.read_off(RATES, np.r_[6.0, 5.9, 5.8, np.full(118, np.nan)])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scaled_updates_are_those_of_an_optimizer_at_that_rate(name):
    """What makes it the config's own optimizer: at a constant rate both give the same model."""
    rate, other = 2e-3, 5e-2
    config = OptimizerConfig(
        name=name, learning_rate=rate, muon_learning_rate=3 * rate, schedule="cosine",
        warmup_steps=4,
    )  # fmt: skip
    expected = config.model_copy(
        update={"learning_rate": other, "muon_learning_rate": 3 * other, "schedule": "constant",
                "warmup_steps": 0}
    )  # fmt: skip
    model = Transformer(TINY, 12, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def after(optimizer):
        @jax.jit
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = model, optimizer.init(model)
        for _ in range(3):
            grads = jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(x.dtype), params)
            params, state = step(params, state, grads)
        return {k: np.asarray(v) for k, v in flatten(params).items()}

    ours = after(lr_range.rising(config, 10, other, other))
    rng = np.random.default_rng(0)
    theirs = after(make_optimizer(expected, 10))
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=2e-5, atol=2e-6, err_msg=key)


def test_the_rate_rises_from_the_lowest_to_the_highest():
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, clip_norm=1e9)
    optimizer = lr_range.rising(config, 5, 1e-4, 1.0)
    params = {"w": jnp.ones(())}
    state, sizes = optimizer.init(params), []
    for _ in range(5):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(updates["w"]))
    # Adam on a constant gradient moves by the rate itself.
    np.testing.assert_allclose(sizes, np.geomspace(1e-4, 1.0, 5), rtol=1e-3)


def test_the_command_on_a_tiny_config(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lr_range, "STEPS", 60)
    config = configfile.load(tiny, ["--pretrain.optimizer.name", "adamw"])
    lr_range.lr_range_command(config, tmp_path / "out")
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "lr_range.json").read_text())
    assert (tmp_path / "out" / "lr_range.png").read_bytes().startswith(b"\x89PNG")
    suggestion = report["suggestion"]["learning_rate"]
    assert f"--pretrain.optimizer.learning-rate {suggestion:.2g}" in out
    # tests/tiny.toml trains well at 5e-3.
    assert 3e-4 < suggestion < 0.3
    assert len(report["rates"]) == len(report["losses"])
    assert report["losses"][0] == pytest.approx(math.log(300), rel=0.05)
