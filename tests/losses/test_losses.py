"""What every row of LOSSES promises. A new row is tested here without new test code: its arguments
are made from the shapes in its signature and from the names that its family gives them, its options
from their defaults and literals, and what its docstring claims is put to the test."""

import inspect
import itertools
import re
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from minilm.errors import UserError
from minilm.losses import LOSSES
from minilm.losses.docstrings import explain
from minilm.losses.reduce import mean

# *batch examples, or B of them, each of the shape *dims; V tokens, C classes, L items in a list.
SHAPES = {"*batch": (4, 6), "B": (4,), "*dims": (3, 2), "V": (7,), "C": (7,), "L": (5,)}
INTEGERS = {"labels": 7, "groups": 2}


def _parameters(name, *, options):
    return [
        p
        for p in inspect.signature(LOSSES[name]).parameters.values()
        if (p.kind is p.KEYWORD_ONLY) == options
    ]


def _choices(name):
    """Every setting of the options that have no default; those are literals."""
    required = [p for p in _parameters(name, options=True) if p.default is p.empty]
    for values in itertools.product(*(typing.get_args(p.annotation) for p in required)):
        yield dict(zip((p.name for p in required), values, strict=True))


def _shape(annotation):
    return sum((SHAPES[d] for d in annotation.dim_str.split()), ())


def _bent(x):
    """A function to be penalised for its slope: one value per example."""
    return jnp.sum(0.5 * x**2, axis=(1, 2)) + x[:, 0, 0]


def _argument(parameter, draw_float, rng):
    """One positional argument: by its name where only some values are meant, else by its shape."""
    match parameter.name:
        case "function":
            return _bent
        case "params" | "initial":
            return {"w": _f32(draw_float((3, 2))), "b": [_f32(draw_float((3,)))]}
    annotation = parameter.annotation
    shape = _shape(annotation)
    match parameter.name:
        case "relevance":
            return _f32(rng.integers(0, 4, shape))
        case "targets" if annotation.dim_str.endswith(" C"):
            return _f32(rng.dirichlet(np.full(shape[-1], 0.5), shape[:-1]))
        case "labels" if "int32" not in annotation.dtypes:
            return _f32(rng.integers(0, 2, shape))
        case "costs":
            return _f32(rng.random(shape))
        case name if name in INTEGERS:
            return jnp.asarray(rng.integers(0, INTEGERS[name], shape), jnp.int32)
    return _f32(draw_float(shape))


def _f32(x):
    return jnp.asarray(x, jnp.float32)


def _draw(name, draw_float, rng):
    """Positional arguments of the shapes and dtypes in the signature."""
    return [_argument(p, draw_float, rng) for p in _parameters(name, options=False)]


def _floating(argument):
    leaves = jax.tree.leaves(argument)
    return not callable(argument) and all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)


def _floats(arguments):
    return tuple(i for i, x in enumerate(arguments) if _floating(x))


def _cast(argument, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), argument) if _floating(argument) else argument


def _moved(argument, direction, step):
    return jax.tree.map(lambda x, d: x + step * d, argument, direction)


def _of(name, arguments, options, at):
    """The loss as a function of its argument `at`."""
    return lambda x: LOSSES[name](*arguments[:at], x, *arguments[at + 1 :], **options)


ROWS = [(name, options) for name in LOSSES for options in _choices(name)]


def _rows(holds):
    return pytest.mark.parametrize(
        ("name", "options"),
        [row for row in ROWS if holds(row[0])],
        ids=lambda x: x if isinstance(x, str) else ",".join(x.values()),
    )


def _is_per_element(name):
    return inspect.signature(LOSSES[name]).return_annotation.dim_str == "*batch"


def _is_convex(name):
    return "Convex in" in " ".join(explain(LOSSES[name]).remarks)


def _is_nonnegative(name):
    return "at least 0" in explain(LOSSES[name]).returns


def _takes_a_mask(name):
    return "mask" in inspect.signature(LOSSES[name]).parameters


every_loss = _rows(lambda name: True)


