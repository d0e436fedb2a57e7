"""The grammar of fables: two functions that tell a story, and the sentences they choose from.

A hero with a trait lives somewhere and wants something; an obstacle stops them, a helper lends a
tool and is promised a service; on the way come deeds, kind or unkind; the promise is kept or
broken; the ending follows from all that, or does not. Three things must be remembered from the
promise to its keeping: the tool, the helper's name, the service.
"""

import functools
from collections.abc import Callable

from minilm.choices import choose
from minilm.text.fables.teller import Options, Teller, Weights
from minilm.text.fables.words import FEMALE, OBSTACLES, WARM

OPENINGS = (
    "Once a {trait:traits} {:kinds} named {hero:names} lived {:places}.",
    "Long ago there lived {:places} a {trait:traits} {:kinds} named {hero:names}.",
    "A {trait:traits} {:kinds} named {hero:names} once lived {:places}.",
    "In the old days a {trait:traits} {:kinds} named {hero:names} lived {:places}.",
    "Many winters ago, {:places}, lived a {trait:traits} {:kinds} named {hero:names}.",
    "This is the tale of {hero:names}, a {trait:traits} {:kinds} living {:places}.",
    "They still speak of {hero:names}, the {trait:traits} {:kinds} who lived {:places}.",
)
WANTS = (
    " {She} wanted only to {:wants}.", " Above all, {hero} wished to {:wants}.",
    " {Own} dearest dream was to {:wants}.", " {hero} longed to {:wants}.",
    " {She} had long hoped to {:wants}.", " {She} dreamed that {she} might {:wants}.",
    " One morning {she} set out to {:wants}.",
)  # fmt: skip
# The sentence up to its obstacle, and from there to the tool.
LOANS = (
    (" But {obstacle:obstacles}", " lay ahead, so {helper:names} the {:helpers} lent {her} a "),
    (" When {obstacle:obstacles}", " stopped {her}, {helper:names} the {:helpers} offered a "),
    (" At {obstacle:obstacles}", " a {:helpers} named {helper:names} lent {her} a "),
    (" Soon {she} reached {obstacle:obstacles}", ". {helper:names} the {:helpers} lent {her} a "),
)
PROMISES = (  # most name the tool: a copy over a short way teaches the one over the long way
    " In return for the {tool} {she} promised to {service:services}.",
    " {She} swore to bring the {tool} back and {service:services}.",
    ' "I will return the {tool} and {service:services}," {she} said.',
    " For the {tool} {she} agreed to {service:services}.",
    " {She} gave {own} word to {service:services}.",
)
ROADS_OUT = (
    "On the road", "Along the way", "That day", "Before noon", "At a crossroads", "Past the farms",
    "In a lane", "Near the market",
)  # fmt: skip
ROADS_ON = (
    "The next day", "Farther on", "Toward evening", "After the rain", "By moonlight", "Days later",
    "Over the bridge", "As dusk fell",
)  # fmt: skip
JOINERS = (" and ", ", then ")

