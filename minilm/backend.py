"""How JAX computes here: XLA flags and compute dtype, chosen before JAX starts by a short trial.

On a CPU, bfloat16 is faster than float32 only where oneDNN's fused kernels and AVX-512 BF16 or AMX
exist, and slower elsewhere; so it is timed, not guessed.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minilm.config import BackendConfig

# Their names change between releases of jaxlib, and one that it does not know kills the process at
# the first computation: so they are used only after a child process has lived with them.
FLAGS = "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_fusion_type=dot,eltwise,reduce"
TIMEOUT = 60.0  # seconds for a whole trial
WORTH_IT = 0.95  # bfloat16 costs digits, so it has to save some of float32's time


class Choice(NamedTuple):
    """What a run computes with; stored in it, so that a resume keeps it."""

    compute_dtype: str
    xla_flags: str  # as set, or as found in XLA_FLAGS
    reason: str  # one line for the user
    jaxlib: str  # the version that took these flags


class Trial(NamedTuple):
    """What the child processes found."""

    platform: str  # "cpu", "gpu", "tpu"; "none" where no child lived to tell
    device: str
    fast_bfloat16: bool  # of an accelerator
    milliseconds: dict[str, float]  # a step on CPU, by dtype; one whose child died is missing


def configure(config: BackendConfig, stored: Mapping[str, Any] | None = None) -> Choice:
    """Sets XLA_FLAGS and says which compute dtype to use. Call it before JAX computes anything.

    A user's own XLA_FLAGS are left alone, and "none" in the config leaves them as they are.

    Args:
      stored: an earlier run's Choice as a dict, to go on computing in the same way.
    """
    found, started = os.environ.get("XLA_FLAGS", ""), _jax_has_started()
    # FLAGS themselves were set by an earlier call or a parent process: they count as ours.
    ours = config.xla_flags == "auto" and found in ("", FLAGS) and not started
    flags = FLAGS if ours and _has_onednn() else "" if ours else found
    if stored is not None:
        choice = _kept(config.compute_dtype, stored, found, ours)
    elif config.compute_dtype == "float32" or (config.compute_dtype != "auto" and flags != FLAGS):
        choice = Choice(config.compute_dtype, "" if ours else found, "as configured", _jaxlib())
    else:
        choice = _chosen(config.compute_dtype, _remembered_trial(flags), flags, ours)
    if choice.xla_flags:
        os.environ["XLA_FLAGS"] = choice.xla_flags
    else:
        os.environ.pop("XLA_FLAGS", None)
    _use_compilation_cache(choice.xla_flags)
    return choice


def cache_dir() -> Path | None:
    """A folder of minilm's own in the user's cache, made if need be; None where none can be."""
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or home) / "minilm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
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
        "cores": _cores(),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def matmul_rate(dtype: str, seconds: float = 1.0) -> float:
    """GFLOP/s of a square matrix product now: a shared machine has slow hours. Starts JAX."""
    import jax
    import jax.numpy as jnp

    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def _kept(dtype: str, stored: Mapping[str, Any], found: str, ours: bool) -> Choice:
    dtype = stored["compute_dtype"] if dtype == "auto" else dtype
    flags, reason = stored["xla_flags"], "as when this run began"
    if not ours and flags != found:
        flags, reason = found, "as when this run began, but under the XLA flags found"
    elif flags and stored["jaxlib"] != _jaxlib() and not _trial(flags, ("bfloat16",)).milliseconds:
        flags, reason = "", f"this run's XLA flags are unknown to jaxlib {_jaxlib()}"
    return Choice(dtype, flags, reason, _jaxlib())


def _chosen(dtype: str, trial: Trial, flags: str, ours: bool) -> Choice:
    plain, times = "" if ours else flags, trial.milliseconds
    if trial.platform not in ("cpu", "none"):
        able = "has fast" if trial.fast_bfloat16 else "lacks fast"
        best = "bfloat16" if trial.fast_bfloat16 else "float32"
        reason = f"{trial.device} {able} bfloat16"
        return Choice(best if dtype == "auto" else dtype, plain, reason, _jaxlib())
    if "bfloat16" not in times or "float32" not in times:
        reason = "no child process could try bfloat16 here"
        return Choice("float32" if dtype == "auto" else dtype, plain, reason, _jaxlib())
    took = "a trial step took {bfloat16:.1f} ms in bfloat16, {float32:.1f} in float32".format(
        **times
    )
    if dtype == "bfloat16" or times["bfloat16"] < WORTH_IT * times["float32"]:
        reason = f"{took}, with oneDNN fusion" if flags == FLAGS else took
        return Choice("bfloat16", flags, reason, _jaxlib())
    return Choice("float32", plain, took, _jaxlib())


def _remembered_trial(flags: str) -> Trial:
    """The trial of this processor, jaxlib and flags, from the user's cache where it is there."""
    folder = None if _has_accelerator_plugin() else cache_dir()
    if folder is None:
        return _trial(flags)
    key = hashlib.sha256(repr((_cpu(), _cores(), _jaxlib(), flags)).encode()).hexdigest()[:16]
    path = folder / f"trial-{key}.json"
    try:
        return Trial(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        trial = _trial(flags)
    # A child that died of something else than the flags, memory say, gets another chance.
    if len(trial.milliseconds) == 2:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(trial._asdict()))
        temporary.replace(path)
    return trial


