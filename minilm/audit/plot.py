"""An audit as a picture: who has what share of the loss and of the gradient."""

import io
from collections.abc import Sequence

from minilm.audit.card import Card


def draw(cards: Sequence[Card]) -> str:
    """SVG: for each stage a pair of bars a term and a group."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [
        [(t.name, t.loss_share, t.gradient_share) for t in card.terms]
        + [(g.name, g.loss, g.gradient) for g in card.groups]
        for card in cards
    ]
    heights = [len(r) + 1.5 for r in rows]
    with matplotlib.rc_context({"svg.hashsalt": "audit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 0.42 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(cards), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, card, bars in zip(axes, cards, rows, strict=True):
            places = range(len(bars))
            ax.barh([p - 0.2 for p in places], [b[1] for b in bars], 0.38, label="of the loss")
            ax.barh([p + 0.2 for p in places], [b[2] for b in bars], 0.38, label="of the gradient")
            ax.set_yticks(list(places), [b[0] for b in bars])
            ax.axhline(len(card.terms) - 0.5, color="0.8", lw=1)  # terms above, groups below
            ax.invert_yaxis()
            ax.set(xlim=(0, 1), title=card.stage, xlabel="share")
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(loc="lower right", frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
