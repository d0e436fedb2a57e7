"""A picture of every loss: its value and its gradient along one argument, for a few options.

Numbers in the drawings are rounded and what names a version is left out, so that they change only
when a loss does.
"""

import io
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minilm.losses import classification, language, policy, preference, ranking, regression
from minilm.losses import regularization as penalties

type Curve = Callable[[Array], Array]  # number -> number

POINTS = 161
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by the colour-blind too
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "xtick.bottom": False,
    "ytick.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#666666",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
}


class Picture(NamedTuple):
    """Curves by what is told apart, over an argument that `axis` names."""

    axis: str
    curves: dict[str, Curve]
    span: tuple[float, float] = (-4.0, 4.0)


def _number(value: float) -> Array:
    return jnp.asarray(value, jnp.float32)


def _row(*values: Array | float) -> Array:
    """A vector, such as the logits of one example."""
    return jnp.stack([jnp.asarray(v, jnp.float32) for v in values])


def _log_odds(share: float) -> Array:
    """Two logits of which the first has this probability."""
    return _row(math.log(share / (1 - share)), 0.0)


def _at(loss: Callable[..., Array], *rest: Array) -> Curve:
    """A loss over its first argument."""
    return lambda x: loss(x, *rest)


def _of_two(loss: Callable[..., Array], *rest: Array) -> Curve:
    """A loss over the first of two logits or scores, the other 0."""
    return lambda x: loss(_row(x, 0.0), *rest)


def _of_four(loss: Callable[..., Array], *rest: Array) -> Curve:
    """A loss over the first of four logits, the others 0."""
    return lambda x: loss(_row(x, 0.0, 0.0, 0.0), *rest)


def _of_three(position: int) -> Curve:
    """ListMLE over the score of one of three items, the others 0."""
    relevance = jnp.array([2.0, 1.0, 0.0])
    return lambda x: ranking.listmle(jnp.zeros(3).at[position].set(x), relevance)


def _ndcg(temperature: float) -> Curve:
    relevance = jnp.array([2.0, 1.0, 0.0])
    return lambda x: ranking.approximate_ndcg(_row(x, 1.0, 0.0), relevance, temperature=temperature)


_NO, _YES = _number(0.0), _number(1.0)
_FIRST = jnp.array(0)
_BETTER_FIRST = jnp.array([1.0, 0.0])
_MISS = "prediction − target"
_POSITIVE = "logit of a positive"
_MARGIN = "score of the more relevant of two items, the other's 0"
_STUDENT = "log-odds of the first of two tokens"
_RATIO = "log π − log π_old"

