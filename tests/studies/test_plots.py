"""Pictures of studies are drawn of whatever there is."""

import numpy as np

from minilm.studies.curves import Curve, Fit
from minilm.studies.plots import over_optimization


def curve(parse: bool) -> Curve:
    x = np.arange(4.0)
    return Curve(x, x, 2 * x, -x, x / 4 if parse else None)


def test_arms_of_any_number_with_and_without_fits_and_parse_shares():
    best = {"n": [1, 2], "kl": [0.0, 0.2], "proxy": [0.0, 1.0], "gold": [0.0, 0.5]}
    fit = {"gold": Fit(1.0, 0.5, 0.0, 0.9, "rl")}
    arms = {name: [curve(parse)] for name, parse in zip("abcd", (True, False) * 2, strict=True)}
    drawn = over_optimization(arms, {"a": fit}, {"a": best}, {"a": "a falls"})
    assert drawn.startswith(b"\x89PNG")
    assert over_optimization({"a": arms["a"]}, {}, {}, {}) != drawn
