"""What a disk or a kill does to checkpoints: the one before is used, never half of one."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minilm import checkpoint
from minilm.errors import UserError


def save(folder: Path, step: int, tree: Any = None, **options: Any) -> Path:
    tree = {"w": np.full((50, 20), step, np.float32)} if tree is None else tree
    return checkpoint.save(folder, step, tree, {}, **({"keep": 9} | options))


def kept(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step_")) for p in folder.iterdir())


# What a disk does


def largest(path: Path) -> Path:
    files = [file for file in (path / "arrays").rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "torn": lambda path: os.truncate(largest(path), 100),
    "one bit": lambda path: flip_a_bit(largest(path)),
    "file lost": lambda path: largest(path).unlink(),
    "one bit of metadata": lambda path: flip_a_bit(path / "metadata.json"),
    "metadata torn": lambda path: os.truncate(path / "metadata.json", 100),
    "metadata lost": lambda path: (path / "metadata.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(tmp_path, capsys, damage):
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGES[damage](newest)
    assert checkpoint.latest(tmp_path) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line
    assert str(newest) in line
    for read in (checkpoint.load_arrays, checkpoint.find):
        with pytest.raises(UserError, match="step_00000002"):
            read(newest)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        flip_a_bit(largest(save(tmp_path, step)))
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path)


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_half_written_folders_are_ignored_then_swept(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / ".tmp-step_00000002")
    assert checkpoint.latest(tmp_path) == path
    save(tmp_path, 3)
    assert kept(tmp_path) == [1, 3]


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_as_tensorstore_says_it(*_, **__):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")


def no_room_left(_):
    return SimpleNamespace(free=0)


@pytest.mark.parametrize(
    ("target", "failure"),
    [
        ("shutil.disk_usage", no_room_left),
        ("minilm.checkpoint.flush", full_disk),
        ("orbax.checkpoint.Checkpointer.save", full_disk_as_tensorstore_says_it),
    ],
    ids=["before", "files", "arrays"],
)
def test_a_full_disk_leaves_older_checkpoints_as_they_were(tmp_path, monkeypatch, target, failure):
    path = save(tmp_path, 1)
    monkeypatch.setattr(target, failure)
    with pytest.raises(
        UserError, match=r"cannot (save|write): .*(No space left|RESOURCE_EXHAUSTED)"
    ):
        save(tmp_path, 2)
    assert kept(tmp_path) == [1]
    assert checkpoint.latest(tmp_path) == path


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_an_interrupt_while_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


# Imports once, then starts one saving process after another, each killed after a random moment.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import orbax.checkpoint
from minilm import checkpoint

folder, moments = Path(sys.argv[1]), random.Random(0)

def train():
    done = checkpoint.latest(folder)
    step = checkpoint.metadata(done)["step"] if done else 0
    while True:
        step += 1
        tree = {f"w{i}": np.full((64, 64), step, np.float32) for i in range(8)}
        checkpoint.save(folder, step, tree, {}, keep=2)

for line in sys.stdin:
    child = os.fork()
    if not child:
        train()
    time.sleep(moments.uniform(0.05, float(line)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def test_sigkill_at_any_instant_leaves_a_valid_checkpoint(tmp_path):
    """MaxText 5260: killed during a save, the unfinished step was taken as the latest."""
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killer.stdin is not None
    assert killer.stdout is not None
    reached = 0
    with killer:
        for number in range(48):
            if number >= 8 and reached:
                break
            longest = 0.5 * (1 + number // 8)  # on a busy machine a first save may take that long
            print(longest, file=killer.stdin, flush=True)
            assert killer.stdout.readline() == "killed\n"
            newest = checkpoint.latest(tmp_path)
            if newest is None:  # killed before the very first was in place
                assert reached == 0
                continue
            arrays = checkpoint.load_arrays(newest)
            step = checkpoint.metadata(newest)["step"]
            assert {int(value) for a in arrays.values() for value in np.unique(a)} == {step}
            assert step >= reached
            reached = step
    assert reached > 0


def test_killed_between_any_two_operations_a_valid_checkpoint_is_left(tmp_path, monkeypatch):
    """The same, exhaustively: the process "dies" at the n-th rename, removal or flush."""

    class Killed(BaseException):
        pass

    calls = {"left": 0}

    def dying(function):
        def wrapped(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:  # and nothing works from then on, as for a dead process
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    save(tmp_path, 1)
    save(tmp_path, 2)
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    monkeypatch.setattr(checkpoint, "flush", dying(checkpoint.flush))
    for lives in range(60):
        calls["left"] = lives
        step = 2 + lives // 2  # half of the time a step that may be there already
        try:
            save(tmp_path, step, keep=2)
        except Killed:
            finished = False
        else:
            finished = True
        calls["left"] = 10**6
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert checkpoint.load_arrays(newest)["w"][0, 0] == checkpoint.metadata(newest)["step"]
        if finished:
            assert checkpoint.metadata(newest)["step"] == step
            break
    else:
        pytest.fail("never finished")


def test_what_was_just_written_stays_although_a_damaged_one_is_later(tmp_path):
    for step in (1, 2, 9):
        path = save(tmp_path, step)
    flip_a_bit(largest(path))
    save(tmp_path, 3, keep=2)
    assert kept(tmp_path) == [2, 3]
