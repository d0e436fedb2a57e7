"""What every test runs under: checked shapes, no silent promotion, no network."""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Before anything imports JAX or a Hugging Face library; subprocesses inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: programs that nobody optimised are made in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("GLIBC_TUNABLES", "")  # a fork of forkserver.py must not start again
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # for test_parallel.py; all else takes the first
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Every jaxtyping signature in minilm is checked at every call. Must come before minilm is imported.
install_import_hook("minilm", "beartype.beartype")

# (3,) and (3, 1) must not broadcast, nor float32 and int32 mix, in silence.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# No deadline: the first example of a shape compiles. Derandomised: a red build means a change.
settings.register_profile("minilm", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("minilm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One process makes the shared run, in the first file; what reads it comes last.

    Between them the other process has enough to do, and does not wait for the run.
    """

    def place(item: pytest.Item) -> int:
        if item.path.name == "test_resume.py":
            return 0
        return 2 if item.path in readers else 1

    readers = {i.path for i in items if "tiny_run" in vars(i).get("fixturenames", ())}
    items.sort(key=place)


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Forbids files beyond so many bytes, which fails like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Done(NamedTuple):
    """How a command's process ended. `code` is minus the signal's number if one ended it."""

    code: int
    output: str


class Processes:
    """Runs minilm commands, each in a process of its own (see forkserver.py)."""

    def __init__(self, folder: Path, cache: Path):
        self._output = folder / "output"
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(__file__).with_name("forkserver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **CACHE, "JAX_COMPILATION_CACHE_DIR": str(cache)},
        )
        self._ready = False  # it imports JAX while the test process goes on

    def __call__(
        self, *words: object, at: tuple[str, int, int] | None = None, after: float | None = None
    ) -> Done:
        """Runs `minilm WORDS`, or the script that the first word names, and waits for its end.

        Args:
          at: (pattern, n, signal): the process gets `signal` just before its n-th file operation on
            a path like `pattern`.
          after: seconds after which it is killed.
        """
        self._ready = self._ready or self._read() == "ready"
        assert self._ready
        request = {"words": [str(word) for word in words], "output": str(self._output)}
        assert self._server.stdin is not None
        print(json.dumps(request | {"signal": at, "after": after}), file=self._server.stdin)
        self._server.stdin.flush()
        code = int(self._read())
        return Done(code, self._output.read_text(errors="replace"))

    def _read(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        self._server.__exit__(None, None, None)  # closes the pipes, which ends it, and waits


# Programs compiled by one process of a session serve the others, even those that compile fast.
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Path:
    """A folder of all the processes that pytest-xdist runs the tests in."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def compiled(shared) -> Path:
    """Where compiled programs are kept; a folder that the user has for them lives longer."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or shared / "compiled")


@pytest.fixture(scope="session", autouse=True)
def _compiling_once(compiled) -> None:
    """Every test takes programs from there, and leaves its own."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", str(compiled))
    for name, value in CACHE.items():
        jax.config.update(name.lower(), int(value))
    compilation_cache.reset_cache()  # what the imports compiled has settled that there is none


@pytest.fixture(scope="session")
def processes(tmp_path_factory, compiled) -> Iterator[Processes]:
    """Commands in processes of their own."""
    server = Processes(tmp_path_factory.mktemp("processes"), compiled)
    yield server
    server.close()


@pytest.fixture
def tiny_copy(tiny_run, tmp_path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The config of seconds."""
    return Path(__file__).with_name("tiny.toml")


@pytest.fixture(scope="session")
def tiny_run(shared, tiny, processes) -> Path:
    """One uninterrupted run of tests/tiny.toml. To be read, not written."""
    from minilm import cli

    out = shared / "tiny" / "run"
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # made by the first who asks for it
        code = cli.main(["run", str(tiny), "--out", str(out)])
    assert code == 0
    return out


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Asserts that two run folders hold the same figures, curves, files and parameters."""
    from minilm.selftest import differences

    def same(ours: Path, theirs: Path, stages=("pretrain", "preferences", "reward", "rlhf")):
        assert differences(ours, theirs, list(stages)) == []

    return same
