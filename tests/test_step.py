"""The step's gradient, what a bad gradient may not do, averages of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import (
    LANGUAGE,
    OPTIMIZE,
    STEP,
    STEPS,
    arrays,
    assert_equal,
    forward,
    fresh,
    new_model,
    ragged_batch,
)

from minilm.losses.language import z_loss
from minilm.objective import Objective, Term
from minilm.step import init_state, make_train_step
from minilm.text.batches import Batches, Growth


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """maxtext#3040, trl#3021: with ragged rows a mean of micro-batch means is another objective."""
    batch = ragged_batch()
    split = make_train_step(forward, LANGUAGE, OPTIMIZE, accumulation=4)
    (whole, of_whole), (parts, of_parts) = STEP(fresh(), batch), split(fresh(), batch)
    assert float(of_whole["loss"].value) == pytest.approx(float(of_parts["loss"].value), rel=1e-6)
    assert float(of_whole["grad_norm"].value) == pytest.approx(
        float(of_parts["grad_norm"].value), rel=1e-5
    )
    assert float(of_parts["cross_entropy"].count) == 12 + 1 + 7
    # Adam's first moment is a tenth of the (clipped) gradient: compared leaf by leaf.
    for name, found in arrays(parts.opt_state).items():
        np.testing.assert_allclose(
            found, arrays(whole.opt_state)[name], rtol=1e-3, atol=1e-7, err_msg=name
        )


def test_loss_and_gradient_norm_are_those_of_the_mean_over_real_tokens():
    model = new_model()

    def plain(model, batch):
        scores = forward(model, batch)
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), batch.targets[..., None], 2)
        return -jnp.sum(picked[..., 0] * batch.weights) / 20

    value, gradient = jax.jit(jax.value_and_grad(plain))(model, ragged_batch())
    _, found = STEP(fresh(), ragged_batch())
    assert float(found["loss"].value) == pytest.approx(float(value), rel=1e-5)
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in arrays(gradient).values()))
    assert float(found["grad_norm"].value) == pytest.approx(norm, rel=1e-5)


def test_an_empty_mask_is_a_loss_of_zero_and_no_nan():
    batch = ragged_batch()._replace(weights=np.zeros((4, 12), np.float32))
    state, found = STEP(fresh(), batch)
    assert (float(found["loss"].value), float(found["grad_norm"].value)) == (0, 0)
    assert float(found["cross_entropy"].count) == 0  # and it is reported
    assert all(np.isfinite(x).all() for x in arrays(state).values())


def test_a_non_finite_gradient_changes_nothing_but_the_counters():
    before = arrays(fresh())
    state, found = STEP(fresh(), ragged_batch(weight=np.inf))
    assert not np.isfinite(float(found["loss"].value))
    counters = {"step": 1, "extra.skipped": 1, "extra.skipped_in_a_row": 1}
    for name, array in arrays(state).items():
        np.testing.assert_array_equal(array, counters.get(name, before[name]), err_msg=name)
    state, _ = STEP(state, ragged_batch())
    assert (int(state.extra["skipped"]), int(state.extra["skipped_in_a_row"])) == (1, 0)
    assert_equal(state.model, STEP(fresh(), ragged_batch())[0].model)  # as if it had not been


def test_one_compilation_serves_all_steps_and_the_loss_goes_down():
    state, losses = fresh(), []
    for _ in range(STEPS):
        state, found = STEP(state, ragged_batch())
        losses.append(float(found["loss"].value))
    assert int(state.step) == STEPS
    assert STEP._cache_size() == 1
    assert losses[-1] < 0.7 * losses[0]


def test_donation_leaves_the_model_a_state_was_made_from():
    """The reference policy is a copy: a donated one would be deleted under its user."""
    model = new_model()
    state, before = init_state(model, OPTIMIZE), arrays(model)
    old = state.model.embed_tokens[...]
    STEP(state, ragged_batch())
    assert old.is_deleted()  # the state's own arrays are given away
    np.testing.assert_array_equal(arrays(model)["embed_tokens"], before["embed_tokens"])


