"""Trackers are told what metrics.jsonl is told: read back from TensorBoard's own files."""

import struct
import sys
import types
from pathlib import Path

import pytest

from minilm.config import Config, TrackingConfig
from minilm.errors import UserError
from minilm.metrics import MetricsLog
from minilm.stages.workspace import Workspace
from minilm.trackers import TRACKERS, Tracked


def workspace(out: Path, tracker) -> Workspace:
    return Workspace(Config(tracking=TrackingConfig(tracker=tracker)), out, None, "float32")


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What TensorBoard would read: records of a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


def test_tensorboard_is_told_what_the_log_is_told(tmp_path):
    ws = workspace(tmp_path, "tensorboard")
    opened = ws.tracker("pretrain")
    assert opened is not None
    (tmp_path / "pretrain").mkdir()
    log = MetricsLog(tmp_path / "pretrain" / "metrics.jsonl", keep_until=-1, tracker=opened(-1))
    log.log(10, {"loss": 0.5, "grad_norm": 2.0})
    log.log(10, {"validation_loss": 0.25}, kind="eval")
    log.close()
    assert scalars(tmp_path / "pretrain" / "tensorboard") == [
        ("train/loss", 10, 0.5), ("train/grad_norm", 10, 2.0), ("eval/validation_loss", 10, 0.25),
    ]  # fmt: skip


def test_without_a_tracker_none_is_opened(tmp_path):
    assert workspace(tmp_path, "none").tracker("pretrain") is None


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_stage_goes_on_in_the_same_run(name, tmp_path, monkeypatch):
    told, begun = [], []

    class Run:
        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("closed")

    def init(**options):
        begun.append(options)
        return Run()

    fake = types.SimpleNamespace(init=init, finish=lambda: told.append("closed"))
    monkeypatch.setitem(sys.modules, name, fake)
    for step in (-1, 40):
        of = Tracked(tmp_path, "fables", "reward/member_1", "mine", {"seed": 0}, step)
        tracker = TRACKERS[name](of)
        tracker.log(50, {"train/loss": 1.0})
        tracker.close()
    assert told == [(50, {"train/loss": 1.0}), "closed"] * 2
    assert begun[0] == begun[1]
    assert begun[0]["resume"] == "allow"
    assert begun[0]["name"] == "fables/reward/member_1"


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match="trackio is not installed") as error:
        TRACKERS["trackio"](Tracked(tmp_path, "a", "b", "c", {}, 0))
    assert "pip install trackio" in str(error.value)
