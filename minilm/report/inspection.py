"""The page of a checkpoint: what it holds and what its weights are like, in one HTML file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from minilm import anatomy, spectra
from minilm.anatomy import Neighbours, Units, Weights
from minilm.files import write_atomically
from minilm.inspection import BROKEN, branches, describe, facts, others, shape_of
from minilm.report import plots
from minilm.report.page import environment
from minilm.report.plots import Line, Panel
from minilm.spectra import BINS, REACH, Spectrum

KINDS = {  # the matrices of a layer by figure, each with its colour
    "attention": {
        "q_proj": plots.MODEL, "k_proj": plots.TRAIN, "v_proj": plots.PROXY, "o_proj": plots.GOLD
    },
    "mlp": {"gate_proj": plots.MODEL, "up_proj": plots.PROXY, "down_proj": plots.GOLD},
}  # fmt: skip
ENDS = {"embed_tokens": plots.MODEL, "lm_head": plots.GOLD}
DEPTHS = (plots.TRAIN, plots.MODEL, plots.PROXY, plots.GOLD, plots.PARSE)  # lowest layer first
SHORT = 60  # characters: longer facts are folded away, as the config is


class Layer(NamedTuple):
    """How many of a layer's hidden units are of which kind; all 0 where it is not finite."""

    units: int
    dead: int
    sometimes: int
    always: int
    mean: float | None  # of the shares of positions, None where not finite


def write(path: Path, file: Path | None = None, *, token: str | None = None) -> Path:
    """Writes the page of a checkpoint and returns where.

    The same checkpoint gives the same page, byte for byte.

    Args:
      path: a run, a stage or a checkpoint.
      file: where the page goes; None: `inspection.html` beside the folder of the checkpoint's stage
        (in the run, that is), of a checkpoint elsewhere beside its own folder.
      token: one more token whose neighbours are shown, before those of the sample.
    Raises:
      UserError: as `anatomy.read`, `neighbours` and `hidden_units`; the file cannot be written.
    """
    weights = anatomy.read(path)
    file = file or _place(weights.path)
    write_atomically(file, render(weights, token).encode("utf-8"))
    return file


def render(weights: Weights, token: str | None = None) -> str:
    """The page as HTML. Raises UserError as `write`."""
    described = describe(weights.path)
    asked = [] if token is None else anatomy.neighbours(weights, token)
    said = facts(described)
    broken = said.pop(BROKEN, None)
    folded = {k: v for k, v in said.items() if k.startswith("config ") or len(v) > SHORT}
    figures, units = anatomy.spectra(weights), anatomy.hidden_units(weights)
    rooms = [(name, s, s.stable_rank) for name, s in figures.items() if s.stable_rank > 0]
    absolute = weights.path.absolute()
    inside = absolute.parent.name == "checkpoints"
    return (
        environment()
        .get_template("inspection.html.j2")
        .render(
            name="/".join(absolute.parts[-4:-2]) if inside else absolute.name,
            path=str(weights.path),
            meta=weights.metadata,
            averaged=weights.averaged,
            parameters=sum(row.size for row in described.parameters),
            short={k: v for k, v in said.items() if k not in folded and v},
            long=folded,
            broken=broken,
            branches=list(branches(described.parameters)),
            shape_of=shape_of,
            others=others(described),
            spectra=figures,
            narrowest=min(rooms, key=lambda room: room[2], default=None),
            bars={name: _bars(s.histogram) for name, s in figures.items()},
            neighbours=_cards([*asked, *anatomy.sample_neighbours(weights)]),
            untied="lm_head" in weights.arrays,
            source=units.source,
            positions=units.positions,
            layers=[_layer(shares) for shares in units.layers],
            plots=_plots(figures, units),
            negligible=spectra.NEGLIGIBLE,
            nearly=spectra.NEARLY,
        )
    )


def _place(checkpoint: Path) -> Path:
    inside = checkpoint.absolute().parent.name == "checkpoints"
    folder = checkpoint.absolute().parents[2] if inside else checkpoint.absolute().parent
    return folder / "inspection.html"


