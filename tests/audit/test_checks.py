"""Checks of batches by themselves: sound ones pass, each fault is found by the check it is for."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from minilm.audit import checks
from minilm.audit.setting import Setting
from minilm.objective import Objective, Term
from minilm.text.batches import Batch, pack
from minilm.text.tokenizer import Tokenizer

EOS, PAD = Tokenizer.eos_id, Tokenizer.pad_id
TOKENS = np.array([[EOS, 5, 6, 7], [EOS, 5, EOS, PAD]], np.int32)
TARGETS = np.array([[5, 6, 7, EOS], [5, EOS, PAD, PAD]], np.int32)


class World(NamedTuple):
    compute_dtype: str = "float32"


def language(tokens=TOKENS, targets=TARGETS, weights=None, values=None) -> Setting:
    """Eight tokens; the logits of a target depend on the token before it alone."""
    weights = (targets != PAD).astype(np.float32) if weights is None else weights
    batch = Batch(tokens, targets, weights, (tokens != PAD).astype(np.int32))
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)

    def losses(logits, batch):
        each = -jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
        return each + jnp.log(jnp.sum(jnp.exp(logits), axis=-1))

    aim = Objective((Term("next_token", 1.0, values or losses, lambda b: jnp.asarray(b.weights)),))
    return Setting("pretrain", World(), table, aim, lambda m, b: m[b.tokens], batch, None)


SOUND = (
    checks.language_formula,
    checks.every_target_counts_once,
    checks.targets_are_the_next_tokens,
    checks.company_and_padding_change_nothing,
    checks.accumulation_is_the_whole_batch,
)


@pytest.mark.parametrize("check", SOUND, ids=lambda c: c.__name__)
def test_a_sound_batch_passes(check):
    passed, said = check(language())
    assert passed, said


def test_a_mean_of_rows_is_not_the_loss():
    """mean-of-means: each row's tokens weigh by the row's length."""

    def values(logits, batch):
        counts = jnp.sum(batch.weights, axis=1, keepdims=True)
        return language().objective.terms[0].values(logits, batch) / counts * jnp.mean(counts)

    assert not checks.language_formula(language(values=values))[0]


def test_a_padding_target_that_counts_is_found():
    weights = np.ones(TARGETS.shape, np.float32)
    assert not checks.every_target_counts_once(language(weights=weights))[0]


def test_an_end_of_text_that_does_not_count_is_found():
    weights = ((TARGETS != PAD) & (TARGETS != EOS)).astype(np.float32)
    assert not checks.every_target_counts_once(language(weights=weights))[0]


def test_targets_that_are_not_shifted_are_found():
    assert not checks.targets_are_the_next_tokens(language(targets=TOKENS))[0]


class Encoder(NamedTuple):
    pad_id: int = PAD
    eos_id: int = EOS

    def encode_batch(self, texts):
        return [[int(n) for n in text.split()] for text in texts]


class Trained(NamedTuple):
    rows: np.ndarray
    held_out: list[str]


@pytest.mark.parametrize("count", [20, 100])
def test_a_held_out_text_in_the_rows_is_found_also_where_it_is_longer_than_a_row(count):
    ids = 2 + np.arange(count) % 50
    other = 2 + np.arange(1, 41) * 7 % 50
    setting = language()._replace(ws=World()._replace(), parts=None)
    for documents, leaked in (([ids, other], True), ([other], False)):
        rows = pack([np.array(d, np.int32) for d in documents], 32)
        parts = Trained(rows, [" ".join(map(str, ids))])
        here = setting._replace(parts=parts, ws=Tokens(Encoder()))
        assert checks.no_held_out_document_is_trained_on(here)[0] is not leaked


class Tokens(NamedTuple):
    tokenizer: Encoder


def test_a_check_that_cannot_be_computed_has_failed():
    def broken(setting):
        raise ValueError("shapes (3,) and (4,)")

    (found,) = checks.run_checks(language(), {"it works": broken})
    assert not found.passed
    assert found.name == "pretrain: it works"
    assert "shapes (3,) and (4,)" in found.said


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (1.0005, 1.0, True),
        (1.01, 1.0, False),
        (1000.5, 1000.0, True),  # relative to what is large
        (1e-4, 0.0, True),  # absolute to what is small
        (np.nan, 1.0, False),
        (np.array([]), np.array([]), True),
        (np.array([1.0, 2.0]), np.array([1.0, 2.1]), False),
    ],
)
def test_closeness_is_relative_to_the_expected_but_at_least_to_one(found, expected, same):
    assert checks.close(found, expected, 1e-3)[0] == same
