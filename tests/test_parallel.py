"""The same training on meshes of every shape, and in two processes, as on one device."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from toy import LANGUAGE, VOCAB, arrays, forward, ragged_batch

from minilm import checkpoint, configfile, parallel
from minilm.config import ModelConfig, OptimizerConfig, ParallelConfig
from minilm.errors import UserError
from minilm.files import read_json
from minilm.metrics import read
from minilm.model import Transformer
from minilm.optim import make_optimizer
from minilm.stages.pretrain import forward_of
from minilm.step import TrainState, init_state, make_train_step
from minilm.text.batches import Batch

MODEL = ModelConfig(num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=4, head_dim=4, mlp_dim=16)
OPTIMIZE = make_optimizer(OptimizerConfig(learning_rate=0.03), 10)
ROWS = 8


class Rows:
    """Batches of eight ragged rows; remembers which were asked for."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def size(self, step: int) -> int:
        return ROWS

    def part(self, step: int, start: int, stop: int) -> Batch:
        self.asked.append((start, stop))
        halves = ragged_batch(step), ragged_batch(100 + step)
        return jax.tree.map(lambda *x: np.concatenate(x)[start:stop], *halves)

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, 0, ROWS)


def start() -> TrainState:
    model = Transformer(MODEL, VOCAB, rngs=nnx.Rngs(0))
    return init_state(model, OPTIMIZE, ema_decay=0.9)


def trained(
    mesh, state=None, begin: int = 0, end: int = 4, accumulation: int = 1, forward=forward
) -> tuple[TrainState, list[float]]:
    options = {"accumulation": accumulation, "ema_decay": 0.9, "log_layers": True, "mesh": mesh}
    step = make_train_step(forward, LANGUAGE, OPTIMIZE, **options)
    state = parallel.build(mesh, start) if state is None else state
    losses, batches = [], Rows()
    for k in range(begin, end):
        state, metrics = step(state, parallel.read(mesh, batches, k))
        losses.append(float(metrics["loss"].value))
    assert step._cache_size() == 1  # the state comes out as it goes in  # pyright: ignore
    return state, losses


def mesh_of(data: int, fsdp: int, tensor: int):
    return parallel.make_mesh(ParallelConfig(data=data, fsdp=fsdp, tensor=tensor), MODEL, ROWS)


SHAPES = [(2, 1, 1), (1, 4, 1), (1, 1, 4), (8, 1, 1), (2, 2, 2)]


