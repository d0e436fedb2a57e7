"""The bugs of the field, one by one put into minilm: the audit has to name each.

Every mutant is injected into a finished, healthy run of tests/tiny.toml, on which the audit is
silent (test_audit.py): so what it says of a mutant is the mutant's doing.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm import algorithms, rewards
from minilm import model as models
from minilm.audit import CHECKS, audit_stage
from minilm.audit.records import record_checks
from minilm.audit.setting import SETTINGS, Setting
from minilm.objective import Objective
from minilm.stages import pretrain, reward, rlhf
from minilm.stages.workspace import open_run
from minilm.text import batches, corpora
from minilm.text.store import Documents, Store


class Mutant(NamedTuple):
    stage: str
    caught_by: str  # a check's name
    inject: Callable[[pytest.MonkeyPatch, Path], None]
    seen: str  # where the field met it


def _batch(change):
    """A mutant of the batches that a stage reads."""

    def inject(patch, run):
        original = batches.Batches.__getitem__
        patch.setattr(
            batches.Batches, "__getitem__", lambda self, step: change(original(self, step))
        )

    return inject


def _replace(module, name, wrap):
    """A mutant that wraps a function where it is used."""

    def inject(patch, run):
        patch.setattr(module, name, wrap(vars(module)[name]))

    return inject


def _masked(batch):
    return batch._replace(weights=np.zeros_like(batch.weights))


def _unshifted(batch):
    return batch._replace(targets=batch.tokens)


def _one_segment(batch):
    return batch._replace(segments=np.ones_like(batch.segments))


def _padding_counts(batch):
    return batch._replace(weights=np.ones_like(batch.weights))


def _read_before_the_end(original):
    return lambda m, tokens, segments, last: original(m, tokens, segments, last - 1)


def _read_at_the_row_s_end(original):
    def right_pad(rows, count, width):
        tokens, segments, last = original(rows, count, width)
        return tokens, segments, np.full_like(last, width - 1)

    return right_pad


def _padding_attended(original):
    return lambda model, tokens, segments: original(model, tokens, jnp.ones_like(segments))


def _temperature_forgotten(original):
    return lambda m, tokens, segments, width, temperature: original(m, tokens, segments, width, 1.0)


def _ratio_one_for_ever(original):
    return lambda new, old, advantages: original(new, jax.lax.stop_gradient(new), advantages)


def _another_estimator(original):
    return lambda new, ref, *, estimator: original(new, ref, estimator="k2")


def _reference_moves_along(original):
    def complete(model, reference, prompts, samples, *, pad_id, temperature):
        return original(model, model, prompts, samples, pad_id=pad_id, temperature=temperature)

    return complete


def _end_left_out(original):
    def complete(model, reference, prompts, samples, *, pad_id, temperature):
        found = original(model, reference, prompts, samples, pad_id=pad_id, temperature=temperature)
        last = jnp.cumsum(found.mask, axis=1) == jnp.sum(found.mask, axis=1, keepdims=True)
        return found._replace(mask=found.mask & ~last)

    return complete


def _means_of_parts(patch, run):
    """Each micro-batch divided by its own count: maxtext#3040, trl#3021."""
    original = Objective.totals

    def totals(self, outputs, batch):
        counts = self.counts(batch)
        return {
            n: 100 * t / jnp.maximum(counts[n], 1.0)
            for n, t in original(self, outputs, batch).items()
        }

    patch.setattr(Objective, "totals", totals)


def _means_of_rows(patch, run):
    """A short row weighs like a long one."""

    def totals(self, outputs, batch):
        found = {}
        for term in self.terms:
            over = term.over(batch).astype(jnp.float32)
            rows = jnp.sum(jnp.where(over > 0, term.values(outputs, batch), 0.0) * over, axis=1)
            share = jnp.sum(over) / over.shape[0] / jnp.maximum(jnp.sum(over, axis=1), 1.0)
            found[term.name] = jnp.sum(rows * share)
        return found

    patch.setattr(Objective, "totals", totals)


def _reduced_in_bfloat16(original):
    def loss(logits, labels):
        half = jax.nn.log_softmax(logits.astype(jnp.bfloat16))
        return -jnp.take_along_axis(half, labels[..., None], axis=-1)[..., 0].astype(jnp.float32)

    return loss


def _roles_swapped(original):
    return lambda chosen, rejected, *, label: original(rejected, chosen, label=label)


def _leaked(patch, run):
    original = corpora.split

    def split(corpus, seed):
        halves = original(corpus, seed)
        store = Store()
        numbers = [store.append(d) for d in (*halves.train, *halves.held_out[:3])]
        return halves._replace(train=Documents(store, np.array(numbers)))

    patch.setattr("minilm.audit.setting.split", split)


def _replayed(patch, run):
    path = run / "rlhf" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], *lines[2:]]))


def _half_saved(patch, run):
    newest = max((run / "reward" / "checkpoints").glob("step_*"))
    (newest / "tokenizer.json").write_text("{")


def _never_saved(patch, run):
    newest = max((run / "pretrain" / "checkpoints").glob("step_*"))
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()


def _one_answer(patch, run):
    path = run / "rlhf" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"after": rows[0]["after"]}) + "\n" for row in rows))


