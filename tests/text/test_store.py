"""Documents in a file: the same as they came, and not in memory."""

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilm.config import TextCorpus, TokenizerConfig
from minilm.errors import UserError
from minilm.text import corpora, store, tokenizer
from minilm.text.batches import tokenize
from minilm.text.cleaning import fingerprint
from minilm.text.corpora import split
from minilm.text.overlap import copied_shares
from minilm.text.store import Document, Documents, Store
from minilm.text.tokenizer import train_tokenizer

texts = st.text(st.characters(codec=None), max_size=30)  # half surrogate pairs too


def kept(*documents: Document, folder: Path | None = None) -> Documents:
    found = Store(folder)
    return Documents(found, np.array([found.append(d) for d in documents], np.int64))


@example([("\ud83d\ude00", "\udc00", None)])  # two halves are not the letter that they would make
@given(st.lists(st.tuples(texts, texts, st.none() | st.floats(allow_nan=False)), max_size=8))
def test_documents_come_back_as_they_were(rows):
    documents = [Document(*row) for row in rows]
    found = kept(*documents)
    assert list(found) == documents == [found[i] for i in range(len(found))]
    assert found.characters == sum(len(d.text) for d in documents)


@pytest.mark.parametrize("limit", [0, 2**24], ids=["disk", "memory"])
def test_what_is_asked_for_is_read_whether_it_is_on_the_disk(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(store, "IN_MEMORY", limit)
    documents = [Document(f"text {i}" * i, str(i)) for i in range(50)]
    found = kept(*documents, folder=tmp_path / "deep" / "er")
    assert [found[i] for i in (49, 3, 20)] == [documents[i] for i in (49, 3, 20)]
    assert list(found[10:20:3]) == documents[10:20:3]
    assert list((tmp_path / "deep" / "er").iterdir()) == []  # a killed process leaves nothing


def test_a_store_grows_while_it_is_read():
    found = Store()
    for i in range(5):
        assert found.append(Document("x" * i, str(i))) == i
        assert found[i // 2].text == "x" * (i // 2)
    assert found.sizes.tolist() == [0, 1, 2, 3, 4]
    assert found.fingerprints.tolist() == [fingerprint("x" * i) for i in range(5)]


def test_documents_are_equal_when_they_are_the_same_in_order():
    a, b = Document("a", "1"), Document("b", "2")
    assert kept(a, b) == kept(a, b) == [a, b]
    assert kept(a, b) != kept(b, a)
    assert kept(a) != kept(a, b)


def test_a_spread_is_even_and_all_where_there_are_few():
    documents = [Document("x" * 10, str(i)) for i in range(100)]
    assert kept(*documents).spread(1000) == documents
    assert [int(d.id) for d in kept(*documents).spread(250)] == list(range(0, 100, 4))


def test_a_full_disk_is_a_users_error(tmp_path, monkeypatch, file_limit):
    monkeypatch.setattr(store, "IN_MEMORY", 1)
    file_limit(10_000)
    with pytest.raises(UserError, match=r"cannot keep the corpus(.|\n)*as much room"):
        kept(*(Document("x" * 1000, str(i)) for i in range(100)), folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep the corpus"):
        Store(tmp_path / "cache")


SIZE = 2**22


@pytest.fixture
def small_blocks(monkeypatch):
    """All limits divided by some hundreds, so that four megabytes are a large corpus."""
    monkeypatch.setattr(store, "IN_MEMORY", 2**14)
    monkeypatch.setattr(corpora, "BLOCK", 2**14)
    monkeypatch.setattr(corpora, "LONGEST", 2**15)
    monkeypatch.setattr(corpora, "HELD_OUT", 2**15)
    monkeypatch.setattr(tokenizer, "BLOCK", 2**15)
    monkeypatch.setattr(tokenizer, "PIECE", 2**13)


@pytest.mark.parametrize("separator", [None, "\n\n"], ids=["one document", "many"])
def test_a_corpus_is_never_in_memory_as_a_whole(tmp_path, small_blocks, separator):
    """From the file to rows and copied shares: a quarter of it at most, by Python's own count."""
    path = tmp_path / "large.txt"
    words = [f"{w}{i}" for i in range(60) for w in ("the fox", "lent a hook", "to Mara", "at noon")]
    with path.open("w", encoding="utf-8") as file:
        numbers = np.random.default_rng(0).integers(len(words), size=SIZE // 10).tolist()
        for start in range(0, len(numbers), 200):
            file.write(" ".join(words[n] for n in numbers[start : start + 200]) + "\n\n")
    del numbers
    corpus = TextCorpus(files=(str(path),), separator=separator)
    tracemalloc.start()
    try:
        halves = split(corpus, 0, tmp_path / "cache")
        made = train_tokenizer(TokenizerConfig(kind="bytes"), ())
        rows = tokenize(halves.train, made, 64, tmp_path / "cache", 0)
        copied_shares([[d.text for d in halves.held_out]], (d.text for d in halves.train))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    assert size > SIZE
    assert peak < size // 4, f"{peak:,} bytes of {size:,}"
    assert sum(len(d.text) for d in halves.held_out) <= 2**15
    assert halves.train.characters > 0.9 * size
    assert len(rows) > 1000


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path, small_blocks):
    whole = "".join(f"word{i} {'x' * (i % 7)}\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(whole)
    parts = list(corpora.text(TextCorpus(files=(str(tmp_path / "a.txt"),)), 0))
    assert "".join(d.text for d in parts) == whole
    assert max(len(d.text) for d in parts) <= 2**15
    assert [d.id for d in parts] == [f"{tmp_path}/a.txt#{n}" for n in range(len(parts))]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": whole}) + "\n")
    halves = split(TextCorpus(files=(str(tmp_path / "a.jsonl"),)), 0)
    held_out = sum(len(d.text) for d in halves.held_out)
    assert halves.train.characters + held_out == len(whole)
    assert 0 < held_out <= 2**15
    assert halves.report["documents"] == 1 and halves.report["characters"] == len(whole)


@given(st.text("ab\n", max_size=60), st.sampled_from(["\n\n", "ab", "b", "aab"]), st.integers(1, 9))
def test_blocks_do_not_change_what_a_separator_parts(text, separator, size):
    blocks = iter([text[i : i + size] for i in range(0, len(text), size)])
    assert list(corpora._separated(blocks, separator)) == text.split(separator)


def test_blocks_do_not_change_what_utf_8_says(tmp_path, monkeypatch):
    path, text = tmp_path / "a.txt", "aé€𝕏\r\n\ufeff" * 9
    path.write_bytes(text.encode())
    damaged = text.encode() + b"\xe2\x82"
    for size in range(1, 12):
        monkeypatch.setattr(corpora, "BLOCK", size)
        path.write_bytes(text.encode())
        assert "".join(corpora._utf8(path)) == text
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"not UTF-8 at byte {len(damaged) - 2}"):
            list(corpora._utf8(path))
        path.write_bytes(text.encode() + b"\0")
        with pytest.raises(UserError, match=f"NUL at byte {len(damaged) - 2}"):
            list(corpora._utf8(path))


def test_what_is_beyond_the_held_out_limit_is_trained_on(monkeypatch):
    documents = [Document(f"{i:05d}" * 4, str(i)) for i in range(100)]
    monkeypatch.setitem(corpora.CORPORA, "text", lambda corpus, seed: iter(documents))
    all_of_it = split(TextCorpus(held_out=0.5), 0)
    monkeypatch.setattr(corpora, "HELD_OUT", 100)
    some = split(TextCorpus(held_out=0.5), 0)
    assert some.held_out == all_of_it.held_out[:5]
    assert Counter([*some.train, *some.held_out]) == Counter(documents)
    monkeypatch.setattr(corpora, "HELD_OUT", 1)  # one at least
    assert len(split(TextCorpus(held_out=0.5), 0).held_out) == 1
