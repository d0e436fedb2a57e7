"""The audit of a healthy run: silent, and its shares add up."""

import json

import pytest

from minilm import cli
from minilm.algorithms import ALGORITHMS
from minilm.audit import CHECKS, as_dict, audit
from minilm.audit.card import described
from minilm.losses import LOSSES
from minilm.terms import LOSS_OF, TERMS


@pytest.fixture(scope="module")
def found(tiny_run):
    return audit(tiny_run)


def test_a_healthy_run_of_every_stage_passes(found):
    assert [check for check in found.checks if check.passed is False] == []
    names = {check.name for check in found.checks}
    for stage, checks in CHECKS.items():
        assert {f"{stage}: {name}" for name in checks} <= names


def test_shares_add_up(found):
    assert [card.stage for card in found.cards] == ["pretrain", "reward", "rlhf"]
    for card in found.cards:
        for shares in (
            [t.loss_share for t in card.terms], [t.gradient_share for t in card.terms],
            [g.elements for g in card.groups], [g.gradient for g in card.groups],
        ):  # fmt: skip
            assert sum(shares) == pytest.approx(1) or not any(shares)  # advantages cancel
        assert all(0 < share <= 1 for share in card.heaviest.values() if share)


def test_every_trained_term_says_what_it_rewards_and_ignores(found):
    for card in found.cards:
        for term in card.terms:
            assert "pays" in term.pays_for
            assert term.rewards
            assert term.ignores


@pytest.mark.parametrize(
    "term", sorted({t for rows in TERMS.values() for t in rows} | set(LOSS_OF))
)
def test_every_term_of_the_registry_is_described(term):
    assert LOSS_OF.get(term, term) in LOSSES
    assert all(described(term))


def test_the_audit_is_json(found):
    assert json.loads(json.dumps(as_dict(found)))["failed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"rloo"}))
def test_other_algorithms_pass_too(algorithm, tiny, tiny_copy, processes):
    words = ["run", tiny, "--out", tiny_copy, "--redo", "rlhf", "--rlhf.algorithm", algorithm]
    assert processes(*words).code == 0
    done = processes("audit", tiny_copy)
    assert done.code == 0, done.output


def test_the_command_writes_and_tells_by_its_exit_code(tiny_copy, capsys):
    (tiny_copy / "rlhf" / "metrics.jsonl").write_text("")
    assert cli.main(["audit", str(tiny_copy)]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert json.loads((tiny_copy / "audit.json").read_text())["failed"] >= 1
    assert (tiny_copy / "audit.svg").read_text().startswith("<?xml")


def test_a_folder_that_is_no_run_is_a_users_error(tmp_path, capsys):
    assert cli.main(["audit", str(tmp_path)]) == 2
    assert "config.toml" in capsys.readouterr().err


@pytest.mark.slow
def test_a_config_is_audited_before_anything_is_spent(tiny, processes):
    done = processes("audit", tiny, "--objective.z_loss.weight", "1e-3")
    assert done.code == 0, done.output
    assert "z_loss" in done.output
