"""A stage as the audit sets it up is the stage as it ran."""

import dataclasses

import jax
import numpy as np
import pytest

from minilm import checkpoint, metrics
from minilm.audit.setting import SETTINGS, of_rlhf, rows_of
from minilm.errors import UserError
from minilm.files import read_jsonl
from minilm.stages.policy import PolicyEvaluator
from minilm.stages.workspace import open_run


@pytest.fixture(scope="module")
def settings(tiny_run):
    ws = open_run(tiny_run)
    return {stage: make(ws) for stage, make in SETTINGS.items()}


def first(tiny_run, stage: str) -> dict:
    records = metrics.read(tiny_run / stage / "metrics.jsonl")
    return next(r for r in records if r["kind"] == "train")


def test_the_first_rollout_is_the_one_that_was_trained_on(settings, tiny_run):
    found, logged = settings["rlhf"].parts.collected.metrics, first(tiny_run, "rlhf")
    for name in ("objective/scores", "objective/entropy", "completions/mean_length"):
        assert float(found[name].value) == pytest.approx(logged[name], rel=1e-5)


def test_a_rollout_paid_by_gold_is_audited_as_it_was_paid(settings, tiny_run):
    """What the judge gives is part of the score, as the reward model's is."""
    ws = open_run(tiny_run)
    how = ws.config.rlhf.model_copy(update={"judge_weight": 2.0, "learned_weight": 0.5})
    paid = dataclasses.replace(ws, config=ws.config.model_copy(update={"rlhf": how}))
    collected = of_rlhf(paid).parts.collected
    evaluator = PolicyEvaluator(paid)
    width = collected.samples.tokens.shape[1]
    rows = np.asarray(collected.rollout.tokens)[:, :-width]
    gold = evaluator.judged(rows, collected.samples)
    assert gold.std() > 0
    learned = np.asarray(settings["rlhf"].parts.collected.scores)
    np.testing.assert_allclose(collected.scores, 0.5 * learned + 2 * gold, rtol=1e-4, atol=1e-4)


def test_models_are_those_of_the_checkpoints(settings, tiny_run):
    for stage in ("pretrain", "reward"):
        saved = checkpoint.load_arrays(checkpoint.find(tiny_run / stage))
        for key, leaf in checkpoint.flatten(settings[stage].model).items():
            np.testing.assert_array_equal(np.asarray(leaf), saved[f"model.{key}"])


def test_prompts_are_told_apart_by_split(settings, tiny_run):
    parts = settings["reward"].parts
    for name, prompts in (("train", parts.train_prompts), ("held_out", parts.held_out_prompts)):
        rows = read_jsonl(tiny_run / "preferences" / f"{name}.jsonl")
        assert prompts == {row["prompt"] for row in rows}


def test_the_loss_of_a_batch_does_not_depend_on_its_order(settings):
    found = settings["pretrain"]
    turned = jax.tree.map(lambda x: x[::-1], found.batch)
    assert found.loss(turned) == pytest.approx(found.loss(found.batch), rel=1e-5)


def test_rows_are_cut_from_every_array(settings):
    batch = rows_of(settings["pretrain"].batch, slice(1, 3))
    assert {x.shape[0] for x in jax.tree.leaves(batch)} == {2}


def test_the_tolerance_is_that_of_the_dtype(settings):
    assert settings["reward"].tolerance == 1e-3


def test_a_folder_without_config_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.toml"):
        open_run(tmp_path)
