"""Every verdict has a remedy, and every remedy's command is one that minilm takes."""

import numpy as np
import pytest

from minilm import diagnose
from minilm.cli import COMMANDS
from minilm.configfile import load
from minilm.diagnose import HEALTHY, rl, verdicts
from minilm.diagnose.curves import Curve, Curves
from minilm.diagnose.frame import Evidence, Finding
from minilm.diagnose.remedies import REMEDIES
from minilm.pipeline import NAMES, STAGES


def test_every_verdict_has_a_remedy_and_every_remedy_a_verdict():
    assert REMEDIES.keys() == {*verdicts.RULES, *rl.RULES, *HEALTHY}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "rlhf"])
@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_a_remedys_command_can_be_typed(name, stage):
    curves = Curves({"validation": Curve(np.array([1.0, 9.0]), np.array([1.0, 2.0]))})
    found = Finding(0.5, (Evidence("figure", 1.0),))
    command = diagnose._verdict(name, found, curves, stage, "runs/a/config.toml").command
    program, word, *words = command.split()
    assert program == "minilm"
    assert word in COMMANDS
    if word == "run":  # its options are config keys of today, with values that they take
        assert words[1] == "--redo"
        assert words[-2:] == ["--out", "runs/a"]
        config = load("configs/quick.toml", words[3:-2])
        # No stage before the one that is remade was made with what changes.
        before = [row for row in STAGES if NAMES.index(row.name) < NAMES.index(words[2])]
        usual, sections = load("configs/quick.toml"), {s for row in before for s in row.sections}
        assert {s for s in sections if dict(config)[s] != dict(usual)[s]} == set()


@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_a_remedy_is_a_sentence(name):
    text = REMEDIES[name].text
    assert text[0].isupper()
    assert text.endswith(".")
