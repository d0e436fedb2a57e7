"""Penalties on parameters, on gradients and between groups, to be added with a small weight.

Those on parameters, and `group_gap`, are one number each: they are not averaged over examples.
The entropy bonus is `language.entropy` with a negative weight, the leash to a reference model
`language.kl_divergence`, or `policy.kl_estimate` where only sampled tokens are known.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

from minilm.errors import UserError
from minilm.losses.checks import check_labels, check_shape, check_weights
from minilm.losses.reduce import mean

Params = PyTree[Float[Array, "..."]]
Scalar = Float32[Array, ""]


def l1(params: Params) -> Scalar:
    """L1 penalty: pays the size of every parameter, so those that earn little go to 0.

    L(θ) = Σ_i |θ_i|

    Convex in the parameters. Its gradient is the sign, the same for large and small, 0 at 0:
    gradient descent hovers about 0 within a learning rate.

    Use: where few parameters shall remain.
    Rewards: zeros.
    Ignores: what a parameter does; its unit: scale the inputs alike before.

    Args:
      params: a tree of arrays, such as a model.
    Returns:
      One number for the whole tree, not one per element; at least 0.
    Reference:
      Tibshirani (1996), Regression Shrinkage and Selection via the Lasso, JRSS B 58(1).

    >>> l1({"w": jnp.array([3.0, -4.0]), "b": jnp.array([0.0])}).tolist()
    7.0
    """
    # |θ| as θ sign θ: jnp.abs has the slope 1 at 0, and would drive zeros away.
    sizes = jax.tree.map(lambda x: x * jnp.sign(x), _float32(params))
    return jnp.asarray(optax.tree.sum(sizes), jnp.float32)


def l2(params: Params) -> Scalar:
    """L2 penalty: pays the square of every parameter, so large ones shrink and few reach 0.

    L(θ) = Σ_i θ_i²

    Convex in the parameters. Under plain gradient descent it is weight decay; under Adam it is not
    (a decay of its own does it there: Loshchilov and Hutter 2019, arXiv:1711.05101).

    Use: against weights that grow without need; where two inputs say the same, to share between
      them.
    Rewards: many small parameters in place of few large ones.
    Ignores: what a parameter does; scale that a later normalisation takes out anyway.

    Args:
      params: a tree of arrays, such as a model.
    Returns:
      One number for the whole tree, not one per element; at least 0.
    Reference:
      Hoerl and Kennard (1970), Ridge Regression, Technometrics 12(1).

    >>> l2({"w": jnp.array([3.0, -4.0]), "b": jnp.array([0.0])}).tolist()
    25.0
    """
    return optax.tree.norm(_float32(params), squared=True).astype(jnp.float32)


def l2_from(params: Params, initial: Params) -> Scalar:
    """L2 from initial weights (L2-SP): pays the squared distance from where training began.

    L(θ) = Σ_i (θ_i − θ⁰_i)²

    Convex in the parameters. Gradients reach the first argument only.

    Use: in fine-tuning, to keep what the pretrained model knows.
    Rewards: staying near the start.
    Ignores: what the model says: a small step of weights may change much, a large one nothing.

    Args:
      params: a tree of arrays, such as a model.
      initial: a copy of the same tree from the start; a constant.
    Returns:
      One number for the whole tree, not one per element; at least 0.
    Raises:
      UserError: another tree, or an array of another shape.
    Reference:
      Li, Grandvalet and Davoine (2018), Explicit Inductive Bias for Transfer Learning with
      Convolutional Networks, arXiv:1802.01483.

    >>> l2_from({"w": jnp.array([3.0, -4.0])}, {"w": jnp.array([3.0, -2.0])}).tolist()
    4.0
    """
    if jax.tree.structure(params) != jax.tree.structure(initial):
        raise UserError("not a tree like that of params", where="initial")
    for (path, now), before in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(initial), strict=True
    ):
        check_shape(f"initial{jax.tree_util.keystr(path)}", before, now.shape, "params")
    constant = jax.lax.stop_gradient(_float32(initial))
    return l2(jax.tree.map(jnp.subtract, _float32(params), constant))


def gradient_penalty(
    function: Callable[[Float[Array, "B *dims"]], Float[Array, "B"]],
    inputs: Float[Array, "B *dims"],
) -> Float32[Array, "B"]:
    """Gradient penalty: pays the squared slope of a function at its inputs.

    L(f, x) = ‖∇_x f(x)‖²

    Use: for a critic or a classifier that should not jump between near inputs.
    Rewards: a function that is flat where the data lie.
    Ignores: the function's level; its slope away from the inputs; the inputs' unit.

    Args:
      function: inputs -> one value for each; an example's value must not depend on the others. It
        gets float32.
      inputs: examples along the first axis.
    Returns:
      Squared length of the gradient per example, in value² / input²; at least 0.
    Raises:
      UserError: the function does not return one value per example.
    Reference:
      Drucker and LeCun (1992), Improving Generalization Performance Using Double Backpropagation,
      IEEE Trans. Neural Networks 3(6); Mescheder, Geiger and Nowozin (2018), arXiv:1801.04406, R1.

    >>> gradient_penalty(lambda x: 3 * x[:, 0] + 4 * x[:, 1], jnp.ones((2, 2))).tolist()
    [25.0, 25.0]
    """

    def total(x):
        values = function(x)
        check_shape("function's values", values, inputs.shape[:1], "inputs' first axis")
        return jnp.sum(values.astype(jnp.float32))

    slopes = jax.grad(total)(inputs.astype(jnp.float32))
    return jnp.sum(slopes**2, axis=tuple(range(1, slopes.ndim)))


def group_gap(
    losses: Float[Array, "*batch"],
    groups: Int[Array, "*batch"],
    *,
    weights: Float[Array, "*batch"] | Bool[Array, "*batch"] | None = None,
) -> Scalar:
    """Group gap: pays the difference between the mean losses of two groups.

    L(l, g) = |mean of l where g = 0 − mean of l where g = 1|

    A gap over a batch is not the mean of gaps over its parts, nor that over all the data: small
    batches make it noisy and too large.

    Use: as a second term beside the loss itself, where one group must not pay for the other.
    Rewards: equal mean losses, be it by making the better group worse.
    Ignores: the level of the losses; who inside a group bears them; groups beyond these two.

    Args:
      losses: one per example, of any loss.
      groups: 0 or 1.
      weights: what an example counts, at least 0; a mask will do; None counts all alike.
    Returns:
      One number, not one per element, in the unit of the losses; at least 0. 0 where a group is
      empty.
    Raises:
      UserError: shapes differ; groups other than 0 and 1, or weights that are negative, not finite
        or all 0 (outside jit).
    Reference:
      Zafar et al. (2017), Fairness Beyond Disparate Treatment and Disparate Impact,
      arXiv:1610.08452: error rates that differ between groups.

    >>> group_gap(jnp.array([1.0, 3.0, 5.0]), jnp.array([0, 0, 1])).tolist()
    3.0
    """
    check_shape("groups", groups, losses.shape, "losses")
    check_labels(groups, 2, "groups")
    weights = jnp.ones(losses.shape) if weights is None else weights
    check_shape("weights", weights, losses.shape, "losses")
    check_weights(weights)
    weights = weights.astype(jnp.float32)
    first, second = (mean(losses, jnp.where(groups == g, weights, 0.0)) for g in (0, 1))
    both = (first.count > 0) & (second.count > 0)
    gap = first.value - second.value
    return jnp.where(both, gap * jnp.sign(gap), 0.0)  # jnp.abs has the slope 1 at 0


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