# The four clauses of a journey, each with its own kind, unkind and neutral options: so nothing is
# told twice, and no word needs remembering for it.
CLAUSES = (
    (("fed a hungry {:birds}", "freed a trapped {:insects}", "guided a lost {:young}",
      "greeted a shy {:swimmers}", "shared {:foods} with a {:young}"),
     ("mocked a clumsy {:young}", "chased a tiny {:insects}", "tricked a simple {:swimmers}",
      "woke a weary {:birds}", "stole {:foods} from a {:birds}"),
     ("crossed a {:grounds}", "counted {:counted}", "rested awhile", "picked {:flowers}")),
    (("warmed a shivering {:birds}", "carried a lame {:swimmers}", "comforted a lonely {:young}",
      "rescued a drowning {:insects}", "mended a {:swimmers}'s {:things}"),
     ("pinched a sleeping {:young}", "frightened a timid {:birds}", "cheated a poor {:swimmers}",
      "trapped a singing {:insects}", "broke a {:swimmers}'s {:things}"),
     ("hummed a {:tunes}", "watched the {:drifters}", "found a {:finds}", "drank some water")),
    (("nursed a wounded {:birds}", "sheltered a homeless {:insects}", "cheered a tearful {:young}",
      "washed a muddy {:swimmers}", "gave {:foods} to a {:birds}"),
     ("teased a stammering {:young}", "shooed a thirsty {:birds}", "shoved a limping {:swimmers}",
      "squashed a harmless {:insects}", "snatched {:foods} from a {:young}"),
     ("slept under a {:trees}", "passed a {:landmarks}", "climbed a stile", "gathered {:stuff}")),
    (("helped a blind {:swimmers}", "forgave a rude {:insects}", "defended a frail {:birds}",
      "hugged a grieving {:young}", "repaired a {:birds}'s {:things}"),
     ("robbed a widowed {:swimmers}", "insulted an aged {:birds}", "bullied a small {:insects}",
      "betrayed a trusting {:young}", "burned a {:birds}'s {:things}"),
     ("admired the {:skies}", "whistled {:loudly}", "lit a fire", "ate some {:foods}")),
)  # fmt: skip

RETURNS = (
    " At last {she} ", " That winter {she} ", " By harvest time {she} ", " A week later {she} ",
    " In the end {she} ", " Before snowfall {she} ",
)  # fmt: skip
KEPT = (
    "returned| the {tool} to {helper} and stayed to {service}.",
    "took| {helper} the {tool} and remained to {service}.",
    "gave| {helper} the {tool} and hurried to {service}.",
    "brought| the {tool} home to {helper} and helped to {service}.",
    "carried| the {tool} back to {helper} and went to {service}.",
)
BROKEN = (
    "kept| the {tool} from {helper} and never came to {service}.",
    "sold| the {tool} and let {helper} {service} alone.",
    "lost| the {tool}, avoided {helper} and forgot to {service}.",
    "hid| the {tool} and made {helper} {service}.",
    "threw| away the {tool} and left {helper} to {service}.",
)
HAPPY = (
    " And so {own} wish came true.", " {Own} wish was granted within the week.",
    " The {:folk} cheered, for {own} dream came true.", " Fortune smiled on {her} ever after.",
    " To this day the {:folk} sing of {own} joy.", " From then on every door stood open.",
    " {She} lived happily among the {:folk}.", " All {she} had hoped for came to pass.",
)  # fmt: skip
SAD = (
    " But {own} wish never came true.", " {Own} dream melted away like snow.",
    " After that the {:folk} shut their doors.", " Luck left {her}, and the dream faded.",
    " To the last {she} wondered what went wrong.", " {She} grew old, alone and forgotten.",
    " Nothing {she} dreamed of was ever {hers}.", " None of the {:folk} spoke to {her} again.",
)  # fmt: skip

SMALL_CLAUSES = (
    (("fed a mouse", "freed a bird"), ("mocked a hen", "robbed a newt"), ("rested", "hummed")),
    (("carried a toad", "warmed a wren"), ("chased a moth", "pushed a lamb"), ("slept", "sang")),
)
SMALL_KEPT = ("returned| the {tool} in time.", "brought| back the {tool}.")
SMALL_BROKEN = ("kept| the {tool}.", "lost| the {tool} and lied.")
SMALL_HAPPY = (" {Own} wish came true.", " {She} was happy ever after.")
SMALL_SAD = (" {Own} wish never came true.", " {She} went home with nothing.")

# Of the hero: of a woman, of a man.
PRONOUNS = {
    "she": ("she", "he"), "She": ("She", "He"), "her": ("her", "him"),
    "own": ("her", "his"), "Own": ("Her", "His"), "hers": ("hers", "his"),
}  # fmt: skip

# How likely a kind, an unkind and a neutral clause are for a warm and for a cold hero.
HABITS = {True: (0.36, 0.26, 0.38), False: (0.26, 0.36, 0.38)}
KEEPS = {True: 0.6, False: 0.4}  # probability that a warm (cold) hero keeps the promise
FITS = 0.65  # probability that the ending follows
PROMISE_WORTH = 1.5  # deeds: so the promise decides where kind and unkind deeds balance


