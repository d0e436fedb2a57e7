"""The rows of the pipeline."""

from minilm.config import Config, SFTConfig
from minilm.pipeline import STAGES, stages_of


def test_without_examples_everything_builds_on_pretraining():
    stages = {s.name: s.needs for s in stages_of(Config())}
    assert stages == {
        "pretrain": (),
        "preferences": ("pretrain",),
        "reward": ("pretrain", "preferences"),
        "rlhf": ("pretrain", "reward"),
    }


def test_with_examples_what_follows_builds_on_fine_tuning():
    stages = {s.name: s.needs for s in stages_of(Config(sft=SFTConfig(file="examples.jsonl")))}
    assert stages["sft"] == ("pretrain",)
    assert stages["preferences"] == ("sft",)
    assert stages["reward"] == ("sft", "preferences")
    assert stages["rlhf"] == ("sft", "reward")


def test_a_stage_comes_after_what_it_needs_and_has_sections_that_exist():
    known = set()
    for stage in STAGES:
        assert known >= set(stage.needs)
        assert set(stage.sections) <= set(Config.model_fields)
        known.add(stage.name)
