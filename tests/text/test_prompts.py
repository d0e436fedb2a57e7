"""Prompts: openings of held-out documents in sets that share nothing."""

import itertools

import pytest

from minilm.config import Config, PromptsConfig, TokenizerConfig
from minilm.errors import UserError
from minilm.text.prompts import opening, prompt_sets
from minilm.text.store import Document
from minilm.text.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(TokenizerConfig(kind="bytes"), [])
SIZES = PromptsConfig(
    sentences=1, max_tokens=32, preferences=8, rlhf=9, development=3, evaluation=5
)  # fmt: skip
CONFIG = Config(prompts=SIZES)
DOCUMENTS = [Document(f"Fox {i} ran. It slept. The end.", str(i)) for i in range(40)]


@pytest.mark.parametrize(
    ("text", "sentences", "expected"),
    [
        ("One. Two. Three.", 1, "One."),
        ("One. Two. Three.", 2, "One. Two."),
        ("“Help!” cried he. Two.", 1, "“Help!”"),
        ('He said "No." Then left. Bye.', 1, 'He said "No."'),
        ("Pi is 3.14 here. Two.", 1, "Pi is 3.14 here."),  # no space follows that point
        ("Why? Because.", 1, "Why?"),
        ("One. Two.", 2, None),  # nothing would be left to write
        ("no end", 1, None),
    ],
)
def test_opening(text, sentences, expected):
    assert opening(text, sentences) == expected


def test_the_sets_have_their_sizes_and_share_nothing():
    sets = prompt_sets(CONFIG, TOKENIZER, DOCUMENTS)
    assert [len(s) for s in sets] == [8, 9, 3, 5]
    for one, other in itertools.combinations(sets, 2):
        assert not set(one) & set(other)
    assert all(p.startswith("Fox ") and p.endswith(" ran.") for s in sets for p in s)


def test_documents_that_open_alike_give_one_prompt():
    """Otherwise the same prompt could train the policy and report on it."""
    documents = [*DOCUMENTS, *(d._replace(id=d.id + "b") for d in DOCUMENTS)]
    prompts = [p for s in prompt_sets(CONFIG, TOKENIZER, documents) for p in s]
    assert len(set(prompts)) == len(prompts)


def test_the_draw_is_the_seeds():
    first, again = (prompt_sets(CONFIG, TOKENIZER, DOCUMENTS) for _ in range(2))
    other = prompt_sets(CONFIG.model_copy(update={"seed": 1}), TOKENIZER, DOCUMENTS)
    assert first == again
    assert first != other


def test_more_prompts_for_rlhf_leave_the_evaluation_prompts_alone():
    """Figures of runs with different training settings are read on the same prompts."""
    more = CONFIG.model_copy(update={"prompts": SIZES.model_copy(update={"rlhf": 20})})
    a, b = (prompt_sets(c, TOKENIZER, DOCUMENTS) for c in (CONFIG, more))
    assert (a.evaluation, a.development) == (b.evaluation, b.development)


def test_long_prompts_are_left_out():
    long = Document("F" + "o" * 40 + "x ran. It slept.", "long")
    prompts = prompt_sets(CONFIG, TOKENIZER, [long, *DOCUMENTS])
    assert not any("ooo" in p for s in prompts for p in s)
    assert all(len(TOKENIZER.encode(p)) + 1 <= 32 for s in prompts for p in s)


def test_too_few_documents_say_what_there_is_and_what_was_asked_for():
    with pytest.raises(
        UserError, match="20 held-out documents give 20 different prompts"
    ) as caught:
        prompt_sets(CONFIG, TOKENIZER, DOCUMENTS[:20])
    assert "value: 25" in str(caught.value)
