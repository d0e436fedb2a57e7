"""The figures of a draw, and the command and the committed sample that go with them."""

import json
import math
from pathlib import Path

import pytest

from minilm.text.fables import generate, stories
from minilm.text.fables.__main__ import main, statistics, vocabulary

SAMPLE = Path(__file__).parents[3] / "data" / "fables.jsonl"


def test_statistics_of_two_stories():
    one, two = generate(1), generate(2)
    found = statistics([one, two])
    assert found["stories"] == 2
    assert found["entropy"] == pytest.approx(-(one.logprob + two.logprob) / 2)
    assert found["entropy_per_character"] == pytest.approx(
        -(one.logprob + two.logprob) / (len(one.text) + len(two.text))
    )
    assert found["words"] == (len(one.text.split()) + len(two.text.split())) / 2


def test_vocabulary_is_words_only():
    words = vocabulary([generate(seed) for seed in range(50)])
    assert all(word.isalpha() for word in words)


def test_the_command_writes_stories(capsys):
    main(["--stories", "3", "--seed", "4", "--size", "small"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [s.text for s in stories(4, 3, size="small")]


def test_the_command_writes_the_committed_sample(capsys):
    main(["--stories", "20"])
    assert capsys.readouterr().out.splitlines() == SAMPLE.read_text("utf-8").splitlines()[:20]


def test_the_command_prints_statistics(capsys):
    main(["--stories", "50", "--statistics"])
    assert "gold_std" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--size", "huge"], ["--stories", "1", "--statistics"]])
def test_the_command_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_the_committed_sample_is_what_the_grammar_draws():
    """After a change of the grammar run the command that data/README.md gives."""
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    drawn = list(stories(0, len(rows)))
    assert len(rows) == 200
    assert [row["text"] for row in rows] == [story.text for story in drawn]
    for row, story in zip(rows, drawn, strict=True):
        assert math.isclose(row["logprob"], story.logprob, rel_tol=1e-12)
