"""A small language model, its ragged batches and its step, for tests of steps and loops."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minilm.checkpoint import flatten
from minilm.config import LoopConfig, ModelConfig, OptimizerConfig
from minilm.losses.language import next_token_cross_entropy
from minilm.model import Transformer, hidden_states, logits
from minilm.objective import Objective, Term
from minilm.optim import make_optimizer
from minilm.step import TrainState, init_state, make_train_step
from minilm.text.batches import Batch, batch_of

VOCAB = 11
CONFIG = ModelConfig(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)  # fmt: skip
OPTIMIZER = OptimizerConfig(learning_rate=0.03, weight_decay=0.1, clip_norm=1.0)
LOOP = LoopConfig(
    optimizer=OPTIMIZER, log_every=2, evaluate_every=4, checkpoint_every=4, keep_checkpoints=2
)  # fmt: skip
LANGUAGE = Objective(
    (
        Term(
            "cross_entropy", 1.0,
            lambda o, b: next_token_cross_entropy(o, b.targets), lambda b: b.weights,
        ),
    )
)  # fmt: skip
STEPS = 12


def forward(model, batch):
    return logits(model, hidden_states(model, batch.tokens, batch.segments))


def new_model() -> Transformer:
    shape = jax.eval_shape(lambda: Transformer(CONFIG, VOCAB, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape).astype(x.dtype)), shape)


def ragged_batch(seed: int = 0, *, weight: float = 1.0) -> Batch:
    """Rows with 12, 1, 7 and no real targets, each token one more than the one before."""
    rng = np.random.default_rng(seed)
    rows = (2 + (rng.integers(0, 9, (4, 1)) + np.arange(13)) % 9).astype(np.int32)
    for row, length in zip(rows, (12, 1, 7, 0), strict=True):
        row[length + 1 :] = 0
    batch = batch_of(rows)
    return batch._replace(weights=np.where(batch.weights > 0, np.float32(weight), np.float32(0)))


OPTIMIZE = make_optimizer(OPTIMIZER, STEPS)
STEP = make_train_step(forward, LANGUAGE, OPTIMIZE)


def fresh() -> TrainState:
    return init_state(new_model(), OPTIMIZE)


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def assert_equal(a, b) -> None:
    a, b = arrays(a), arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