@pytest.fixture(scope="module")
def one():
    return trained(None)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_a_mesh_of_any_shape_trains_as_one_device_does(shape, one):
    mesh = mesh_of(*shape)
    state, losses = trained(mesh)
    np.testing.assert_allclose(losses, one[1], rtol=1e-5)
    for name, array in arrays(state).items():
        np.testing.assert_allclose(array, arrays(one[0])[name], atol=2e-5, err_msg=name)
    # Each device has its part alone: of parameters, moments and averages.
    _, fsdp, tensor = shape
    for tree in (state.model, state.averaged):
        kernel = tree.layers[0].mlp.up_proj[...]
        parts = {shard.data.shape for shard in kernel.addressable_shards}
        assert parts == {(16 // fsdp, 16 // tensor)}
    moments = [x for n, x in checkpoint.flatten(state.opt_state).items() if "up_proj" in n]
    assert moments
    assert all(m.addressable_shards[0].data.shape == (16 // fsdp, 16 // tensor) for m in moments)


@pytest.mark.parametrize("chunk", [0, 8])
def test_parts_of_a_batch_stay_on_their_devices(chunk, one):
    """Accumulation and chunks of logits cut a batch across its devices' rows: nothing is gathered,
    and each device has a quarter of the work."""
    work, gathered = [], []
    for mesh in (None, mesh_of(4, 1, 1)):
        parts = {"accumulation": 2, "mesh": mesh}
        step = make_train_step(forward_of(chunk), LANGUAGE, OPTIMIZE, **parts)
        state = parallel.build(mesh, start)
        compiled = step.lower(state, parallel.read(mesh, Rows(), 0)).compile()  # pyright: ignore
        work.append(compiled.cost_analysis()["flops"])
        gathered.append(compiled.as_text().count(" all-gather("))
    assert gathered == [0, 0]
    assert work[1] < 0.5 * work[0]
    _, losses = trained(mesh_of(4, 1, 1), accumulation=2, forward=forward_of(chunk))
    np.testing.assert_allclose(losses, one[1], rtol=1e-5)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(tmp_path, one):
    half, _ = trained(mesh_of(1, 2, 4), end=2)
    saved = checkpoint.save(tmp_path, 2, half, {}, keep=1)
    mesh = mesh_of(4, 2, 1)
    state = checkpoint.restore(saved, parallel.build(mesh, start))
    assert state.model.layers[0].mlp.up_proj[...].sharding.spec == PartitionSpec("fsdp")
    state, losses = trained(mesh, state, begin=2)
    np.testing.assert_allclose(losses, one[1][2:], rtol=1e-5)
    for name, array in arrays(state).items():
        np.testing.assert_allclose(array, arrays(one[0])[name], atol=2e-5, err_msg=name)


def test_each_row_of_a_batch_is_read_once():
    batches = Rows()
    read_anew = parallel.read(mesh_of(2, 2, 2), batches, 3)
    assert sorted(batches.asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    for found, expected in zip(read_anew, batches[3], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_without_a_mesh_nothing_is_placed():
    assert mesh_of(1, 1, 1) is None
    assert parallel.build(None, lambda: "as it is") == "as it is"
    assert parallel.whole("mine") == "mine"
    assert parallel.said_by_first(3, 0.5) == (3, 0.5)
    assert parallel.is_first() and not parallel.any_says(False)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 16}, "a mesh of 16 devices (data 16 x fsdp 1 x tensor 1)"),
        ({"data": 3}, "batch_size / accumulation: does not divide into 3 parts"),
        ({"tensor": 8}, "model.num_kv_heads: does not divide into 8 parts"),
    ],
)
def test_what_does_not_divide_is_named(sizes, said):
    with pytest.raises(UserError) as error:
        parallel.make_mesh(ParallelConfig(**sizes), MODEL, ROWS)
    assert said in str(error.value)


@pytest.mark.slow  # three runs, two of which share the machine
def test_two_processes_train_as_one_does_and_go_on_after_a_kill(tiny, tmp_path):
    """A run of two processes over JAX's CPU collectives, of which one is killed on the way."""
    words = [sys.executable, "-m", "minilm", "pretrain", str(tiny)]
    port = 20_000 + time.time_ns() // 1000 % 20_000
    out = tmp_path / "two"
    alone = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}  # a device for each process

    def start_one(number: int) -> subprocess.Popen:
        more = f"--parallel.data 2 --parallel.coordinator localhost:{port + attempt}"
        more += f" --parallel.processes 2 --parallel.process {number} --pretrain.steps 40"
        with (tmp_path / f"log_{number}_{attempt}.txt").open("wb") as log:
            return subprocess.Popen(
                [*words, "--out", str(out), *more.split()], stdout=log, stderr=log, env=alone
            )

    attempt = 0
    both = [start_one(0), start_one(1)]
    while not list((out / "pretrain").glob("checkpoints/step_*")):
        time.sleep(0.05)
        if any(p.poll() is not None for p in both):
            [p.kill() for p in both]
            pytest.fail(_logs(tmp_path))
    both[1].kill()  # and the other cannot go on alone
    time.sleep(0.2)
    both[0].kill()
    for process in both:
        process.wait()
    attempt = 1
    both = [start_one(0), start_one(1)]
    codes = [p.wait(timeout=240) for p in both]
    assert codes == [0, 0], _logs(tmp_path)
    subprocess.run([*words, "--out", str(tmp_path / "one")], check=True, capture_output=True)
    ours, theirs = (
        [r["loss"] for r in read(tmp_path / name / "pretrain" / "metrics.jsonl") if "loss" in r]
        for name in ("two", "one")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    found = [read_json(tmp_path / n / "summary.json")["pretrain"] for n in ("two", "one")]
    assert found[0]["validation_loss"] == pytest.approx(found[1]["validation_loss"], rel=1e-4)
    assert "resumed at step" in (tmp_path / "log_1_1.txt").read_text()
    assert not list((out / "process_1").glob("*/checkpoints/step_*"))


def _logs(folder: Path) -> str:
    return "\n".join(p.read_text(errors="replace")[-2000:] for p in sorted(folder.glob("log_*")))


def test_several_processes_do_not_take_the_other_stages(tiny, tmp_path, capsys):
    from minilm.run import run

    config = configfile.load(tiny, ["--parallel.coordinator", "localhost:1"])
    with pytest.raises(UserError, match="several processes pretrain"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
