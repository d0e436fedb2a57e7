"""`minilm oracle`: algorithms trained by minilm's own code reach, and never pass, the bound."""

import json

import numpy as np
import pytest

from minilm import cli
from minilm.studies import exact, oracle


@pytest.fixture(scope="module")
def task():
    """One whose best completion is likely enough to be met: what is never sampled is not learnt."""
    return oracle.problem(3, vocab=3, length=3)


@pytest.fixture(scope="module")
def found(task):
    """At four times the command's rate, for want of time."""
    faster = oracle.SETTINGS.optimizer.model_copy(update={"learning_rate": 8e-3})
    config = oracle.SETTINGS.model_copy(update={"optimizer": faster})
    return oracle.compare(task, ["rloo", "ppo", "expert_iteration"], 80, config)


def test_algorithms_come_near_their_optimum(found):
    """With unbiased gradients and 80 steps of 64 completions; a sign error would end below 0."""
    shares = {name: row["share"] for name, row in found["algorithms"].items()}
    assert shares["rloo"] > 0.85
    assert shares["ppo"] > 0.8
    assert shares["expert_iteration"] > 0.8
    assert max(shares.values()) <= 1 + 1e-6


def test_no_algorithm_has_more_reward_than_the_frontier_at_its_kl(found):
    bound = found["frontier"]
    for row in found["algorithms"].values():
        most = np.interp(row["kl"][1:], bound["kl"], bound["reward"])
        assert (np.array(row["reward"][1:]) <= most + 0.02).all()


def test_every_algorithm_starts_at_the_reference_with_a_value_head_too(found):
    for row in found["algorithms"].values():
        assert row["kl"][0] == pytest.approx(0, abs=1e-6)
        assert row["reward"][0] == pytest.approx(found["start"], abs=1e-5)


def test_the_frontier_is_that_of_the_tilted_reference(task, found):
    bound = found["frontier"]
    assert np.all(np.diff(bound["kl"]) > 0)
    assert np.all(np.diff(bound["reward"]) > 0)
    at_beta = exact.optimal(task.logprobs, task.reward, oracle.BETA)
    assert found["optimum"]["kl"] == pytest.approx(exact.kl(at_beta, task.logprobs))
    best = found["best_of_n"]
    most = np.interp(best["kl"][1:], bound["kl"], bound["reward"])
    assert (np.array(best["reward"][1:]) <= most + 0.02).all()


def test_the_command_writes_figures_and_a_picture_of_an_algorithms_rows(tmp_path, capsys):
    words = ["oracle", "--out", str(tmp_path), "--algorithms", "grpo", "--steps", "5"]
    assert cli.main(words) == 0
    assert "of the optimum" in capsys.readouterr().out
    found = json.loads((tmp_path / "oracle.json").read_text())
    assert set(found["algorithms"]) == {"grpo", "grpo, k2"}
    assert (tmp_path / "oracle.png").read_bytes().startswith(b"\x89PNG")


def test_where_and_how_kl_is_priced_is_the_configs(task):
    """`rlhf.kl_estimator` and `rlhf.kl_in` were once left out: every row took its paper's."""

    def after(name, **priced):
        return oracle.train(name, task, oracle.SETTINGS.model_copy(update=priced), 5).kl[-1]

    own = after("grpo")
    assert after("grpo", kl_estimator="k2") == after("grpo, k2") != own
    assert after("grpo", kl_in="reward") not in (own, after("grpo, k2"))


def test_a_misspelt_algorithm_is_named(tmp_path, capsys):
    assert cli.main(["oracle", "--out", str(tmp_path), "--algorithms", "rlo"]) == 2
    assert "did you mean 'rloo'" in capsys.readouterr().err
