"""A run that is stopped anywhere and started again is, bit for bit, the run that was not."""

import random
from signal import SIGINT, SIGKILL, SIGTERM

import pytest

# In the order of a run: the file operation before which the signal comes, and which.
STOPS = {
    "before rows have their name": ("*/cache/.tmp-rows-*", 2, SIGKILL),
    "Ctrl-C": ("*/pretrain/checkpoints/.tmp-step_00000010", 1, SIGINT),
    "within a save": ("*/pretrain/checkpoints/.tmp-step_00000020/*", 3, SIGKILL),
    "between evaluation and best": ("*/pretrain/checkpoints/step_*20/*metadata.json*", 2, SIGKILL),
    "after the last step": ("*/pretrain/*loss_map.json*", 1, SIGKILL),
    "between done and summary": ("*/*summary.json*", 1, SIGKILL),
    "writing the pairs": ("*/preferences/*held_out.jsonl*", 1, SIGKILL),
    "within a save of the reward model": ("*/reward/checkpoints/.tmp-step_00000004/*", 5, SIGKILL),
    "evaluating the reward model": ("*/reward/*evaluation.json*", 1, SIGKILL),
    "SIGTERM": ("*/rlhf/checkpoints/.tmp-step_00000002", 1, SIGTERM),
    "within a save of the policy": ("*/rlhf/checkpoints/.tmp-step_00000004/*", 1, SIGKILL),
    "evaluating the policy": ("*/rlhf/*samples.jsonl*", 1, SIGKILL),
}
SAVED = (SIGINT, SIGTERM)  # these save and exit cleanly


def test_killed_at_chosen_instants_it_ends_the_same(
    tmp_path, tiny, tiny_run, processes, assert_same
):
    """One run, stopped twelve times: within saves, between them, in every stage."""
    out = tmp_path / "run"
    for name, (pattern, times, number) in STOPS.items():
        done = processes("run", tiny, "--out", out, at=(pattern, times, number))
        assert done.code == (130 if number in SAVED else -SIGKILL), f"{name}: {done.output}"
        if number in SAVED:
            assert "the same command resumes" in done.output
            assert (out / "report.html").exists()
    done = processes("run", tiny, "--out", out)
    assert done.code == 0, done.output
    assert_same(out, tiny_run)


def test_a_damaged_last_checkpoint_is_passed_over(tmp_path, tiny, tiny_run, processes, assert_same):
    out = tmp_path / "run"
    stop = ("*/pretrain/checkpoints/.tmp-step_00000040", 1, SIGKILL)
    words = ["run", tiny, "--out", out, "--until", "pretrain"]
    assert processes(*words, at=stop).code == -SIGKILL
    kept = sorted((out / "pretrain" / "checkpoints").glob("step_*"))
    assert len(kept) >= 2
    largest = max(
        (p for p in kept[-1].rglob("*") if p.is_file() and p.name != "metadata.json"),
        key=lambda p: p.stat().st_size,
    )
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    done = processes(*words)
    assert done.code == 0, done.output
    assert "damaged checkpoint skipped" in done.output
    assert_same(out, tiny_run, ("pretrain",))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_instants_it_ends_the_same(
    tmp_path, tiny, tiny_run, processes, assert_same, seed
):
    """SIGKILL by the clock, so within saves of Orbax's threads and compilations too."""
    moments, out, kills = random.Random(seed), tmp_path / "run", 0
    while (done := processes("run", tiny, "--out", out, after=moments.uniform(1, 5))).code:
        assert done.code == -SIGKILL, done.output
        kills += 1
        assert kills < 100
    assert kills > 0
    assert_same(out, tiny_run)
