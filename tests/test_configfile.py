"""Config files: what is read, what is refused and in which words."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm import configfile
from minilm.config import (
    Config,
    FablesCorpus,
    HubCorpus,
    JudgeConfig,
    ModelConfig,
    OptimizerConfig,
    PreferencesConfig,
    PretrainConfig,
    PydocCorpus,
    TextCorpus,
)
from minilm.errors import UserError

EXAMPLE = """
seed = 3

[corpus]
size = "small"
documents = 4000

[model]
num_layers = 2

[pretrain.optimizer]
learning_rate = 2e-3
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "example.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    return path


def message(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        configfile.load(path, words)
    return str(caught.value)


def test_a_file_sets_its_keys_and_leaves_the_others_at_their_defaults(example: Path):
    config = configfile.load(example)
    assert config.seed == 3
    assert config.corpus == FablesCorpus(size="small", documents=4000)
    assert config.model == ModelConfig(num_layers=2)
    assert config.pretrain.optimizer == OptimizerConfig(learning_rate=2e-3)
    assert config.rlhf == Config().rlhf


def test_an_empty_file_is_the_default_config(tmp_path: Path):
    path = tmp_path / "empty.toml"
    path.touch()
    assert configfile.load(str(path)) == Config()


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--model.num-layers 4", "model.num_layers", 4),
        ("--model.num_layers=4", "model.num_layers", 4),
        ("--model.num-layers 4 --model.num-layers 6", "model.num_layers", 6),
        ("--pretrain.optimizer.learning-rate=1e-3", "pretrain.optimizer.learning_rate", 1e-3),
        ("--reward.optimizer.weight-decay 1", "reward.optimizer.weight_decay", 1.0),
        ("--model.tie-embeddings false", "model.tie_embeddings", False),
        ("--preferences.max-pairs 7", "preferences.max_pairs", 7),
        ("--preferences.max-pairs none", "preferences.max_pairs", None),
        ("--preferences.file none", "preferences.file", None),
        ("--preferences.file 12", "preferences.file", "12"),
        ("--rlhf.missing-eos-score -3.5", "rlhf.missing_eos_score", -3.5),
        ("--judge.name my_file:score", "judge.name", "my_file:score"),
        ("--judge.options.target 3 --judge.options.word ox", "judge.options.target", 3),
        ("--judge.options.strict true", "judge.options.strict", True),
        ("--judge.options.weight 0.5", "judge.options.weight", 0.5),
        ("--corpus.kind text --corpus.files a b", "corpus.files", ["a", "b"]),
        ("--corpus.files a --corpus.kind text", "corpus.files", ["a"]),
        ("--corpus.kind hub --corpus.name none", "corpus.name", "none"),
    ],
)
def test_an_option_is_parsed_as_what_its_key_takes(example: Path, words: str, name, value):
    found = configfile.sections(configfile.load(example, words.split()), [name])[name]
    assert (found, type(found)) == (value, type(value))


def test_another_kind_of_corpus_drops_the_keys_that_only_the_former_has(example: Path):
    config = configfile.load(example, ["--corpus.kind", "text", "--corpus.held-out", "0.2"])
    assert config.corpus == TextCorpus(held_out=0.2)


@pytest.mark.parametrize(
    "key",
    list(filter(lambda key: configfile.NAMED not in key.name, configfile.keys())),
    ids=lambda key: f"{key.name}-{key.kind}",
)
def test_every_key_takes_its_own_default_as_an_option(example: Path, key: configfile.Key):
    words = ["--corpus.kind", key.kind] if key.kind else []
    words += ["--corpus.name", "somebody/something"] if key.kind == "hub" else []
    default = "text" if key.required else key.default
    values = [str(v) for v in default] if isinstance(default, list) else [str(default).lower()]
    if values and not isinstance(default, dict):  # a table's keys are options of their own
        words += [f"--{key.name.replace('_', '-')}", *values]
    found = configfile.sections(configfile.load(example, words), [key.name])
    assert found[key.name] == default or key.name in EXAMPLE_KEYS


EXAMPLE_KEYS = {"corpus.size", "corpus.documents"}  # of the example, where the kind is another's


