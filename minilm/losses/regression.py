"""Losses on real-valued predictions. Argument order: (predictions, targets); one per element."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from minilm.losses.checks import check_finite, check_option, check_shape

PerElement = Float[Array, "*batch"]
Loss = Float32[Array, "*batch"]

# Past it exp goes on along its tangent: e^40 times the square of a miss of 10,000 and a further
# 10,000 beyond the bound is still a number in float32, and e^40 is far outside any use.
MAX_EXPONENT = 40.0


def squared_error(predictions: PerElement, targets: PerElement) -> Loss:
    """Squared error: pays the square of the miss, so one miss of 10 costs as much as 100 of 1.

    L(p, t) = (p − t)²

    Its minimiser is the conditional mean. Convex in the predictions. Its gradient, 2 (p − t), grows
    with the miss without bound.

    Use: where the mean is wanted and the noise has light tails; to add up or bill totals.
    Rewards: the conditional mean, and before all fewer large misses.
    Ignores: the sign of a miss; the median, the spread, how rare an outlier is.

    Args:
      predictions, targets: in the target's unit.
    Returns:
      Loss per element, in the squared unit; at least 0.
    Raises:
      UserError: another shape of targets; targets that are not finite (outside jit).
    Reference:
      Gauss (1809), Theoria Motus Corporum Coelestium, book 2, section 3.

    >>> squared_error(jnp.array([1.0, 3.0]), jnp.array([3.0, 3.0])).tolist()
    [4.0, 0.0]
    """
    return optax.squared_error(*_prepare(predictions, targets))


def absolute_error(predictions: PerElement, targets: PerElement) -> Loss:
    """Absolute error: pays each unit of a miss the same, so a wild outlier pulls like any other.

    L(p, t) = |p − t|

    Its minimiser is the conditional median. Convex in the predictions. Its gradient is the sign of
    the miss, so steps do not get smaller near the optimum.

    Use: where targets hold gross errors, or where the cost of a miss is proportional to it.
    Rewards: being right about the middle of the cases.
    Ignores: how far out the far cases lie; the mean, hence totals.

    Args:
      predictions, targets: in the target's unit.
    Returns:
      Loss per element, in the target's unit; at least 0.
    Raises:
      UserError: another shape of targets; targets that are not finite (outside jit).
    Reference:
      Laplace (1774), Mémoire sur la probabilité des causes par les évènements, problem 3.

    >>> absolute_error(jnp.array([1.0, 3.0]), jnp.array([3.0, 3.0])).tolist()
    [2.0, 0.0]
    """
    predictions, targets = _prepare(predictions, targets)
    miss = predictions - targets
    return miss * jnp.sign(miss)  # jnp.abs has the slope 1 at 0


def huber(predictions: PerElement, targets: PerElement, *, delta: float = 1.0) -> Loss:
    """Huber loss: pays a small miss by its square, and past `delta` each further unit the same.

    L(p, t) = ½ e² where |e| ≤ δ, else δ (|e| − ½ δ);  e = p − t

    Between the mean (δ large) and the median (δ small). Convex in the predictions. Its gradient is
    the miss, clipped to ±δ.

    Use: for nearly normal noise with some outliers; δ about the size of an ordinary miss.
    Rewards: small misses among the ordinary cases.
    Ignores: how far an outlier lies beyond δ; the sign of a miss.

    Args:
      predictions, targets: in the target's unit.
      delta: δ, above 0, in the target's unit.
    Returns:
      Loss per element, in the squared unit; at least 0.
    Raises:
      UserError: delta not above 0; another shape of targets; targets that are not finite (outside
        jit).
    Reference:
      Huber (1964), Robust Estimation of a Location Parameter, Ann. Math. Statist. 35(1).

    >>> huber(jnp.array([0.5, 11.0]), jnp.array([0.0, 1.0])).tolist()
    [0.125, 9.5]
    """
    check_option("delta", delta, 0 < delta < math.inf, "above 0, finite")
    return optax.huber_loss(*_prepare(predictions, targets), delta=delta)


def log_cosh(predictions: PerElement, targets: PerElement) -> Loss:
    """Log-cosh: pays a small miss by half its square and a large one by its size, all smooth.

    L(p, t) = log cosh(p − t)

    Like Huber's loss with δ = 1, with a second derivative everywhere. Convex in the predictions.
    Its gradient is tanh(p − t).

    Use: as Huber's loss, where an optimizer uses curvature; scale the targets so that 1 is an
      ordinary miss.
    Rewards: small misses among the ordinary cases.
    Ignores: how far an outlier lies; the sign of a miss; the unit, which is yours to scale.

    Args:
      predictions, targets: in a unit of which 1 is an ordinary miss.
    Returns:
      Loss per element; at least 0 up to rounding.
    Raises:
      UserError: another shape of targets; targets that are not finite (outside jit).
    Reference:
      Chen et al. (2019), Log Hyperbolic Cosine Loss Improves Variational Auto-Encoder,
      openreview.net/forum?id=rkglvsC9Ym.

    >>> [round(x, 4) for x in log_cosh(jnp.array([1.0, 10.0]), jnp.zeros(2)).tolist()]
    [0.4338, 9.3069]
    """
    return optax.log_cosh(*_prepare(predictions, targets))


def quantile_loss(predictions: PerElement, targets: PerElement, *, quantile: float = 0.5) -> Loss:
    """Pinball loss: pays `quantile` per unit of shortfall and `1 − quantile` per unit of overshoot.

    L(p, t) = max(q (t − p), (q − 1) (t − p))

    Its minimiser is the conditional q-quantile, so 0.75 makes a forecaster err on the high side.
    Convex in the predictions.

    Use: where a miss to one side costs k times the other: q = k / (k + 1); for intervals, by two
      quantiles.
    Rewards: falling short in a share 1 − q of the cases, no more and no less.
    Ignores: how far the far cases lie; the mean.

    Args:
      predictions, targets: in the target's unit.
      quantile: q, in (0, 1).
    Returns:
      Loss per element, in the target's unit; at least 0.
    Raises:
      UserError: quantile outside (0, 1); another shape of targets; targets that are not finite
        (outside jit).
    Reference:
      Koenker and Bassett (1978), Regression Quantiles, Econometrica 46(1), eq. 3.1.

    >>> quantile_loss(jnp.array([1.0, 3.0]), jnp.array([3.0, 1.0]), quantile=0.75).tolist()
    [1.5, 0.5]
    """
    check_option("quantile", quantile, 0 < quantile < 1, "between 0 and 1, exclusive")
    predictions, targets = _prepare(predictions, targets)
    shortfall = targets - predictions
    return jnp.maximum(quantile * shortfall, (quantile - 1) * shortfall)


def expectile_loss(predictions: PerElement, targets: PerElement, *, expectile: float = 0.5) -> Loss:
    """Expectile loss: pays the squared miss, weighted by the side of the miss.

    L(p, t) = τ (t − p)² where p < t, else (1 − τ) (t − p)²

    Its minimiser is the conditional τ-expectile: the value at which overshoot, weighted by 1 − τ,
    balances shortfall, weighted by τ. Half of it is half the squared error. Convex in the
    predictions, with a continuous gradient, unlike the pinball loss.

    Use: as the pinball loss, where large misses hurt more than in proportion.
    Rewards: an optimistic (τ > ½) or pessimistic mean.
    Ignores: in what share of the cases it falls short.

    Args:
      predictions, targets: in the target's unit.
      expectile: τ, in (0, 1).
    Returns:
      Loss per element, in the squared unit; at least 0.
    Raises:
      UserError: expectile outside (0, 1); another shape of targets; targets that are not finite
        (outside jit).
    Reference:
      Newey and Powell (1987), Asymmetric Least Squares Estimation and Testing, Econometrica 55(4).

    >>> expectile_loss(jnp.array([1.0, 3.0]), jnp.array([3.0, 1.0]), expectile=0.75).tolist()
    [3.0, 1.0]
    """
    check_option("expectile", expectile, 0 < expectile < 1, "between 0 and 1, exclusive")
    predictions, targets = _prepare(predictions, targets)
    weight = jnp.where(predictions < targets, expectile, 1 - expectile)
    return weight * optax.squared_error(predictions, targets)


def linex(predictions: PerElement, targets: PerElement, *, a: float = 1.0) -> Loss:
    """LINEX: pays one side of a miss about exponentially, the other about linearly.

    L(p, t) = exp(z) − z − 1;  z = a (p − t)

    With a > 0 overshoot is the dear side, with a < 0 shortfall; near 0 it is half of z². Its
    minimiser is −log E[exp(−a t)] / a, for normal noise the mean less a σ² / 2. Convex in the
    predictions. Past z = 40 exp goes on along its tangent, so value and gradient stay finite.

    Use: where a miss to one side is a nuisance and to the other a disaster that grows.
    Rewards: staying on the cheap side, by a margin that grows with the spread.
    Ignores: small differences on the cheap side.

    Args:
      predictions, targets: in the target's unit.
      a: per unit of the target; not 0. 1 / a is the miss at which it turns dear.
    Returns:
      Loss per element; at least 0 up to rounding.
    Raises:
      UserError: a is 0 or not finite; another shape of targets; targets that are not finite
        (outside jit).
    Reference:
      Varian (1975), A Bayesian Approach to Real Estate Assessment; Zellner (1986), Bayesian
      Estimation and Prediction Using Asymmetric Loss Functions, JASA 81.

    >>> [round(x, 4) for x in linex(jnp.array([-1.0, 0.0, 1.0]), jnp.zeros(3)).tolist()]
    [0.3679, 0.0, 0.7183]
    """
    check_option("a", a, a != 0 and math.isfinite(a), "any number but 0")
    predictions, targets = _prepare(predictions, targets)
    z = a * (predictions - targets)
    near = jnp.minimum(z, MAX_EXPONENT)
    # expm1, since exp(z) − 1 − z cancels near 0.
    return jnp.expm1(near) + jnp.exp(near) * (z - near) - z


def gaussian_nll(predictions: PerElement, log_variances: PerElement, targets: PerElement) -> Loss:
    """Gaussian negative log-likelihood: pays the squared miss in predicted variances, and variance.

    L(p, s, t) = ½ (s + (t − p)² exp(−s) + log 2π);  s = log σ²

    Its minimiser is the conditional mean with the log of the conditional variance. Convex in the
    predictions. Past −s = 40 exp goes on along its tangent, so value and gradient stay finite.

    Use: where a forecast has to say how sure it is.
    Rewards: misses as large as announced; certainty where it is earned.
    Ignores: the shape of the distribution beyond mean and variance; a case that the model declares
      noisy hardly counts for the mean.

    Args:
      predictions, targets: in the target's unit.
      log_variances: s, the log of the predicted variance.
    Returns:
      Nats per element, of the density in the target's unit, so of either sign.
    Raises:
      UserError: shapes differ; targets that are not finite (outside jit).
    Reference:
      Nix and Weigend (1994), Estimating the Mean and Variance of the Target Probability
      Distribution, IEEE ICNN.

    >>> print(gaussian_nll(jnp.array([0.0]), jnp.array([0.0]), jnp.array([1.0])).round(4))
    [1.4189]
    """
    predictions, targets = _prepare(predictions, targets)
    check_shape("log_variances", log_variances, predictions.shape, "predictions")
    s = log_variances.astype(jnp.float32)
    near = jnp.minimum(-s, MAX_EXPONENT)
    precision = jnp.exp(near) * (1 - s - near)
    squared = optax.squared_error(predictions, targets)
    return 0.5 * (s + squared * precision + math.log(2 * math.pi))


def asymmetric(loss: Callable[..., Loss], shortfall_cost: float) -> Callable[..., Loss]:
    """Asymmetric cost: a loss that pays `shortfall_cost` times as much where it falls short.

    L'(p, t) = k L(p, t) where p < t, else L(p, t)

    Of the absolute error it makes k + 1 times the pinball loss with q = k / (k + 1), of the squared
    error k + 1 times the expectile loss with τ = k / (k + 1). Convex where the loss is, since no
    miss costs nothing.

    Use: where the books say what a shortfall costs: train on that price.
    Rewards: what the loss rewards, shifted to the high side (k > 1).
    Ignores: what the loss ignores.

    Args:
      loss: (predictions, targets) -> loss per element; fix its options by `functools.partial`.
      shortfall_cost: k, above 0.
    Returns:
      A loss (predictions, targets) -> loss per element, in the same unit.
    Raises:
      UserError: shortfall_cost not above 0.
    Reference:
      Granger (1969), Prediction with a Generalized Cost of Error Function, Operational Research
      Quarterly 20(2).

    >>> dear = asymmetric(squared_error, shortfall_cost=3.0)
    >>> dear(jnp.array([1.0, 3.0]), jnp.array([3.0, 1.0])).tolist()
    [12.0, 4.0]
    """
    holds = 0 < shortfall_cost < math.inf
    check_option("shortfall_cost", shortfall_cost, holds, "above 0, finite")

    def weighted(predictions: PerElement, targets: PerElement) -> Loss:
        values = loss(predictions, targets)
        short = predictions.astype(jnp.float32) < targets.astype(jnp.float32)
        return jnp.where(short, float(shortfall_cost), 1.0) * values

    return weighted


def _prepare(predictions: PerElement, targets: PerElement) -> tuple[Loss, Loss]:
    """Both in float32, of one shape, the targets finite."""
    check_shape("targets", targets, predictions.shape, "predictions")
    check_finite(targets, "targets")
    return predictions.astype(jnp.float32), targets.astype(jnp.float32)
