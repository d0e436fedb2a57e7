"""Rows as the hub's data sets have them."""

import pytest

from minilm.errors import UserError
from minilm.text.formats import plain
from minilm.text.preferences import pairs_from


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASK = said("user", "Why is the sky blue?")
SHAPES = {
    "TRL, plain": {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    "TRL, conversational": {
        "prompt": [said("user", "Why?")],
        "chosen": [said("assistant", "Because.")],
        "rejected": [said("assistant", "No.")],
    },
    "TRL, conversational without a prompt": {
        "chosen": [said("user", "Why?"), said("assistant", "Because.")],
        "rejected": [said("user", "Why?"), said("assistant", "No.")],
    },
    "UltraFeedback": {
        "prompt": "Why?",
        "chosen": [said("user", "Why?"), said("assistant", "Because.")],
        "rejected": [said("user", "Why?"), said("assistant", "No.")],
        "score_chosen": 8.0,
    },
    "summarize": {
        "info": {"post": "Why?", "title": "A question"},
        "summaries": [{"text": "No."}, {"text": "Because."}],
        "choice": 1,
    },
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_shape_says_the_same(row):
    (pair,) = pairs_from([row], "rows.jsonl")
    assert pair[:3] == ("Why?", "Because.", "No.")


def test_a_dialogue_as_text_is_asked_up_to_its_last_answer():
    """Anthropic/hh-rlhf: both texts hold the dialogue, and differ in the last answer."""
    asked = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": f"{asked} Because.", "rejected": f"{asked} Bees, perhaps."}
    (pair,) = pairs_from([row], "rows.jsonl")
    assert pair[:3] == (asked, " Because.", " Bees, perhaps.")


def test_a_longer_conversation_says_who_speaks():
    row = plain(
        {
            "chosen": [ASK, said("assistant", "Air."), said("user", "So?"), said("assistant", "A")],
            "rejected": [
                ASK,
                said("assistant", "Air."),
                said("user", "So?"),
                said("assistant", "B"),
            ],
        }
    )
    assert row["prompt"] == "user: Why is the sky blue?\n\nassistant: Air.\n\nuser: So?"
    assert (row["chosen"], row["rejected"]) == ("A", "B")


def test_a_row_of_no_known_shape_is_left_for_the_reader_to_name():
    row = {"chosen": "b", "rejected": "c"}
    assert plain(row) == row
    with pytest.raises(UserError, match="missing field 'prompt'"):
        pairs_from([row], "rows.jsonl")
    assert plain({"summaries": [1, 2], "choice": 0}) == {"summaries": [1, 2], "choice": 0}
    assert plain({"chosen": ["x"], "rejected": ["y"]})["chosen"] == ["x"]
