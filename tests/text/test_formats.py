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


LISTS = {
    "ratings": {"prompt": "p", "completions": ["a", "b", "c", "d"], "ratings": [1, 3, 2, 3]},
    "ranks": {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 1]},
    "openbmb/UltraFeedback": {
        "instruction": "p",
        "completions": [
            {"response": text, "overall_score": score}
            for text, score in zip("abcd", (5.0, 8.5, 7.0, 8.5), strict=True)
        ],
    },
}


@pytest.mark.parametrize("row", LISTS.values(), ids=LISTS)
def test_a_list_is_all_its_pairs_but_those_rated_the_same(row):
    pairs = pairs_from([row], "rows.jsonl")
    assert {(p.chosen, p.rejected) for p in pairs} == {
        ("b", "a"), ("c", "a"), ("d", "a"), ("b", "c"), ("d", "c"),
    }  # fmt: skip
    assert all(p.prompt == "p" and p.rating_chosen > p.rating_rejected for p in pairs)


def test_ranks_become_ratings_from_zero():
    (pair,) = pairs_from([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 4]}], "rows")
    assert (pair.chosen, pair.rating_chosen, pair.rating_rejected) == ("a", 3.0, 0.0)


def test_answers_rated_one_by_one_are_compared_within_their_prompt():
    rows = [
        {"prompt": "p", "completion": "a", "rating": 2},
        {"prompt": "q", "completion": "c", "rating": 5},
        {"prompt": [said("user", "p")], "completion": [said("assistant", "b")], "rating": 4},
    ]
    (pair,) = pairs_from(rows, "rows.jsonl")
    assert (*pair[:3], pair.rating_chosen) == ("p", "b", "a", 4.0)
    with pytest.raises(UserError, match="no prompt has both a better and a worse completion"):
        pairs_from(rows[:2], "rows.jsonl")


def test_trls_unpaired_answers_are_good_ones_against_bad_ones_of_their_prompt():
    good, bad = {"completion": "a", "label": True}, {"completion": "b", "label": False}
    rows = [
        {"prompt": "p"} | good,
        {"prompt": "q"} | good,
        {"prompt": [said("user", "p")], "completion": [said("assistant", "c")], "label": False},
        {"prompt": "p"} | bad,
        {"prompt": "p", "completion": "d", "label": True},
    ]
    pairs = pairs_from(rows, "rows.jsonl")
    assert {p[:3] for p in pairs} == {("p", x, y) for x in "ad" for y in "bc"}
    assert {(p.rating_chosen, p.rating_rejected) for p in pairs} == {(1.0, 0.0)}
    with pytest.raises(UserError, match="both a better and a worse completion") as refused:
        pairs_from([{"prompt": "p"} | good, {"prompt": "q"} | bad], "rows.jsonl")
    assert "`label` true and false" in str(refused.value)


def test_an_empty_rating_beside_a_label_is_none():
    rows = [{"prompt": "p", "completion": c, "label": c == "a", "rating": None} for c in "ab"]
    (pair,) = pairs_from(rows, "rows.jsonl")
    assert (pair.chosen, pair.rejected) == ("a", "b")


@pytest.mark.parametrize("label", [1, "true", None, 0.0])
def test_a_label_that_is_neither_true_nor_false_is_named(label):
    row = {"prompt": "p", "completion": "a", "label": label}
    with pytest.raises(UserError, match=r"must be true \(good\) or false") as refused:
        pairs_from([row | {"label": True}, row], "rows.jsonl")
    assert refused.value.where == "rows.jsonl:2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a", "b"]}, "as many `ratings`"),
        ({"completions": ["a", "b"], "ratings": [1]}, "as many `ratings`"),
        ({"completions": ["a", "b"], "ranks": 1}, "as many `ratings`"),
        ({"completions": ["a", 3], "ratings": [1, 2]}, "prompt and completions must be texts"),
        ({"completions": ["a", "b"], "ratings": [1, "2"]}, "a rating must be a finite number"),
        ({"completions": ["a", "b"], "ranks": [None, 2]}, "a rating must be a finite number"),
        ({"completion": "a", "rating": float("nan")}, "a rating must be a finite number"),
    ],
)
def test_lists_that_do_not_fit_are_refused_by_line(row, message):
    with pytest.raises(UserError, match=message) as refused:
        pairs_from([LISTS["ratings"], {"prompt": "p"} | row], "rows.jsonl")
    assert "rows.jsonl:2" in str(refused.value)


@pytest.mark.parametrize("rating", [float("nan"), float("inf"), 10**400, True, "5"])
def test_a_rating_that_is_no_finite_number_is_named(rating):
    row = {"prompt": "Why?", "completion": "Because.", "rating": rating}
    with pytest.raises(UserError, match="a rating must be a finite number") as refused:
        pairs_from([row], "rows.jsonl")
    assert refused.value.where == "rows.jsonl:1"