def _plots(figures: Mapping[str, Spectrum], units: Units) -> dict[str, Markup | None]:
    """Every figure by name, None where there is nothing to draw."""
    drawn = {name: _over_layers(name, figures, kinds) for name, kinds in KINDS.items()}
    kinds = {**KINDS, "ends": ENDS}
    drawn |= {f"{name}_weights": _weights(name, figures, of) for name, of in kinds.items()}
    return drawn | {"units": _active(units)}


def _over_layers(
    name: str, figures: Mapping[str, Spectrum], kinds: Mapping[str, str]
) -> Markup | None:
    """Three figures of each kind of matrix, layer by layer."""

    def lines(figure: Callable[[Spectrum], float]) -> list[Line]:
        curves = []
        for kind, colour in kinds.items():
            values = [figure(s) for key, s in figures.items() if key.rpartition(".")[2] == kind]
            known = [v if math.isfinite(v) else None for v in values]
            curves.append(Line(range(len(known)), known, kind, colour, "o"))
        return curves

    panels = [
        Panel("largest σ", lines(lambda s: s.largest), legend=False),
        Panel("stable rank", lines(lambda s: s.stable_rank), legend=False),
        Panel(
            "effective / full",
            lines(lambda s: s.effective_rank / min(s.rows, s.columns)),
            scale="share",
        ),
    ]
    return plots.curves(name, "layer", panels, height=5.6)


def _weights(name: str, figures: Mapping[str, Spectrum], kinds: Mapping[str, str]) -> Markup | None:
    """How the weights of each kind of matrix are spread, over all layers, beside a normal."""
    edges = np.linspace(-REACH, REACH, BINS + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    lines = []
    for kind, colour in kinds.items():
        counts = [s.histogram for k, s in figures.items() if k.rpartition(".")[2] == kind]
        total = np.sum([c for c in counts if c] or [[0]], axis=0)
        if total.sum():
            shares = [float(n) or None for n in total / total.sum()]
            lines.append(Line(middles, shares, kind, colour))
    if not lines:
        return None
    width = 2 * REACH / BINS
    normal = [width * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in middles]
    lines.append(Line(middles, normal, "normal", plots.SOFT))
    panel = Panel("share of weights", lines, scale="log")
    return plots.curves(f"{name}-weights", "weight / RMS of its matrix", [panel])


def _active(units: Units) -> Markup | None:
    """Units from the idlest to the busiest, in at most five layers, evenly from the lowest up."""
    count = len(units.layers)
    chosen = sorted({round(k * (count - 1) / (len(DEPTHS) - 1)) for k in range(len(DEPTHS))})
    lines = []
    for number, colour in zip(chosen, DEPTHS, strict=False):
        shares = np.sort(units.layers[number])
        if np.isfinite(shares).all():
            places = ((np.arange(len(shares)) + 0.5) / len(shares)).tolist()
            lines.append(Line(places, shares.tolist(), f"layer {number}", colour))
    panel = Panel("active at, of positions", lines, scale="share")
    return plots.curves("units", "units, from the idlest on", [panel])


def _layer(shares: np.ndarray) -> Layer:
    if not np.isfinite(shares).all():
        return Layer(len(shares), 0, 0, 0, None)
    dead, always = int(spectra.dead(shares).sum()), int(spectra.always(shares).sum())
    sometimes = len(shares) - dead - always
    return Layer(len(shares), dead, sometimes, always, float(shares.mean()))


def _cards(found: Sequence[Neighbours]) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """Token, matrix and neighbours as shown."""
    return [
        (
            anatomy.quoted(n.token),
            n.matrix,
            [(anatomy.quoted(t), cosine) for t, cosine in n.nearest],
        )
        for n in found
    ]


def _bars(counts: Sequence[int]) -> str:
    """A histogram as the path of an SVG of BINS by 10 units; what is there is seen."""
    top = max(counts, default=0) or 1
    heights = [(i, max(0.4, 10 * n / top)) for i, n in enumerate(counts) if n]
    return "".join(f"M{i} 10V{10 - height:.2f}h.8V10z" for i, height in heights)
