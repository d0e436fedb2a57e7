from minilm.losses.docstrings import explain


def priced(chosen, rejected, *, k=1.0):
    """A loss: pays for
    what it says.

    L = k |a| b
    L' = 0

    First remark, on
    two lines.

    Second remark: not a section.

    Use: here,
      and here.
    Rewards: this: that.
    Ignores: the rest.

    Args:
      chosen, rejected: scores, of
        any unit.
      k: a number.
    Returns:
      Loss, at
      least 0.
    Raises:
      ValueError: never.
    Reference:
      Nobody (1900).

    >>> print("Ignores: this output.")
    Ignores: this output.
    """


def bare():
    """A loss."""


def test_a_docstring_is_taken_apart():
    e = explain(priced)
    assert (e.name, e.family) == ("priced", __name__.rpartition(".")[2])
    assert e.formula == "L = k |a| b\nL' = 0"
    assert e.remarks == ("First remark, on two lines.", "Second remark: not a section.")
    assert (e.use, e.rewards, e.ignores) == ("here, and here.", "this: that.", "the rest.")
    assert e.args == {"chosen, rejected": "scores, of any unit.", "k": "a number."}
    assert (e.returns, e.reference) == ("Loss, at least 0.", "Nobody (1900).")


def test_the_first_line_ends_at_the_first_empty_one():
    assert explain(priced).pays == "A loss: pays for what it says."


def test_what_is_not_said_is_empty():
    e = explain(bare)
    assert e.pays == "A loss."
    assert (e.formula, e.remarks, e.use, e.args, e.reference) == ("", (), "", {}, "")
