"""Tokenizers: exact round trips, the promised vocabulary, clear refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from minilm.config import TokenizerConfig
from minilm.errors import UserError
from minilm.text.tokenizer import EOS, PAD, Tokenizer, train_tokenizer

CORPUS = [
    "The fox lent the hook to Mara. Mara kept the hook and thanked the fox.",
    "Was the promise kept? It was, and the fox was glad of the promise.\r\n\tÜber 300 €!",
] * 4
KINDS = ("bpe", "characters", "bytes")


def trained(kind: str, vocab_size: int = 320) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), CORPUS)


BPE, BYTES = trained("bpe"), trained("bytes")


@given(st.text())
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_any_unicode_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 <= i < tokenizer.vocab_size for i in ids)


@given(st.text(st.sampled_from(sorted(set("".join(CORPUS))))))
def test_characters_come_back_one_id_each(text):
    tokenizer = trained("characters")
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [EOS, PAD, f"a{EOS}b", f"{PAD}{PAD}", "<|endo"])
def test_text_that_looks_like_a_special_token_is_plain_text(kind, text):
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind), [text, *CORPUS])
    ids = tokenizer.encode(text)
    assert not {tokenizer.pad_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_two_and_are_dropped_in_decoding(kind):
    tokenizer = trained(kind)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([1, *ids[:2], 0, *ids[2:], 1, 0, 0]) == "the fox"
    assert tokenizer.decode(np.array([1, *ids], np.int32)) == "the fox"
    assert tokenizer.tokens([0, 1]) == [PAD, EOS]


def test_bytes_are_their_value_and_two():
    text = "hé\0\n€"
    assert [i - 2 for i in BYTES.encode(text)] == list(text.encode())
    assert BYTES.vocab_size == 258


def test_characters_have_one_id_for_each_of_the_corpus():
    assert trained("characters").vocab_size == 2 + len(set("".join(CORPUS)))


@pytest.mark.parametrize("size", [258, 259, 300, 2048])
def test_bpe_never_has_more_tokens_than_asked_for(size):
    tokenizer = trained("bpe", size)
    assert tokenizer.vocab_size <= size
    if size <= 300:
        assert tokenizer.vocab_size == size  # this corpus has pairs enough
    assert max(tokenizer.encode("".join(CORPUS))) < tokenizer.vocab_size


def test_bpe_merges_the_most_frequent_pair_first():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=259), ["abab abab xy"])
    assert tokenizer.tokens([258]) == ["ab"]
    assert tokenizer.tokens(tokenizer.encode("xab")) == ["x", "ab"]


def test_a_part_of_a_character_is_readable():
    assert BYTES.tokens(BYTES.encode("é ")) == [r"\xc3", r"\xa9", " "]
    assert "".join(BPE.tokens(BPE.encode(CORPUS[0]))) == CORPUS[0]
    assert trained("characters").tokens(trained("characters").encode("fox")) == ["f", "o", "x"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_texts_encoded_apart(kind):
    tokenizer = trained(kind)
    texts = ["the fox", "", "Mara"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_tokenizer(kind, tmp_path):
    tokenizer = trained(kind)
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert (loaded.digest, loaded.kind, loaded.vocab_size) == (
        tokenizer.digest,
        kind,
        tokenizer.vocab_size,
    )
    assert loaded.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_alone_serves_the_tokenizers_library(kind, tmp_path):
    text = "the fox kept the promise.\n"
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind), [EOS, text, *CORPUS])
    tokenizer.save(tmp_path / "tokenizer.json")
    foreign = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for t in (text, EOS):
        assert foreign.encode(t).ids == tokenizer.encode(t)
        assert foreign.decode(foreign.encode(t).ids) == t
    assert (foreign.token_to_id(PAD), foreign.token_to_id(EOS)) == (0, 1)


def test_digests_differ_where_tokenizers_do():
    assert len({trained(kind).digest for kind in KINDS} | {trained("bpe", 300).digest}) == 4


def test_training_is_deterministic_in_another_process():
    code = (
        "from minilm.text.tokenizer import *\n"
        f"print(train_tokenizer(TokenizerConfig(vocab_size=320), {CORPUS!r}).digest)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == BPE.digest


def test_a_character_outside_the_alphabet_is_named_with_its_offset():
    with pytest.raises(UserError, match=r"'Z' at offset 4 .*\n.*bpe"):
        trained("characters").encode("the Z fox Z")


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_refused(kind):
    with pytest.raises(UserError, match=r"'\\ud800' at offset 3"):
        trained(kind).encode("the\ud800")
    if kind != "bytes":  # which reads no corpus
        with pytest.raises(UserError, match=r"lone surrogate '\\udfff' at offset 1"):
            train_tokenizer(TokenizerConfig(kind=kind), ["a\udfff"])


def test_a_missing_or_damaged_file_is_a_users_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer.load(path)
    BPE.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"{}", b"\xff\xfe", b"[1]"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.load(path)


def test_a_foreign_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    hf.Tokenizer(hf.models.BPE({"a": 0, "b": 1}, [])).save(str(path))
    with pytest.raises(UserError, match="ids 0 and 1"):
        Tokenizer.load(path)


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        BPE.save(tmp_path / "file" / "run" / "tokenizer.json")


def test_the_saved_file_registers_no_spelling_of_the_specials(tmp_path):
    BPE.save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"] == []


def foreign(kind: str) -> hf.Tokenizer:
    """Tokenizers as others make them, special tokens and all."""
    if kind == "gpt2":
        inner = hf.Tokenizer(hf.models.BPE())
        inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = hf.decoders.ByteLevel()
        letters = hf.pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>", "<|im_start|>"]
        trainer = hf.trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
    elif kind == "unigram":
        inner = hf.Tokenizer(hf.models.Unigram())
        inner.pre_tokenizer = hf.pre_tokenizers.Metaspace()
        inner.decoder = hf.decoders.Metaspace()
        trainer = hf.trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        )
    else:
        inner = hf.Tokenizer(hf.models.WordLevel(unk_token="[UNK]"))
        inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
        trainer = hf.trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    inner.train_from_iterator([c.replace("\r\n\t", " ") for c in CORPUS], trainer)
    return inner


@pytest.mark.parametrize("kind", ["gpt2", "unigram", "words"])
def test_a_tokenizer_of_ones_own_keeps_its_ids_but_for_two_more(tmp_path, kind):
    theirs, path = foreign(kind), tmp_path / "own.json"
    theirs.save(str(path))
    ours = train_tokenizer(TokenizerConfig(kind="file", file=str(path)), ())
    asked = "The fox lent the hook to Mara."
    assert ours.encode(asked) == [i + 2 for i in theirs.encode(asked).ids]
    assert ours.decode([1, *ours.encode(asked), 0]) == theirs.decode(theirs.encode(asked).ids)
    assert ours.vocab_size == theirs.get_vocab_size() + 2
    assert len(ours.tokens(range(ours.vocab_size))) == ours.vocab_size
    ours.save(tmp_path / "kept.json")
    assert Tokenizer.load(tmp_path / "kept.json").digest == ours.digest
    again = train_tokenizer(TokenizerConfig(kind="file", file=str(tmp_path / "kept.json")), ())
    assert again.digest == ours.digest  # one of minilm's stays as it is


def test_a_tokenizer_file_that_is_none_is_told(tmp_path):
    (tmp_path / "own.json").write_text("{}")
    with pytest.raises(UserError, match="damaged tokenizer file"):
        train_tokenizer(TokenizerConfig(kind="file", file=str(tmp_path / "own.json")), ())
    with pytest.raises(ValueError, match="belong together"):
        TokenizerConfig(kind="file")