def test_the_average_of_the_weights_follows_them_and_a_bad_update_leaves_it():
    averaging = make_train_step(forward, LANGUAGE, OPTIMIZE, ema_decay=0.5, log_layers=True)
    state = init_state(new_model(), OPTIMIZE, ema_decay=0.5)
    assert_equal(state.averaged, state.model)
    expected = arrays(state.model)
    for k in range(3):
        before = arrays(state.model)
        state, found = averaging(state, ragged_batch())
        kept = min(0.5, (1 + k) / (10 + k))
        expected = {n: kept * expected[n] + (1 - kept) * x for n, x in arrays(state.model).items()}
    for name, array in arrays(state.averaged).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6, err_msg=name)
    plain, three = fresh(), None
    for _ in range(3):
        plain, three = STEP(plain, ragged_batch())
    assert_equal(state.model, plain.model)  # averaging watches, it does not steer
    # What is logged of the third step, layer by layer.
    moved = np.linalg.norm(arrays(state.model)["embed_tokens"] - before["embed_tokens"])
    ratio = moved / np.linalg.norm(before["embed_tokens"])
    assert float(found["update_ratio/embed_tokens"].value) == pytest.approx(ratio, rel=1e-3)
    parts = [float(x.value) for n, x in found.items() if n.startswith("grad_norm/")]
    assert np.hypot.reduce(parts) == pytest.approx(float(three["grad_norm"].value), rel=1e-5)
    average = arrays(state.averaged)
    state, found = averaging(state, ragged_batch(weight=np.inf))
    for name, array in arrays(state.averaged).items():
        np.testing.assert_array_equal(array, average[name], err_msg=name)
    assert float(found["update_ratio/layers.0"].value) == 0


def test_a_growing_batch_is_compiled_once_a_size():
    rows = 2 + (np.arange(6)[:, None] + np.arange(13)) % 9
    batches = Batches(rows, batch_size=Growth(1, 4, 5), seed=0)
    state, step = fresh(), make_train_step(forward, LANGUAGE, OPTIMIZE)
    for k in range(10):
        state, found = step(state, batches[k])
        assert float(found["cross_entropy"].count) == 12 * [1, 1, 1, 2, 2, 4, 4, 4, 4, 4][k]
    assert step._cache_size() == 3


BOTH = Objective((*LANGUAGE.terms, Term("z", 5.0, lambda o, b: z_loss(o), lambda b: b.weights)))


@pytest.mark.parametrize(("most", "accumulation"), [(0.3, 1), (0.3, 4), (1e3, 1)])
def test_a_gradient_taken_apart_is_clipped_to_a_multiple_of_the_others(most, accumulation):
    """Plain descent by 1, so the parameters' change is the gradient."""
    batch = jax.tree.map(jnp.asarray, ragged_batch())
    model, plain = new_model(), optax.sgd(1.0)

    def loss(model, of):
        return jnp.sum(of(forward(model, batch)) * batch.weights) / 20

    def cross_entropy(scores):
        at = jnp.take_along_axis(scores, batch.targets[..., None], 2)[..., 0]
        return jax.nn.logsumexp(scores, axis=-1) - at

    first, second = (
        arrays(jax.grad(loss)(model, of))
        for of in (cross_entropy, lambda x: 5 * jax.nn.logsumexp(x, axis=-1) ** 2)
    )
    a, b = (np.sqrt(sum((x.astype(float) ** 2).sum() for x in g.values())) for g in (first, second))
    assert 0.3 * a < b < 1e3 * a  # cut in the one case, whole in the other
    share = min(1.0, most * a / b)
    step = make_train_step(forward, BOTH, plain, accumulation=accumulation, apart={"z": most})
    state, found = step(init_state(model, plain), batch)
    assert float(found["kept/z"].value) == pytest.approx(share, rel=1e-4)
    for name, moved in arrays(state.model).items():
        expected = arrays(model)[name] - first[name] - share * second[name]
        np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("apart", [{"y": 1.0}, {"z": 1.0, "cross_entropy": 1.0}])
def test_what_is_taken_apart_is_trained_and_leaves_others(apart):
    with pytest.raises(ValueError, match="apart"):
        make_train_step(forward, BOTH, OPTIMIZE, apart=apart)
