"""The invariant that makes a text decide its own derivation, checked whenever a story is told."""

import pytest

from minilm.text.fables.sample import Writer
from minilm.text.fables.teller import Ambiguous, Teller, check_prefix_free, template


def first(count, weights):
    return 0


def told(tell, lists=None, decide=first) -> Writer:
    writer = Writer(lists or {}, decide)
    tell(writer)
    return writer


@pytest.mark.parametrize(
    "surfaces",
    [("cat", "catfish", "dog"), ("the cat", "the catfish"), (" and ", ", then "), ("a", "b")],
)
def test_word_boundaries_keep_surfaces_apart(surfaces):
    check_prefix_free(surfaces)


@pytest.mark.parametrize(
    "surfaces",
    [
        ("cat", "cat nap"),
        ("cat", "cat"),
        ("cat", ""),
        (" and ", " and soon "),
        ("Ann", "dog", "Ann's"),
        ("a", "ab", "abc", "a b"),  # the offender is not its neighbour in order
    ],
)
def test_a_surface_that_begins_another_is_refused(surfaces):
    with pytest.raises(Ambiguous):
        check_prefix_free(surfaces)


def test_overlapping_templates_are_refused_when_drawing_too():
    with pytest.raises(Ambiguous):
        told(lambda t: t.one_of(("saw a {:things}.", "saw a {:things} there.")), {"things": ("x",)})


def test_a_template_that_begins_with_a_drawn_slot_cannot_compete():
    with pytest.raises(Ambiguous, match="'' begins"):
        told(lambda t: t.one_of(("{:things} fell.", "It rained.")), {"things": ("Rocks",)})


def test_two_copies_of_one_word_cannot_compete():
    def tell(t: Teller):
        t.tell("{hero:names} and {friend:names}.")
        t.one_of((" {hero} won.", " {hero} won.", " {friend} won."))

    with pytest.raises(Ambiguous):
        told(tell, {"names": ("Ann", "Bob")})


def test_text_that_continues_a_chosen_word_is_refused():
    with pytest.raises(Ambiguous, match="continues the word"):
        told(lambda t: t.tell("a {:things}s"), {"things": ("cat", "dog")})


@pytest.mark.parametrize("pick", [0, 1])
def test_a_kept_word_is_not_drawn_again(pick):
    writer = told(
        lambda t: t.tell("{hero:names} met {friend:names}."),
        {"names": ("Ann", "Bob")},
        lambda count, weights: min(pick, count - 1),
    )
    assert writer.story().text in ("Ann met Bob.", "Bob met Ann.")


def test_a_part_of_a_list_has_the_whole_for_slips():
    writer = told(
        lambda t: t.tell("{tool:tools/1}"), {"tools": ("axe", "rope"), "tools/1": ("rope",)}
    )
    assert writer.story().text == "rope"
    assert writer.kin["tool"] == ("axe", "rope")


def test_the_bar_ends_the_head():
    assert template("lost| the {tool}.").head == "lost"
    assert template("lost| the {tool}.").rest == " the {tool}."
    assert told(lambda t: t.tell("lost| it.")).story().text == "lost it."
