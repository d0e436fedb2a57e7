"""Corpora: exact texts, honest splits, one clear message for each way a source can be wrong."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.config import FablesCorpus, HubCorpus, PydocCorpus, TextCorpus
from minilm.errors import UserError
from minilm.text import corpora
from minilm.text.corpora import split
from minilm.text.fables import parse
from minilm.text.store import Document


def documents_of(*files, column: str = "text") -> list[Document]:
    return list(corpora.text(TextCorpus(files=tuple(map(str, files)), column=column), 0))


def texts_of(*files, column: str = "text") -> list[str]:
    return [d.text for d in documents_of(*files, column=column)]


def error_of(*files, column: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        documents_of(*files, column=column)
    return str(caught.value)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet}
tables = pytest.mark.parametrize("suffix", WRITERS)

AWKWARD = ["one\ntwo\r\n\n", 'a "quote", and a comma', "NA", "null", " é€ 𝕏\t", "<|endoftext|>"]


def test_a_txt_file_is_one_document_with_every_character_kept(tmp_path):
    # `datasets` in text mode would make "\n" of "\r\n", and cut at pages and odd separators.
    contents = ["one\r\ntwo\n\n", "\x0cpage\u2028line\x85\r", "no newline at the end", " \ufeff"]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_bytes(content.encode())
    assert texts_of(tmp_path / "*.txt") == contents


def test_a_separator_parts_a_txt_into_documents(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("One.\nHello.\n\nTwo.\nBye.\n\n\n\nThree.", encoding="utf-8")
    corpus = TextCorpus(files=(str(path),), separator="\n\n")
    found = [d for d in corpora.text(corpus, 0) if d.text.strip()]
    assert [d.text for d in found] == ["One.\nHello.", "Two.\nBye.", "Three."]
    assert len({d.id for d in found}) == 3


@tables
def test_a_table_has_a_document_a_row_exactly(tmp_path, suffix):
    path = WRITERS[suffix](
        tmp_path / f"a{suffix}", [{"id": i, "text": t} for i, t in enumerate(AWKWARD)]
    )
    assert texts_of(path) == AWKWARD


@tables
def test_another_column_is_read_when_named(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", [{"text": "no", "body": "yes"}])
    assert texts_of(path, column="body") == ["yes"]


def test_files_and_globs_mix_in_order_and_each_file_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.TXT"):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "d.jsonl", [{"text": "d"}])
    found = texts_of(
        tmp_path / "b.txt", tmp_path / "*.txt", tmp_path / "d.jsonl", tmp_path / "**/*.TXT"
    )
    assert found == ["b.txt", "a.txt", "d", "deep/er/c.TXT"]


@pytest.mark.parametrize("name", ["a[1].txt", "a[1].jsonl", "a b*c.jsonl"])
def test_a_name_with_glob_letters_is_a_name(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "x"}\n')
    assert len(documents_of(path)) == 1


def test_documents_say_where_they_are_from(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": "b"}])
    assert [d.id for d in documents_of(path)] == [f"{path}#1", f"{path}#2"]


def test_without_files_the_error_says_what_to_pass():
    assert "--corpus.files PATH" in error_of()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\n", "empty"),
        ("a.txt", b"abc\0def", "NUL at byte 3"),
        ("a.txt", "caf\xe9 noir".encode("latin-1"), "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8 at byte 13"),
        ("a.csv", b"text\nab\0c\n", "NUL at byte 7"),
        ("a.jsonl", b"", "empty"),
        ("a.parquet", b"", "empty"),
        ("a.jsonl", b'{"text": "good"}\n{"text": bad}\n', "cannot load"),
        ("a.jsonl", b"plain text\n", "cannot load"),
        ("a.parquet", b"no parquet", "cannot load"),
        ("a.docx", b"PK", "unknown name '.docx'"),
        ("a", b"text", ".txt"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(path)
    assert says in message
    assert str(path) in message


def test_a_missing_file_and_a_glob_without_files_are_named(tmp_path):
    assert "nowhere.txt" in error_of(tmp_path / "nowhere.txt")
    assert "*.txt" in error_of(tmp_path / "*.txt")


def test_a_folder_gets_a_hint_of_a_glob(tmp_path):
    assert f"{tmp_path}/**/*.txt" in error_of(tmp_path)


@tables
def test_a_missing_column_is_named_with_those_there_are(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", [{"body": "x", "title": "y"}])
    message = error_of(path)
    assert "no column 'text'" in message
    assert "body, title" in message
    assert "corpus.column" in message


@tables
def test_a_column_of_numbers_is_refused(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"a{suffix}", [{"text": 3}, {"text": 4}])
    assert "column 'text' of row 1 is not text but int" in error_of(path)


def test_a_csv_whose_later_part_is_all_digits_is_text(tmp_path):
    """`datasets` reads 10,000 rows at a time and guesses the type of each part."""
    texts = [*(f"a {i}" for i in range(10_000)), *map(str, range(10_000, 10_020))]
    path = write_csv(tmp_path / "a.csv", [{"text": t} for t in texts])
    assert texts_of(path) == texts


def test_a_row_without_text_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": None}])
    assert "row 2 is not text but NoneType" in error_of(path)


def test_blank_rows_are_no_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ["", " \n"] + ["x", "y"] * 15])
    halves = split(TextCorpus(files=(str(path),)), 0)
    assert {d.text for d in [*halves.train, *halves.held_out]} == {"x", "y"}
    with pytest.raises(UserError, match="no text"):
        split(TextCorpus(files=(str(write_jsonl(path, [{"text": ""}])),)), 0)


def test_reading_is_quiet_and_leaves_no_cache(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    code = (
        "from minilm.config import TextCorpus\nfrom minilm.text.corpora import text\n"
        f"print(len(list(text(TextCorpus(files=({str(path)!r},)), 0))))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert [p for p in (tmp_path / "home").rglob("*") if p.is_file()] == []


def test_importing_corpora_imports_neither_datasets_nor_grain():
    code = (
        "import sys, minilm.text.batches, minilm.text.corpora\n"
        "print({'datasets', 'grain', 'jax', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def local_hub(tmp_path) -> str:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{i}", "body": f"b{i}"} for i in range(30)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "held", "body": "out"}])
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_a_split_and_a_column(local_hub, streaming):
    corpus = HubCorpus(name=local_hub, column="body", streaming=streaming, max_documents=3)
    assert [d.text for d in corpora.hub(corpus, 0)] == ["b0", "b1", "b2"]
    corpus = HubCorpus(name=local_hub, split="test", streaming=streaming)
    assert [d.text for d in corpora.hub(corpus, 0)] == ["held"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"split": "trian"}, "trian"),
        ({"config": "nothing"}, "nothing"),
        ({"column": "content"}, "body, text"),
    ],
)
def test_hub_names_what_a_data_set_lacks(local_hub, changes, says):
    with pytest.raises(UserError, match=says):
        list(corpora.hub(HubCorpus(name=local_hub, **changes), 0))


def test_an_offline_hub_names_the_alternatives():
    with pytest.raises(UserError) as caught:
        list(corpora.hub(HubCorpus(name="nobody/nothing"), 0))
    for word in ("nobody/nothing", "fables", "text", "pydoc"):
        assert word in str(caught.value)


def test_a_hub_out_of_reach_is_noticed_without_the_library_retrying(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(corpora, "_documents", None)  # would fail if called
    with pytest.raises(UserError, match=r"out of reach(.|\n)*fables(.|\n)*HF_HUB_OFFLINE"):
        list(corpora.hub(HubCorpus(name="nobody/nothing"), 0))


def test_pydoc_is_the_topics_of_the_language_reference():
    documents = list(corpora.pydoc(PydocCorpus(), 0))
    assert {d.text for d in documents} == set(topics.values())
    assert sum(len(d.text) for d in documents) > 400_000


@pytest.mark.parametrize("size", ["small", "full"])
def test_fables_are_stories_with_their_exact_log_probability(size):
    for document in corpora.fables(FablesCorpus(size=size, documents=5), 11):
        assert document.logprob == pytest.approx(parse(document.text, size=size).logprob)


def test_fables_are_a_function_of_the_seed():
    corpus = FablesCorpus(size="small", documents=100)
    assert split(corpus, 1) == split(corpus, 1)
    assert split(corpus, 1) != split(corpus, 2)


def corpus_of(monkeypatch, texts: list[str], held_out: float) -> PydocCorpus:
    documents = [Document(t, str(i), -1.0) for i, t in enumerate(texts)]
    monkeypatch.setitem(corpora.CORPORA, "pydoc", lambda corpus, seed: iter(documents))
    return PydocCorpus(held_out=held_out)


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(20, 0.01, 1), (100, 0.1, 10), (50, 0.37, 18)]
)
def test_a_share_of_the_documents_is_held_out_whole(monkeypatch, count, share, expected):
    texts = [f"text {i}" for i in range(count)]
    halves = split(corpus_of(monkeypatch, texts, share), 5)
    assert len(halves.held_out) == expected
    assert Counter(d.text for d in [*halves.train, *halves.held_out]) == Counter(texts)


def test_the_seed_decides_which(monkeypatch):
    corpus = corpus_of(monkeypatch, [f"text {i}" for i in range(200)], 0.1)
    assert split(corpus, 1) == split(corpus, 1)
    assert split(corpus, 1).held_out != split(corpus, 2).held_out


def test_copies_of_held_out_texts_are_dropped_from_training(monkeypatch):
    texts = ["the same"] * 30 + [f"text {i}" for i in range(30)]
    halves = split(corpus_of(monkeypatch, texts, 0.3), 0)
    held_out = {d.text for d in halves.held_out}
    assert "the same" in held_out
    assert not held_out & {d.text for d in halves.train}
    assert len(halves.train) > 0


@given(
    st.lists(st.text("ab c", min_size=1).filter(str.strip), min_size=1, max_size=19),
    st.sampled_from([0.1, 0.5, 0.9]),
)
def test_few_documents_are_split_by_position(texts, share):
    # Numbered, so that no half document equals another.
    texts = [f"{i}{t}" for i, t in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        halves = split(corpus_of(patch, texts, share), 0)
    whole = "".join(texts)
    tail = "".join(d.text for d in halves.held_out)
    assert "".join(d.text for d in halves.train) + tail == whole
    assert len(tail) == max(1, round(share * len(whole)))


def test_one_long_text_is_cut_where_its_last_share_begins(monkeypatch):
    halves = split(corpus_of(monkeypatch, ["0123456789" * 10], 0.05), 0)
    (head,), (tail,) = halves.train, halves.held_out
    assert (len(head.text), tail.text) == (95, "56789")
    assert (head.id, tail.id) == ("0[:95]", "0[95:]")
    assert head.logprob is None  # of the whole text, not of a part
    assert tail.logprob is None


def test_of_a_long_text_in_parts_the_end_is_held_out(monkeypatch):
    monkeypatch.setattr(corpora, "LONGEST", 10)
    whole = " ".join(f"{i:03d}" for i in range(100))  # 399 characters in forty parts
    halves = split(corpus_of(monkeypatch, [whole], 0.1), 0)
    tail = "".join(d.text for d in halves.held_out)
    assert len(tail) == 40 and whole.endswith(tail)
    assert "".join(d.text for d in halves.train) + tail == whole


def test_conversations_and_instructions_are_read_without_a_text_column(tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [{"messages": said}, {"prompt": "2 + 2 =", "completion": " 4"}]
    rows += [{"instruction": "Add", "input": "1, 2", "output": "3"}]
    texts = []
    for row in rows:  # of one shape a file, as tables are
        write_jsonl(tmp_path / "rows.jsonl", [row])
        texts += [
            d.text for d in corpora.text(TextCorpus(files=(str(tmp_path / "rows.jsonl"),)), 0)
        ]
    assert texts == ["user: Hi\n\nassistant: Yes?", "2 + 2 = 4", "Add\n\n1, 2\n\n3"]


def test_the_report_counts_what_was_read_and_dropped(tmp_path):
    texts = [f"document number {i} of them all" for i in range(30)]
    rows = [{"text": t} for t in [*texts, texts[0], "  ", texts[1]]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    corpus = TextCorpus(files=(str(tmp_path / "rows.jsonl"),), duplicates="exact")
    found = split(corpus, 0)
    assert found.report == {
        "documents": 33, "characters": sum(len(r["text"]) for r in rows), "empty": 1,
        "exact_duplicates": 2, "near_duplicates": None, "held_out_copies": 0,
        "training_documents": 27, "held_out_documents": 3,
    }  # fmt: skip
    both = {d.text for d in found.train} | {d.text for d in found.held_out}
    assert both == set(texts) and len(found.train) == 27
