"""The pictures of docs/losses/ are what their losses draw."""

import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from minilm.losses import LOSSES
from minilm.losses.__main__ import HELPERS
from minilm.losses.pictures import PICTURES, draw

STORED = Path(__file__).parents[2] / "docs" / "losses"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def test_no_picture_is_of_no_loss():
    known = set(LOSSES) | {helper.__name__ for helper in HELPERS}
    assert set(PICTURES) <= known
    assert {p.stem for p in STORED.iterdir()} == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_what_the_loss_draws(name):
    stored = (STORED / f"{name}.svg").read_text("utf-8")
    drawn = draw(name)
    assert NUMBER.sub("0", drawn) == NUMBER.sub("0", stored)
    # Another processor may round otherwise: by 0.1 of a point in the picture.
    numbers = ([float(x) for x in NUMBER.findall(svg)] for svg in (drawn, stored))
    np.testing.assert_allclose(*numbers, atol=0.11, rtol=0)


def test_a_picture_is_small_valid_and_without_a_date():
    svg = draw("quantile_loss")
    assert len(svg) < 25_000
    xml.etree.ElementTree.fromstring(svg)
    assert "Matplotlib v" not in svg
    assert re.findall(r"20\d\d-\d\d", svg) == []
    assert ">q = 0.9</text>" in svg