@every_loss
def test_float32_losses_of_the_shape_that_the_signature_says(name, options):
    rng = np.random.default_rng(0)
    arguments = _draw(name, rng.standard_normal, rng)
    out = LOSSES[name](*arguments, **options)
    assert out.shape == _shape(inspect.signature(LOSSES[name]).return_annotation)
    assert out.dtype == jnp.float32
    functions = [x for x in arguments if callable(x)]
    arrays = [x for x in arguments if not callable(x)]
    # As under jit, where no value is known.
    traced = jax.eval_shape(lambda *xs: LOSSES[name](*functions, *xs, **options), *arrays)
    assert (traced.shape, traced.dtype) == (out.shape, out.dtype)


@every_loss
def test_bfloat16_inputs_are_computed_in_float32(name, options):
    rng = np.random.default_rng(1)
    half = [_cast(x, jnp.bfloat16) for x in _draw(name, rng.standard_normal, rng)]
    full = [_cast(x, jnp.float32) for x in half]
    out = LOSSES[name](*half, **options)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, LOSSES[name](*full, **options))


@every_loss
def test_value_and_gradient_are_finite_at_extremes(name, options):
    # bfloat16, computed in float32 and of its range, is finite where float32 is.
    rng = np.random.default_rng(2)
    floats = _floats(_draw(name, rng.standard_normal, rng))

    def total(*xs):
        return jnp.sum(LOSSES[name](*xs, **options))

    for _ in range(4):
        drawn = _draw(name, lambda shape: rng.choice([-1e4, -1.0, 0.0, 1.0, 1e4], shape), rng)
        out, gradients = jax.value_and_grad(total, argnums=floats)(*drawn)
        assert np.isfinite(out)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@every_loss
def test_gradient_of_the_first_array_agrees_with_finite_differences(name, options):
    rng = np.random.default_rng(3)
    arguments = _draw(name, rng.standard_normal, rng)
    at = _floats(arguments)[0]
    first, step = arguments[at], 1e-2
    loss = _of(name, arguments, options, at)
    direction = jax.tree.map(lambda x: _f32(rng.standard_normal(x.shape)), first)
    behind, ahead = _moved(first, direction, -step), _moved(first, direction, step)
    measured = np.asarray(loss(ahead) - loss(behind)) / (2 * step)

    def slope(x):
        gradient = jax.grad(lambda x: jnp.sum(loss(x)))(x)
        products = jax.tree.leaves(
            jax.tree.map(lambda g, d: np.asarray(g * d), gradient, direction)
        )
        # An element depends on its own part of the argument alone.
        return sum(p.sum(tuple(range(measured.ndim, p.ndim))) for p in products)

    # What was measured is a mean of the slopes between: near a kink they differ.
    between = np.stack([slope(x) for x in (behind, first, ahead)])
    slack = 5e-3 + 5e-3 * abs(between[1])
    assert (measured <= between.max(0) + slack).all()
    assert (measured >= between.min(0) - slack).all()


@_rows(_is_per_element)
def test_what_lies_under_the_mask_changes_neither_loss_nor_gradient(name, options):
    rng = np.random.default_rng(4)
    arrays = _draw(name, rng.standard_normal, rng)
    mask = jnp.asarray(rng.random(SHAPES["*batch"]) < 0.6)
    other = _draw(name, lambda shape: rng.choice([-1e4, 1e4], shape), rng)
    spoilt = [
        jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, y)
        if x.shape[: mask.ndim] == mask.shape
        else x
        for x, y in zip(arrays, other, strict=True)
    ]

    @jax.value_and_grad
    def loss(*xs):
        return mean(LOSSES[name](*xs, **options), mask).value

    before, gradient = loss(*arrays)
    after, gradient_after = loss(*spoilt)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(gradient, gradient_after)
    assert not gradient[~mask].any()


@_rows(_is_nonnegative)
def test_never_negative_where_the_docstring_says_so(name, options):
    rng = np.random.default_rng(5)
    for scale in (0.1, 1.0, 5.0, 1e3):
        arguments = _draw(name, lambda shape, s=scale: s * rng.standard_normal(shape), rng)
        out = LOSSES[name](*arguments, **options)
        rounding = 1e-6 * scale if "up to rounding" in explain(LOSSES[name]).returns else 0.0
        assert out.min() >= -rounding


