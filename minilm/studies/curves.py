"""What optimisation against a proxy does to gold: early stopping, falls, Gao's curves, best-of-n.

Arrays are float64; KL is in nats a completion, rewards in the unit of the judge or of the reference
model's standard deviation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Num
from scipy.special import gammaln
from scipy.stats import t as student

Values = Float[np.ndarray, " K"]
RESAMPLES = 1000  # of a bootstrap


class Curve(NamedTuple):
    """A policy on its way: one value an evaluation, the first before any update."""

    steps: Num[np.ndarray, " K"]
    kl: Values
    proxy: Values
    gold: Values
    parse_share: Values | None = None


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def student_interval(values: Sequence[float]) -> Interval:
    """Mean of a few independent values with Student's 95 % interval.

    Raises:
      ValueError: fewer than two values.

    >>> student_interval([1.0, 3.0]).mean
    2.0
    """
    x = np.asarray(values, np.float64)
    if len(x) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(x)}")
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return Interval(float(x.mean()), float(x.mean() - half), float(x.mean() + half))


def until_best_proxy(curve: Curve) -> Curve:
    """The way to the highest proxy, where those would stop who see nothing else."""
    stop = int(np.argmax(curve.proxy)) + 1
    return Curve(*(None if x is None else x[:stop] for x in curve))  # pyright: ignore


def column(curve: Curve, name: str) -> Values:
    """`gold` or `proxy` of a curve."""
    return {"gold": curve.gold, "proxy": curve.proxy}[name]


def stopped_at(curve: Curve, budget: float) -> int:
    """Index of the last evaluation before KL first exceeds the budget: early stopping by KL."""
    beyond = np.flatnonzero(curve.kl > budget)
    return len(curve.kl) - 1 if not len(beyond) else max(int(beyond[0]) - 1, 0)


def budget_grid(curves: Sequence[Curve]) -> Float[np.ndarray, " G"]:
    """Every KL at which some seed would stop elsewhere, in order."""
    return np.unique(np.concatenate([np.maximum.accumulate(c.kl) for c in curves]))


def best_budget(curves: Sequence[Curve]) -> float:
    """The KL budget at which the mean gold of these seeds is highest."""
    grid = budget_grid(curves)
    gold = [np.mean([c.gold[stopped_at(c, b)] for c in curves]) for b in grid]
    return float(grid[int(np.argmax(gold))])


def stops(curves: Sequence[Curve]) -> list[int]:
    """Index of where each seed stops by the KL budget that is best for the *other* seeds.

    The budget that is best for a seed itself would make noise look like a peak: a maximum of noisy
    values lies above the others by construction.

    Raises:
      ValueError: fewer than two seeds.
    """
    if len(curves) < 2:
        raise ValueError(f"a peak is found with at least 2 seeds, got {len(curves)}")
    others = ([*curves[:i], *curves[i + 1 :]] for i in range(len(curves)))
    return [stopped_at(c, best_budget(them)) for c, them in zip(curves, others, strict=True)]


def falls(curves: Sequence[Curve]) -> list[float]:
    """How far each seed's gold fell, by its last value, from where the others say to stop."""
    return [float(c.gold[i] - c.gold[-1]) for c, i in zip(curves, stops(curves), strict=True)]


def rises(curves: Sequence[Curve]) -> list[float]:
    """How far each seed's proxy rose between the same two points."""
    return [float(c.proxy[-1] - c.proxy[i]) for c, i in zip(curves, stops(curves), strict=True)]


def regrets(curves: Sequence[Curve], budget: float) -> list[float]:
    """How much more gold each seed has where the others say to stop than at a KL budget."""
    return [
        float(c.gold[i] - c.gold[stopped_at(c, budget)])
        for c, i in zip(curves, stops(curves), strict=True)
    ]


class Fit(NamedTuple):
    """start + d (α − β g(d)) with d = √KL; `r2` is the share of the variance that it explains."""

    alpha: float
    beta: float
    start: float
    r2: float
    shape: str  # "rl": g = log d; "best_of_n": g = d


