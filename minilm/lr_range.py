"""Learning-rate range test: the rate rises exponentially, and the loss says where to stay below."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from minilm import backend
from minilm.config import Config, OptimizerConfig
from minilm.errors import UserError
from minilm.files import write_atomically, write_json
from minilm.model import Transformer
from minilm.optim import make_optimizer
from minilm.stages.preflight import check
from minilm.stages.pretrain import LANGUAGE, forward_of
from minilm.step import init_state, make_train_step
from minilm.terms import configured
from minilm.text.batches import Batches, batch_across, batch_of, pack
from minilm.text.corpora import split
from minilm.text.tokenizer import train_tokenizer

LOW, HIGH, STEPS = 1e-5, 10.0, 120  # twenty steps a decade
CHARACTERS = 2**25  # of a corpus, at most: no range test reads more
BROKEN = 3.0  # times the first loss: what comes after teaches nothing more
BELOW_EDGE = 10.0  # how far below the edge of divergence a rate is safe for a whole run
OUT = Path("runs/lr-range")

type Values = Float[np.ndarray, " n"]


class RangeTest(NamedTuple):
    """What was measured, and the rates that it points at.

    Attributes:
      rates, losses: as run, in order; losses of single batches, before each update.
      smooth: centred moving average of the losses.
      steepest: where the smoothed loss falls fastest by the logarithm of the rate.
      edge: where it has taken back half of its fall; None where it never did.
      suggestion: `steepest`, or a tenth of `edge` where that is lower.
    """

    rates: Values
    losses: Values
    smooth: Values
    steepest: float
    edge: float | None
    suggestion: float


def read_off(rates: Values, losses: Values) -> RangeTest:
    """Reads the suggestion off the losses of a range test.

    Raises:
      UserError: the loss did not fall at any rate; fewer than ten finite losses.
    Reference:
      Smith (2017), Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186,
      section 3.3: note where the loss begins to fall, and where it turns ragged or rises.

    >>> rates = np.geomspace(1e-5, 10.0, 61)
    >>> losses = 5 - 3 / (1 + (1e-2 / rates) ** 2) + rates**2
    >>> 5e-3 < read_off(rates, losses).suggestion < 5e-2
    True
    """
    finite = np.isfinite(losses)
    count = len(losses) if finite.all() else int(np.argmin(finite))
    if count < 10:
        problem = f"the loss was finite at {count} rates only"
        raise UserError(problem, where="lr-range", hint="is the data sound? try lower rates")
    smooth = _moving_average(losses[:count])
    before = float(np.median(losses[: max(count // 8, 3)]))  # at rates too low to change anything
    # What lies below the noise of single batches is no fall.
    least = 3 * float(np.std(losses[: max(count // 8, 3)]))
    lowest = int(np.argmin(smooth))
    fall = before - float(smooth[lowest])
    if lowest == 0 or fall <= least:
        problem = f"the loss fell at no rate from {rates[0]:.2g} to {rates[count - 1]:.2g}"
        raise UserError(problem, where="lr-range", hint="minilm diagnose says more of a whole run")
    slopes = np.gradient(smooth, np.log(rates[:count]))
    steepest = float(rates[np.argmin(slopes[: lowest + 1])])
    back = np.flatnonzero(smooth[lowest:] > before - fall / 2)
    edge = float(rates[lowest + back[0]]) if len(back) else None
    if edge is None and count < len(losses):
        edge = float(rates[count])  # the first loss that was not finite
    suggestion = min(steepest, math.inf if edge is None else edge / BELOW_EDGE)
    return RangeTest(rates, losses, smooth, steepest, edge, suggestion)


def _moving_average(values: Values) -> Values:
    """Over a twelfth of the points, centred: an exponential average would lag, by half a decade."""
    window = np.ones(2 * (len(values) // 24) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def rising(
    config: OptimizerConfig, steps: int, low: float, high: float
) -> optax.GradientTransformation:
    """The config's optimizer with a rate that rises from `low` to `high` in place of its schedule.

    AdamW's and Muon's updates, weight decay included, are linear in the rate: so the optimizer
    runs at its configured rate, and its updates are scaled. Muon's own rate rises in proportion.
    """
    flat = config.model_copy(update={"schedule": "constant", "warmup_steps": 0})
    inner = make_optimizer(flat, steps)
    first, growth = low / config.learning_rate, math.log(high / low) / max(steps - 1, 1)

    def init(params: Any) -> Any:
        return inner.init(params), jnp.zeros((), jnp.float32)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, after = inner.update(updates, state[0], params)
        scale = first * jnp.exp(growth * state[1])
        return jax.tree.map(lambda u: scale.astype(u.dtype) * u, updates), (after, state[1] + 1)

    return optax.GradientTransformation(init, update)


def range_test(
    config: Config,
    *,
    compute_dtype: str = "float32",
    steps: int = STEPS,
    low: float = LOW,
    high: float = HIGH,
) -> RangeTest:
    """Trains the config's model from scratch, its rate rising from `low` to `high`.

    It takes the pretraining's own objective, optimizer and batches, and stops when the loss is
    beyond hope.

    Raises:
      UserError: as `read_off`, and whatever the corpus raises.
    """
    settings, corpus, seed = config.pretrain, config.corpus, config.seed
    if corpus.kind == "fables":  # a document a row at least: no more are read
        needed = min(corpus.documents, max(2 * steps * settings.batch_size, 1000))
        corpus = corpus.model_copy(update={"documents": needed})
    texts = [d.text for d in split(corpus, seed).train.spread(CHARACTERS)]
    tokenizer = train_tokenizer(config.tokenizer, texts)
    batches = Batches(
        pack(list(tokenizer.stream(texts)), settings.sequence_length),
        batch_size=settings.batch_size,
        seed=seed,
        make=batch_of if settings.document_attention else batch_across,
    )
    shape = {"compute_dtype": compute_dtype, "rngs": nnx.Rngs(seed)}
    model = Transformer(config.model, tokenizer.vocab_size, **shape)
    objective = configured(LANGUAGE, "pretrain", config, steps)
    optimizer = rising(settings.optimizer, steps, low, high)
    parts = {"accumulation": settings.accumulation, "balancing": config.balance}
    update = make_train_step(forward_of(settings.logits_chunk), objective, optimizer, **parts)
    state = init_state(model, optimizer, objective, config.balance)
    losses: list[float] = []
    for k in track(range(steps), "lr-range", console=Console(stderr=True), transient=True):
        state, metrics = update(state, batches[k])
        losses.append(float(metrics["loss"].value))
        if not losses[-1] < BROKEN * losses[0]:
            break
    return read_off(np.geomspace(low, high, steps)[: len(losses)], np.array(losses))


def draw(test: RangeTest) -> bytes:
    """A PNG: losses and their average by rate, the suggestion and the edge as lines."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    count = len(test.smooth)
    axes.plot(test.rates[:count], test.losses[:count], ".", color="0.65", label="one batch")
    axes.plot(test.rates[:count], test.smooth, color="tab:blue", label="smoothed")
    axes.axvline(test.suggestion, color="tab:green", label=f"suggestion {test.suggestion:.2g}")
    axes.axvline(test.steepest, color="tab:blue", ls=":", label=f"steepest {test.steepest:.2g}")
    if test.edge is not None:
        axes.axvline(test.edge, color="tab:red", ls="--", label=f"edge {test.edge:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    least, first = float(test.losses[:count].min()), float(test.losses[0])
    axes.set_ylim(least - 0.05 * abs(first), max(1.5 * first, least + 0.1 * abs(first)))
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def lr_range_command(config: Config, out: Path | None) -> None:
    """`minilm lr-range CONFIG`: a table, and `lr_range.json` and `lr_range.png` in `out`."""
    choice = backend.configure(config.backend)
    check(config, ["pretrain"])
    test = range_test(config, compute_dtype=choice.compute_dtype, steps=STEPS)
    folder, options = out or OUT, config.pretrain.optimizer
    suggested = {"learning_rate": test.suggestion}
    if options.name == "muon":
        ratio = options.muon_learning_rate / options.learning_rate
        suggested["muon_learning_rate"] = ratio * test.suggestion
    table = Table(
        Column("learning rate", justify="right"), Column("loss", justify="right"), title="lr-range"
    )
    for n in range(0, len(test.smooth), max(len(test.smooth) // 18, 1)):
        table.add_row(f"{test.rates[n]:.2g}", f"{test.smooth[n]:.4g}")
    console = Console(soft_wrap=True)
    console.print(table)
    facts = {"steepest": test.steepest, "edge": test.edge, "configured": options.learning_rate}
    for name, value in {**suggested, **facts}.items():
        console.print(f"{name}: {'beyond what was tried' if value is None else f'{value:.2g}'}")
    words = [
        f"--pretrain.optimizer.{name.replace('_', '-')} {value:.2g}"
        for name, value in suggested.items()
    ]
    console.print(f"next: minilm run CONFIG {' '.join(words)}", markup=False)
    losses = [x if math.isfinite(x) else None for x in test.losses.tolist()]
    points = {"rates": test.rates.tolist(), "losses": losses, "smooth": test.smooth.tolist()}
    write_json(folder / "lr_range.json", {"suggestion": suggested, **facts, **points})
    write_atomically(folder / "lr_range.png", draw(test))
    console.print(f"{folder / 'lr_range.json'}, {folder / 'lr_range.png'}", markup=False)
