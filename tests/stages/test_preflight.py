"""What is said before anything runs."""

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
        ({"rlhf": {"judge_weight": 1.0}, "judge": {"name": "none"}}, "no judge to pay by"),
        ({"judge": {"name": "none"}}, "no judge to label pairs"),
        ({"corpus": {"kind": "fables", "documents": 1000}}, "more prompts than held-out stories"),
        ({"objective": {"z_los": {"weight": 1.0}}}, "did you mean 'z_loss'"),
    ],
)
def test_what_a_later_stage_would_find_out_is_told_now(sections, message):
    with pytest.raises(UserError) as refused:
        check(config(**sections), ALL)
    assert message in str(refused.value)


def test_stages_that_do_not_run_are_not_asked_for_theirs():
    check(config(rlhf={"algorithm": "ppoo"}, judge={"name": "none"}), ["pretrain"])
