"""A checkpoint is whole or absent, comes back bit for bit, and says so when a disk damaged it."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from minilm import checkpoint
from minilm.errors import UserError


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.q_proj = nnx.Param(jax.random.normal(rngs.params(), (width, 2, 3)), axes=("e", "h"))
        self.norm = nnx.Param(jax.random.normal(rngs.params(), (width,), jnp.bfloat16))


class Model(nnx.Module):
    """Twelve layers: as strings, 10 sorts before 2."""

    def __init__(self, width: int = 4, layers: int = 12):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (7, width)))
        self.layers = nnx.List([Block(width, rngs) for _ in range(layers)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: Any
    model: Any
    opt_state: Any
    extra: Any


def make_state(width: int = 4, layers: int = 12, fill: float | None = None) -> State:
    model = Model(width, layers)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda x: x + 1, optimizer.init(model))
    state = State(
        jnp.int32(3), model, opt_state, {"kl_coef": jnp.float32(0.1), "skipped": jnp.int32(5)}
    )
    return state if fill is None else jax.tree.map(lambda x: x * 0 + np.array(fill, x.dtype), state)


def save(folder: Path, step: int, tree: Any = None, **options: Any) -> Path:
    tree = {"w": np.full((50, 20), step, np.float32)} if tree is None else tree
    return checkpoint.save(folder, step, tree, {}, **({"keep": 9} | options))


def kept(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in folder.iterdir())


def assert_same(a: Any, b: Any) -> None:
    """Same structure, and the same bytes, dtype and shape leaf by leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# What comes back


def test_a_train_state_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    path = save(tmp_path, 3, state)
    assert_same(checkpoint.restore(path, make_state(fill=0.0)), state)


def test_shapes_alone_are_enough_to_restore(tmp_path):
    model = Model()
    path = save(tmp_path, 3, model)
    assert_same(checkpoint.restore(path, jax.eval_shape(Model)), model)


def test_nan_infinity_and_negative_zero_survive(tmp_path):
    tree = {"w": jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0])}
    path = save(tmp_path, 1, tree)
    assert_same(checkpoint.restore(path, {"w": jnp.zeros(4)}), tree)


def test_leaves_are_named_as_the_code_names_them(tmp_path):
    path = save(tmp_path, 3, make_state())
    arrays = checkpoint.load_arrays(path)
    assert {"step", "extra.kl_coef", "model.embed", "model.layers.10.q_proj"} <= set(arrays)
    assert {"opt_state.1.0.mu.layers.2.norm", "opt_state.1.0.count"} <= set(arrays)


def test_arrays_are_read_without_a_model_and_by_prefix(tmp_path):
    state = make_state()
    path = save(tmp_path, 3, state)
    arrays = checkpoint.load_arrays(path, "model.layers.1.")
    assert list(arrays) == ["model.layers.1.norm", "model.layers.1.q_proj"]
    norm = state.model.layers[1].norm[...]
    assert arrays["model.layers.1.norm"].dtype == jnp.bfloat16
    assert arrays["model.layers.1.norm"].tobytes() == np.asarray(norm).tobytes()


def test_the_model_is_restored_out_of_a_train_state(tmp_path):
    state = make_state()
    path = save(tmp_path, 3, state)
    assert_same(checkpoint.restore(path, make_state(fill=0.0).model, prefix="model"), state.model)


def test_a_restored_state_is_its_own_to_donate(tmp_path):
    path = save(tmp_path, 3, {"w": jnp.arange(1000.0)})
    like = {"w": jnp.zeros(1000)}
    first, second = checkpoint.restore(path, like), checkpoint.restore(path, like)
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(first)
    assert_same(second["w"], jnp.arange(1000.0))


