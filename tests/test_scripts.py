"""The scripts, in order, are `minilm run` in pieces."""

from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_pretrain_reward_and_rlhf_in_order_give_what_run_gives_bit_for_bit(
    tmp_path, tiny, tiny_run, processes, assert_same
):
    for name in ("pretrain", "reward", "rlhf"):
        done = processes(SCRIPTS / f"{name}.py", tiny, "--out", tmp_path / "run")
        assert done.code == 0, done.output
    assert_same(tmp_path / "run", tiny_run)