PICTURES: dict[str, Picture] = {
    "squared_error": Picture(_MISS, {"": _at(regression.squared_error, _NO)}),
    "absolute_error": Picture(_MISS, {"": _at(regression.absolute_error, _NO)}),
    "huber": Picture(
        _MISS, {f"δ = {d}": _at(partial(regression.huber, delta=d), _NO) for d in (0.5, 1.0, 2.0)}
    ),
    "log_cosh": Picture(_MISS, {"": _at(regression.log_cosh, _NO)}),
    "quantile_loss": Picture(
        _MISS,
        {
            f"q = {q}": _at(partial(regression.quantile_loss, quantile=q), _NO)
            for q in (0.1, 0.5, 0.9)
        },
    ),
    "expectile_loss": Picture(
        _MISS,
        {
            f"τ = {t}": _at(partial(regression.expectile_loss, expectile=t), _NO)
            for t in (0.1, 0.5, 0.9)
        },
    ),
    "linex": Picture(
        _MISS,
        {
            f"a = {a}".replace("-", "−"): _at(partial(regression.linex, a=a), _NO)
            for a in (-1.0, 0.5, 1.0)
        },
        (-3.0, 3.0),
    ),
    "gaussian_nll": Picture(
        _MISS,
        {
            f"σ = {s}": _at(regression.gaussian_nll, _number(2 * math.log(s)), _NO)
            for s in (0.5, 1.0, 2.0)
        },
    ),
    "asymmetric": Picture(
        _MISS,
        {
            "squared, k = 3": _at(regression.asymmetric(regression.squared_error, 3.0), _NO),
            "absolute, k = 3": _at(regression.asymmetric(regression.absolute_error, 3.0), _NO),
        },
    ),
    "binary_cross_entropy": Picture(
        _POSITIVE,
        {
            "y = 1": _at(classification.binary_cross_entropy, _YES),
            "y = 0": _at(classification.binary_cross_entropy, _NO),
            "y = 1, k = 3": _at(
                partial(classification.binary_cross_entropy, positive_weight=3.0), _YES
            ),
            "y = 1, ε = 0.2": _at(
                partial(classification.binary_cross_entropy, label_smoothing=0.2), _YES
            ),
        },
    ),
    "softmax_cross_entropy": Picture(
        "logit of the class that it was, of two",
        {
            f"ε = {e}": _of_two(
                partial(classification.softmax_cross_entropy, label_smoothing=e), _FIRST
            )
            for e in (0.0, 0.1, 0.3)
        },
    ),
    "soft_cross_entropy": Picture(
        "logit of the first of two classes",
        {
            f"t = ({t}, {1 - t:.1f})": _of_two(classification.soft_cross_entropy, _row(t, 1 - t))
            for t in (0.5, 0.8, 1.0)
        },
    ),
    "focal": Picture(
        _POSITIVE,
        {
            f"y = 1, γ = {g}": _at(partial(classification.focal, gamma=g), _YES)
            for g in (0.0, 1.0, 2.0, 5.0)
        },
    ),
    "hinge": Picture(
        _POSITIVE,
        {"y = 1": _at(classification.hinge, _YES), "y = 0": _at(classification.hinge, _NO)},
    ),
    "cost_sensitive": Picture(
        "logit of the right class, of two",
        {
            f"an error costs {c}": _of_two(
                classification.cost_sensitive, _FIRST, jnp.array([[0, c], [1, 0]], jnp.float32)
            )
            for c in (1, 5)
        },
    ),
    "ordinal": Picture(
        "score",
        {
            f"grade {y} of 0 … 4": _at(partial(classification.ordinal, levels=5), jnp.int32(y))
            for y in (0, 2, 3, 4)
        },
    ),
    "pairwise_logistic": Picture(_MARGIN, {"": _of_two(ranking.pairwise_logistic, _BETTER_FIRST)}),
    "pairwise_hinge": Picture(
        _MARGIN,
        {
            f"m = {m}": _of_two(partial(ranking.pairwise_hinge, margin=m), _BETTER_FIRST)
            for m in (1.0, 2.0)
        },
    ),
    "listnet": Picture(
        _MARGIN, {f"r = ({r}, 0)": _of_two(ranking.listnet, jnp.array([r, 0])) for r in (1, 3)}
    ),
    "listmle": Picture(
        "score of one of three items, the others 0",
        {"best": _of_three(0), "middle": _of_three(1), "worst": _of_three(2)},
    ),
    "approximate_ndcg": Picture(
        "score of the best of three items, the others 1 and 0",
        {f"T = {t}": _ndcg(t) for t in (1.0, 0.5, 0.2)},
    ),
    "next_token_cross_entropy": Picture(
        "logit of the token that came, of four",
        {"": _of_four(language.next_token_cross_entropy, _FIRST)},
    ),
    "z_loss": Picture("logit of one of four tokens", {"": _of_four(language.z_loss)}),
    "unlikelihood": Picture(
        "logit of the unwanted token, of four", {"": _of_four(language.unlikelihood, _FIRST)}
    ),
    "entropy": Picture("logit of one of four tokens", {"": _of_four(language.entropy)}),
    "kl_divergence": Picture(
        _STUDENT, {f"q = {q}": _of_two(language.kl_divergence, _log_odds(q)) for q in (0.5, 0.9)}
    ),
    "forward_kl": Picture(
        _STUDENT, {f"teacher {q}": _of_two(language.forward_kl, _log_odds(q)) for q in (0.5, 0.9)}
    ),
    "reverse_kl": Picture(
        _STUDENT, {f"teacher {q}": _of_two(language.reverse_kl, _log_odds(q)) for q in (0.5, 0.9)}
    ),
    "jensen_shannon": Picture(
        f"{_STUDENT}, the teacher's {math.log(9):.1f}",
        {
            f"β = {b}": _of_two(partial(language.jensen_shannon, beta=b), _log_odds(0.9))
            for b in (0.1, 0.5, 0.9)
        },
    ),
    "bradley_terry": Picture(
        "score of the chosen, of the rejected 0",
        {f"y = {y}": _at(partial(preference.bradley_terry, label=y), _NO) for y in (1.0, 0.8, 0.5)},
    ),
    "clipped_surrogate": Picture(
        _RATIO,
        {
            "A = 1": _at(policy.clipped_surrogate, _NO, _YES),
            "A = −1": _at(policy.clipped_surrogate, _NO, -_YES),
        },
        (-1.0, 1.0),
    ),
    "policy_gradient": Picture(
        _RATIO,
        {
            "A = 1": _at(policy.policy_gradient, _NO, _YES),
            "A = −1": _at(policy.policy_gradient, _NO, -_YES),
        },
        (-1.0, 1.0),
    ),
    "kl_estimate": Picture(
        "log π − log π_ref",
        {
            "k1": _at(partial(policy.kl_estimate, estimator="k1"), _NO),
            "k2": _at(partial(policy.kl_estimate, estimator="k2"), _NO),
            "k3": _at(partial(policy.kl_estimate, estimator="k3"), _NO),
        },
        (-2.0, 2.0),
    ),
    "clipped_value_loss": Picture(
        "value, from 0 at the rollout",
        {
            "R = 1": _at(policy.clipped_value_loss, _NO, _YES),
            "R = 0.1": _at(policy.clipped_value_loss, _NO, _number(0.1)),
        },
        (-1.0, 1.5),
    ),
    "l1": Picture("one parameter", {"": penalties.l1}),
    "l2": Picture("one parameter", {"": penalties.l2}),
    "l2_from": Picture("one parameter, from 1", {"": _at(penalties.l2_from, _YES)}),
    "gradient_penalty": Picture(
        "slope w of f(x) = w x",
        {"": lambda w: penalties.gradient_penalty(lambda x: w * x, jnp.ones(1))[0]},
    ),
    "group_gap": Picture(
        "mean loss of one group, the other's 1",
        {"": lambda x: penalties.group_gap(_row(x, 1.0), jnp.array([0, 1]))},
        (0.0, 2.0),
    ),
}


