"""Bad input, each kind: one clear message, exit code 2, no traceback."""

import json
import shutil
from pathlib import Path

import pytest

from minilm import checkpoint
from minilm.config import TokenizerConfig
from minilm.text.tokenizer import train_tokenizer


def assert_one_message(done, *fragments: str) -> None:
    """Exit code 2 and one message, which has these fragments."""
    assert done.code == 2, done.output
    assert done.output.count("minilm: ") == 1
    assert "Traceback" not in done.output
    for fragment in fragments:
        assert fragment in done.output, done.output


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("absent.txt", None, ["no such file", "absent.txt"]),
        ("empty.txt", b"", ["the file is empty", "empty.txt"]),
        ("blank.txt", b" \n\n ", ["the file is empty"]),
        ("binary.txt", b"\x7fELF\0\0text", ["a binary file: NUL at byte 4", "UTF-8 text"]),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), ["not UTF-8 at byte 3", "iconv"]),
        ("short.txt", b"Too short.", ["shorter than one sequence", "pretrain.sequence_length"]),
        ("table.csv", b"title,body\na,b\n", ["no column 'text'", "body, title", "corpus.column"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["cannot load", "broken.jsonl"]),
        ("broken.parquet", b"PAR1 and no more", ["cannot load", "broken.parquet"]),
        ("picture.png", b"text", ["unknown name '.png'", ".txt"]),
    ],
)
def test_a_corpus_file_that_will_not_do(tiny, tmp_path, processes, name, content, fragments):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    words = ["--corpus.kind", "text", "--corpus.files", tmp_path / name, "--until", "pretrain"]
    assert_one_message(processes("run", tiny, "--out", tmp_path / "run", *words), *fragments)


def test_a_corpus_that_is_not_named(tiny, tmp_path, processes):
    words = ["--corpus.kind", "text", "--until", "pretrain"]
    done = processes("run", tiny, "--out", tmp_path / "run", *words)
    assert_one_message(done, "corpus.files: no files are named", "--corpus.files PATH")
    # The folder that this left is no obstacle to the mended command, which gets further.
    (tmp_path / "short.txt").write_text("Too short.")
    mended = processes(
        "run", tiny, "--out", tmp_path / "run", *words, "--corpus.files", tmp_path / "short.txt"
    )
    assert_one_message(mended, "shorter than one sequence")


def test_a_data_set_that_cannot_be_fetched(tiny, tmp_path, processes):
    """The tests run with HF_HUB_OFFLINE=1."""
    words = ["--corpus.kind", "hub", "--corpus.name", "nobody/nothing", "--until", "pretrain"]
    done = processes("run", tiny, "--out", tmp_path / "run", *words)
    assert_one_message(done, "nobody/nothing", "fables", "text", "pydoc")


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("[pretrain]\nstep = 3", ["pretrain.step: unknown key", "did you mean pretrain.steps?"]),
        ("[pretrain]\nsteps = 'many'", ["pretrain.steps", "'many'", "a whole number ≥ 1"]),
        ("[pretrain]\nsteps = 0", ["pretrain.steps", "a whole number ≥ 1"]),
        ("[model]\nnum_heads = 3\nnum_kv_heads = 2", ["num_heads (3) must be a multiple"]),
        ("[judge]\nname = 'length'", ["judge.name: 'length' needs the option 'target'"]),
        ("[judge]\nname = 'lenght'", ["judge.name", "did you mean 'length'?"]),
        ("[judge]\nname = 'absent_module:score'", ["cannot import module 'absent_module'"]),
        ("[judge]\nname = 'none'", ["there is no judge to label pairs", "--preferences.file"]),
        ("[judge]\nname = 'length'\noptions.target = 0", ["the judge failed", "at least 1 word"]),
        ("[rlhf]\nalgorithm = 'pppo'", ["rlhf.algorithm", "did you mean 'ppo'?"]),
        ("[corpus]\nkind = 'pydoc'", ["judge.name", "fables alone", "--until pretrain"]),
        ("[rlhf]\nminibatches = 3", ["rlhf", "do not split into 3 minibatches"]),
        ("[rlhf]\ngroup_size = 1", ["rlhf.group_size", "rloo compares", "at least 2"]),
        ("[prompts]\nrlhf = 9000", ["prompts.preferences + rlhf", "at most 3840"]),
        ("[preferences]\nfile = 'absent.jsonl'", ["absent.jsonl: missing file"]),
        ("[pretrain", ["not TOML"]),
    ],
)
def test_a_config_that_will_not_do_is_refused_before_anything_runs(
    tmp_path, processes, line, fragments
):
    config, out = tmp_path / "mine.toml", tmp_path / "run"
    config.write_text(f"{line}\n")
    assert_one_message(processes("run", config, "--out", out), *fragments)
    assert not (out / "pretrain").exists()


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([{"prompt": "a", "chosen": "b"}], [":1: missing field 'rejected'"]),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": "b", "rejected": "c"}],
            [":2: missing field 'prompt'", "prompt, chosen, rejected"],
        ),
        ([{"prompt": "a", "chosen": 1, "rejected": "c"}], [":1: 'chosen' must be a text"]),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c", "votes": 2, "votes_chosen": 3}],
            [":1: votes_chosen must lie between 0 and votes"],
        ),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "b"}],
            [":1: 'chosen' and 'rejected' are the same text"],
        ),
        (
            [{"prompt": p, "chosen": "b", "rejected": " "} for p in "ab"],
            [":1: 'rejected' is empty", "leave such pairs out"],
        ),
        (
            [
                {"prompt": p, "chosen": "b", "rejected": "c", "votes": 2, "votes_chosen": 1}
                for p in "ab"
            ],
            ["every pair is a tie", "2 pairs"],
        ),
        ([], ["no preference pairs"]),
        (["{not json"], [":1: not JSON"]),
    ],
)
def test_a_preferences_file_that_will_not_do(tiny, tiny_run, tmp_path, processes, rows, fragments):
    file, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    words = ["--out", out, "--init", tiny_run, "--preferences.file", file]
    assert_one_message(processes("run", tiny, *words), "pairs.jsonl", *fragments)


