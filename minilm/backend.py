"""How JAX computes here: XLA flags and compute dtype, chosen before JAX starts by a short trial.

On a CPU, bfloat16 is faster than float32 only where oneDNN's fused kernels and AVX-512 BF16 or AMX
exist, and slower elsewhere; so it is timed, not guessed.
"""

import atexit
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minilm.config import BackendConfig

# Their names change between releases of jaxlib, and one that it does not know kills the process at
# the first computation: so they are used only after a child process has lived with them.
FLAGS = "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_fusion_type=dot,eltwise,reduce"
# Sums of scattered gradients otherwise depend on which thread comes first. Only a GPU reads it.
GPU_FLAGS = "--xla_gpu_deterministic_ops=true"
TIMEOUT = 60.0  # seconds for a whole trial
WORTH_IT = 0.95  # bfloat16 costs digits, so it has to save some of float32's time
WIND_UP = 0.3  # seconds; 0.05 was enough in 268 of 268 cases on a machine at five times its load
JAXLIB = importlib.metadata.version("jaxlib")
_KEPT: list[object] = []


class Choice(NamedTuple):
    """What a run computes with; stored in it, so that a resume keeps it."""

    compute_dtype: str
    xla_flags: str  # as set, or as found in XLA_FLAGS
    reason: str  # one line for the user
    jaxlib: str  # the version that took these flags


class Trial(NamedTuple):
    """What the child processes found."""

    device: str
    fast_bfloat16: bool | None  # of an accelerator; None on a CPU, which is timed
    milliseconds: dict[str, float]  # a step, by dtype; one whose child died is missing


def configure(config: BackendConfig, stored: Mapping[str, Any] | None = None) -> Choice:
    """Sets XLA_FLAGS and says which compute dtype to use. Call it before JAX computes anything.

    A user's own XLA_FLAGS are left alone. `stored`, an earlier Choice as a dict, is kept to.
    """
    found = os.environ.get("XLA_FLAGS", "")
    # FLAGS themselves were set by an earlier call or a parent process: they count as ours.
    known = found in ("", FLAGS, GPU_FLAGS)
    ours = config.xla_flags == "auto" and known and not _jax_has_started()
    if stored:
        dtype = stored["compute_dtype"] if config.compute_dtype == "auto" else config.compute_dtype
        flags = stored["xla_flags"] if ours else found
        # A newer jaxlib may no longer know them.
        if flags and stored["jaxlib"] != JAXLIB and not _trial({dtype: flags}).milliseconds:
            flags = ""
        choice = Choice(dtype, flags, "as when this run began", JAXLIB)
    else:
        can_fuse = ours and sys.platform == "linux" and platform.machine() == "x86_64"
        plain = (GPU_FLAGS if _accelerated() else "") if ours else found
        choice = _chosen(config.compute_dtype, plain, FLAGS if can_fuse else plain)
    if choice.xla_flags:
        os.environ["XLA_FLAGS"] = choice.xla_flags
    else:
        os.environ.pop("XLA_FLAGS", None)
    _start_jax(choice.xla_flags)
    return choice


def keep[F](function: F) -> F:
    """Keeps a jitted function, and so its program, until the process ends; returns it.

    jaxlib 0.12 aborts the process ("Check failed: available_.size() == num_created_") when a
    program with oneDNN fusions is destroyed within milliseconds of its last use. So a function
    that is jitted inside another one, and would die when that returns, has to be kept.
    """
    if "onednn" in os.environ.get("XLA_FLAGS", ""):
        _KEPT.append(function)
    return function


def cache_dir() -> Path | None:
    """A folder of minilm's own in the user's cache, made if need be; None where none can be."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minilm"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def facts() -> dict[str, Any]:
    """Versions and hardware, for a run's record. Starts JAX."""
    import jax

    packages = ("minilm", "jax", "jaxlib", "flax", "optax")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "system": platform.platform(),
        "cpu": _cpu()[0],
        "cores": os.cpu_count(),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def matmul_rate(dtype: str) -> float:
    """GFLOP/s of a square matrix product now: a shared machine has slow hours. Starts JAX."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = keep(jax.jit(lambda a, b: a @ b))
    times = timeit.repeat(lambda: product(x, x).block_until_ready(), number=1, repeat=25)
    return (
        2 * size**3 / statistics.median(times) / 1e9
    )  # the first, with compilation, is an outlier


def _chosen(dtype: str, plain: str, fused: str) -> Choice:
    """By trial, where there is a choice: float32 with the flags `plain`, bfloat16 with `fused`."""
    if dtype == "float32" or (dtype == "bfloat16" and fused == plain):
        return Choice(dtype, plain, "as configured", JAXLIB)
    device, fast, times = _remembered_trial({"float32": plain, "bfloat16": fused})
    if fast is not None:  # an accelerator, for which the CPU's flags are not
        fused = plain
        reason = f"{device} {'has' if fast else 'lacks'} fast bfloat16"
    elif len(times) < 2:
        reason = "no child process could try bfloat16 here"
    else:
        fast = times["bfloat16"] < WORTH_IT * times["float32"]
        how = " with oneDNN fusion" if fused == FLAGS else ""
        reason = f"a trial step took {times['bfloat16']:.1f} ms in bfloat16{how}"
        reason += f", {times['float32']:.1f} in float32"
    if dtype == "auto":
        dtype = "bfloat16" if fast else "float32"
    flags = fused if dtype == "bfloat16" and "bfloat16" in times else plain
    return Choice(dtype, flags, reason, JAXLIB)


def _remembered_trial(flags: dict[str, str]) -> Trial:
    """The trial of this processor, jaxlib and flags, from the user's cache where it is there."""
    folder = cache_dir()
    if folder is None or _accelerated():
        return _trial(flags)
    key = hashlib.sha256(repr((_cpu(), os.cpu_count(), JAXLIB, flags)).encode()).hexdigest()
    path = folder / f"trial-{key[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Trial(**json.loads(path.read_text()))
    trial = _trial(flags)
    if len(trial.milliseconds) == 2:  # a child that died, of memory say, gets another chance
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(trial._asdict()))
    return trial


