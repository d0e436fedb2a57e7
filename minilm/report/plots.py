"""Figures as inline SVG whose colours are the page's CSS variables, so that both schemes fit."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

# matplotlib draws in placeholder colours, which are then replaced by what they stand for.
_VARIABLES = ("ink", "line", "train", "model", "proxy", "gold", "parse", "soft")
_PLACEHOLDERS = tuple(f"#0101{n:02}" for n in range(8))
INK, GRID, TRAIN, MODEL, PROXY, GOLD, PARSE, SOFT = _PLACEHOLDERS
_DASHED = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1.2}
_WIDTH = 4.7  # inches: the points of a telephone's width, so that text keeps its size there
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be found, read aloud, and takes our font
    "font.size": 9.5, "font.sans-serif": ["DejaVu Sans"], "text.color": INK,
    "axes.edgecolor": SOFT, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "lines.linewidth": 1.7, "lines.markersize": 4.5, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


class Line(NamedTuple):
    """A curve. `band` holds an interval's two ends; `start` is a point marked by a diamond."""

    x: Sequence[float]
    y: Sequence[float | int | None]
    label: str
    colour: str
    marks: str = ""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    start: float | int | None = None


class Panel(NamedTuple):
    """One pair of axes: `level` a known bound and its label, `scale` linear, log or share.

    Without a `legend` another panel of the figure names the lines.
    """

    ylabel: str
    lines: Sequence[Line]
    level: tuple[float | int | None, str] = (None, "")
    scale: str = "linear"
    legend: bool = True


def curves(name: str, xlabel: str, panels: Sequence[Panel], height: float = 2.7) -> Markup | None:
    """Panels one below the other over a common x axis, None where all are empty."""
    some = [[x for x in p.lines if any(y is not None for y in x.y)] for p in panels]
    panels = [p._replace(lines=lines) for p, lines in zip(panels, some, strict=True) if lines]

    def draw(axes: Sequence[Any]) -> None:
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel)
        axes[-1].set_xlabel(xlabel)
        if xlabel in ("step", "layer"):
            axes[-1].xaxis.get_major_locator().set_params(integer=True)

    return _svg(name, draw, len(panels), height) if panels else None


def reliability(name: str, rows: Sequence[Sequence[float | int]]) -> Markup:
    """What share of pairs went as predicted; rows of (predicted, observed, count)."""

    def draw(axes: Sequence[Any]) -> None:
        predicted, observed, counts = zip(*rows, strict=True)
        sizes = [12 + 90 * n / max(counts) for n in counts]
        axes[0].plot([0, 1], [0, 1], label="perfectly calibrated", **_DASHED)
        axes[0].plot(predicted, observed, color=PROXY, label="reward model")
        axes[0].scatter(predicted, observed, sizes, color=PROXY, zorder=3)
        axes[0].set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes[0].set(xlabel="predicted P(preferred)", ylabel="observed share")
        axes[0].legend(loc="upper left")

    return _svg(name, draw, 1, 3.6)


def histograms(name: str, xlabel: str, groups: Sequence[tuple[str, Any, str]]) -> Markup:
    """Outlined histograms over common bins; groups of (label, values, colour)."""

    def draw(axes: Sequence[Any]) -> None:
        values = [v for _, group, _ in groups for v in group]
        ends = (min(values), max(values))
        for label, group, colour in groups:
            axes[0].hist(group, 30, range=ends, color=colour, alpha=0.18)
            axes[0].hist(group, 30, range=ends, color=colour, histtype="step", lw=1.6, label=label)
        axes[0].set(xlabel=xlabel, ylabel="completions")
        axes[0].legend(loc="upper left")

    return _svg(name, draw, 1, 2.7)


def _draw_panel(ax: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for line in panel.lines:
        y = [float("nan") if v is None else v for v in line.y]
        ax.plot(line.x, y, color=line.colour, marker=line.marks, label=line.label)
        if line.band:
            ax.fill_between(line.x, *line.band, color=line.colour, alpha=0.18, lw=0)
        if line.start is not None:
            ax.plot(0, line.start, "D", color=line.colour, mfc="none", ms=9, mew=1.6)
    bound, label = panel.level
    if bound is not None:
        ax.axhline(bound, label=label, **_DASHED)
    ax.set_ylabel(panel.ylabel)
    if panel.scale == "log":
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else (1.0, 2.0, 5.0)))
        # Plain numbers: powers of ten are set in mathematics, which SVG text is not.
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    if panel.scale == "share":
        ax.set_ylim(-0.03, 1.03)
    if panel.legend and (len(panel.lines) > 1 or bound is not None):
        ax.legend()


def _svg(name: str, draw: Callable[[Sequence[Any]], None], rows: int, height: float) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure

    # The salt makes ids the same on every drawing.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    # An element of the page: no prolog, metadata or style; ids of its own.
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" role="img">', svg)
    svg = re.sub(r'\bid="|\burl\(#|xlink:href="#', rf"\g<0>{name}-", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font(-family)?: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font\1: \2inherit", svg)
    for placeholder, variable in zip(_PLACEHOLDERS, _VARIABLES, strict=True):
        svg = svg.replace(placeholder, f"var(--{variable})")
    return Markup(re.sub(r"\n\s*", "\n", svg))
