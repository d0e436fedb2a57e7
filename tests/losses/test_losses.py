"""What every row of LOSSES promises. A new row is tested here without new test code: its arguments
are made from the shapes in its signature, its options from their defaults and literals."""

import inspect
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm.losses import LOSSES
from minilm.losses.reduce import mean

BATCH, SIZES = (4, 6), {"V": 7}


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


def _draw(name, draw_float, rng):
    """Positional arguments of the shapes and dtypes in the signature."""
    arrays = []
    for parameter in _parameters(name, options=False):
        dimensions = parameter.annotation.dim_str.split()
        assert dimensions[0] == "*batch", "a loss has one value per element of *batch"
        shape = BATCH + tuple(SIZES[d] for d in dimensions[1:])
        if "int32" in parameter.annotation.dtypes:
            arrays.append(jnp.asarray(rng.integers(0, SIZES["V"], shape), jnp.int32))
        else:
            arrays.append(jnp.asarray(draw_float(shape), jnp.float32))
    return arrays


def _floats(arrays):
    return tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))


ROWS = [(name, options) for name in LOSSES for options in _choices(name)]
every_loss = pytest.mark.parametrize(
    ("name", "options"), ROWS, ids=lambda x: x if isinstance(x, str) else ",".join(x.values())
)


@every_loss
def test_one_float32_loss_per_element(name, options):
    rng = np.random.default_rng(0)
    arrays = _draw(name, rng.standard_normal, rng)
    out = LOSSES[name](*arrays, **options)
    assert out.shape == BATCH
    assert out.dtype == jnp.float32


@every_loss
def test_bfloat16_inputs_are_computed_in_float32(name, options):
    rng = np.random.default_rng(1)
    arrays = _draw(name, rng.standard_normal, rng)
    floats = _floats(arrays)
    half = [x.astype(jnp.bfloat16) if i in floats else x for i, x in enumerate(arrays)]
    full = [x.astype(jnp.float32) if i in floats else x for i, x in enumerate(half)]
    out = LOSSES[name](*half, **options)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, LOSSES[name](*full, **options))


@every_loss
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_value_and_gradient_are_finite_at_extremes(name, options, dtype):
    rng = np.random.default_rng(2)
    floats = _floats(_draw(name, rng.standard_normal, rng))
    value_and_gradients = jax.jit(
        jax.value_and_grad(lambda *xs: jnp.sum(LOSSES[name](*xs, **options)), argnums=floats)
    )
    for _ in range(8):
        arrays = _draw(name, lambda shape: rng.choice([-1e4, -1.0, 0.0, 1.0, 1e4], shape), rng)
        arrays = [x.astype(dtype) if i in floats else x for i, x in enumerate(arrays)]
        out, gradients = value_and_gradients(*arrays)
        assert np.isfinite(out)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)


@every_loss
def test_gradient_of_the_first_argument_agrees_with_finite_differences(name, options):
    rng = np.random.default_rng(3)
    first, *rest = _draw(name, rng.standard_normal, rng)
    step = 1e-2

    @jax.jit
    def loss(x):
        return LOSSES[name](x, *rest, **options)

    direction = jnp.asarray(rng.standard_normal(first.shape), jnp.float32)
    _, exact = jax.jvp(loss, (first,), (direction,))
    measured = (loss(first + step * direction) - loss(first - step * direction)) / (2 * step)
    # Elements within a step of a clip have no derivative; the seed leaves one or two of 24.
    wrong = ~np.isclose(exact, measured, rtol=5e-3, atol=5e-3)
    assert wrong.sum() <= (2 if "clip" in name else 0)
    # Reverse mode, which training uses, against forward mode.
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(first)
    np.testing.assert_allclose(jnp.sum(gradient * direction), jnp.sum(exact), rtol=1e-4, atol=1e-4)


@every_loss
def test_what_lies_under_the_mask_changes_neither_loss_nor_gradient(name, options):
    rng = np.random.default_rng(4)
    arrays = _draw(name, rng.standard_normal, rng)
    mask = jnp.asarray(rng.random(BATCH) < 0.6)
    other = _draw(name, lambda shape: rng.choice([-1e4, 1e4], shape), rng)
    spoilt = [
        jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, y)
        for x, y in zip(arrays, other, strict=True)
    ]

    @jax.jit
    @jax.value_and_grad
    def loss(*xs):
        return mean(LOSSES[name](*xs, **options), mask).value

    before, gradient = loss(*arrays)
    after, gradient_after = loss(*spoilt)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(gradient, gradient_after)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_documented(name):
    text = inspect.getdoc(LOSSES[name])
    assert text is not None
    assert "pays" in text.splitlines()[0], "the first line says what the loss pays for"
    for part in ("Args:", "Returns:", "Reference:", ">>> "):
        assert part in text


@pytest.mark.parametrize("name", LOSSES)
def test_mismatched_shapes_are_refused(name):
    # Optax's Huber broadcast (3,) against (3, 1) in silence; a signature that binds does not.
    rng = np.random.default_rng(6)
    first, *rest = _draw(name, rng.standard_normal, rng)
    if not rest:
        pytest.skip("one argument")
    options = next(_choices(name))
    with pytest.raises(Exception, match=r"shape|type"):
        LOSSES[name](first, *(x[:1] for x in rest), **options)