@pytest.mark.parametrize(
    ("toml", "words", "fragments"),
    [
        ("[model]\nnum_layer = 4", "", ["example.toml: model.num_layer", "model.num_layers?"]),
        ("num_layers = 4", "", ["example.toml: num_layers", "did you mean model.num_layers?"]),
        ("[modle]\nnum_layers = 4", "", ["example.toml: modle", "did you mean model?"]),
        ("[pretrain]\nlearning_rate = 1.0", "", ["pretrain.optimizer.learning_rate"]),
        ("[corpus]\nfiles = ['a']", "", ["'files' belongs to corpus.kind = 'text'"]),
        ("[corpus]\nkind = 'txt'", "", ["corpus.kind", "'txt'", "'fables' or", "mean 'text'?"]),
        ("[corpus]\nkind = 3", "", ["corpus.kind", "3"]),
        ("[corpus]\nkind = 'hub'", "", ["corpus.name: is required", "pass --corpus.name"]),
        ("corpus = 3", "", ["corpus: must be a section", "kind, size"]),
        ("learning_rate = 1", "", [".learning_rate?"]),
        ("model = 3", "", ["model: must be a section", "num_layers"]),
        ("[seed]\nx = 1", "", ["seed: wrong value", "a whole number ≥ 0"]),
        ("seed = '3'", "", ["seed: wrong value", "'3'", "a whole number ≥ 0"]),
        ("seed = true", "", ["seed: wrong", "True", "a whole number ≥ 0"]),
        ("seed = 1.5", "", ["seed: wrong", "1.5"]),
        ("seed = 1979-05-27", "", ["seed: wrong value", "1979-05-27"]),
        (
            "[judge.options]\nx = [1979-05-27]",
            "",
            ["judge.options.x", "1979-05-27", "text or a whole number or"],
        ),
        ("[judge.options]\nx = nan", "", ["judge.options.x: must be finite", "nan"]),
        ("[rlhf]\nmissing_eos_score = inf", "", ["rlhf.missing_eos_score: must be finite"]),
        ("[corpus]\nheld_out = 1.0", "", ["corpus.held_out", "1.0", "a number > 0 and < 1"]),
        ("[corpus]\nkind = 'text'\nfiles = 'a'", "", ["corpus.files", "a list, each text"]),
        ("[corpus]\nkind = 'text'\nfiles = [3]", "", ["corpus.files", "3", "text"]),
        ("[tokenizer]\nkind = 'bpee'", "", ["tokenizer.kind", "'bpe' or", "mean 'bpe'?"]),
        ("[model]\nnum_heads = 5\nnum_kv_heads = 2", "", ["model", "multiple of num_kv_heads (2)"]),
        ("", "--model.num-layer 4", ["--model.num-layer:", "did you mean model.num_layers?"]),
        ("", "--modle.num-layers 4", ["--modle.num-layers:", "did you mean model?"]),
        ("", "--num-layers 4", ["--num-layers:", "did you mean model.num_layers?"]),
        ("", "--model.num-layers 0", ["--model.num-layers:", "0", "a whole number ≥ 1"]),
        ("", "--model.num-layers 1.5", ["--model.num-layers:", "'1.5'", "a whole number ≥ 1"]),
        ("", "--model.num-layers", ["--model.num-layers: needs a value", "a whole number ≥ 1"]),
        ("", "--model.num-layers 1 2", ["--model.num-layers: wrong value", "[1, 2]", "a whole"]),
        ("", "--model.tie-embeddings yes", ["'yes'", "true or false"]),
        ("", "--preferences.max-pairs x", ["'x'", "a whole number ≥ 1 or none"]),
        ("", "--model 3", ["--model: must be a section", "num_layers"]),
        ("", "--seed.x 3", ["--seed.x: wrong value", "a whole number ≥ 0"]),
        ("[judge.options]\na = 1", "--judge.options.a.b 3", ["--judge.options.a.b: wrong value"]),
        ("", "--judge.options 3", ["--judge.options", "a table"]),
        ("", "--corpus.kind", ["--corpus.kind: needs a value", "'fables' or 'text'"]),
        ("", "--corpus.files", ["--corpus.files"]),
        ("", "--corpus.kind text --corpus.files", ["--corpus.files: needs a value"]),
        ("", "--corpus.kind hub", ["corpus.name: is required"]),
        ("", "--model.num-kv-heads 3", ["--model.num-kv-heads: num_heads (4) must be a multiple"]),
        (
            "[model]\nnum_heads = 4",
            "--model.num-kv-heads 3",
            ["--model.num-kv-heads: num_heads (4)"],
        ),
        ("", "stray", ["unexpected argument 'stray'"]),
        ("a = 1\nb = = 2", "", ["not TOML", "line 2"]),
    ],
)
def test_a_mistake_is_named_with_its_place_value_and_remedy(
    example: Path, toml: str, words: str, fragments: list[str]
):
    example.write_text(toml, encoding="utf-8")
    text = message(example, *words.split())
    assert all(fragment in text for fragment in fragments), text