@_rows(_is_convex)
def test_convex_in_the_first_array_where_the_docstring_says_so(name, options):
    rng = np.random.default_rng(6)
    for scale in (0.5, 3.0, 30.0):
        arguments = _draw(name, lambda shape, s=scale: s * rng.standard_normal(shape), rng)
        at = _floats(arguments)[0]
        loss = _of(name, arguments, options, at)
        one = arguments[at]
        two = _draw(name, lambda shape, s=scale: s * rng.standard_normal(shape), rng)[at]
        middle = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
        chord = (loss(one) + loss(two)) / 2
        assert (loss(middle) <= chord + 1e-5 * (1 + abs(chord))).all()


def test_the_claims_that_are_tested_are_found():
    convex = {name for name in LOSSES if _is_convex(name)}
    assert {"squared_error", "softmax_cross_entropy", "pairwise_hinge", "l1"} <= convex
    assert not {"focal", "entropy", "approximate_ndcg", "policy_gradient"} & convex
    signed = {name for name in LOSSES if not _is_nonnegative(name)}
    assert signed == {
        "gaussian_nll",
        "cost_sensitive",
        "clipped_surrogate",
        "policy_gradient",
        "kl_estimate",
    }


@_rows(_takes_a_mask)
def test_a_padded_list_has_the_loss_of_the_short_one_whatever_the_padding(name, options):
    rng = np.random.default_rng(7)
    scores, relevance = _draw(name, rng.standard_normal, rng)
    real = jnp.broadcast_to(jnp.arange(5) < 3, scores.shape)
    short = LOSSES[name](scores[..., :3], relevance[..., :3], **options)

    def total(x, r):
        out = LOSSES[name](x, r, mask=real, **options)
        return jnp.sum(out), out

    for odd in (1e4, -jnp.inf, jnp.nan):
        x, r = jnp.where(real, scores, odd), jnp.where(real, relevance, odd)
        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(x, r)
        np.testing.assert_allclose(out, short, rtol=1e-5, atol=1e-6)
        assert np.isfinite(gradient).all()
        assert not gradient[~real].any()


@_rows(_takes_a_mask)
def test_the_order_of_the_items_changes_nothing(name, options):
    rng = np.random.default_rng(8)
    scores, relevance = _draw(name, rng.standard_normal, rng)
    mask = jnp.asarray(rng.random(scores.shape) < 0.7)
    shuffled = rng.permutation(5)
    out = LOSSES[name](scores, relevance, mask=mask, **options)
    again = LOSSES[name](
        *(x[..., shuffled] for x in (scores, relevance)), mask=mask[..., shuffled], **options
    )
    np.testing.assert_allclose(again, out, rtol=1e-5, atol=1e-6)


@_rows(_takes_a_mask)
@pytest.mark.parametrize("items", [0, 1])
def test_a_list_that_asks_no_order_is_zero(name, options, items):
    rng = np.random.default_rng(9)
    scores, relevance = _draw(name, rng.standard_normal, rng)
    mask = jnp.broadcast_to(jnp.arange(5) < items, scores.shape)

    def total(x):
        return jnp.sum(LOSSES[name](x, relevance, mask=mask, **options))

    value, gradient = jax.value_and_grad(total)(scores)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
def test_documented(name):
    explained = explain(LOSSES[name])
    assert explained.name == name
    assert "pays" in explained.pays, "the first line says what the loss pays for"
    assert " = " in explained.formula, "the second paragraph is the formula"
    for part in ("use", "rewards", "ignores", "args", "returns", "reference"):
        assert explained._asdict()[part], f"{part} is missing"
    assert re.search(r"\b(1[789]|20)\d\d\b", explained.reference), "a reference has a year"
    assert ">>> " in (inspect.getdoc(LOSSES[name]) or "")
    documented = {n for names in explained.args for n in names.split(", ")}
    assert documented == set(inspect.signature(LOSSES[name]).parameters)


@pytest.mark.parametrize("name", LOSSES)
def test_mismatched_shapes_are_refused(name, monkeypatch):
    # Optax's Huber broadcast (3,) against (3, 1) in silence.
    rng = np.random.default_rng(10)
    first, *rest = _draw(name, rng.standard_normal, rng)
    if not rest or callable(first):
        pytest.skip("one array")
    options = next(_choices(name))
    short = [jax.tree.map(lambda x: x[:1], x) for x in rest]
    with pytest.raises(Exception, match=r"shape|type"):
        LOSSES[name](first, *short, **options)
    # In a user's process nothing checks signatures.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match="shape does not fit"):
        LOSSES[name](first, *short, **options)
