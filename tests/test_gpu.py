"""What only a GPU can show, with the flag that `backend.configure` sets where one may be:

JAX_PLATFORMS=cuda,cpu XLA_FLAGS=--xla_gpu_deterministic_ops=true uv run pytest -n 0 -m gpu
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from minilm import backend, checkpoint, cli
from minilm.algorithms import ALGORITHMS, objective
from minilm.attention import attend, chosen
from minilm.config import BackendConfig, ModelConfig, OptimizerConfig, RLHFConfig
from minilm.generate import generate
from minilm.model import Transformer
from minilm.optim import make_optimizer
from minilm.rewards import Normalization, RewardModel
from minilm.rollout import completion_outputs
from minilm.stages.pretrain import LANGUAGE, forward
from minilm.stages.rlhf import make_collect, make_step, start_state
from minilm.step import init_state, make_train_step
from minilm.text.batches import batch_of

pytestmark = pytest.mark.gpu
SHAPE = ModelConfig(num_layers=2, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16)
VOCAB = 320


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU here")


def model(seed: int, dtype: str = "float32", **head) -> Transformer:
    return Transformer(SHAPE, VOCAB, compute_dtype=dtype, **head, rngs=nnx.Rngs(seed))


def losses(device, dtype: str) -> list[float]:
    """Of eight steps of training on one device."""
    with jax.default_device(device):
        rows = np.random.default_rng(0).integers(2, VOCAB, (8, 65))
        optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3), 8)
        state, batch = init_state(model(0, dtype), optimizer), batch_of(rows)
        step = make_train_step(forward, LANGUAGE, optimizer)
        found = []
        for _ in range(8):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"].value))
    return found


def test_training_on_a_gpu_is_training_on_a_cpu():
    """Matrix products round to TF32, 10 bits, unless told otherwise."""
    ours, theirs = (
        losses(jax.devices("gpu")[0], "float32"),
        losses(jax.devices("cpu")[0], "float32"),
    )
    np.testing.assert_allclose(ours, theirs, rtol=5e-3)
    assert ours[-1] < ours[0] - 0.2


def test_bfloat16_learns_as_float32_does():
    device = jax.devices("gpu")[0]
    np.testing.assert_allclose(losses(device, "bfloat16"), losses(device, "float32"), rtol=3e-2)


def test_bfloat16_is_chosen_where_the_device_has_it():
    choice = backend._chosen("auto", "", "")
    capability = float(jax.devices()[0].compute_capability)
    assert choice.compute_dtype == ("bfloat16" if capability >= 8 else "float32")
    assert "bfloat16" in choice.reason


def test_the_same_steps_give_the_same_losses_bit_for_bit():
    device = jax.devices("gpu")[0]
    assert losses(device, "bfloat16") == losses(device, "bfloat16")


def test_sampled_log_probabilities_are_those_of_a_forward_pass():
    policy = model(3)
    prompts = jax.random.randint(jax.random.key(0), (16, 8), 2, VOCAB)
    samples = generate(policy, prompts, jax.random.key(1), max_new_tokens=24, eos_id=1, pad_id=0)
    tokens = jnp.concatenate([prompts, samples.tokens], axis=1)
    segments = jnp.concatenate([prompts != 0, samples.mask], axis=1).astype(jnp.int32)
    again = completion_outputs(policy, tokens, segments, 24, 1.0).logprobs
    gap = np.abs(np.asarray(jnp.where(samples.mask, again - samples.logprobs, 0.0)))
    assert gap.max() < 2e-2


@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_rlhf_raises_what_it_is_paid_for(name):
    """Ratio 1 at the first update, one compilation, a rising score."""
    algorithm = ALGORITHMS[name]
    config = RLHFConfig(
        prompts_per_step=8,
        group_size=8,
        kl_coef=0.0,
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
    )
    prompts = np.random.default_rng(0).integers(2, VOCAB, (16, 8)).astype(np.int32)
    frozen = (model(0), model(1, scalar_head=True))
    frozen[1].score[...] = jax.random.normal(jax.random.key(5), (64,))
    ids = {"max_new_tokens": 16, "eos_id": 1, "pad_id": 0}
    payer = RewardModel((frozen[1],), (Normalization(0.0, 1.0),))
    collect = make_collect(
        config, algorithm, frozen[0], payer, prompts, key=jax.random.key(0), **ids
    )
    optimizer = make_optimizer(config.optimizer, 100)
    step = make_step(config, objective(algorithm, config), optimizer, collect, 16)
    state, scores = start_state(model(0, scalar_head=algorithm.critic), optimizer), []
    for k in range(40):
        state, metrics = step(state, k)
        scores.append(float(metrics["objective/scores"].value))
        if k == 0:
            assert float(metrics["val/ratio_deviation"].value) < 2e-2
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.3


def test_the_whole_pipeline_runs_and_says_on_what(tiny, tmp_path):
    assert cli.main(["run", str(tiny), "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["environment"]["platform"] == "gpu"
    assert set(summary) >= {"pretrain", "preferences", "reward", "rlhf"}
    assert checkpoint.find(tmp_path / "run" / "rlhf").exists()


def test_cudnn_attention_is_taken_in_bfloat16_and_trains_as_the_plain_one_does():
    assert chosen("float32", SHAPE.head_dim) == "plain"
    if float(jax.devices()[0].compute_capability) >= 8:
        assert chosen("bfloat16", SHAPE.head_dim) == "cudnn"
    rng = jax.random.key(0)
    q, k, v = (x.astype(jnp.bfloat16) for x in jax.random.normal(rng, (3, 2, 64, 4, 16)))
    mask = jnp.tril(jnp.ones((64, 64), bool))[None]
    plain, found = (attend(q, k, v, mask, kind) for kind in ("plain", "auto"))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, plain)), atol=3e-2)


def test_the_gradient_of_an_odd_length_is_there_too():
    q, k, v = (
        x.astype(jnp.bfloat16) for x in jax.random.normal(jax.random.key(1), (3, 2, 63, 4, 16))
    )
    mask = jnp.tril(jnp.ones((63, 63), bool))[None]
    pay = jax.grad(lambda q: jnp.sum(attend(q, k, v, mask).astype(jnp.float32) ** 2))
    assert np.isfinite(np.asarray(pay(q), np.float32)).all()


def test_the_backend_is_configured_on_a_gpu_without_flags_for_cpus(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    choice = backend.configure(BackendConfig(compute_dtype="bfloat16"))
    assert "onednn" not in choice.xla_flags
