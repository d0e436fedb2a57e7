"""Evidence and confidence."""

from hypothesis import given
from hypothesis import strategies as st

from minilm.diagnose.frame import Evidence, above, below

positive = st.floats(1e-6, 1e6)


def test_evidence_says_its_step_where_it_has_one():
    assert str(Evidence("gold", 0.44189, 8)) == "gold: 0.4419 at step 8"
    assert str(Evidence("best", 2.0)) == "best: 2"


@given(positive)
def test_confidence_is_a_half_at_the_limit(limit):
    assert above(limit, limit) == below(limit, limit) == 0.5


@given(positive, positive, st.floats(1.01, 100))
def test_confidence_grows_with_the_distance_from_the_limit(value, limit, more):
    assert 0 < above(value, limit) <= above(value * more, limit) <= 1
    assert 0 < below(value * more, limit) <= below(value, limit) <= 1


def test_what_is_infinite_is_certain():
    assert above(float("inf"), 1.0) == 1.0
    assert below(0.0, 1.0) == 1.0
