"""The objective card on a model of two numbers, against closed forms."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from minilm.audit.card import card_of, described, element_gradients, element_losses
from minilm.audit.setting import SETTINGS, Setting
from minilm.config import TermConfig
from minilm.objective import Objective, Term
from minilm.stages.workspace import open_run


class Batch(NamedTuple):
    x: jnp.ndarray
    counted: jnp.ndarray


def setting(weights: dict[str, float], counted=(1.0, 1.0, 1.0, 1.0)) -> Setting:
    """`w · x` of four elements; "z_loss" pays (w·x)² / 2, "repetition" −3 w·x: opposite pulls."""
    losses = {
        "z_loss": lambda o, b: o**2 / 2,
        "repetition": lambda o, b: -3.0 * o,
        "smoothing": lambda o, b: 0.0 * o + 1.0,
    }
    terms = tuple(Term(n, w, losses[n], lambda b: b.counted) for n, w in weights.items())
    batch = Batch(jnp.array([1.0, 2.0, 3.0, 100.0]), jnp.array(counted))
    model = {"w": jnp.float32(0.5)}
    return Setting("test", None, model, Objective(terms), lambda m, b: m["w"] * b.x, batch, None)


X, W = np.array([1.0, 2.0, 3.0, 100.0]), 0.5
EVERY = {"all": np.ones(4, bool)}


def test_shares_are_those_of_the_closed_form():
    card = card_of(setting({"z_loss": 2.0, "repetition": 1.0}), EVERY)
    losses = np.array([np.mean((W * X) ** 2 / 2), np.mean(-3 * W * X)])
    norms = np.array([2 * abs(np.mean(W * X * X)), abs(np.mean(-3 * X))])
    weighed = np.abs(losses * [2, 1])
    assert [t.loss for t in card.terms] == pytest.approx(losses)
    assert [t.loss_share for t in card.terms] == pytest.approx(weighed / weighed.sum())
    assert [t.gradient_norm for t in card.terms] == pytest.approx(norms)
    assert [t.gradient_share for t in card.terms] == pytest.approx(norms / norms.sum())


def test_terms_that_pull_against_each_other_are_a_conflict():
    card = card_of(setting({"z_loss": 1.0, "repetition": 1.0}), EVERY)
    assert card.cosines == {"z_loss | repetition": pytest.approx(-1.0)}
    assert any(flag.startswith("conflict: z_loss | repetition") for flag in card.flags)


def test_a_negative_weight_turns_a_pull_round():
    card = card_of(setting({"z_loss": 1.0, "repetition": -1.0}), EVERY)
    assert card.cosines == {"z_loss | repetition": pytest.approx(1.0)}
    assert not any(flag.startswith("conflict") for flag in card.flags)


def test_a_term_without_gradient_is_idle():
    card = card_of(setting({"z_loss": 1.0, "smoothing": 1.0}), EVERY)
    assert "idle: smoothing has no gradient" in card.flags
    assert not any("idle: z_loss" in flag for flag in card.flags)


def test_a_group_that_is_hardly_heard_is_rare():
    groups = {"small": X < 10, "large": X > 10}
    card = card_of(setting({"z_loss": 1.0}), groups)
    small, large = card.groups
    squares = (W * X) ** 2 / 2
    assert small.elements == pytest.approx(0.75)
    assert small.loss == pytest.approx(squares[:3].sum() / squares.sum())
    assert small.gradient == pytest.approx((W * X)[:3].sum() / (W * X).sum())
    assert large.gradient == pytest.approx(1 - small.gradient)
    assert not any("rare: small" in flag for flag in card.flags)  # 5.7 % of the gradient
    card = card_of(setting({"z_loss": 1.0}), {"first": X < 2, "rest": X >= 2})
    assert any(flag.startswith("rare: first") for flag in card.flags)  # 0.9 %


def test_elements_that_do_not_count_have_no_share():
    found = setting({"z_loss": 1.0}, counted=(1.0, 1.0, 1.0, 0.0))
    aim, outputs = found.objective, found.outputs(found.batch)
    gradients = element_gradients(aim, outputs, found.batch)
    losses = element_losses(aim, outputs, found.batch)
    assert gradients == pytest.approx([W / 3, 2 * W / 3, W, 0])
    assert losses == pytest.approx([W**2 / 6, 4 * W**2 / 6, 9 * W**2 / 6, 0])


def test_a_term_is_described_by_the_docstring_of_its_loss():
    pays, rewards, ignores = described("centering")
    assert "pays" in pays
    assert rewards != ignores


def test_a_term_of_lists_has_no_part_in_the_pairs_shares(tiny_run):
    ws = open_run(tiny_run)
    only_lists = {
        "bradley_terry": TermConfig(weight=0.0), "plackett_luce": TermConfig(weight=1.0),
    }  # fmt: skip
    config = ws.config.model_copy(update={"objective": only_lists})
    card = card_of(SETTINGS["reward"](dataclasses.replace(ws, config=config)))
    assert [t.name for t in card.terms] == ["plackett_luce"]
    assert card.terms[0].gradient_norm > 0
    assert {g.gradient for g in card.groups} == {0.0}
    assert not any(flag.startswith("rare") for flag in card.flags)