def draw(name: str) -> str:
    """The picture of a loss as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    picture = PICTURES[name]
    x = np.linspace(*picture.span, POINTS, dtype=np.float32)
    along = jax.jit(lambda x: [jax.vmap(jax.value_and_grad(c))(x) for c in picture.curves.values()])
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(7.2, 2.3))
        value, gradient = figure.subplots(1, 2)
        # Fixed places: what follows from the extent of a text differs between machines.
        figure.subplots_adjust(left=0.07, right=0.76, bottom=0.2, top=0.9, wspace=0.25)
        rows = zip(picture.curves, along(jnp.asarray(x)), COLOURS, strict=False)
        for label, (values, slopes), colour in rows:
            value.plot(x, np.asarray(values), color=colour, label=label)
            gradient.plot(x, np.asarray(slopes), color=colour)
        value.set_title("value", fontsize=9)
        gradient.set_title("gradient", fontsize=9)
        figure.supxlabel(picture.axis, fontsize=9, x=0.415, y=0.02)
        if len(picture.curves) > 1:
            figure.legend(loc="center left", bbox_to_anchor=(0.77, 0.55))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return _tidy(out.getvalue())


def _tidy(svg: str) -> str:
    """Without prolog, metadata, comments, names of groups and superfluous decimals."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(?<=<g) id="\w[^"]*"| transform="rotate\(-0 [^"]*"', "", svg)

    def rounded(attribute: re.Match) -> str:
        return re.sub(r"-?\d+\.\d+", lambda m: f"{round(float(m[0]), 1) + 0.0:g}", attribute[0])

    svg = re.sub(r'\b(?:d|x|y|width|height|transform)="[^"]*"', rounded, svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