def _trial(flags: str, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> Trial:
    """Times a step by dtype, in child processes that take turns: bfloat16's has the flags.

    Turns, since a shared machine changes speed by more than what is to be told apart.
    """
    trial = Trial("none", "", False, {})
    with contextlib.ExitStack() as stack:
        children = {dtype: stack.enter_context(_child(dtype, flags)) for dtype in dtypes}
        for child in children.values():
            if line := _line(child):
                trial = Trial(**line, milliseconds={})
            if trial.platform not in ("cpu", "none"):
                return trial
        for dtype, child in 12 * list(children.items()):
            if line := _line(child, ask=True):
                took = line["milliseconds"]
                trial.milliseconds[dtype] = min(trial.milliseconds.get(dtype, took), took)
    return trial


@contextlib.contextmanager
def _child(dtype: str, flags: str) -> Iterator[Any]:
    environment = {
        **os.environ,
        "XLA_FLAGS": "" if flags == FLAGS and dtype == "float32" else flags,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # A clone that is not installed finds itself.
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        ).strip(os.pathsep),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "minilm.backend", dtype],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watchdog = threading.Timer(TIMEOUT, child.kill)
    watchdog.start()
    try:
        yield child
    finally:
        watchdog.cancel()
        child.kill()
        child.communicate()


def _line(child: Any, *, ask: bool = False) -> dict[str, Any] | None:
    """What the child says next, in answer where asked; None where it has died."""
    if ask:
        with contextlib.suppress(OSError):
            child.stdin.write("go\n")
            child.stdin.flush()
    line = child.stdout.readline()
    return json.loads(line) if line.startswith("{") else None


def _child_main(dtype: str) -> None:
    """The child's side: says what device it has, then times a step for each line it reads."""
    import jax

    device = jax.devices()[0]
    fast = device.platform == "tpu"
    if device.platform == "gpu":
        # NVIDIA's "8.0" (Ampere) is the first with bfloat16 units; AMD's are called "gfx90a" etc.
        capability = str(device.compute_capability)
        fast = capability.startswith("gfx") or float(capability) >= 8
    print(
        json.dumps(
            {"platform": device.platform, "device": device.device_kind, "fast_bfloat16": fast}
        ),
        flush=True,
    )
    step, parameters, tokens = _step(dtype)
    parameters = jax.block_until_ready(step(parameters, tokens))
    for _ in sys.stdin:
        start = time.perf_counter()
        parameters = jax.block_until_ready(step(parameters, tokens))
        took = 1e3 * (time.perf_counter() - start)
        print(json.dumps({"milliseconds": round(took, 2)}), flush=True)


def _step(dtype: str) -> tuple[Any, Any, Any]:
    """A gradient step of one transformer layer with output layer, at the size of the defaults."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    batch, length, width, heads, hidden, vocabulary = 8, 128, 128, 4, 352, 512
    shapes = {
        "embedding": (vocabulary, width),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 2 * hidden),
        "down": (hidden, width),
    }
    # Numbers from NumPy: JAX would compile a program for each of these lines.
    random = np.random.default_rng(0)
    parameters = {
        name: 0.02 * random.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    tokens = random.integers(0, vocabulary, (batch, length), np.int32)

    def loss(parameters: dict[str, Any], tokens: Any) -> Any:
        p = {name: value.astype(dtype) for name, value in parameters.items()}
        x = p["embedding"][tokens]
        q, k, v = jnp.split((x @ p["qkv"]).reshape(batch, length, heads, -1), 3, axis=-1)
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        x = x + jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(x.shape) @ p["out"]
        gate, up = jnp.split(x @ p["up"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ p["down"]
        logits = jnp.matmul(x, p["embedding"].T, preferred_element_type=jnp.float32)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.take_along_axis(logprobs, tokens[..., None], axis=-1).mean()

    def step(parameters: dict[str, Any], tokens: Any) -> dict[str, Any]:
        gradients = jax.grad(loss)(parameters, tokens)
        return jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradients)

    return jax.jit(step), parameters, tokens


def _use_compilation_cache(flags: str) -> None:
    """Keeps compiled programs between runs; not oneDNN's, which JAX can't store and warns about."""
    import jax

    folder = cache_dir()
    own = jax.config.jax_compilation_cache_dir
    if "onednn" not in flags and folder is not None and not own:
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))


def _jax_has_started() -> bool:
    """Whether a backend exists, after which XLA no longer reads its flags."""
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # JAX has no public way to ask without starting it

    return xla_bridge.backends_are_initialized()


def _has_onednn() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _has_accelerator_plugin() -> bool:
    names = ("jax_plugins", "libtpu")
    cpu_only = os.environ.get("JAX_PLATFORMS") == "cpu"
    return not cpu_only and any(importlib.util.find_spec(name) for name in names)


def _jaxlib() -> str:
    return importlib.metadata.version("jaxlib")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _cpu() -> tuple[str, str]:
    """The processor's name and, since virtual machines hide it, its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), platform.machine()
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {name.strip(): value.strip() for name, value in found.items()}
    return found.get("model name", platform.machine()), found.get("flags", "")


if __name__ == "__main__":
    _child_main(sys.argv[1])
