"""Files that anyone may have written: a `UserError` that says what is wrong, or a value."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm import checkpoint, configfile
from minilm.config import TokenizerConfig
from minilm.diagnose import diagnose
from minilm.errors import UserError
from minilm.files import read_jsonl, sha256
from minilm.text.formats import example
from minilm.text.preferences import pairs_from
from minilm.text.tokenizer import Tokenizer, train_tokenizer

TOML = Path(__file__).with_name("tiny.toml").read_text(encoding="utf-8")
PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [{"role": "user", "content": "a"}],
     "chosen": [{"role": "assistant", "content": "b"}],
     "rejected": [{"role": "assistant", "content": "c"}]},
    {"prompt": "a", "completions": ["b", "c"], "ratings": [1, 2.5]},
    {"prompt": "a", "completion": "b", "rating": 3},
    {"prompt": "a", "completion": "c", "label": False},
    {"info": {"post": "a"}, "summaries": [{"text": "b"}, {"text": "c"}], "choice": 1},
    {"instruction": "a", "completions": [{"response": "b", "overall_score": 1.0}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]  # fmt: skip
NAMES = sorted({key for row in PAIRS for key in row} | {"role", "content", "text", "votes"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner),
    max_leaves=6,
)
MANY = settings(max_examples=200)


@st.composite
def edited(draw, text: str) -> str:
    """A text with up to four places cut out or written over."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 20)))
        new = draw(
            st.text(max_size=3) | st.sampled_from(['"', "]", "=", "\n[", "1e999", "{", "-1"])
        )
        text = text[:start] + new + text[stop:]
    return text


@st.composite
def changed_row(draw):
    """A row of a known shape in which some values are others, or gone."""
    row = dict(draw(st.sampled_from(PAIRS)))
    for key in draw(st.lists(st.sampled_from(NAMES), max_size=3)):
        row[key] = draw(JSON)
    for key in draw(st.lists(st.sampled_from(sorted(row)), max_size=1)):
        row.pop(key, None)
    return row


def refused_or_done(function, *args) -> bool:
    """Whether it said what is wrong. Another exception fails the test."""
    try:
        function(*args)
    except UserError as error:
        assert error.problem
        return True
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@MANY
@given(text=edited(TOML))
def test_a_config(folder, text):
    (folder / "config.toml").write_bytes(text.encode(errors="surrogatepass"))
    refused_or_done(configfile.load, folder / "config.toml")


@MANY
@given(
    words=st.lists(
        st.sampled_from(
            ["--seed", "--rlhf.lr", "--model.num-layers=2", "--", "-1", "=", "--=", "[1"]
        )
        | st.text(max_size=6),
        max_size=4,
    )
)
def test_options(words):
    refused_or_done(configfile.load, Path(__file__).with_name("tiny.toml"), words)


@MANY
@given(
    rows=st.lists(changed_row() | JSON, min_size=1, max_size=3), edit=st.booleans(), data=st.data()
)
def test_a_file_of_pairs_or_examples(folder, rows, edit, data):
    text = "\n".join(map(json.dumps, rows))
    if edit:
        text = data.draw(edited(text))
    path = folder / "pairs.jsonl"
    path.write_bytes(text.encode(errors="surrogatepass"))

    def read_examples():
        for number, row in enumerate(read_jsonl(path), 1):
            example(row, f"{path}:{number}")

    refused_or_done(lambda: pairs_from(read_jsonl(path), str(path)))
    refused_or_done(read_examples)


@pytest.fixture(scope="module")
def written_tokenizer(folder) -> str:
    texts = ["the cat sat on the mat", "a cat and a hat"] * 9
    train_tokenizer(TokenizerConfig(vocab_size=270), texts).save(folder / "good.json")
    return (folder / "good.json").read_text(encoding="utf-8")


@MANY
@given(data=st.data())
def test_a_tokenizer(folder, written_tokenizer, data):
    path = folder / "tokenizer.json"
    text = data.draw(edited(json.dumps(json.loads(written_tokenizer))))
    path.write_bytes(text.encode(errors="surrogatepass"))

    def use():
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(tokenizer.encode("a cat"))

    refused_or_done(use)


@MANY
@given(text=edited("step,train_loss,validation_loss\n1,2.0,2.1\n2,1.9,2.0\n3,1.8,1.9\n4,1.7,1.8\n"))
def test_a_table_of_curves(folder, text):
    (folder / "curves.csv").write_bytes(text.encode(errors="surrogatepass"))
    refused_or_done(diagnose, folder / "curves.csv")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    import jax.numpy as jnp

    tree = {"model": {"w": jnp.arange(6.0).reshape(2, 3)}}
    return checkpoint.save(tmp_path_factory.mktemp("saved"), 1, tree, {"stage": "x"}, keep=1)


@MANY
@given(data=st.data())
def test_a_checkpoints_metadata(saved, data):
    """Also where the digest is right: it tells damage, and is no signature."""
    path = saved / "metadata.json"
    before = path.read_bytes()
    record = json.loads(before)
    record.pop("digest")
    for key in data.draw(st.lists(st.sampled_from(sorted(record)), min_size=1, max_size=2)):
        if data.draw(st.booleans()):
            record.pop(key, None)
        else:
            record[key] = data.draw(JSON)
    checkpoint._write_metadata(saved, record)
    try:
        refused_or_done(checkpoint.load_arrays, saved)
    finally:
        path.write_bytes(before)


def test_a_checkpoint_does_not_name_files_outside_of_itself(saved, tmp_path):
    path = saved / "metadata.json"
    before = path.read_bytes()
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    record = json.loads(before)
    record.pop("digest")
    record["files"] = {"../" * 20 + str(secret): sha256(secret)}
    checkpoint._write_metadata(saved, record)
    with pytest.raises(UserError, match="outside"):
        checkpoint.metadata(saved)
    path.write_bytes(before)


def test_nothing_is_unpickled(saved, folder, written_tokenizer, monkeypatch):
    """A pickle runs what it says. Neither a checkpoint nor a tokenizer is one."""

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert checkpoint.load_arrays(saved)["model.w"].shape == (2, 3)
    Tokenizer.load(folder / "good.json")
    sources = Path(checkpoint.__file__).parent.rglob("*.py")
    words = ("import pickle", "allow_pickle=True", "eval(", "exec(", "marshal")
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert not [word for word in words if word in text.replace("literal_eval(", "")], source
