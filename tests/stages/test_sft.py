"""Supervised fine-tuning: what the loss is on, what it starts from, what builds on it."""

import json

import numpy as np
import pytest

from minilm import checkpoint
from minilm.config import Config, SFTConfig, TokenizerConfig
from minilm.configfile import load
from minilm.errors import UserError
from minilm.files import read_json
from minilm.pipeline import stages_of
from minilm.stages import sft as s
from minilm.stages.evaluate import token_losses
from minilm.stages.workspace import load_model
from minilm.text.fables import stories
from minilm.text.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(TokenizerConfig(kind="characters"), ["abcdefgh "])
EOS = TOKENIZER.eos_id


def test_the_loss_is_on_completions_and_their_end_alone():
    """trl#3927: a prompt's tokens in the loss teach the model to ask."""
    examples = [("ab", "cde"), ("", "gh"), ("fff", "a")]
    rows = s.packed(examples, TOKENIZER, 16)
    batch = s.completions_of(rows, TOKENIZER.vocab_size)
    learnt = [
        TOKENIZER.decode(targets[(weights > 0) & (targets != EOS)])
        for targets, weights in zip(batch.targets, batch.weights, strict=True)
    ]
    assert sorted("".join(learnt)) == sorted("cdegha")
    ends = sum(((batch.targets == EOS) & (batch.weights > 0)).sum(1))
    assert ends == len(examples)
    assert batch.tokens.max() < TOKENIZER.vocab_size
    # Each example attends to itself alone, its prompt included.
    whole = "".join(TOKENIZER.decode(row[row > EOS]) for row in batch.tokens)
    assert len(whole) == sum(len(p) + len(c) for p, c in examples)


def test_an_example_longer_than_a_row_is_learnt_in_windows():
    rows = s.packed([("a" * 6, "b" * 30)], TOKENIZER, 8)
    batch = s.completions_of(rows, TOKENIZER.vocab_size)
    assert batch.weights.sum() == 31  # every token of the completion once, and the end


@pytest.mark.parametrize("seed", range(20))
def test_no_prompt_is_learnt_from_and_held_out(seed):
    """By row, four of five prompts with three answers each were in both parts."""
    asked = [(f"ask {n % 10}", f"answer {n}") for n in range(30)]
    alone = [("", f"text {n}") for n in range(10)]
    held, rest = s.split([*asked, *alone], 0.2, np.random.default_rng(seed))
    assert sorted([*held, *rest]) == sorted([*asked, *alone])
    prompts = [{p for p, _ in part if p} for part in (held, rest)]
    assert not prompts[0] & prompts[1]
    assert 6 <= len(held) <= 8  # a fifth of 40, in portions of three and of one


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [[500, 500], [900, *10 * [10]], [30, 60, 90]])
def test_a_frequent_prompt_does_not_empty_what_is_learnt_from(sizes, seed):
    """By share of prompts, half of the first and nine tenths of the second could be held out."""
    examples = [(f"ask {k}", f"{k} {n}") for k, size in enumerate(sizes) for n in range(size)]
    held, rest = s.split(examples, 0.1, np.random.default_rng(seed))
    assert len(held) == 0.1 * len(examples)
    assert sorted([*held, *rest]) == sorted(examples)


def test_texts_without_prompts_land_in_both_parts():
    held, rest = s.split([("", str(n)) for n in range(10)], 0.3, np.random.default_rng(0))
    assert (len(held), len(rest)) == (3, 7)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_examples_of_one_prompt_are_split_among_themselves_and_neither_part_is_empty(share):
    examples = [("Tell a story:", str(n)) for n in range(9)]
    held, rest = s.split(examples, share, np.random.default_rng(0))
    assert sorted([*held, *rest]) == examples
    assert min(len(held), len(rest)) == 1


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[dict]:
    texts = [story.text for story in stories(3, 40, size="small")]
    return [dict(zip(("prompt", "completion"), t.split(". ", 1), strict=True)) for t in texts]


@pytest.fixture(scope="module")
def tuned(tiny, tiny_run, examples, processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in examples))
    words = ["--init", tiny_run, "--out", folder / "run", "--sft.file", file]
    dials = ["--sft.epochs", 3, "--sft.sequence-length", 96, "--sft.batch-size", 2]
    done = processes("run", tiny, *words, *dials, "--until", "preferences")
    assert done.code == 0, done.output
    return folder / "run"


def test_it_starts_from_the_pretrained_model_and_gets_better(tuned, tiny_run, examples):
    summary = read_json(tuned / "sft" / "done.json")["summary"]
    assert (summary["examples"], summary["held_out_examples"]) == (36, 4)
    assert summary["validation_loss"] < summary["validation_loss_before"]
    tokenizer = Tokenizer.load(tiny_run / "tokenizer.json")
    order = np.random.default_rng((1, 11)).permutation(40)[:4]
    for key, run in (
        ("validation_loss_before", tiny_run / "pretrain"),
        ("validation_loss", tuned / "sft"),
    ):
        model, _ = load_model(checkpoint.find(run))
        nats = []
        for row in (examples[i] for i in order):
            # Prompt and completion are tokens of their own, so their texts must not merge.
            ids = [*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["completion"])]
            if ids != tokenizer.encode(row["prompt"] + row["completion"]):
                pytest.skip("a token reaches over the border")
            told = token_losses(model, tokenizer, row["prompt"] + row["completion"])
            nats += told[len(tokenizer.encode(row["prompt"])) :]
        assert summary[key] == pytest.approx(np.mean(nats), rel=1e-4)


def test_what_follows_builds_on_it(tuned):
    inputs = read_json(tuned / "preferences" / "done.json")["inputs"]
    assert inputs == {"sft": read_json(tuned / "sft" / "done.json")["hash"]}


def test_without_examples_there_is_no_such_stage(tiny, tmp_path, processes):
    assert "sft" not in [stage.name for stage in stages_of(load(tiny))]
    done = processes("sft", tiny, "--out", tmp_path / "run")
    assert done.code == 2
    assert "sft.file: there are no examples to fine-tune on" in done.output


def test_a_row_that_is_no_example_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": " "}\n')
    with pytest.raises(UserError, match="no completion to learn") as refused:
        s.examples_of(Config(sft=SFTConfig(file=str(file))))
    assert f"{file}:2" in str(refused.value)
    file.write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="one part of the examples is trained on"):
        s.examples_of(Config(sft=SFTConfig(file=str(file))))