def _accelerated() -> bool:
    """Whether JAX may find a GPU or a TPU here."""
    plugin = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    return plugin and os.environ.get("JAX_PLATFORMS") != "cpu"


def _trial(flags: dict[str, str]) -> Trial:
    """Times a step by dtype, each in a child process with its flags.

    They take turns, since a shared machine changes speed by more than what is to be told apart.
    """
    trial = Trial("", None, {})
    children = {dtype: _start_child(dtype, flags[dtype]) for dtype in flags}
    watchdog = threading.Timer(TIMEOUT, lambda: [child.kill() for child in children.values()])
    watchdog.daemon = True
    watchdog.start()
    for dtype, child in 12 * list(children.items()):
        with contextlib.suppress(OSError, ValueError):  # it has died: no pipe, or no answer
            child.stdin.write(b"go\n")
            answer = json.loads(child.stdout.readline())
            best = min(answer.pop("milliseconds"), trial.milliseconds.get(dtype, math.inf))
            trial = Trial(**answer, milliseconds=trial.milliseconds | {dtype: best})
        if trial.fast_bfloat16 is not None:
            break
    watchdog.cancel()
    for child in children.values():
        child.kill()
        child.communicate()
    return trial


def _start_child(dtype: str, flags: str) -> Any:
    return subprocess.Popen(
        [sys.executable, "-m", "minilm.backend", dtype],
        cwd=Path(__file__).parents[1],  # where `-m` finds minilm even if it is not installed
        env={**os.environ, "XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )


def _child_main(dtype: str) -> None:
    """The child's side: for each line it reads, says what device it has and what a step took."""
    import jax

    device, fast = jax.devices()[0], None
    if device.platform == "gpu":
        # NVIDIA's "8.0" (Ampere) is the first with bfloat16 units; AMD's are called "gfx90a" etc.
        capability = str(device.compute_capability)
        fast = capability.startswith("gfx") or float(capability) >= 8
    elif device.platform == "tpu":
        fast = True
    step, matrices = _step(dtype)
    matrices = jax.block_until_ready(step(matrices))
    for _ in sys.stdin:
        start = time.perf_counter()
        matrices = jax.block_until_ready(step(matrices))
        took = round(1e3 * (time.perf_counter() - start), 2)
        answer = {"device": device.device_kind, "fast_bfloat16": fast, "milliseconds": took}
        print(json.dumps(answer), flush=True)


def _step(dtype: str) -> tuple[Callable[[Any], Any], Any]:
    """A gradient step of attention and a feed-forward layer, at the default config's sizes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(0)  # JAX would compile a program for each of these lines
    x = random.standard_normal((16, 128, 128), np.float32)
    shapes = ((128, 3 * 128), (128, 2 * 352), (352, 128))
    matrices = [0.1 * random.standard_normal(shape, np.float32) for shape in shapes]

    def loss(matrices: Any) -> Any:
        qkv, up, down = (matrix.astype(dtype) for matrix in matrices)
        h = jnp.asarray(x, dtype)
        q, k, v = jnp.split((h @ qkv).reshape(16, 128, 4, 3 * 32), 3, axis=-1)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores / 32**0.5, axis=-1).astype(dtype)
        h = h + jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(h.shape)
        gate, wide = jnp.split(h @ up, 2, axis=-1)
        return jnp.square(((jax.nn.silu(gate) * wide) @ down).astype(jnp.float32)).mean()

    gradient = jax.grad(loss)
    step = jax.jit(lambda m: [p - 0.1 * g for p, g in zip(m, gradient(m), strict=True)])
    return step, matrices


def _start_jax(flags: str) -> None:
    """Keeps compiled programs between runs, except oneDNN's, which JAX can't store and warns about.

    Those need a moment at the end instead, for the reason that `keep` gives.
    """
    import jax

    folder = cache_dir()
    if "onednn" in flags:
        atexit.register(time.sleep, WIND_UP)  # after JAX's own, so it runs before
    elif folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))


def _jax_has_started() -> bool:
    """Whether a backend exists, after which XLA no longer reads its flags."""
    bridge = sys.modules.get("jax._src.xla_bridge")  # JAX has no public way to ask
    return bridge is not None and bridge.backends_are_initialized()


def _cpu() -> tuple[str, str]:
    """The processor's name and, since virtual machines hide it, its features."""
    info = Path("/proc/cpuinfo")  # Linux's
    text = info.read_text() if info.exists() else ""
    fields = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.MULTILINE))
    return fields.get("model name", platform.machine()), fields.get("flags", "")


if __name__ == "__main__":
    _child_main(sys.argv[1])
