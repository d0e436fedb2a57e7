"""Records survive a kill, are cut back on resume; progress costs nothing and needs no terminal."""

import errno
import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from minilm import metrics
from minilm.errors import UserError
from minilm.metrics import MetricsLog, Progress, read


def write(path: Path, steps: range, keep_until: int = -1) -> None:
    log = MetricsLog(path, keep_until)
    for step in steps:
        log.log(step, {"loss": 1 / (step + 1)})
    log.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read(path)]


# Records


def test_a_record_is_one_json_object_a_line(tmp_path):
    path = tmp_path / "pretrain" / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.log(10, {"loss": 0.1, "tokens_per_second": 2e4})
    log.log(10, {"validation_loss": 3}, kind="eval")
    lines = path.read_text().splitlines()  # written before the log is closed
    log.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "kind": "train", "loss": 0.1, "tokens_per_second": 2e4},
        {"step": 10, "kind": "eval", "validation_loss": 3.0},
    ]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, -1)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.1})
    log.close()

    def strict(constant):
        raise ValueError(f"{constant} is not JSON")

    record = json.loads(path.read_text(), parse_constant=strict)
    assert record == {
        "step": 1,
        "kind": "train",
        "loss": None,
        "grad_norm": None,
        "learning_rate": 0.1,
        "nonfinite": ["loss", "grad_norm"],
    }
    (back,) = read(path)
    assert math.isnan(back["loss"])
    assert math.isnan(back["grad_norm"])


def test_a_resumed_log_is_cut_back_to_its_checkpoint_and_goes_on(tmp_path):
    resumed, whole = tmp_path / "resumed.jsonl", tmp_path / "whole.jsonl"
    write(resumed, range(8))
    write(resumed, range(5, 10), keep_until=4)
    write(whole, range(10))
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_fresh_start_drops_what_an_earlier_try_wrote(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    write(path, range(0), keep_until=-1)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", range(1, 30, 4))
def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, range(4))
    path.write_bytes(path.read_bytes()[:-torn])
    assert steps(path) == [0, 1, 2]
    write(path, range(3, 5), keep_until=9)
    assert steps(path) == [0, 1, 2, 3, 4]


def test_a_full_disk_during_the_cut_keeps_the_old_records(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("minilm.files.flush", full)
    with pytest.raises(UserError, match="No space left"):
        MetricsLog(path, keep_until=2)
    assert steps(path) == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_a_users_error(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", -1)
    log.close()
    full = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    log._file = full
    with pytest.raises(UserError, match="No space left"):
        log.log(1, {"loss": 1.0})
    log.close()


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "train"}\nnot json\n{"step": 2, "kind": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        read(path)


def test_a_missing_file_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read(tmp_path / "missing.jsonl")


# Progress


def plain(width: int = 40) -> Console:
    return Console(file=io.StringIO(), width=width)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_jupyter=False)


def output(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.seconds)


def test_without_a_terminal_lines_come_seldom_and_at_the_end(monkeypatch):
    clock, console = Clock(monkeypatch), plain()
    with Progress("pretrain", 250, console=console) as progress:
        clock.seconds = 5.0  # of compilation
        for step in range(1, 251):
            progress.update(step, {"loss": 2.5, "grad_norm": 0.125}, tokens=2048)
            clock.seconds += 0.125
    lines = output(console).splitlines()
    assert len(lines) == 4  # at 10, 20, 30 and 36 s; none is wrapped at the console's width
    assert lines[0] == "pretrain  41/250  16,384 tokens/s  0:00:27 left  loss 2.5  grad_norm 0.125"
    assert lines[-1] == "pretrain  250/250  16,384 tokens/s  loss 2.5  grad_norm 0.125"


def test_steps_may_be_passed_over_and_a_resumed_stage_starts_late(monkeypatch):
    clock, console = Clock(monkeypatch), plain()
    with Progress("rlhf", 1000, start=500, console=console) as progress:
        for step in range(510, 611, 10):
            clock.seconds += 1
            progress.update(step, {}, tokens=64)
    assert output(console).splitlines()[0] == "rlhf  600/1000  640 tokens/s  0:00:40 left"


def test_nothing_done_is_nothing_said():
    console = plain()
    with Progress("pretrain", 10, start=10, console=console):
        pass
    assert output(console) == ""


def test_on_a_terminal_one_line_is_redrawn_and_notes_stand_above_it(monkeypatch):
    monkeypatch.setattr(metrics, "_REFRESH", 0.0)
    console = terminal()
    with Progress("pretrain [x]", 3, console=console) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": 2.0}, tokens=10)
            progress.note(f"a note [{step}]")
    text = output(console)
    assert [f"a note [{step}]" in text for step in (1, 2, 3)] == [True] * 3
    assert "  3/3  " in text
    assert "tokens/s  loss 2" in text
    assert text.rindex("a note [3]") < text.rindex("3/3")


def test_a_line_wider_than_the_terminal_is_cut(monkeypatch):
    monkeypatch.setattr(metrics, "_REFRESH", 0.0)
    console = terminal(width=60)
    with Progress("pretrain", 3, console=console) as progress:
        progress.update(1, {f"metric_{i}": float(i) for i in range(20)})
    assert "metric_0 0" in output(console)
    assert "metric_19" not in output(console)
    assert output(console).splitlines()[-2].count("━") + 1 >= 20  # the bar is still there


def test_the_last_line_is_shown_after_an_error_too():
    console = plain()
    with pytest.raises(ZeroDivisionError), Progress("reward", 10, console=console) as progress:
        progress.update(1, {"loss": 1.0})
        raise ZeroDivisionError
    assert output(console).startswith("reward  1/10  loss 1")


@pytest.mark.parametrize("console", [plain(), terminal()], ids=["plain", "terminal"])
def test_an_update_costs_less_than_fifty_microseconds(console):
    """Amortised; measured 1 µs, so that a false alarm needs a machine fifty times slower."""
    count = 20_000
    with Progress("pretrain", count, console=console) as progress:
        start = time.process_time()
        for step in range(count):
            progress.update(step, {"loss": 2.5, "grad_norm": 1.0}, tokens=2048)
        seconds = time.process_time() - start
    assert seconds / count < 50e-6