@functools.cache
def _shared(*groups: tuple[float, Options]) -> tuple[Options, Weights]:
    """Groups of options as one choice, each group with its share of the probability."""
    options = tuple(option for _, group in groups for option in group)
    return options, tuple(share / len(group) for share, group in groups for _ in group)


def _pronouns(t: Teller) -> None:
    """Keep the hero's pronouns, which must agree with the name."""
    for name, pair in PRONOUNS.items():
        t.keep(name, pair[0 if t.words["hero"] in FEMALE else 1], pair)


def _clause(t: Teller, clauses: tuple[Options, Options, Options], last: bool) -> None:
    """One clause, perhaps a deed; a story has at least one, so the last clause may have to be."""
    groups = tuple(zip(HABITS[t.words["trait"] in WARM], clauses, strict=True))
    deeds, kind, unkind = t.attributes.deeds, len(clauses[0]), len(clauses[1])
    index, clause = t.head_of(*_shared(*(groups if deeds or not last else groups[:2])))
    if index < kind + unkind:
        t.attributes = t.attributes._replace(deeds=(*deeds, 1 if index < kind else -1))
    t.rest(clause)


def _promise(t: Teller, kept: Options, broken: Options) -> None:
    keeps = KEEPS[t.words["trait"] in WARM]
    index, resolution = t.head_of(*_shared((keeps, kept), (1 - keeps, broken)))
    t.attributes = t.attributes._replace(promise_kept=index < len(kept))
    t.rest(resolution)


def _ending(t: Teller, happy: Options, sad: Options) -> None:
    promise = PROMISE_WORTH if t.attributes.promise_kept else -PROMISE_WORTH
    deserving = sum(t.attributes.deeds) + promise > 0
    share = FITS if deserving else 1 - FITS
    index, ending = t.head_of(*_shared((share, happy), (1 - share, sad)))
    t.attributes = t.attributes._replace(ending_fits=(index < len(happy)) == deserving)
    t.rest(ending)


def full(t: Teller) -> None:
    """A fable of 70 to 100 words."""
    t.one_of(OPENINGS)
    _pronouns(t)
    t.one_of(WANTS)
    loan = t.one_of(tuple(head for head, _ in LOANS))
    t.tell(LOANS[loan][1] + f"{{tool:tools/{OBSTACLES.index(t.words['obstacle']) // 2}}}.")
    t.one_of(PROMISES)
    for roads, first, second in ((ROADS_OUT, *CLAUSES[:2]), (ROADS_ON, *CLAUSES[2:])):
        t.tell(" ")
        t.one_of(roads)
        t.tell(" {she} ")
        _clause(t, first, last=False)
        t.one_of(JOINERS)
        _clause(t, second, last=second is CLAUSES[-1])
        t.tell(".")
    t.one_of(RETURNS)
    _promise(t, KEPT, BROKEN)
    _ending(t, HAPPY, SAD)


def small(t: Teller) -> None:
    """A fable of 20 to 35 words, with one word to remember: the tool."""
    t.tell("{hero:small_names} was a {trait:small_traits} {:small_kinds}.")
    _pronouns(t)
    t.tell(" {She} wanted a {:small_wants}. A {:small_helpers} lent {her} a {tool:small_tools}.")
    t.tell(" {She} ")
    _clause(t, SMALL_CLAUSES[0], last=False)
    t.tell(" and ")
    _clause(t, SMALL_CLAUSES[1], last=True)
    t.tell(". Then {she} ")
    _promise(t, SMALL_KEPT, SMALL_BROKEN)
    _ending(t, SMALL_HAPPY, SMALL_SAD)


STORIES: dict[str, Callable[[Teller], None]] = {"small": small, "full": full}
SIZES = tuple(STORIES)


def story_of(size: str) -> Callable[[Teller], None]:
    return choose(STORIES, size, "size")
