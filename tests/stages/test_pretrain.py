"""Pretraining, read off a finished run: its figures against an independent computation."""

import json
import math
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from minilm import checkpoint, metrics
from minilm.configfile import load
from minilm.model import hidden_states, logits
from minilm.stages.workspace import load_model
from minilm.text.corpora import CORPORA
from minilm.text.fables import parse
from minilm.text.tokenizer import Tokenizer

LENGTH = 96  # tests/tiny.toml: pretrain.sequence_length


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tiny_run) -> Path:
    return tiny_run / "pretrain"


@pytest.fixture(scope="module")
def summary(folder) -> dict:
    return json.loads((folder / "done.json").read_text())["summary"]


@pytest.fixture(scope="module")
def charges(folder, tiny_run) -> list[np.ndarray]:
    """Nats of every token of every held-out story, in float64, padded to one shape of our own."""
    model, _ = load_model(checkpoint.find(folder))
    tokenizer = Tokenizer.load(tiny_run / "tokenizer.json")
    windows, owners = [], []
    stories = lines(folder / "held_out.jsonl")
    for n, story in enumerate(stories):
        ids = [1, *tokenizer.encode(story["text"]), 1]
        for start in range(0, len(ids) - 1, LENGTH):
            windows.append(ids[start : start + LENGTH + 1])
            owners.append(n)
    tokens = np.zeros((len(windows), LENGTH), np.int32)
    for row, window in zip(tokens, windows, strict=True):
        row[: len(window) - 1] = window[:-1]
    segments = (np.arange(LENGTH) < [[len(w) - 1] for w in windows]).astype(np.int32)
    hidden = hidden_states(model, jnp.asarray(tokens), jnp.asarray(segments))
    scores = np.asarray(logits(model, hidden), np.float64)
    logprobs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    found: list[list[float]] = [[] for _ in stories]
    for n, window, row in zip(owners, windows, logprobs, strict=True):
        found[n] += [-row[t, after] for t, after in enumerate(window[1:])]
    return [np.array(x) for x in found]


def test_the_validation_loss_is_the_mean_charge_of_held_out_tokens(summary, charges, folder):
    nats, tokens = sum(c.sum() for c in charges), sum(map(len, charges))
    texts = [s["text"] for s in lines(folder / "held_out.jsonl")]
    assert summary["validation_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert summary["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    per_character = nats / sum(map(len, texts))
    assert summary["validation_nats_per_character"] == pytest.approx(per_character, rel=1e-5)
    bits = nats / math.log(2) / sum(len(t.encode()) for t in texts)
    assert summary["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_the_entropy_floor_is_what_the_grammar_charges(summary, charges, folder):
    exact = -sum(parse(s["text"], size="small").logprob for s in lines(folder / "held_out.jsonl"))
    assert summary["entropy_floor"] == pytest.approx(exact / sum(map(len, charges)), rel=1e-6)
    assert summary["excess_per_document"] == pytest.approx(
        summary["excess_loss"] * sum(map(len, charges)) / len(charges), rel=1e-6
    )


def test_no_held_out_story_was_trained_on(folder, tiny):
    config = load(tiny)
    held_out = [s["text"] for s in lines(folder / "held_out.jsonl")]
    everything = [d.text for d in CORPORA["fables"](config.corpus, config.seed)]
    assert len(held_out) == round(config.corpus.held_out * config.corpus.documents)
    assert set(held_out) <= set(everything)
    rows = np.load(next((folder.parent / "cache").glob("rows-*.npy")))
    tokenizer = Tokenizer.load(folder.parent / "tokenizer.json")
    trained = sum(len(tokenizer.encode(t)) + 1 for t in everything if t not in set(held_out))
    assert (rows[:, 1:] != tokenizer.pad_id).sum() == trained  # each once, and nothing else


def test_the_loss_goes_down_from_that_of_guessing(folder, summary):
    curve = [r["loss"] for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "train"]
    first = metrics.read(folder / "metrics.jsonl")[0]
    assert first["validation_loss"] == pytest.approx(math.log(summary["vocab_size"]), rel=0.02)
    assert curve[-1] < curve[0] - 1
    assert [r["step"] for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "eval"] == [
        0,
        20,
        40,
    ]


def test_samples_are_written_as_they_were_counted(folder, summary, tiny):
    texts = [s["text"] for s in lines(folder / "samples.jsonl")]
    assert len(texts) == load(tiny).pretrain.sample_count
    share = np.mean([parse(t, size="small").failure is None for t in texts])
    assert summary["parse_share"] == pytest.approx(share)
    assert sum(summary[k] for k in ("parse_share", "slip", "break", "no_end")) == pytest.approx(1)


def test_the_loss_map_charges_a_story_what_the_grammar_does(folder):
    found = json.loads((folder / "loss_map.json").read_text())
    text = "".join(found["tokens"])
    (story,) = [s for s in lines(folder / "held_out.jsonl") if s["text"] == text]
    assert len(found["exact"]) == len(found["tokens"]) == len(found["model"]) - 1  # the end's
    assert sum(found["exact"]) == pytest.approx(-story["logprob"], rel=1e-6)


def test_a_checkpoint_alone_is_enough(folder, tiny_run):
    path = checkpoint.find(folder)
    facts = checkpoint.metadata(path)
    assert facts["step"] == 40
    assert (path / "tokenizer.json").read_bytes() == (tiny_run / "tokenizer.json").read_bytes()
    assert facts["config"] == load(tiny_run / "config.toml").model_dump(mode="json")


GROWING = ["--pretrain.batch-start", 1, "--pretrain.batch-warmup-steps", 13]


@pytest.fixture(scope="module")
def grown(tiny, processes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("grown") / "run"
    done = processes("run", tiny, "--out", out, "--until", "pretrain", *GROWING)
    assert done.code == 0, done.output
    return out


def test_a_growing_batch_is_logged_and_its_tokens_are_counted(grown):
    """One row for seven steps, two for six, then four: records are means over five steps."""
    records = metrics.read(grown / "pretrain" / "metrics.jsonl")
    sizes = [r["batch_size"] for r in records if r["kind"] == "train"]
    assert sizes == pytest.approx([1.0, (2 + 6) / 5, (6 + 8) / 5, 4, 4, 4, 4, 4])
    summary = json.loads((grown / "pretrain" / "done.json").read_text())["summary"]
    positions = summary["tokens_per_second"] * summary["seconds"]
    assert positions == pytest.approx((7 * 1 + 6 * 2 + 27 * 4) * LENGTH)


def test_a_run_killed_while_its_batch_grows_ends_the_same(
    grown, tiny, tmp_path, processes, assert_same
):
    words = ["run", tiny, "--out", tmp_path / "run", "--until", "pretrain", *GROWING]
    stop = ("*/pretrain/checkpoints/.tmp-step_00000020/*", 3, signal.SIGKILL)
    assert processes(*words, at=stop).code == -signal.SIGKILL  # step 10 is kept
    assert processes(*words).code == 0
    assert_same(tmp_path / "run", grown, ("pretrain",))