@pytest.mark.parametrize(
    "out", [Path("a_file/below/run"), Path("a_file"), Path("/proc/minilm"), Path("/dev/null/run")]
)
def test_an_output_folder_that_cannot_be_written(tiny, tmp_path, processes, out):
    (tmp_path / "a_file").write_text("in the way")
    done = processes("run", tiny, "--out", tmp_path / out)
    assert_one_message(done, "--out: cannot write the run folder")


@pytest.mark.parametrize(
    "words", [["generate"], ["inspect"], ["report"], ["inspect", "{run}", "--diff"]], ids=" ".join
)
def test_no_checkpoint_where_one_is_looked_for(tiny_run, tmp_path, processes, words):
    words = [word.format(run=tiny_run) for word in words]
    assert_one_message(processes(*words, tmp_path), str(tmp_path))
    assert_one_message(processes(*words, tmp_path / "absent"), "absent")


def flip_a_bit(checkpoints: Path) -> None:
    """In the largest file of each."""
    for path in checkpoints.iterdir():
        found = [p for p in path.rglob("*") if p.is_file() and p.name != "metadata.json"]
        largest = max(found, key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)


def test_a_checkpoint_that_is_gone_or_damaged(tiny, tiny_copy, processes):
    shutil.rmtree(tiny_copy / "rlhf")
    flip_a_bit(tiny_copy / "reward" / "checkpoints")
    done = processes("run", tiny, "--out", tiny_copy)
    assert done.code == 2
    assert "every checkpoint is damaged" in done.output
    assert "Traceback" not in done.output
    shutil.rmtree(tiny_copy / "reward" / "checkpoints")
    done = processes("run", tiny, "--out", tiny_copy)
    assert_one_message(done, "no checkpoint here", "reward")


def test_a_reward_model_of_another_tokenizer(tiny, tiny_copy, processes):
    shutil.rmtree(tiny_copy / "rlhf")
    path = checkpoint.find(tiny_copy / "reward")
    arrays, facts = checkpoint.load_arrays(path), checkpoint.metadata(path)
    own = {"step", "best", "arrays", "files", "bytes", "digest", "format", "minilm_version"}
    facts = {k: v for k, v in facts.items() if k not in own} | {"tokenizer": "f" * 64}
    shutil.rmtree(path.parent)
    checkpoint.save(path.parent, 9, arrays, facts, keep=1)
    done = processes("run", tiny, "--out", tiny_copy)
    assert_one_message(done, "the reward model was trained with another tokenizer")


def test_a_tokenizer_that_is_not_the_runs(tiny, tiny_copy, processes):
    shutil.rmtree(tiny_copy / "rlhf")
    train_tokenizer(TokenizerConfig(kind="bytes"), []).save(tiny_copy / "tokenizer.json")
    done = processes("run", tiny, "--out", tiny_copy)
    assert_one_message(done, "was trained with another tokenizer")
    (tiny_copy / "tokenizer.json").write_text("{")
    assert_one_message(processes("run", tiny, "--out", tiny_copy), "damaged tokenizer file")


def test_a_damaged_record_of_a_finished_stage(tiny, tiny_copy, processes):
    (tiny_copy / "reward" / "done.json").write_text("{")
    done = processes("run", tiny, "--out", tiny_copy)
    assert_one_message(done, "reward/done.json: not JSON")


def test_an_option_that_a_judge_lacks_is_named_before_the_one_it_needs(tmp_path, processes):
    config = tmp_path / "mine.toml"
    config.write_text("[judge]\nname = 'length'\noptions.targt = 3\n")
    done = processes("run", config, "--out", tmp_path / "run")
    assert_one_message(done, "has no option 'targt'", "did you mean 'target'?")
