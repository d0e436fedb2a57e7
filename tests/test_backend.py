"""How the compute dtype and the XLA flags are chosen. JAX has started here: trials are faked."""

import io
import json
import os
import platform
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minilm import backend
from minilm.backend import FLAGS, Choice, Trial
from minilm.config import BackendConfig

FAST = Trial("cpu", None, {"float32": 20.0, "bfloat16": 10.0})
SLOW = Trial("cpu", None, {"float32": 20.0, "bfloat16": 19.9})
DEAD = Trial("cpu", None, {"float32": 20.0})
NONE = Trial("", None, {})
T4 = Trial("Tesla T4", False, {})
H100 = Trial("NVIDIA H100", True, {})


class Machine:
    """A machine whose children answer with `trial`, and which counts how often they are asked."""

    def __init__(self) -> None:
        self.trial, self.asked = FAST, []

    def __call__(self, flags: dict[str, str]) -> Trial:
        self.asked.append(flags)
        return self.trial


@pytest.fixture
def machine(monkeypatch, tmp_path: Path) -> Machine:
    """An x86 Linux machine on which JAX has not started and no flags are set."""
    machine = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(backend, "_trial", machine)
    monkeypatch.setattr(backend, "_jax_has_started", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(backend, "_start_jax", lambda flags: None)
    return machine


def flags_now() -> str:
    return os.environ.get("XLA_FLAGS", "")


@pytest.mark.parametrize(
    ("trial", "dtype", "flags"),
    [
        (FAST, "bfloat16", FLAGS),
        (SLOW, "float32", ""),
        (DEAD, "float32", ""),
        (NONE, "float32", ""),
        (T4, "float32", ""),
        (H100, "bfloat16", ""),
    ],
)
def test_auto_takes_what_the_trial_finds_faster(machine: Machine, trial, dtype: str, flags: str):
    machine.trial = trial
    choice = backend.configure(BackendConfig())
    assert (choice.compute_dtype, choice.xla_flags, flags_now()) == (dtype, flags, flags)


@pytest.mark.parametrize(("trial", "dtype"), [(T4, "float32"), (H100, "bfloat16")])
def test_where_there_may_be_a_gpu_its_sums_are_told_to_repeat(
    machine: Machine, monkeypatch, trial, dtype
):
    """Without the flag, two runs of the same eight steps on an H100 differed."""
    monkeypatch.setattr(backend, "_accelerated", lambda: True)
    machine.trial = trial
    choice = backend.configure(BackendConfig())
    assert (choice.compute_dtype, choice.xla_flags) == (dtype, backend.GPU_FLAGS)
    assert flags_now() == backend.GPU_FLAGS
    again = backend.configure(BackendConfig(), choice._asdict())
    assert again.xla_flags == backend.GPU_FLAGS


def test_the_reason_names_both_times(machine: Machine):
    reason = backend.configure(BackendConfig()).reason
    assert "10.0 ms in bfloat16" in reason
    assert "20.0 in float32" in reason


def test_a_users_own_flags_are_left_alone_and_tried_with_both_dtypes(machine: Machine, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    choice = backend.configure(BackendConfig())
    assert machine.asked == [{"float32": "--xla_mine=1", "bfloat16": "--xla_mine=1"}]
    assert (choice.compute_dtype, choice.xla_flags) == ("bfloat16", "--xla_mine=1")
    assert flags_now() == "--xla_mine=1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_none_sets_no_flags_and_a_given_dtype_needs_no_trial(machine: Machine, dtype):
    choice = backend.configure(BackendConfig(compute_dtype=dtype, xla_flags="none"))
    assert (choice.compute_dtype, choice.xla_flags, machine.asked) == (dtype, "", [])


def test_a_given_bfloat16_takes_the_flags_where_a_child_lived_with_them(machine: Machine):
    machine.trial = SLOW
    choice = backend.configure(BackendConfig(compute_dtype="bfloat16"))
    assert (choice.compute_dtype, choice.xla_flags) == ("bfloat16", FLAGS)


def test_a_given_bfloat16_does_without_flags_that_kill(machine: Machine):
    machine.trial = DEAD
    choice = backend.configure(BackendConfig(compute_dtype="bfloat16"))
    assert (choice.compute_dtype, choice.xla_flags) == ("bfloat16", "")


def test_a_second_run_remembers_the_trial_of_the_same_machine(machine: Machine):
    first = backend.configure(BackendConfig())
    assert backend.configure(BackendConfig()) == first
    assert machine.asked == [{"float32": "", "bfloat16": FLAGS}]


def test_a_trial_whose_child_died_is_not_remembered(machine: Machine):
    machine.trial = DEAD
    backend.configure(BackendConfig())
    machine.trial = FAST
    assert backend.configure(BackendConfig()).compute_dtype == "bfloat16"


def test_a_damaged_memory_is_made_anew(machine: Machine, tmp_path: Path):
    backend.configure(BackendConfig())
    (path,) = (tmp_path / "minilm").glob("trial-*.json")
    path.write_text("{")
    assert backend.configure(BackendConfig()).compute_dtype == "bfloat16"
    assert json.loads(path.read_text())["device"] == "cpu"


def test_an_unwritable_cache_only_costs_the_memory(machine: Machine, monkeypatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert backend.cache_dir() is None
    assert backend.configure(BackendConfig()).compute_dtype == "bfloat16"


def test_a_resumed_run_keeps_its_choice_without_a_trial(machine: Machine):
    machine.trial = SLOW
    stored = Choice("bfloat16", FLAGS, "", backend.JAXLIB)._asdict()
    choice = backend.configure(BackendConfig(), stored)
    assert (choice.compute_dtype, choice.xla_flags, flags_now()) == ("bfloat16", FLAGS, FLAGS)
    assert machine.asked == []


def test_a_resumed_run_drops_flags_that_a_new_jaxlib_refuses(machine: Machine):
    machine.trial = NONE
    stored = Choice("bfloat16", "--xla_of_old=1", "", "0.1.0")._asdict()
    choice = backend.configure(BackendConfig(), stored)
    assert (choice.compute_dtype, choice.xla_flags) == ("bfloat16", "")


def test_where_jax_has_started_the_flags_stay_and_the_dtype_is_tried_under_them(
    machine: Machine, monkeypatch
):
    monkeypatch.setattr(backend, "_jax_has_started", lambda: True)
    assert backend.configure(BackendConfig()).xla_flags == ""
    assert machine.asked == [{"float32": "", "bfloat16": ""}]
    stored = Choice("bfloat16", FLAGS, "", backend.JAXLIB)._asdict()
    choice = backend.configure(BackendConfig(), stored)
    assert (choice.compute_dtype, choice.xla_flags) == ("bfloat16", "")


def test_an_unknown_flag_kills_the_child_and_not_us():
    assert backend._trial({"bfloat16": "--xla_no_such_flag=1"}) == NONE


@pytest.mark.slow
def test_a_real_trial_times_both_dtypes():
    trial = backend._trial({"float32": "", "bfloat16": ""})
    assert trial.device == "cpu"
    assert trial.milliseconds.keys() == {"float32", "bfloat16"}


def test_the_child_says_what_device_it_has_and_times_a_step_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\ngo\n"))
    backend._child_main("float32")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["device"], line["fast_bfloat16"]) for line in lines] == 2 * [("cpu", None)]
    assert all(line["milliseconds"] > 0 for line in lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_timed_step_is_a_gradient_step_of_every_matrix(dtype: str):
    step, matrices = backend._step(dtype)
    for before, after in zip(matrices, step(matrices), strict=True):
        assert after.dtype == jnp.float32
        assert jnp.isfinite(after).all()
        assert (after != before).any()


def test_compiled_programs_are_kept_except_onednns(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backend.atexit, "register", lambda *_: None)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        backend._start_jax(FLAGS)
        assert jax.config.jax_compilation_cache_dir is None
        backend._start_jax("")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "minilm" / "xla")
        jax.config.update("jax_compilation_cache_dir", "/a/users/own")
        backend._start_jax("")
        assert jax.config.jax_compilation_cache_dir == "/a/users/own"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_function_is_kept_only_where_onednns_programs_must_not_die(monkeypatch):
    """Their destruction right after use aborted a process on a busy machine, at its very end."""

    def alive_after_keeping() -> bool:
        def function(): ...

        reference = weakref.ref(backend.keep(function))
        del function
        return reference() is not None

    monkeypatch.setattr(backend, "_KEPT", [])
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not alive_after_keeping()
    monkeypatch.setenv("XLA_FLAGS", FLAGS)
    assert alive_after_keeping()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="oneDNN's")
def test_a_process_outlives_its_kept_programs():
    # Without `keep`, 5 of 5 processes aborted within a second.
    code = (
        "import jax, jax.numpy as jnp; from minilm.backend import _start_jax, keep, FLAGS\n"
        "_start_jax(FLAGS)\n"
        "def once(x): return keep(jax.jit(lambda a: jnp.tanh(a @ a) @ a))(x)\n"
        "for _ in range(40): once(jnp.ones((512, 512), jnp.bfloat16)).block_until_ready()\n"
    )
    environment = {**os.environ, "XLA_FLAGS": FLAGS}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )


def test_facts_name_versions_and_hardware_in_json():
    facts = json.loads(json.dumps(backend.facts()))
    assert facts["jax"] == jax.__version__
    assert facts["device"] == "cpu"
    assert facts["cores"] >= 1
    assert {"python", "jaxlib", "flax", "optax", "cpu", "device", "minilm"} <= facts.keys()


def test_the_matrix_product_rate_is_in_gflops():
    # From a tenth of one slow core to a hundred fast ones.
    assert 0.1 < backend.matmul_rate("float32") < 1e5


def test_importing_the_backend_does_not_import_jax():
    code = "import sys, minilm.backend, minilm.configfile as _; "
    code += "print('jax' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