def gao_fit(kl: Values, reward: Values, start: float, shape: str) -> Fit:
    """Least squares of Gao's curves; linear in α and β, so exact. Fewer than two points give 0.

    Reference:
      Gao, Schulman and Hilton (2022), Scaling Laws for Reward Model Overoptimization,
      arXiv:2210.10760, eq. 1 (best-of-n) and 2 (RL).
    """
    d = np.sqrt(np.maximum(kl, 0.0))
    used = d > 1e-3
    d, y = d[used], reward[used] - start
    if len(d) < 2:  # never left the reference: there is no curve
        return Fit(0.0, 0.0, float(start), 0.0, shape)
    columns = np.stack([d, -d * _bend(d, shape)], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residual, spread = y - columns @ [alpha, beta], y - y.mean()
    r2 = 1 - (residual**2).sum() / max(float((spread**2).sum()), 1e-12)
    return Fit(float(alpha), float(beta), float(start), float(r2), shape)


def gao_value(fit: Fit, kl: Values) -> Values:
    """The fitted reward at some KL."""
    d = np.sqrt(np.maximum(kl, 1e-12))
    return fit.start + d * (fit.alpha - fit.beta * _bend(d, fit.shape))


def _bend(d: np.ndarray, shape: str) -> np.ndarray:
    return {"rl": np.log, "best_of_n": lambda x: x}[shape](d)


def fit_seeds(
    curves: Sequence[Curve], name: str, *, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float, float]]:
    """The fit of "gold" or "proxy" to all seeds, each figure with its bootstrap interval."""

    def fit(chosen: Sequence[Curve]) -> Fit:
        kl = np.concatenate([c.kl for c in chosen])
        values = np.concatenate([column(c, name) for c in chosen])
        return gao_fit(kl, values, float(np.mean([column(c, name)[0] for c in chosen])), "rl")

    rng, whole = np.random.default_rng(0), fit(curves)
    drawn = [
        fit([curves[i] for i in rng.integers(len(curves), size=len(curves))])
        for _ in range(resamples)
    ]
    out = {}
    for number, key in enumerate(("alpha", "beta", "start", "r2")):
        values = np.array([f[:4] for f in (whole, *drawn)], np.float64)[:, number]
        low, high = np.quantile(values[1:], [0.025, 0.975])
        out[key] = (float(values[0]), float(low), float(high))
    return out


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ reference) at most, in nats: log n − (n − 1) / n.

    Exact where no two completions score alike; Beirami et al. (2024), arXiv:2401.01879, show that
    it is an upper bound otherwise.

    >>> best_of_n_kl(1)
    0.0
    """
    return float(np.log(n) - (n - 1) / n)


def most_n(kl: float, limit: int) -> int:
    """The largest n, up to a limit, whose best of n spends no more than so many nats.

    >>> most_n(1.0, 64), most_n(9.0, 64)
    (6, 64)
    """
    return max(n for n in range(1, limit + 1) if n == 1 or best_of_n_kl(n) <= kl)


def best_of_n(
    proxy: Float[np.ndarray, "P N"], values: Float[np.ndarray, "P N"], n: int
) -> Float[np.ndarray, " P"]:
    """Expected value of the completion of highest proxy among n, without bias, a prompt.

    All N samples are used: the i-th lowest proxy wins in C(i−1, n−1) of the C(N, n) subsets.

    Raises:
      ValueError: n outside 1 … N.
    Reference:
      Nakano et al. (2021), WebGPT, arXiv:2112.09332, appendix I.

    >>> best_of_n(np.array([[0.0, 1.0]]), np.array([[5.0, 7.0]]), 1).tolist()
    [6.0]
    """
    count = proxy.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n must lie between 1 and the {count} samples, got {n}")
    ranks = np.arange(1, count + 1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        log_weights = _log_choose(ranks - 1, n - 1) - _log_choose(count, n)
    weights = np.where(ranks >= n, np.exp(log_weights), 0.0)
    weights = weights / weights.sum()  # 1 but for the rounding of the logarithms
    ordered = np.take_along_axis(values, np.argsort(proxy, axis=1, kind="stable"), axis=1)
    return ordered.astype(np.float64) @ weights


def best_of_doublings(
    proxy: Float[np.ndarray, "P N"], gold: Float[np.ndarray, "P N"]
) -> dict[str, list[float]]:
    """`n` = 1, 2, 4 … N, and for each its `kl` and the mean `proxy` and `gold` of the best of n.

    `gold_low` and `gold_high` are gold's 95 % interval, from a bootstrap over prompts.
    """
    counts = doublings(proxy.shape[1])
    by_prompt = np.stack([best_of_n(proxy, gold, n) for n in counts])
    draws = np.random.default_rng(0).integers(len(gold), size=(RESAMPLES, len(gold)))
    low, high = np.quantile([by_prompt[:, d].mean(axis=1) for d in draws], [0.025, 0.975], axis=0)
    return {
        "n": [float(n) for n in counts],
        "kl": [best_of_n_kl(n) for n in counts],
        "proxy": [float(best_of_n(proxy, proxy, n).mean()) for n in counts],
        "gold": by_prompt.mean(axis=1).tolist(),
        "gold_low": low.tolist(),
        "gold_high": high.tolist(),
    }


def _log_choose(a: Any, b: int) -> Any:
    return gammaln(a + 1) - gammaln(b + 1) - gammaln(np.maximum(a - b, 0) + 1)


def doublings(limit: int) -> list[int]:
    """1, 2, 4 … up to the limit.

    >>> doublings(5)
    [1, 2, 4]
    """
    return [2**i for i in range(int(np.log2(limit)) + 1)]