def test_shardings_of_like_are_kept(tmp_path):
    device = jax.devices()[-1]
    mesh = jax.sharding.Mesh(np.array([device]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    path = save(tmp_path, 1, {"w": jnp.arange(8.0)})
    for like in (
        jax.device_put(jnp.zeros(8), sharding),
        jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding),
    ):
        restored = checkpoint.restore(path, {"w": like})["w"]
        assert restored.sharding == sharding
        assert restored.tolist() == list(range(8))


def test_metadata_and_files_travel_along(tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    path = checkpoint.save(
        tmp_path / "checkpoints",
        7,
        {"w": np.zeros(3, np.float32)},
        {"config": {"seed": 1}, "metrics": {"loss": 0.5}},
        keep=1,
        files={"tokenizer.json": tokenizer},
    )
    checkpoint.set_best(path, 2.0)
    record = checkpoint.metadata(path)
    assert path.name == "step_00000007"
    assert (path / "tokenizer.json").read_text() == "{}"
    assert (record["step"], record["best"], record["config"]) == (7, 2.0, {"seed": 1})
    assert record["metrics"] == {"loss": 0.5}
    assert record["arrays"] == {"w": "float32[3]"}
    on_disk = {f for f in path.rglob("*") if f.is_file() and f.name != "metadata.json"}
    assert {path / name for name in record["files"]} == on_disk
    assert record["bytes"] == sum(f.stat().st_size for f in on_disk)


def test_saving_and_reading_say_nothing(tmp_path, capfd):
    path = save(tmp_path, 3, make_state())
    checkpoint.restore(checkpoint.latest(tmp_path) or path, make_state())
    assert capfd.readouterr() == ("", "")


# What does not fit


@pytest.mark.parametrize(
    ("like", "problem"),
    [
        ({"a": jnp.zeros(3)}, "'b.c' is float32[2], expected nothing"),
        (
            {"a": jnp.zeros(3), "b": {"c": jnp.zeros(2), "d": jnp.int32(1)}},
            "'b.d' is missing, expected int32[]",
        ),
        ({"a": jnp.zeros(4), "b": {"c": jnp.zeros(2)}}, "'a' is float32[3], expected float32[4]"),
        (
            {"a": jnp.zeros(3, jnp.int32), "b": {"c": jnp.zeros(2)}},
            "'a' is float32[3], expected int32[3]",
        ),
    ],
    ids=["left over", "missing", "shape", "dtype"],
)
def test_another_structure_is_an_error_that_names_the_leaf(tmp_path, like, problem):
    path = save(tmp_path, 1, {"a": jnp.zeros(3), "b": {"c": jnp.zeros(2)}})
    with pytest.raises(UserError) as error:
        checkpoint.restore(path, like)
    assert f"(1 of its leaves): {problem}" in str(error.value)
    assert str(path) in str(error.value)


def test_another_model_is_an_error_that_counts_and_shows_a_few(tmp_path):
    path = save(tmp_path, 1, make_state(width=4))
    with pytest.raises(UserError, match=r"\(75 of its leaves\).*model\.embed.*…"):
        checkpoint.restore(path, make_state(width=6))


# What is kept


def test_the_last_k_and_the_best_are_kept(tmp_path):
    for step, best in enumerate([5.0, 1.0, 3.0, float("nan"), 4.0, 2.0], start=1):
        checkpoint.set_best(save(tmp_path, step, keep=2), best)
    assert kept(tmp_path) == [2, 5, 6]


@pytest.mark.parametrize(
    ("figures", "step"),
    [([math.nan, 1.0, 2.0], 2), ([2.0, math.nan, 1.0], 3), ([math.nan, math.nan, math.nan], 1)],
)
def test_the_best_that_is_gone_back_to_is_a_number_where_there_is_one(tmp_path, figures, step):
    for number, best in enumerate(figures, start=1):
        checkpoint.set_best(save(tmp_path, number, keep=3), best)
    assert checkpoint.metadata(checkpoint.keep_best(tmp_path, 9))["step"] == step
    assert max(kept(tmp_path)) == step


def test_without_best_only_the_last_are_kept(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, keep=1)
    assert kept(tmp_path) == [4]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 1, {"w": np.zeros(2)})
    path = save(tmp_path, 1, {"w": np.ones(2)})
    assert kept(tmp_path) == [1]
    assert checkpoint.load_arrays(path)["w"].tolist() == [1, 1]


# What is meant by a path


def test_a_checkpoint_is_found_by_its_own_its_stages_and_its_runs_path(tmp_path):
    for stage in ("pretrain", "reward", "rlhf"):
        for step in (1, 2):
            save(tmp_path / stage / "checkpoints", step)
    (tmp_path / "pretrain" / "done.json").write_text("{}")
    (tmp_path / "reward" / "done.json").write_text("{}")
    reward = tmp_path / "reward" / "checkpoints"
    assert checkpoint.find(reward / "step_00000001") == reward / "step_00000001"
    assert checkpoint.find(reward) == reward / "step_00000002"
    assert checkpoint.find(tmp_path / "reward") == reward / "step_00000002"
    assert checkpoint.find(tmp_path) == reward / "step_00000002"  # the last finished
    (tmp_path / "pretrain" / "done.json").unlink()
    (tmp_path / "reward" / "done.json").unlink()
    assert checkpoint.find(tmp_path).parts[-3] == "rlhf"  # the last begun


@pytest.mark.parametrize("name", ["", "missing", "checkpoints/step_00000009"])
def test_no_checkpoint_is_a_users_error_naming_the_path(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path)):
        checkpoint.find(tmp_path / name)


def test_numpy_arrays_come_back_as_such(tmp_path):
    """As one of several processes reads a checkpoint for the others: on no device."""
    tree = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(3, np.int32)}
    saved = checkpoint.save(tmp_path, 1, tree, {}, keep=1)
    found = checkpoint.restore(saved, jax.tree.map(np.zeros_like, tree))
    assert all(isinstance(x, np.ndarray) for x in found.values())
    np.testing.assert_array_equal(found["w"], tree["w"])
    assert found["step"] == 3