def test_a_missing_file_is_named_with_the_nearest_there_is(example: Path):
    text = message(example.with_name("exampel.toml"))
    assert "no such config file" in text
    assert f"did you mean '{example}'?" in text


def test_a_folder_and_a_binary_file_are_refused(tmp_path: Path):
    assert "Is a directory" in message(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"seed = 1\n\xff\xfe")
    assert "can't decode byte 0xff in position 9" in message(binary)


words = st.text(max_size=8)
rates = st.floats(0, 1e9, exclude_min=True, allow_subnormal=False)
shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
counts = st.integers(1, 10**12)
configs = st.builds(
    Config,
    seed=st.integers(0, 2**32 - 1),
    corpus=st.one_of(
        st.builds(FablesCorpus, size=st.sampled_from(["small", "full"]), documents=counts),
        st.builds(TextCorpus, files=st.lists(words, max_size=3).map(tuple), held_out=shares),
        st.builds(
            HubCorpus, name=words, config=st.none() | words, max_documents=st.none() | counts
        ),
        st.builds(PydocCorpus, held_out=shares),
    ),
    model=st.builds(ModelConfig, num_layers=counts, rope_base=rates, tie_embeddings=st.booleans()),
    pretrain=st.builds(
        PretrainConfig, optimizer=st.builds(OptimizerConfig, learning_rate=rates), steps=counts
    ),
    judge=st.builds(
        JudgeConfig,
        name=words,
        options=st.dictionaries(
            words,
            words | st.integers(-(2**62), 2**62) | st.floats(-1e30, 1e30) | st.booleans(),
            max_size=3,
        ),
    ),
    preferences=st.builds(PreferencesConfig, file=st.none() | words),
)


@given(config=configs)
def test_a_dumped_config_loads_as_the_same_config(config: Config, tmp_path_factory):
    path = tmp_path_factory.mktemp("dumped") / "config.toml"
    path.write_bytes(configfile.dump(config).encode())
    assert configfile.load(path) == config


def test_changed_keys_name_what_differs_and_what_one_side_lacks():
    old = {"corpus": {"kind": "text", "files": ["a"]}, "seed": 0, "judge": {"options": {}}}
    new = {"corpus": {"kind": "text", "files": ["b"]}, "judge": {"options": {"x": 1}}}
    expected = ["corpus.files", "judge.options", "judge.options.x", "seed"]
    assert configfile.changed_keys(old, new) == expected
    assert configfile.changed_keys(old, old) == []


def test_sections_are_resolved_values_that_json_can_hold():
    found = configfile.sections(Config(), ["tokenizer", "pretrain.optimizer.name", "seed"])
    assert found == {
        "tokenizer": {"kind": "bpe", "vocab_size": 2048, "file": None},
        "pretrain.optimizer.name": "adamw",
        "seed": 0,
    }


def test_how_a_model_is_computed_is_not_what_it_is(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("")
    words = ["--model.remat", "true", "--model.attention", "plain"]
    plain, other = configfile.load(path), configfile.load(path, words)
    assert plain.model != other.model
    assert configfile.sections(plain, ["model"]) == configfile.sections(other, ["model"])
    assert configfile.sections(other, ["model.remat"]) == {"model.remat": True}
