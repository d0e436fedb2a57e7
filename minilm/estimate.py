"""What a config costs before anything runs: parameters, FLOPs, memory, minutes."""

from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.table import Column, Table

from minilm.config import Config, ModelConfig
from minilm.model import Transformer, flops_per_token, parameter_count
from minilm.optim import make_optimizer
from minilm.text.batches import growth_of
from minilm.text.tokenizer import BYTES, train_tokenizer

# Shares of the measured matrix-product rate that each kind of work reached on two cores
# (benchmarks/train_step.py, benchmarks/generate.py); the rest is copies, softmax, dispatch.
TRAIN_EFFICIENCY = 0.2  # pretraining, in bfloat16
TUNE_EFFICIENCY = 0.35  # reward model and RLHF
DECODE_EFFICIENCY = 0.12
BFLOAT16 = 0.61  # of float32's activations: softmax, norms' sums and logits stay float32
STARTUP_SECONDS = 25.0  # compiling and evaluating, a stage
ALPHABET = 100  # characters that a text of one language has, about
VOCABULARIES = {"bytes": "every byte", "characters": "about", "bpe": "at most", "file": "its"}


def vocabulary(config: Config) -> int:
    """Types that the tokenizer will have: at most, for BPE; assumed, for characters."""
    if config.tokenizer.kind == "file":
        return train_tokenizer(config.tokenizer, ()).vocab_size
    return {"bytes": BYTES, "characters": ALPHABET, "bpe": config.tokenizer.vocab_size}[
        config.tokenizer.kind
    ]


def model_shape(config: Config) -> Transformer:
    """The model as shapes, without allocating it."""
    vocab = vocabulary(config)
    return jax.eval_shape(lambda: Transformer(config.model, vocab, rngs=nnx.Rngs(0)))


def minutes(stage: str, config: Config, environment: dict) -> float:
    """Expected minutes of a stage on this machine, from FLOPs and its measured rate."""
    rate = environment["matmul_gflops"] * 1e9
    length = config.pretrain.sequence_length
    train = flops_per_token(config.model, vocabulary(config), length)
    prompts, rl, sampler = config.prompts, config.rlhf, config.preferences
    sequence = prompts.max_tokens + prompts.max_new_tokens
    completions = rl.prompts_per_step * rl.group_size
    evaluations = 2 + rl.steps // rl.evaluate_every
    sampled = {
        "pretrain": config.pretrain.sample_count,
        "preferences": prompts.preferences * sampler.completions * (not sampler.file),
        "sft": 0,
        "reward": 0,
        "rlhf": rl.steps * completions
        + evaluations * prompts.development
        + (prompts.development + prompts.evaluation) * rl.references,
    }[stage]
    trained = {
        "pretrain": growth_of(config.pretrain).before(config.pretrain.steps) * length,
        "preferences": 0,
        "sft": _sft_tokens(config),
        "reward": prompts.preferences * sampler.completions * config.reward.epochs * sequence,
        # An update, and two forward passes (reference, reward) at a third of its cost each.
        "rlhf": rl.steps * completions * sequence * (rl.epochs + 2 / 3)
        + rl.steps * rl.epochs * rl.minibatches * rl.ptx_rows * length * bool(rl.ptx_coef),
    }[stage]
    decoded = sampled * prompts.max_new_tokens * train / 3
    efficiency = TRAIN_EFFICIENCY if stage == "pretrain" else TUNE_EFFICIENCY
    seconds = trained * train / (efficiency * rate) + decoded / (DECODE_EFFICIENCY * rate)
    return (STARTUP_SECONDS + seconds) / 60


def _sft_tokens(config: Config) -> int:
    """From the file's size, at four bytes a token."""
    path = Path(config.sft.file or "")
    return config.sft.epochs * path.stat().st_size // 4 if path.is_file() else 0


def model_command(config: Config) -> None:
    """`minilm model CONFIG`: parameters, FLOPs a token and memory of a training step."""
    length, batch = config.pretrain.sequence_length, config.pretrain.batch_size
    tokens = batch * length // config.pretrain.accumulation
    trained = growth_of(config.pretrain).before(config.pretrain.steps) * length
    shape, optimizer = model_shape(config), make_optimizer(config.pretrain.optimizer, 1)
    count = parameter_count(shape)
    moments = sum(x.size for x in jax.tree.leaves(jax.eval_shape(optimizer.init, shape)))
    m, vocab, kind = config.model, vocabulary(config), config.tokenizer.kind
    flops = flops_per_token(m, vocab, length)
    activations = activation_bytes(m, vocab, length, tokens)
    rows = [
        ("parameters", f"{count:,}"),
        (f"  at a vocabulary of {VOCABULARIES[kind]}", f"{vocab:,}"),
        ("  of these embeddings", f"{vocab * m.embed_dim * (2 - m.tie_embeddings):,}"),
        ("FLOPs per token, forward and backward", f"{flops:,}"),
        ("tokens a step", f"{batch * length:,}"),
        ("FLOPs of the pretraining", f"{flops * trained:.3g}"),
        ("memory: parameters, float32", _mib(4 * count)),
        ("memory: optimizer and gradient", _mib(4 * (moments + count))),
        ("memory: activations of a step, float32, about", _mib(activations)),
        ("  in bfloat16, about", _mib(round(BFLOAT16 * activations))),
    ]
    table = Table("quantity", Column("value", justify="right"), title="model")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def activation_bytes(model: ModelConfig, vocab: int, length: int, tokens: int) -> int:
    """What a training step in float32 keeps beside parameters and optimizer, about.

    For the backward pass, a layer and token: residuals, norms, Q, K, V, attention weights and the
    MLP's three products; at the end logits, their softmax and its gradient. Within a quarter of
    what XLA says of the compiled step, as is BFLOAT16 times it: tests/test_estimate.py.
    """
    per_layer = 6 * model.embed_dim
    per_layer += 4 * (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_layer += 2 * model.num_heads * length + 4 * model.mlp_dim
    kept = per_layer * model.num_layers
    if model.remat:  # every layer's input, and one layer at a time
        kept = model.embed_dim * model.num_layers + per_layer
    return 4 * tokens * (kept + 3 * vocab)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
