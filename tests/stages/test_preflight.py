"""What is said before anything runs."""

import json

import pytest

from minilm.config import Config
from minilm.errors import UserError
from minilm.stages.preflight import check

ALL = ["pretrain", "preferences", "reward", "rlhf"]


def config(**sections) -> Config:
    return Config.model_validate(sections)


def test_the_default_config_passes():
    check(Config(), ALL)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rlhf": {"algorithm": "ppoo"}}, "did you mean 'ppo'"),
        ({"rlhf": {"group_size": 1}}, "compares a completion with others"),
        ({"rlhf": {"value_warmup_steps": 3}}, "rloo has no critic"),
        (
            {"rlhf": {"algorithm": "reinforce", "prompts_per_step": 1, "group_size": 1}},
            "compares a completion with others of its step",
        ),
        ({"rlhf": {"algorithm": "reinforce", "whiten_rewards": True}}, "reward as a whole"),
        (
            {
                "preferences": {"rater_judge": "fables"},
                "corpus": {"kind": "pydoc"},
                "judge": {"name": "length", "options": {"target": 9}},
            },
            "preferences.rater_judge",
        ),
        (
            {"objective": {"ordinal": {"weight": 1.0, "options": {"low": 1, "high": 5}}}},
            "are not from low to high",
        ),
        ({"rlhf": {"whiten_rewards": True}}, "rloo reads a completion's reward as a whole"),
        ({"rlhf": {"algorithm": "dapo", "kl_target": 2.0}}, "dapo has no price of KL"),
        ({"rlhf": {"judge_weight": 1.0}, "judge": {"name": "none"}}, "no judge to pay by"),
        ({"judge": {"name": "none"}}, "no judge to label pairs"),
        ({"corpus": {"kind": "fables", "documents": 1000}}, "more prompts than held-out stories"),
        ({"preferences": {"rater_judge": "lenght"}}, "preferences.rater_judge: unknown name"),
        ({"preferences": {"rater_judge": "length"}}, "'length' needs the option 'target'"),
        (
            {"objective": {"ordinal": {"weight": 1.0, "options": {"low": 2}}}},
            "high must be a number above low",
        ),
        ({"objective": {"z_los": {"weight": 1.0}}}, "did you mean 'z_loss'"),
    ],
)
def test_what_a_later_stage_would_find_out_is_told_now(sections, message):
    with pytest.raises(UserError) as refused:
        check(config(**sections), ALL)
    assert message in str(refused.value)


@pytest.mark.parametrize("algorithm", ["reinforce", "reinforce++", "ppo"])
def test_a_group_of_one_is_enough_where_the_baseline_is_not_the_groups(algorithm):
    check(config(rlhf={"algorithm": algorithm, "group_size": 1}), ALL)


def test_stages_that_do_not_run_are_not_asked_for_theirs():
    check(config(rlhf={"algorithm": "ppoo"}, judge={"name": "none"}), ["pretrain"])


def test_ratings_of_a_users_file_are_looked_at_before_the_pretraining(tmp_path):
    file = tmp_path / "stars.jsonl"
    rows = [{"prompt": "p", "completion": f"text {n}", "rating": n} for n in range(1, 6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"preferences": {"file": str(file)}, "objective": {"ordinal": {"weight": 1.0}}}
    with pytest.raises(UserError, match="are not from low to high"):
        check(config(**sections), ALL)
    sections["objective"]["ordinal"] |= {"options": {"low": 1, "high": 5}}
    check(config(**sections), ALL)


def test_the_judge_of_raters_that_no_stage_asks_is_not_looked_for():
    check(config(preferences={"rater_judge": "lenght"}), ["pretrain", "rlhf"])