MUTANTS = {
    "every label masked": Mutant("pretrain", "every target counts", _batch(_masked), "trl#6668"),
    "padding weighed": Mutant(
        "pretrain", "every target counts", _batch(_padding_counts), "maxtext#3040"
    ),
    "targets not shifted": Mutant(
        "pretrain", "targets are the next", _batch(_unshifted), "every course's first bug"
    ),
    "documents attend to each other": Mutant(
        "pretrain", "documents do not see", _batch(_one_segment), "packing without segments"
    ),
    "short rows weigh like long ones": Mutant(
        "pretrain", "the loss is its formula", _means_of_rows, "maxtext#3040"
    ),
    "accumulation changes the objective": Mutant(
        "pretrain", "accumulation", _means_of_parts, "trl#3021"
    ),
    "loss reduced in bfloat16": Mutant(
        "pretrain", "the loss is its formula",
        _replace(pretrain, "next_token_cross_entropy", _reduced_in_bfloat16), "unsloth#2783",
    ),
    "held-out documents in training": Mutant("pretrain", "no held-out", _leaked, "leakage"),
    "evaluated before it was saved": Mutant(
        "pretrain", "the last step is saved", _never_saved, "nanochat#446"
    ),
    "an unfinished checkpoint": Mutant(
        "reward", "the last step is saved", _half_saved, "maxtext#5260"
    ),
    "score read at padding": Mutant(
        "reward", "scores stand on end-of-text",
        _replace(reward, "right_pad", _read_at_the_row_s_end), "trl#5338",
    ),
    "chosen and rejected swapped": Mutant(
        "reward", "the loss is its formula", _replace(reward, "bradley_terry", _roles_swapped),
        "reward-bench#94",
    ),
    "proxy read before the end": Mutant(
        "rlhf", "the score stands on end-of-text",
        _replace(rewards, "sequence_score", _read_before_the_end), "trl#5338",
    ),
    "score depends on padding": Mutant(
        "rlhf", "the score stands on end-of-text",
        _replace(models, "hidden_states", _padding_attended), "gpt-neox#1285",
    ),
    "temperature forgotten in the update": Mutant(
        "rlhf", "the first ratio is 1",
        _replace(rlhf, "completion_outputs", _temperature_forgotten), "trl#4159, #6789",
    ),
    "ratio 1 for ever": Mutant(
        "rlhf", "the loss is its formula",
        _replace(algorithms, "policy_gradient", _ratio_one_for_ever), "torchforge#571",
    ),
    "logged KL is not the KL paid for": Mutant(
        "rlhf", "the logged KL",
        _replace(algorithms, "kl_estimate", _another_estimator), "trl#1161",
    ),
    "reference follows the policy": Mutant(
        "rlhf", "the reference is frozen",
        _replace(rlhf, "complete_rollout", _reference_moves_along), "a shared tree, donated",
    ),
    "end-of-text not trained on": Mutant(
        "rlhf", "the mask covers",
        _replace(rlhf, "complete_rollout", _end_left_out), "completions without end",
    ),
    "records replayed on resume": Mutant(
        "rlhf", "steps follow each other", _replayed, "trl#2657, nanochat#808"
    ),
    "one answer to everything": Mutant("rlhf", "completions differ", _one_answer, "trl#204"),
}  # fmt: skip


def catches(name, run, patch) -> None:
    mutant = MUTANTS[name]
    jax.clear_caches()  # else the healthy program would be run
    with patch.context() as inner:
        mutant.inject(inner, run)
        _, checks = audit_stage(open_run(run), mutant.stage)
    jax.clear_caches()
    failed = [check.name for check in checks if check.passed is False]
    assert any(mutant.caught_by in name for name in failed), failed


# What a check of a batch or a file sees, without a program of its own to compile.
CHEAP = (
    "every label masked", "padding weighed", "targets not shifted",
    "held-out documents in training", "short rows weigh like long ones", "loss reduced in bfloat16",
)  # fmt: skip
IN_THE_FILES = (
    "evaluated before it was saved", "an unfinished checkpoint", "records replayed on resume",
    "one answer to everything",
)  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_its_check_catches_it(name, tiny_run, monkeypatch):
    mutant = MUTANTS[name]
    (check,) = (c for n, c in CHECKS[mutant.stage].items() if n.startswith(mutant.caught_by))
    mutant.inject(monkeypatch, tiny_run)
    setting = SETTINGS[mutant.stage](open_run(tiny_run))
    assert not check(setting)[0]


@pytest.mark.parametrize("name", IN_THE_FILES)
def test_the_audit_catches_it_in_the_files(name, tiny_run, tmp_path):
    mutant = MUTANTS[name]
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    ws = open_run(run)
    mutant.inject(pytest.MonkeyPatch(), run)
    if mutant.caught_by == "completions differ":
        nothing = Objective(())
        only_the_folder = Setting("rlhf", ws, None, nothing, lambda model, batch: None, None, None)
        assert not CHECKS["rlhf"][mutant.caught_by](only_the_folder)[0]
        return
    failed = [check.name for check in record_checks(ws, mutant.stage) if check.passed is False]
    assert any(mutant.caught_by in name for name in failed)


@pytest.fixture(scope="session")
def learnt_run(tiny, shared, processes):
    """A run whose completions end, so that they have scores; the audit is silent on it."""
    out = shared / "learnt" / "run"
    words = "--pretrain.steps 400 --pretrain.batch-size 8 --model.embed-dim 32 --model.head-dim 16"
    words += " --reward.max-tokens 128"
    words += " --prompts.max-new-tokens 72 --pretrain.max-new-tokens 96 --rlhf.steps 4"
    assert processes("run", tiny, "--out", out, *words.split()).code == 0
    done = processes("audit", out)
    assert done.code == 0, done.output
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_audit_catches_it_in_a_model_that_has_learnt(name, learnt_run, tmp_path, monkeypatch):
    catches(name, shutil.copytree(learnt_run, tmp_path / "run"), monkeypatch)
