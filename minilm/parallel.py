"""Several devices and hosts: one mesh, and where every array of a training step lies on it.

JAX's own SPMD runtime does the rest: the step is one program over all devices, and XLA puts in the
communication that the placement of its inputs asks for.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from minilm.config import ModelConfig, ParallelConfig
from minilm.errors import UserError

AXES = ("data", "fsdp", "tensor")
# The model's axes (the metadata of its `nnx.Param`s) on those of the mesh. Heads and hidden units
# are split as in Shoeybi et al. (2019), arXiv:1909.08053; the other dimension of each matrix as in
# Rajbhandari et al. (2020), arXiv:1910.02054, stage 3, which XLA gathers when it is needed.
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": None}
ROWS = PartitionSpec(("data", "fsdp"))  # a batch's, over all that is not within one row


def start(config: ParallelConfig) -> int:
    """Joins the other processes, if there are any; returns this one's number. Before JAX computes.

    Raises:
      UserError: the coordinator cannot be reached.
    """
    if config.coordinator is None:
        return 0
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    told: dict[str, Any] = {}
    if config.coordinator != "auto":  # else SLURM, Open MPI or the TPU pod say it
        told = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
    try:
        jax.distributed.initialize(**told)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the other processes: {str(error).splitlines()[0]}",
            where="parallel.coordinator",
            value=config.coordinator,
            hint='HOST:PORT of process 0, the same for all; "auto" on SLURM and TPU pods',
        ) from error
    return jax.process_index()


def make_mesh(config: ParallelConfig, model: ModelConfig, batch_size: int) -> Mesh | None:
    """The mesh of a stage; None where it is one device.

    Raises:
      UserError: sizes that the devices, the batch or the model do not divide into.
    """
    sizes = {name: getattr(config, name) for name in AXES}
    wanted, devices = math.prod(sizes.values()), jax.devices()
    if wanted > len(devices) or (several() and wanted != len(devices)):
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        allowed = "their product is " + "at most " * (not several())
        raise UserError(
            f"a mesh of {wanted} devices ({shape}) does not fit the machine's",
            where="parallel",
            value=wanted,
            allowed=f"{allowed}{len(devices)}",
        )
    for key, value, parts in (
        ("batch_size / accumulation", batch_size, config.data * config.fsdp),
        ("model.embed_dim", model.embed_dim, config.fsdp),
        ("model.num_kv_heads", model.num_kv_heads, config.tensor),
        ("model.mlp_dim", model.mlp_dim, config.tensor),
    ):
        if value % parts:
            raise UserError(
                f"does not divide into {parts} parts",
                where=key,
                value=value,
                allowed=f"multiples of {parts} with this [parallel]",
            )
    if wanted == 1:
        return None
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted]
    )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Of every leaf: a parameter's by RULES, in the optimizer's state and in averages alike."""

    def of(x: Any) -> NamedSharding:
        axes = x.get_metadata().get("axes", ()) if isinstance(x, nnx.Variable) else ()
        names = [RULES.get(axis) for axis in axes]
        # As XLA would write it, or a step's result would not look like its input: no axis of one
        # device, no None at the end.
        spec = [name if name and mesh.shape[name] > 1 else None for name in names]
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def build(mesh: Mesh | None, make: Callable[..., Any], *inputs: Any) -> Any:
    """`make(*inputs)`, each device making its own part: the whole is never on one of them."""
    if mesh is None:
        return make(*inputs)
    return jax.jit(make, out_shardings=shardings(mesh, jax.eval_shape(make, *inputs)))(*inputs)


def constrain(mesh: Mesh | None, tree: Any) -> Any:
    """Inside a jitted function: the placement that `build` gave, kept."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def read(mesh: Mesh | None, batches: Any, step: int) -> Any:
    """Batch `step`, of which this process makes the rows of its own devices alone.

    Args:
      batches: has `size(step)` and `part(step, start, stop)`, as `minilm.text.batches.Batches`.
    """
    if mesh is None:
        return batches[step]
    rows, size = NamedSharding(mesh, ROWS), batches.size(step)
    own = {_span(at, size) for at in rows.addressable_devices_indices_map((size,)).values()}
    parts = {span: batches.part(step, *span) for span in own}

    def place(*leaves: np.ndarray) -> jax.Array:
        known = dict(zip(parts, leaves, strict=True))
        shape = (size, *leaves[0].shape[1:])
        return jax.make_array_from_callback(shape, rows, lambda at: known[_span(at, size)])

    return jax.tree.map(place, *parts.values())


def _span(at: Any, size: int) -> tuple[int, int]:
    """First row and the one after the last."""
    start, stop, _ = at[0].indices(size)
    return start, stop


def several() -> bool:
    """Whether other processes take part."""
    return jax.process_count() > 1


def gathered(tree: Any) -> Any:
    """What several processes hold together, in this one's host memory; collective: all must ask."""
    return multihost_utils.process_allgather(tree, tiled=True) if several() else tree


def whole(tree: Any) -> Any:
    """The same on this process's first device, as a model to evaluate has to be."""
    return jax.tree.map(jnp.asarray, gathered(tree)) if several() else tree


def is_first() -> bool:
    """Whether this is the process that saves."""
    return jax.process_index() == 0


def any_says(flag: bool) -> bool:
    """Whether one of the processes says yes; collective."""
    if not several():
        return flag
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def said_by_first(*numbers: int | float) -> tuple:
    """The numbers of the first process, in float32; collective."""
    if not several():
        return numbers
    told = multihost_utils.broadcast_one_to_all(np.array(numbers, np.float32))
    return tuple(type(own)(x) for own, x in zip(numbers, told.tolist(), strict=True))


def told_by_first(todo: list[str]) -> list[str]:
    """The first process's list, of which the others have no more than it has; collective."""
    (count,) = said_by_first(len(todo))
    return todo[:count]


def read_by_first(state: Any, restore: Callable[[Any], Any]) -> Any:
    """`restore(state)`, read by the first process and told to the others; collective."""
    if not several():
        return restore(state)
    own = gathered(state)
    told = multihost_utils.broadcast_one_to_all(restore(own) if is_first() else own)
    return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), told, state)
