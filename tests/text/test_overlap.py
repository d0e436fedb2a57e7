"""Runs of words that two texts share, against sets of tuples."""

from hypothesis import given
from hypothesis import strategies as st

from minilm.text.overlap import copied_shares

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=8).map(" ".join), max_size=5)


def runs(text: str, words: int) -> list[tuple[str, ...]]:
    split = text.split()
    return [tuple(split[i : i + words]) for i in range(len(split) - words + 1)]


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_shares_are_those_of_sets_of_runs(texts, training, words):
    known = {run for text in training for run in runs(text, words)}
    own = [run for text in texts for run in runs(text, words)]
    (share,) = copied_shares([texts], training, words=words)
    if not own:
        assert share is None
    else:
        assert share is not None and abs(share - sum(r in known for r in own) / len(own)) < 1e-12


def test_thirteen_words_are_asked_for_and_groups_are_apart():
    text = " ".join(f"w{i}" for i in range(20))
    cut = " ".join(f"w{i}" for i in range(12))
    turned = " ".join(f"w{i}" for i in reversed(range(20)))
    assert copied_shares([[text], [turned], [cut], []], [text]) == [1.0, 0.0, None, None]
