"""Reading: exactly the grammar's stories are valid, with the derivation they were drawn by."""

import itertools
import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilm.text.fables import SIZES, Attributes, charges, generate, gold, parse, stories
from minilm.text.fables.grammar import story_of
from minilm.text.fables.parse import Reader
from minilm.text.fables.sample import Story, Writer
from minilm.text.fables.teller import Teller
from minilm.text.fables.words import LISTS

TINY_LISTS = {"names": ("Ann", "Anna", "Bob"), "things": ("cat", "catfish", "cart")}


def tiny(t: Teller) -> None:
    """A cut-down grammar with every kind of telling: weights, state, copies, look-alike words."""
    t.tell("{hero:names} had a {pet:things}.")
    if weighted(t, (" {hero} sold| it", " {hero} sang| to it"), (0.7, 0.3)):
        t.one_of((" and {friend:names} heard.", ", softly."))
    else:
        t.tell(".")
    if t.words["pet"] != "cart":
        weighted(t, (" The {pet} left.", " The {pet} slept near the {:things}."), (1.0, 3.0))


def weighted(t: Teller, sources, weights) -> int:
    index, chosen = t.head_of(sources, weights)
    t.rest(chosen)
    return index


def derivations(tell, lists, forced=()) -> list[Story]:
    """Every story that begins with the forced choices, by walking all choices depth first."""
    found, agenda = [], [list(forced)]
    while agenda:
        script = agenda.pop()
        counts = []

        def decide(count, weights, script=script, counts=counts):
            counts.append(count)
            return script[len(counts) - 1] if len(counts) <= len(script) else 0

        writer = Writer(lists, decide)
        tell(writer)
        found.append(writer.story())
        for depth in range(len(script), len(counts)):
            for option in range(1, counts[depth]):
                agenda.append([*script, *[0] * (depth - len(script)), option])
    return found


def test_probabilities_of_a_cut_down_grammar_sum_to_one():
    every = derivations(tiny, TINY_LISTS)
    # Of each of 3 heroes and 3 pets: sold, or sang to in 2 + 1 ways; a cart's story ends there, the
    # others' go on in 1 + 3 ways.
    assert len({story.text for story in every}) == len(every) == 3 * 4 * (1 + 4 + 4)
    assert math.fsum(math.exp(story.logprob) for story in every) == pytest.approx(1, abs=1e-12)


def test_every_derivation_reads_as_itself():
    for story in derivations(tiny, TINY_LISTS):
        reader = Reader(TINY_LISTS, story.text)
        assert reader.read(tiny).valid
        assert tuple(reader.choices) == story.choices
        assert reader.logprob == pytest.approx(story.logprob, abs=1e-12)


def test_only_the_language_is_valid():
    """A story with one word replaced is valid exactly when some derivation writes it."""
    language = {story.text for story in derivations(tiny, TINY_LISTS)}
    pieces = sorted({piece for text in language for piece in text.split()})
    for text in sorted(language)[::7]:
        words = text.split()
        for place, piece in itertools.product(range(len(words)), pieces):
            edited = " ".join([*words[:place], piece, *words[place + 1 :]])
            reader = Reader(TINY_LISTS, edited)
            assert reader.read(tiny).valid == (edited in language), edited


def test_charges_are_the_conditional_probabilities_of_characters():
    """Against sums over all stories that begin alike."""
    every = derivations(tiny, TINY_LISTS)

    def mass(prefix: str) -> float:
        return math.fsum(math.exp(s.logprob) for s in every if s.text.startswith(prefix))

    for story in every:
        reader = Reader(TINY_LISTS, story.text)
        reader.read(tiny)
        expected = [
            -math.log(mass(story.text[: k + 1]) / mass(story.text[:k]))
            for k in range(len(story.text))
        ]
        assert reader.charges() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("size", "fixed"), [("small", 6), ("full", 26)])
def test_probabilities_of_the_continuations_of_a_beginning_sum_to_its_own(size, fixed):
    """The real grammars cannot be enumerated; all ways on from one beginning can."""
    story = generate(3, size=size)
    reader = Reader(LISTS, story.text)
    reader.read(story_of(size))
    beginning = sum(
        math.log(c.weights[c.index] / sum(c.weights) if c.weights else 1 / len(c.surfaces))
        for c in reader.trace[:fixed]
    )
    ways = derivations(story_of(size), LISTS, story.choices[:fixed])
    assert len({way.text for way in ways}) == len(ways) > 100
    total = math.fsum(math.exp(way.logprob - beginning) for way in ways)
    assert total == pytest.approx(1, abs=1e-9)


def agrees(story: Story, size: str) -> None:
    read = parse(story.text, size=size)
    assert read.valid, story.text
    assert read.failure is None
    assert read.prefix == len(story.text)
    assert read.choices == story.choices
    assert read.logprob == pytest.approx(story.logprob, abs=1e-9)
    assert read.attributes == story.attributes


@pytest.mark.parametrize("size", SIZES)
def test_a_drawn_story_reads_as_it_was_drawn(size):
    for story in stories(0, 3000, size=size):
        agrees(story, size)


@given(seed=st.integers(-(2**63), 2**63), size=st.sampled_from(SIZES))
def test_a_story_of_any_seed_reads_as_it_was_drawn(seed, size):
    agrees(generate(seed, size=size), size)


@pytest.mark.parametrize("size", SIZES)
def test_a_story_of_the_other_size_is_refused(size):
    other = next(each for each in SIZES if each != size)
    assert not parse(generate(0, size=size).text, size=other).valid


