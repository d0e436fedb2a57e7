"""What a config costs, said before anything runs."""

import jax
import numpy as np
import pytest
from flax import nnx

from minilm.config import Config, ModelConfig, OptimizerConfig, PretrainConfig, TokenizerConfig
from minilm.estimate import (
    BFLOAT16,
    STARTUP_SECONDS,
    TRAIN_EFFICIENCY,
    activation_bytes,
    minutes,
    model_command,
    model_shape,
)  # fmt: skip
from minilm.model import Transformer, flops_per_token, parameter_count
from minilm.optim import make_optimizer
from minilm.stages.pretrain import LANGUAGE, forward
from minilm.step import init_state, make_train_step
from minilm.text.batches import batch_of

CONFIG = Config(
    tokenizer=TokenizerConfig(vocab_size=300),
    model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8,
                      mlp_dim=24),
    pretrain=PretrainConfig(steps=1000, batch_size=4, sequence_length=64, sample_count=1,
                            max_new_tokens=1),
)  # fmt: skip
MACHINE = {"matmul_gflops": 100.0}


def test_the_shape_is_that_of_the_model_and_is_not_allocated():
    shape = model_shape(CONFIG)
    # Embedding; attention 16·(2 + 1 + 1)·8 + 16·16; QK-norm; SwiGLU; three norms.
    assert parameter_count(shape) == 300 * 16 + 512 + 256 + 16 + 3 * 16 * 24 + 3 * 16
    assert shape.score is None


@pytest.mark.parametrize(("kind", "types"), [("bytes", 258), ("characters", 100), ("bpe", 300)])
def test_the_vocabulary_is_that_of_the_tokenizers_kind(kind, types):
    """`vocab_size` is BPE's alone."""
    config = CONFIG.model_copy(update={"tokenizer": TokenizerConfig(kind=kind, vocab_size=300)})
    assert model_shape(config).embed_tokens.shape == (types, 16)


def test_pretraining_takes_its_operations_over_the_machines_rate():
    train = flops_per_token(CONFIG.model, 300, 64) * 1000 * 4 * 64
    seconds = train / (TRAIN_EFFICIENCY * 100e9)
    assert minutes("pretrain", CONFIG, MACHINE) == pytest.approx(
        (STARTUP_SECONDS + seconds) / 60, rel=1e-3
    )


def test_a_growing_batch_costs_what_it_reads():
    """Two doublings in 100 steps of 1,000: 50 of one row, 50 of two, 900 of four."""
    grown = CONFIG.pretrain.model_copy(update={"batch_start": 1, "batch_warmup_steps": 100})
    config = CONFIG.model_copy(update={"pretrain": grown})
    ours, whole = (60 * minutes("pretrain", c, MACHINE) - STARTUP_SECONDS for c in (config, CONFIG))
    assert ours / whole == pytest.approx((50 + 2 * 50 + 4 * 900) / 4000, rel=1e-3)


@pytest.mark.parametrize("stage", ["pretrain", "preferences", "reward", "rlhf"])
def test_every_stage_takes_longer_on_a_slower_machine(stage):
    fast, slow = (minutes(stage, CONFIG, {"matmul_gflops": rate}) for rate in (1000.0, 1.0))
    assert STARTUP_SECONDS / 60 <= fast < slow


def test_pairs_from_a_file_need_no_sampling():
    config = CONFIG.model_copy(
        update={"preferences": CONFIG.preferences.model_copy(update={"file": "pairs.jsonl"})}
    )
    assert minutes("preferences", config, MACHINE) == STARTUP_SECONDS / 60


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.0), ("bfloat16", BFLOAT16)])
@pytest.mark.parametrize("length", [64, 192])
@pytest.mark.parametrize("remat", [False, True])
def test_memory_of_a_step_is_what_xla_sets_aside_for_it(dtype, factor, length, remat):
    layers = {"num_layers": 6 if remat else 3, "remat": remat}
    model = ModelConfig(embed_dim=64, num_kv_heads=2, head_dim=16, mlp_dim=176, **layers)
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def start():
        return init_state(Transformer(model, 300, compute_dtype=dtype, rngs=nnx.Rngs(0)), optimizer)

    batch = batch_of(np.ones((8, length + 1), np.int32))
    step = make_train_step(forward, LANGUAGE, optimizer, accumulation=1)
    compiled = step.lower(jax.eval_shape(start), batch).compile()  # pyright: ignore
    measured = compiled.memory_analysis().temp_size_in_bytes
    predicted = factor * activation_bytes(model, 300, length, 8 * length)
    assert measured == pytest.approx(predicted, rel=0.25)


def test_the_command_prints_parameters_operations_and_memory(capsys):
    model_command(CONFIG)
    text = capsys.readouterr().out
    assert f"{parameter_count(model_shape(CONFIG)):,}" in text
    assert f"{flops_per_token(CONFIG.model, 300, 64):,}" in text
    assert "MiB" in text
