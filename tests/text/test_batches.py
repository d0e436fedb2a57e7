"""Rows and batches: every token a target once, documents apart, batch k a function of (seed, k)."""

import io
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.config import TokenizerConfig
from minilm.errors import UserError
from minilm.text import batches
from minilm.text.batches import (
    Batches,
    Growth,
    alone,
    batch_across,
    batch_of,
    count_tokens,
    pack,
    tokenize,
)
from minilm.text.store import Document
from minilm.text.tokenizer import Tokenizer, train_tokenizer

PAD, EOS = Tokenizer.pad_id, Tokenizer.eos_id
BYTES = train_tokenizer(TokenizerConfig(kind="bytes"), [])
token_lists = st.lists(
    st.lists(st.integers(2, 99), min_size=1, max_size=40).map(lambda x: np.array(x, np.uint16)),
    min_size=1,
    max_size=20,
)
lengths = st.integers(8, 24)


def numbered(count: int, low: int, high: int, seed: int = 0) -> list[np.ndarray]:
    """Documents no two of which share a token: each token says where it comes from."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([2, *rng.integers(low, high + 1, count)])
    return [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]


def targets_of(batch) -> Counter:
    return Counter(batch.targets[batch.weights > 0].tolist())


@given(token_lists, lengths)
def test_every_token_and_one_end_a_document_is_a_target_once(documents, length):
    batch = batch_of(pack(documents, length))
    assert targets_of(batch) == Counter(np.concatenate(documents).tolist()) + Counter(
        {EOS: len(documents)}
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), lengths)
def test_each_target_follows_its_own_document_in_its_own_segment(sizes, length):
    ends = np.cumsum([2, *sizes])
    documents = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    owner = {int(t): n for n, d in enumerate(documents) for t in d}
    batch = batch_of(pack(documents, length))
    for tokens, targets, weights, segments in zip(*batch, strict=True):
        for t in np.flatnonzero(weights):
            target = int(targets[t])
            if target == EOS:  # after the last token of a document
                assert tokens[t] == documents[owner[int(tokens[t])]][-1]
            elif target == documents[owner[target]][0]:
                assert tokens[t] == EOS
            else:
                assert tokens[t] == target - 1
            # What attention may see: the document's own tokens and the start token.
            seen = {int(x) for x in tokens[: t + 1][segments[: t + 1] == segments[t]]} - {EOS}
            assert {owner[x] for x in seen} <= {
                owner[target] if target != EOS else owner[max(seen)]
            }


@given(token_lists, lengths)
def test_documents_that_fit_stay_whole(documents, length):
    rows = ["".join(map(chr, row)) for row in pack(documents, length)]
    for document in documents:
        if len(document) < length:
            whole = "".join(map(chr, [EOS, *document, EOS]))
            assert any(whole in row for row in rows)


@given(token_lists, lengths)
def test_padding_is_at_the_ends_of_rows_only(documents, length):
    rows = pack(documents, length)
    assert rows.shape[1] == length + 1
    assert (np.diff((rows == PAD).astype(int), axis=1) >= 0).all()
    assert not (rows[:, 1] == PAD).any()  # every row predicts something


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_leaves_no_two_rows_that_would_share_one(sizes):
    # Any-fit algorithms leave at most one row half empty, hence at most twice the optimum.
    rows = pack([np.full(n, 2, np.int32) for n in sizes], 32)
    filled = np.sort((rows[:, 1:] != PAD).sum(1))
    assert len(filled) < 2 or filled[0] + filled[1] > 32


def test_a_document_goes_to_the_fullest_row_with_room():
    sizes = [8, 6, 5, 3]  # with their ends 9, 7, 6 and 4 targets of 11: rooms 2, 4 and 5
    rows = pack([np.full(n, 2 + i, np.int32) for i, n in enumerate(sizes)], 11)
    assert rows.tolist() == [
        [EOS, *[2] * 8, EOS, PAD, PAD],
        [EOS, *[3] * 6, EOS, 5, 5, 5, EOS],
        [EOS, *[4] * 5, EOS, PAD, PAD, PAD, PAD, PAD],
    ]


def test_a_long_document_becomes_windows_that_overlap_by_one_token():
    rows = pack([np.arange(2, 12), np.array([50])], 4)
    assert rows.tolist() == [
        [EOS, 2, 3, 4, 5],
        [5, 6, 7, 8, 9],
        [9, 10, 11, EOS, PAD],  # one place is left, too small for the next and its end
        [EOS, 50, EOS, PAD, PAD],
    ]
    assert pack([np.arange(2, 11), np.array([50])], 4)[2].tolist() == [9, 10, EOS, 50, EOS]


def test_segments_count_the_documents_of_a_row():
    batch = batch_of(np.array([[EOS, 7, 8, EOS, 9, EOS, PAD]], np.uint16))
    assert batch.tokens.tolist() == [[EOS, 7, 8, EOS, 9, EOS]]
    assert batch.targets.tolist() == [[7, 8, EOS, 9, EOS, PAD]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 1, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 3]]
    assert [x.dtype.name for x in batch] == ["int32", "int32", "float32", "int32"]


def stored(tmp_path, texts, *, length=16, tokenizer=BYTES, seed=0):
    documents = [Document(t, str(i)) for i, t in enumerate(texts)]
    return tokenize(documents, tokenizer, length, cache=tmp_path / "cache", seed=seed)


TEXTS = [f"story {i} ends" for i in range(40)]


def test_rows_are_tokenised_once(tmp_path, monkeypatch):
    first = stored(tmp_path, TEXTS)
    monkeypatch.setattr(Tokenizer, "stream", None)  # would fail if called
    assert np.array_equal(stored(tmp_path, TEXTS), first)
    assert isinstance(first, np.memmap)
    assert first.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 3


@pytest.mark.parametrize(
    "change",
    [
        {"texts": [*TEXTS[:-1], "another"]},
        {"texts": ["".join(TEXTS[:2]), *TEXTS[2:]]},  # the same characters
        {"length": 17},
        {"seed": 1},
        {"tokenizer": train_tokenizer(TokenizerConfig(kind="characters"), [*TEXTS, "another"])},
    ],
    ids=["text", "borders", "length", "seed", "tokenizer"],
)
def test_what_decides_the_rows_names_their_file(tmp_path, change):
    stored(tmp_path, TEXTS)
    stored(tmp_path, **{"texts": TEXTS, **change})
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:40], lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"x" * 500],
    ids=["empty", "half a header", "short", "long", "rubbish"],
)
def test_a_damaged_cache_file_is_made_again(tmp_path, damage):
    first = np.array(stored(tmp_path, TEXTS))
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert np.array_equal(stored(tmp_path, TEXTS), first)
    assert file.read_bytes() == whole


def test_the_text_of_rows_is_the_text_of_the_documents(tmp_path):
    rows = stored(tmp_path, TEXTS, length=64)
    found = [BYTES.decode(p) for row in rows for p in np.split(row, np.flatnonzero(row == EOS))]
    assert sorted(filter(None, found)) == sorted(TEXTS)


def test_a_corpus_shorter_than_one_sequence_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        stored(tmp_path, ["abc", "de"], length=8)
    message = str(caught.value)
    assert "pretrain.sequence_length" in message
    assert "7 tokens to train on, 8 needed" in message
    assert len(stored(tmp_path, ["abc", "def"], length=8)) == 1


def test_a_cache_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        stored(tmp_path, TEXTS)


def test_a_full_disk_is_a_users_error_and_leaves_no_rows(tmp_path, file_limit):
    file_limit(10_000)
    with pytest.raises(UserError, match="cannot write: File too large"):
        stored(tmp_path, TEXTS * 100)
    assert list((tmp_path / "cache").iterdir()) == []


def test_tokenising_that_is_interrupted_leaves_no_rows(tmp_path, monkeypatch):
    whole = np.array(stored(tmp_path / "other", TEXTS))
    (cache,) = (tmp_path / "other").iterdir()
    (name,) = (path.name for path in cache.iterdir())

    def interrupted(self, texts):
        yield np.array([2, 3], np.uint16)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stored(tmp_path, TEXTS)
    assert list((tmp_path / "cache").iterdir()) == []
    # Killed, it leaves what has another name, and is written over.
    (tmp_path / "cache" / f".tmp-{name}").write_bytes((cache / name).read_bytes()[:-20] + b"x" * 99)
    assert np.array_equal(stored(tmp_path, TEXTS), whole)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]


def test_tokenising_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "TOLD", 100)
    documents = [Document(t, "") for t in TEXTS]
    told: list[int] = []
    tokenize(documents, BYTES, 16, cache=tmp_path, seed=0, tell=told.append)
    assert told == sorted(told) and len(told) > 3
    assert 0 <= sum(map(len, TEXTS)) - told[-1] < 120


def test_rows_are_those_of_pack(tmp_path):
    texts = ["".join("ab"[i % 2] for i in range(n)) for n in range(1, 90)]
    rows = stored(tmp_path, texts, length=20, seed=4)
    order = np.random.default_rng((4, 5)).permutation(len(texts))
    expected = pack([np.array(BYTES.encode(texts[i]), np.uint16) for i in order], 20)
    assert np.array_equal(rows, expected)
    buffer = io.BytesIO()
    np.save(buffer, expected)
    assert next((tmp_path / "cache").iterdir()).read_bytes() == buffer.getvalue()


def best_fit(sizes: list[int], length: int) -> list[list[int]]:
    """By the definition: the documents of each row, all rows looked at for each."""
    rows: list[list[int]] = []
    for n, size in enumerate(sizes):
        rooms = [length - sum(sizes[i] for i in row) for row in rows]
        fitting = [(room, r) for r, room in enumerate(rooms) if room >= size]
        if fitting:
            rows[min(fitting)[1]].append(n)
        else:
            rows.append([n])
    return rows


@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_packing_is_best_fit_by_its_definition(sizes):
    # Document n is made of the id n + 2 alone; its end takes a place too.
    rows = pack([np.full(size - 1, n + 2) for n, size in enumerate(sizes) if size > 1], 16)
    found = [list(dict.fromkeys(int(t) - 2 for t in row if t > EOS)) for row in rows]
    numbers = [n for n, size in enumerate(sizes) if size > 1]
    expected = best_fit([sizes[n] for n in numbers], 16)
    assert found == [[numbers[i] for i in row] for row in expected]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count elsewhere")
def test_pages_that_were_read_are_given_back(tmp_path):
    rows = stored(tmp_path, TEXTS * 2000, length=256)
    found = Batches(rows, batch_size=4, seed=0)  # imports what it needs
    mapped = rows.nbytes // 1024

    def resident() -> int:
        return int(re.findall(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    before = resident()
    assert int(np.asarray(rows).sum()) > 0
    assert resident() - before > mapped // 2
    assert count_tokens(rows) == sum(len(t.encode()) + 1 for t in TEXTS) * 2000
    assert resident() - before < mapped // 2
    np.asarray(rows).sum()
    assert len(found[0].tokens) == 4
    assert resident() - before < mapped // 2


ROWS = pack(numbered(30, 3, 15), 16)


def chosen(batches: Batches, rows: np.ndarray, steps: range) -> list[int]:
    """The numbers of the rows that batches consist of."""
    known = {tuple(row): i for i, row in enumerate(rows.tolist())}
    found = []
    for k in steps:
        batch = batches[k]
        whole = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
        found += [known[tuple(row)] for row in whole.tolist()]
    return found


def test_batch_k_needs_the_seed_and_k_alone():
    walked = Batches(ROWS, batch_size=4, seed=3)
    steps = [walked[k] for k in range(30)]
    jumped = Batches(ROWS, batch_size=4, seed=3)
    for k in (29, 3, 0, 17):
        for a, b in zip(jumped[k], steps[k], strict=True):
            assert np.array_equal(a, b)


def test_an_epoch_is_a_permutation_of_the_rows_each_time_another():
    n = len(ROWS)
    found = chosen(Batches(ROWS, batch_size=4, seed=3), ROWS, range(n))  # four epochs
    epochs = [found[i : i + n] for i in range(0, 4 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_shuffle_differently_large_ones_too():
    orders = {
        tuple(chosen(Batches(ROWS, batch_size=2, seed=seed), ROWS, range(8)))
        for seed in (0, 1, 2, 2**40 + 3)
    }
    assert len(orders) == 4


def test_a_batch_larger_than_the_corpus_repeats_it():
    batches = Batches(ROWS[:3], batch_size=7, seed=0)
    found = chosen(batches, ROWS[:3], range(3))
    assert all(sorted(found[i : i + 3]) == [0, 1, 2] for i in range(0, 21, 3))


growths = st.builds(
    lambda start, doublings, more: Growth(start, start << doublings, doublings + more),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 9),
)  # fmt: skip


@given(growths, st.integers(0, 40))
def test_a_batch_grows_by_doublings_and_what_was_read_before_is_their_sum(growth, step):
    sizes = [growth.size(k) for k in range(step + 1)]
    assert growth.before(step) == sum(sizes[:-1])
    assert sizes[0] == growth.start
    assert sizes[-1] == growth.full or step < growth.steps
    allowed = {growth.start << n for n in range(4)}
    assert set(sizes) <= allowed and sizes == sorted(sizes)
    # No size is left out, and each but the full one has its share of the steps, within one.
    all_of_them = [growth.size(k) for k in range(growth.steps)]
    counts = list(Counter(all_of_them).values())
    assert len(counts) == (growth.full // growth.start).bit_length() - 1
    assert max(counts) - min(counts) <= 1


@given(growths, st.integers(0, 3))
def test_growing_batches_read_each_row_exactly_once_an_epoch(growth, seed):
    rows, steps = ROWS[:10], range(growth.steps + 8)
    found = chosen(Batches(rows, batch_size=growth, seed=seed), rows, steps)
    assert len(found) == growth.before(len(steps))
    whole = len(found) // 10 * 10
    assert all(sorted(found[i : i + 10]) == list(range(10)) for i in range(0, whole, 10))
    assert len(set(found[whole:])) == len(found) - whole
    # The same rows in the same order as batches of one size read.
    assert found == chosen(Batches(rows, batch_size=1, seed=seed), rows, range(len(found)))


def test_a_growing_batch_needs_the_seed_and_k_alone():
    growth = Growth(1, 8, 9)
    walked = [Batches(ROWS, batch_size=growth, seed=3)[k] for k in range(14)]
    jumped = Batches(ROWS, batch_size=growth, seed=3)
    for k in (13, 0, 8, 4):
        assert len(jumped[k].tokens) == growth.size(k)
        for a, b in zip(jumped[k], walked[k], strict=True):
            assert np.array_equal(a, b)


def test_steps_count_from_zero():
    with pytest.raises(IndexError):
        Batches(ROWS, batch_size=2, seed=0)[-1]


@given(st.lists(st.integers(0, 90), min_size=1, max_size=12), st.integers(1, 5))
def test_alone_predicts_every_token_of_a_document_once_under_its_index(sizes, batch_size):
    documents = [list(range(100 * n + 2, 100 * n + 2 + size)) for n, size in enumerate(sizes)]
    found: dict[int, list[int]] = {n: [] for n in range(len(sizes))}
    longest = 0
    for batch, owners in alone(documents, batch_size=batch_size, max_length=32, ids=BYTES):
        assert len(owners) == batch_size == len(batch.tokens)
        assert batch.tokens.shape[1] == 32
        for targets, weights, owner in zip(batch.targets, batch.weights, owners, strict=True):
            found[int(owner)] = found.get(int(owner), []) + targets[weights > 0].tolist()
            if owner >= 0:
                assert weights.sum() >= max(longest, 1)  # sorted by length, none for nothing
                longest = weights.sum()
    assert found.pop(-1, []) == []  # rows that fill the batch have no weight
    # Windows of equal length keep their order; a shorter last one is met before them.
    for n, document in enumerate(documents):
        assert sorted(found[n]) == sorted([*document, EOS])


def test_alone_begins_with_the_start_token_and_overlaps_windows_by_one():
    ((batch, owners),) = alone([[5, 6, 7], [8]], batch_size=3, max_length=3, ids=BYTES)
    assert owners.tolist() == [0, 1, 0]
    assert batch.tokens.tolist() == [[7, EOS, PAD], [EOS, 8, EOS], [EOS, 5, 6]]
    assert batch.targets.tolist() == [[EOS, PAD, PAD], [8, EOS, PAD], [5, 6, 7]]
    assert batch.weights.sum(1).tolist() == [1, 2, 3]


def test_alone_has_few_shapes():
    documents = [[2] * n for n in range(1, 200, 3)]
    widths = {
        batch.tokens.shape for batch, _ in alone(documents, batch_size=4, max_length=144, ids=BYTES)
    }
    assert widths == {(4, 32), (4, 64), (4, 96), (4, 128), (4, 144)}


def test_nothing_alone_is_nothing():
    assert list(alone([], batch_size=4, max_length=32, ids=BYTES)) == []


def test_across_documents_all_but_padding_is_one_segment():
    rows = np.array([[1, 5, 6, 1, 7, 1, 0, 0]])
    assert batch_of(rows).segments.tolist() == [[1, 1, 1, 2, 2, 3, 3]]
    across = batch_across(rows)
    assert across.segments.tolist() == [[1, 1, 1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(across.weights, batch_of(rows).weights)
