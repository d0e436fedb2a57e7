"""Pictures of studies as PNG: gold beside proxy against the distance from the reference."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minilm.studies.curves import Curve, Fit, column, gao_value

GOLD, PROXY, PARSE, OTHER = "#009e73", "#d55e00", "#777777", "#0072b2"
STYLE: Any = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#e4e4e4", "axes.edgecolor": "#666666",
    "lines.linewidth": 1.7, "legend.frameon": False, "legend.fontsize": 8.5,
}  # fmt: skip


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure in the common style, and its axes [rows, columns]."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False)


def png(made: Any) -> bytes:
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        made.savefig(out, format="png", dpi=150)
    return out.getvalue()


def over_optimization(
    arms: Mapping[str, Sequence[Curve]],
    fits: Mapping[str, Mapping[str, Fit]],
    best_of: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
) -> bytes:
    """A panel an arm: each seed's gold and proxy, their fits, best-of-n; the parse share below.

    A cross marks where a seed's proxy was highest.
    """
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    made, axes = figure(4.6 * columns, 4.4 * rows, 2 * rows, columns)
    for ax in axes.flat:
        ax.set_visible(False)
    for number, (name, curves) in enumerate(arms.items()):
        row, place = divmod(number, columns)
        above, below = axes[2 * row][place], axes[2 * row + 1][place]
        for ax in (above, below):
            ax.set_visible(True)
            ax.sharex(above)
        for key, colour in (("proxy", PROXY), ("gold", GOLD)):
            for n, c in enumerate(curves):
                label = f"{key}, RL, a line a seed" if n == 0 else None
                x, y = np.sqrt(c.kl), column(c, key)
                above.plot(x, y, color=colour, alpha=0.55, label=label)
                above.plot(x[-1], y[-1], "x", color=colour, ms=6)
            if fit := fits.get(name, {}).get(key):
                end = max(float(c.kl.max()) for c in curves)
                kl = np.linspace(0.0, end, 200) + 1e-6
                above.plot(np.sqrt(kl), gao_value(fit, kl), color=colour, ls=(0, (4, 2)), lw=1.2)
            if points := best_of.get(name):
                x = np.sqrt(points["kl"])
                label = f"{key}, best-of-n"
                above.plot(x, points[key], "o", ms=3.5, mfc="none", color=colour, label=label)
        for c in curves:
            if c.parse_share is not None:
                below.plot(np.sqrt(c.kl), c.parse_share, color=PARSE, alpha=0.6)
        above.set(title=titles.get(name, name), ylabel="reward")
        below.set(ylabel="share that parses", ylim=(-0.03, 1.03))
        below.set_xlabel("√KL to the reference, nats a completion")
        above.margins(y=0.12)
    handles, labels = axes[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=2)
    return png(made)
