"""Figures wear the page's colours, and draw what they are given."""

import re

from minilm.report import plots
from minilm.report.plots import Line, Panel, curves


def panel(y, **options):
    return Panel("nats", [Line([0, 10, 20], y, "loss", plots.MODEL)], **options)


def test_every_colour_is_a_variable_of_the_page():
    band = ([0.5, 0.6, 0.7], [1.5, 1.6, 1.7])
    line = Line([0.0, 1.0, 2.0], [1.0, None, 1.2], "gold", plots.GOLD, "o", band, start=0.9)
    svg = curves("f", "KL", [Panel("score", [line, line], (0.8, "floor"))])
    assert svg and not re.search(r"#[0-9a-fA-F]{6}|(fill|stroke): (black|white)", svg)
    assert set(re.findall(r"var\(--(\w+)\)", svg)) == {"ink", "line", "soft", "gold"}


def test_text_stays_text_and_keeps_its_size_on_a_telephone():
    svg = curves("f", "step", [panel([3.0, 2.0, 1.0], level=(0.5, "entropy floor"))])
    assert svg and ">entropy floor</text>" in svg and ">step</text>" in svg
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+) ', svg)
    assert float(width) < 340  # of 390, less margins: one unit is about one pixel there


def test_a_logarithmic_axis_has_plain_numbers():
    svg = curves("f", "step", [panel([4.0, 0.3, 0.004], scale="log")])
    assert svg and {"0.01", "0.1", "1"} <= set(re.findall(r">([\d.]+)</text>", svg))


def test_nothing_to_draw_is_no_figure():
    assert curves("f", "step", [panel([None, None, None]), Panel("x", [])]) is None
    both = curves("f", "step", [panel([1.0, 2.0, 3.0]), panel([None, None, None])])
    assert both and both.count('id="f-axes_') == 1


def test_one_legend_can_serve_all_panels():
    lines = [Line([0, 1], [1.0, 2.0], name, plots.MODEL) for name in ("gate", "up")]
    svg = curves("f", "layer", [Panel("σ", lines, legend=False), Panel("rank", lines)])
    assert svg and svg.count(">gate</text>") == 1
