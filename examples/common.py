"""What the studies share: a small network, minilm's training step over seeds, card and picture."""

import argparse
import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from minilm import backend
from minilm.audit.card import card_of
from minilm.audit.setting import Setting
from minilm.config import BackendConfig, BalanceConfig, OptimizerConfig
from minilm.files import write_atomically
from minilm.objective import Objective, Term, Weight
from minilm.optim import make_optimizer
from minilm.step import init_state, make_train_step

HIDDEN = (16, 16)  # widths
# Gradients are not clipped: that would hide how hard a loss pulls, which is what is studied.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, weight_decay=0.0, clip_norm=1e9, schedule="cosine", beta2=0.99
)
UNBALANCED = BalanceConfig()
# 97.5 % quantiles of Student's t by number of seeds.
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 10: 2.262}
console = Console(width=100, highlight=False)


class MLP(nnx.Module):
    """Fully connected layers with SiLU between them: features [B, F] to one number each, [B]."""

    def __init__(self, widths: Sequence[int], rngs: nnx.Rngs):
        pairs = itertools.pairwise((*widths, 1))
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in pairs])

    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B"]:
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.silu(layer(x))
        return last(x)[:, 0]


class Examples(NamedTuple):
    """A batch, or all the data.

    Attributes:
      features: float32, about 1 in size.
      target: float32, whatever the losses compare outputs with.
    """

    features: Float[Any, "B F"]
    target: Float[Any, "B"]


def forward(model: Any, batch: Any) -> Float[Array, "B"]:
    return model(batch.features)


def term(name: str, loss: Callable[[Any, Any], Any], weight: Weight = 1.0) -> Term:
    """A term that reads a batch's `target`, under a name by which the audit finds a docstring."""
    return Term(name, weight, lambda o, batch: loss(o, batch.target), each)


def each(batch: Any) -> Float[Array, "B"]:
    """Every example counts the same."""
    return jnp.ones(batch.target.shape)


class Start(NamedTuple):
    """What training begins with; for several seeds at once, all arrays have a leading axis.

    data is a NamedTuple of arrays over all examples, with `features` [N, F] and `target` [N]; a
    row of `rows` names the examples of a batch.
    """

    model: MLP
    data: Any
    rows: Int[Any, "steps B"]


def start(seed: int, data: Any, steps: int, batch_size: int) -> Start:
    """A new network and its batches, drawn with replacement."""
    examples, features = data.features.shape
    rows = np.random.default_rng((seed, 61)).integers(examples, size=(steps, batch_size))
    return Start(MLP((features, *HIDDEN), nnx.Rngs(seed)), data, rows.astype(np.int32))


class Trained(NamedTuple):
    """A network, and what its training step reported: by name, one value a step."""

    model: MLP
    metrics: dict[str, Float[Array, "steps"]]


def train(objective: Objective, begin: Start, balancing: BalanceConfig = UNBALANCED) -> Trained:
    """Trains one network with minilm's step.

    A pure function, so `jax.vmap` trains many at once: over seeds, or over weights of terms. It
    takes the loop's place where a run is a second long; `sentiment.py` has the loop itself.
    """
    optimizer = make_optimizer(OPTIMIZER, len(begin.rows))
    step = make_train_step(forward, objective, optimizer, balancing=balancing)

    def one(state, rows):
        state, metrics = step(state, jax.tree.map(lambda x: x[rows], begin.data))
        return state, {name: m.total / jnp.maximum(m.count, 1e-6) for name, m in metrics.items()}

    state = init_state(begin.model, optimizer, objective, balancing)
    state, metrics = jax.lax.scan(one, state, begin.rows)
    return Trained(cast(Any, state.model), metrics)


def train_seeds(
    objective: Objective, begin: Start, balancing: BalanceConfig = UNBALANCED
) -> Trained:
    """`train` for several seeds at once, each with data, network and batches of its own."""
    return jax.jit(jax.vmap(lambda one: train(objective, one, balancing)))(begin)


def starts(draws: Sequence[Any], steps: int, batch_size: int) -> Start:
    """A start a draw of the data, stacked; the draw's place is the seed."""
    return stacked([start(seed, data, steps, batch_size) for seed, data in enumerate(draws)])


def stacked(draws: Sequence[Any]) -> Any:
    """Several trees of arrays as one, with a leading axis."""
    return jax.tree.map(lambda *x: np.stack(x), *draws)


def first(trained: Any) -> Any:
    """The first of several runs."""
    return jax.tree.map(lambda x: x[0], trained)


@jax.jit
def _outputs(models, batch):
    return jax.vmap(forward, in_axes=(0, None))(models, batch)


def outputs(models: MLP, batch: Any) -> Float[np.ndarray, "S B"]:
    """What each of several networks says of the same examples, float64."""
    return np.asarray(_outputs(models, batch), np.float64)


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, form: str = ".2f") -> str:
        return f"{self.mean:{form}} ± {self.half:{form.removeprefix('+')}}"


def interval(values: Any) -> Interval:
    """Student's, over seeds: each has its own data, initialisation and batches."""
    values = np.asarray(values, np.float64)
    half = STUDENT[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean()), float(half))


def show_card(
    study: str,
    model: Any,
    objective: Objective,
    batch: Any,
    groups: Mapping[str, np.ndarray],
    forward: Callable[[Any, Any], Any] = forward,
) -> None:
    """Prints what minilm's audit says of an objective: its terms, and who bears the loss."""
    batch = jax.tree.map(jnp.asarray, batch)
    card = card_of(Setting(study, None, model, objective, forward, batch, None), dict(groups))
    for term in card.terms:
        console.print(f"{term.name}: {term.pays_for}", markup=False)
        console.print(f"  rewards  {term.rewards}\n  ignores  {term.ignores}", markup=False)
    table = Table("group", "of the elements", "of the loss", "of the gradient")
    for g in card.groups:
        table.add_row(g.name, f"{g.elements:.1%}", f"{g.loss:.1%}", f"{g.gradient:.1%}")
    console.print(table)
    for flag in card.flags:
        console.print(f"! {flag}", markup=False)
    console.print()


@contextlib.contextmanager
def picture(path: Path, width: float = 8.0, height: float = 3.2) -> Iterator[Figure]:
    """A figure to draw on, saved as SVG: the same figures give the same file."""
    style: Any = {
        "svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    write_atomically(path, out.getvalue())


def bars(ax: Any, intervals: Mapping[str, Interval], label: str) -> None:
    """Horizontal bars with their intervals, the first on top."""
    names, values = list(intervals), list(intervals.values())
    places = range(len(names))
    halves = [v.half for v in values]
    ax.barh(places, [v.mean for v in values], xerr=halves, color="C0", alpha=0.7)
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlabel(label)


def command(study: Callable[[Path, bool], Any]) -> None:
    """Runs a study from the command line."""
    parser = argparse.ArgumentParser(description=study.__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    # Those of docs/studies.md lie in examples/pictures: a look at a study leaves them as they are.
    place = Path("runs") / "examples"
    parser.add_argument("--out", type=Path, default=place, help=f"of the picture ({place})")
    words = parser.parse_args()
    backend.configure(BackendConfig(compute_dtype="float32", xla_flags="none"))
    study(words.out, words.quick)
    console.print(f"picture: {words.out / Path(parser.prog).stem}.svg", markup=False)