@pytest.mark.parametrize("size", SIZES)
def test_one_word_perturbations_are_refused(size):
    """Doubled, deleted and exchanged words. The last two may make another story ("never" left out
    of "her wish never came true"): then its derivation writes exactly that text."""
    rng = random.Random(0)
    drawn = list(stories(8, 150, size=size))
    vocabulary = sorted({word for story in drawn for word in story.text.split()})
    accepted = 0
    for story in drawn:
        words = story.text.split()
        for _ in range(6):
            place = rng.randrange(len(words))
            before, word, after = words[:place], words[place], words[place + 1 :]
            assert not parse(" ".join([*before, word, word, *after]), size=size).valid
            for instead in ([], [rng.choice(vocabulary)]):
                text = " ".join([*before, *instead, *after])
                read = parse(text, size=size)
                if text != story.text and read.valid:
                    accepted += 1
                    script = iter(read.choices)
                    writer = Writer(LISTS, lambda count, weights, script=script: next(script))
                    story_of(size)(writer)
                    assert writer.story().text == text
    assert accepted < (0.02 if size == "full" else 0.1) * 12 * len(drawn)


@pytest.mark.parametrize("size", SIZES)
def test_every_beginning_of_a_story_lacks_only_its_end(size):
    text = generate(12, size=size).text
    for end in range(len(text)):
        read = parse(text[:end], size=size)
        assert (read.failure, read.prefix) == ("no_end", end)
        assert not read.valid
        assert read.logprob is None
        assert read.attributes.slips == 0


@given(seed=st.integers(0, 10_000), place=st.floats(0, 1), inserted=st.text(min_size=1, max_size=4))
def test_a_break_is_found_where_no_story_goes_on(seed, place, inserted):
    text = generate(seed, size="small").text
    at = int(place * len(text))
    edited = text[:at] + inserted + text[at:]
    read = parse(edited, size="small")
    if read.failure == "break" and not read.attributes.slips:
        good = parse(edited[: read.prefix], size="small").failure
        assert good in (None, "no_end")
        assert parse(edited[: read.prefix + 1], size="small").failure == "break"


def test_text_after_the_end_is_a_break():
    story = generate(4)
    read = parse(story.text + " The end.")
    assert (read.failure, read.prefix) == ("break", len(story.text))
    assert read.attributes == story.attributes


def resolution(text: str) -> tuple[str, str]:
    """A full story parted before its promise is kept or broken."""
    cut = max(text.rfind(word) for word in RETURN_WORDS)
    return text[:cut], text[cut:]


RETURN_WORDS = (" At last ", " That winter ", " By harvest ", " A week later ", " In the end ")
RETURN_WORDS += (" Before snowfall ",)


@pytest.mark.parametrize(("role", "words"), [("tool", "tools"), ("friend", "names")])
def test_a_wrong_word_at_a_copied_slot_is_a_slip(role, words):
    for story in stories(21, 100):
        before, after = resolution(story.text)
        found = re.findall(r"\b(?:" + "|".join(LISTS[words]) + r")\b", after)
        right = found[0]
        wrong = next(word for word in LISTS[words] if word not in before)
        read = parse(before + re.sub(rf"\b{right}\b", wrong, after))
        assert read.failure == "slip", (role, story.text)
        assert not read.valid
        assert read.logprob is None
        assert read.attributes == story.attributes._replace(slips=len(found))
        assert read.choices == story.choices
        assert gold(before + re.sub(rf"\b{right}\b", wrong, after)) == pytest.approx(
            gold(story.text) - 0.5 * len(found)
        )


def test_a_wrong_pronoun_is_a_slip():
    text = generate((21, 0)).text
    before, after = resolution(text)
    swapped = {" he ": " she ", " she ": " he "}
    wrong = re.sub(" he | she ", lambda m: swapped[m.group()], after, count=1)
    assert parse(before + wrong).failure == "slip"


def test_a_word_of_another_list_is_a_break_and_what_came_before_counts():
    story = generate((21, 1))
    before, after = resolution(story.text)
    right = re.search("|".join(LISTS["tools"]), after).group()
    read = parse(before + after.replace(right, "walrus"))
    assert read.failure == "break"
    assert read.attributes.deeds == story.attributes.deeds
    assert read.attributes.promise_kept == story.attributes.promise_kept  # the verb decided it
    assert read.attributes.ending_fits is None


def test_a_slip_and_a_break_are_both_counted():
    before, after = resolution(generate((21, 2)).text)
    right = re.search("|".join(LISTS["tools"]), after).group()
    wrong = next(word for word in LISTS["tools"] if word not in before)
    read = parse(before + after.replace(right, wrong) + " The end.")
    assert read.failure == "break"
    assert read.attributes.slips == after.count(right)


@pytest.mark.parametrize("size", SIZES)
def test_no_text_is_no_story(size):
    assert parse("", size=size)[:4] == (False, "no_end", 0, None)
    assert parse("", size=size).attributes == Attributes()
    assert parse("Colourless green ideas.", size=size).failure == "break"


@pytest.mark.parametrize("size", SIZES)
def test_charges_sum_to_the_storys_own(size):
    for story in stories(31, 200, size=size):
        found = charges(story.text, size=size)
        assert len(found) == len(story.text)
        assert min(found) >= 0
        assert math.fsum(found) == pytest.approx(-story.logprob, abs=1e-9)


def test_what_must_be_remembered_is_charged_nothing():
    for story in stories(41, 50):
        found = charges(story.text)
        for word in re.finditer(rf"\b(?:{'|'.join(LISTS['tools'])})\b", story.text):
            if word.start() > len(story.text) // 2:
                assert sum(found[word.start() : word.end()]) == pytest.approx(0, abs=1e-12)


def test_only_stories_have_charges():
    with pytest.raises(ValueError, match="no_end at 9"):
        charges("Once a gr")
