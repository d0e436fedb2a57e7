"""Weighted sums of terms whose counts come from the batch alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm import terms
from minilm.losses import language
from minilm.objective import Chunked, Objective, Term


class Numbers(NamedTuple):
    targets: np.ndarray
    weights: np.ndarray


OBJECTIVE = Objective(
    (
        Term("squared", 0.5, lambda o, b: (o - b.targets) ** 2, lambda b: b.weights),
        Term("absolute", 2.0, lambda o, b: abs(o - b.targets), lambda b: (b.weights > 0)),
        Term("watched", 0.0, lambda o, b: o, lambda b: b.weights),
    )
)  # fmt: skip
BATCH = Numbers(
    np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32),
    np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.0]], np.float32),
)
OUTPUTS = np.array([[2.0, 0.0, 9.0], [9.0, 6.0, 9.0]], np.float32)


def loss(outputs, batch):
    return OBJECTIVE.loss(OBJECTIVE.totals(outputs, batch), OBJECTIVE.counts(batch))


def test_loss_by_hand():
    squared = (1.0 * 1 + 0.5 * 4 + 2.0 * 1) / 3.5
    absolute = (1 + 2 + 1) / 3
    assert float(loss(OUTPUTS, BATCH)) == pytest.approx(0.5 * squared + 2.0 * absolute)


def test_a_watched_term_is_measured_but_does_not_train():
    totals, counts = OBJECTIVE.totals(OUTPUTS, BATCH), OBJECTIVE.counts(BATCH)
    means = OBJECTIVE.means(totals, counts)
    assert float(means["watched"].value) == pytest.approx((2.0 + 0.0 + 12.0) / 3.5)
    assert float(loss(OUTPUTS + 0.0, BATCH)) == float(OBJECTIVE.loss(totals, counts))
    without = Objective(OBJECTIVE.terms[:2])
    assert float(without.loss(totals, counts)) == float(OBJECTIVE.loss(totals, counts))


def test_parts_add_up_to_the_whole():
    """trl#3021: means of micro-batches weigh a short one like a long one."""
    counts = OBJECTIVE.counts(BATCH)
    parts = [OBJECTIVE.totals(OUTPUTS[i : i + 1], Numbers(*(x[i : i + 1] for x in BATCH)))
             for i in range(2)]  # fmt: skip
    added = {name: parts[0][name] + parts[1][name] for name in counts}
    assert float(OBJECTIVE.loss(added, counts)) == pytest.approx(float(loss(OUTPUTS, BATCH)))


def test_an_empty_mask_gives_a_loss_of_zero_and_a_gradient_of_zero():
    """trl#6668: a loss of 0.0 with every label masked went unnoticed; here the count says it."""
    empty = BATCH._replace(weights=np.zeros((2, 3), np.float32))
    value, gradient = jax.value_and_grad(loss)(OUTPUTS, empty)
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)
    assert float(OBJECTIVE.counts(empty)["squared"]) == 0


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_what_lies_under_the_mask_does_not_reach_the_loss(poison):
    outputs = jnp.where(BATCH.weights == 0, poison, OUTPUTS)
    assert float(loss(outputs, BATCH)) == pytest.approx(float(loss(OUTPUTS, BATCH)))


def test_outputs_made_in_chunks_give_the_same_losses_and_gradients():
    """A head's logits 4 positions at a time: 10 positions, so that the last chunk is filled up."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(0, 1, n), jnp.float32) for n in ((2, 5, 3), (3, 7)))
    batch = Numbers(
        jnp.asarray(rng.integers(0, 7, (2, 5)), jnp.int32), jnp.asarray(rng.random((2, 5)) > 0.3)
    )
    objective = Objective(
        (
            Term(
                "cross_entropy", 1.0,
                lambda o, b: language.next_token_cross_entropy(o, b.targets), lambda b: b.weights,
            ),
            Term("z_loss", 0.1, lambda o, b: language.z_loss(o), lambda b: b.weights),
            Term("smoothing", 0.2, terms.smoothing, lambda b: b.weights),
        )
    )  # fmt: skip

    def loss(hidden, head, chunk):
        outputs = Chunked(hidden, lambda part: part @ head, chunk) if chunk else hidden @ head
        return objective.loss(objective.totals(outputs, batch), objective.counts(batch))

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    plain, (of_hidden, of_head) = both(hidden, head, 0)
    assert of_head.any() and of_hidden.any()
    for chunk in (4, 10, 64):
        value, (a, b) = both(hidden, head, chunk)
        assert float(value) == pytest.approx(float(plain), rel=1e-6)
        np.testing.assert_allclose(a, of_hidden, atol=1e-6)
        np.testing.assert_allclose(b, of_head, atol=1e-6)


def test_logits_in_chunks_are_never_there_at_once():
    """What the compiler sets aside for a vocabulary of 8,192 is a chunk's share of the plain."""
    hidden, head = jnp.zeros((4, 64, 8)), jnp.zeros((8, 8192))
    batch = Numbers(jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64)))
    objective = Objective(
        (Term("z_loss", 1.0, lambda o, b: language.z_loss(o), lambda b: b.weights),)
    )

    def loss(hidden, head, chunk):
        outputs = Chunked(hidden, lambda part: part @ head, chunk) if chunk else hidden @ head
        return objective.loss(objective.totals(outputs, batch), objective.counts(batch))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    plain, chunked = (
        gradient.lower(hidden, head, c).compile().memory_analysis().temp_size_in_bytes
        for c in (0, 16)
    )
    assert plain > 4 * 64 * 8192 * 4  # the logits, in bytes
    assert chunked < plain / 4
