"""The word lists of the fables. Words that follow "a" begin with a consonant."""

LISTS: dict[str, tuple[str, ...]] = {}


def _words(name: str, text: str) -> tuple[str, ...]:
    """Register a list of single words."""
    LISTS[name] = tuple(text.split())
    return LISTS[name]


def _phrases(name: str, text: str) -> tuple[str, ...]:
    """Register a list of phrases, parted by commas."""
    LISTS[name] = tuple(" ".join(each.split()) for each in text.split(","))
    return LISTS[name]


FEMALE = _words(
    "female",
    "Ada Beryl Clara Dora Elsie Flora Greta Hazel Ivy Juno Kira Luna Mabel Nell Olive Petra Rosa "
    "Sylvie Tilda Wanda",
)
MALE = _words(
    "male",
    "Alfie Basil Casper Dorian Edgar Felix Gus Hugo Ivo Jasper Kaspar Linus Milo Ned Otto Percy "
    "Rufus Silas Tobias Victor",
)
LISTS["names"] = FEMALE + MALE
WARM = _words(
    "warm",
    "gentle generous kindly patient cheerful thoughtful faithful friendly helpful merciful humble "
    "tender loyal merry",
)
COLD = _words(
    "cold",
    "greedy vain selfish jealous boastful cunning haughty stubborn lazy reckless spiteful proud "
    "cruel sly",
)
LISTS["traits"] = WARM + COLD
_words(
    "kinds",
    "fox badger hare bear wolf lynx squirrel hedgehog beaver weasel goat mole rabbit donkey mouse "
    "hamster",
)
_words("helpers", "heron raven stork crow parrot swan magpie pelican tortoise pheasant crane gull")
_phrases(
    "places",
    """beside a quiet lake, under a stone bridge, behind the old mill, above a foggy harbor,
    near the salt marsh, inside a hollow trunk, below chalk cliffs, among tall reeds,
    on a grassy island, beyond the orchards, beneath a ruined tower, outside a fishing village,
    between two hills, by the north road, within a walled garden, at the forest edge""",
)
_phrases(
    "wants",
    """win the spring race, find a silver bell, build a tall windmill, learn the moon song,
    taste the royal honey, sail to the coral reef, see the northern lights, plant a rose hedge,
    hear the ocean sing, catch a falling star, paint the evening sky, bake the finest pie,
    map the hidden caves, meet the river king, grow a giant pumpkin, wear a velvet cape,
    climb the glass mountain, ring the temple bell, fly a scarlet kite, carve a wooden flute,
    own a golden comb, dance at the palace, light the great beacon, tame a wild pony""",
)
# Each obstacle with the tools that help against it.
OBSTACLES = _phrases(
    "obstacles",
    """a wide river, a dark cave, a steep cliff, a thorny wood, a snowy pass, a locked gate,
    a haunted hollow, a dusty desert""",
)
for _i, _tools in enumerate(
    (
        "raft canoe paddle barge",
        "lantern candle torch lamp",
        "rope ladder hook pickaxe",
        "hatchet saw sickle scythe",
        "sled cloak scarf shovel",
        "key hammer crowbar chisel",
        "drum whistle mirror trumpet",
        "flask jug camel barrel",
    )
):
    _words(f"tools/{_i}", _tools)
LISTS["tools"] = sum((LISTS[f"tools/{i}"] for i in range(len(OBSTACLES))), ())
_phrases(
    "services",
    """sweep the chimney, guard the hives, mend the fence, paint the barn, water the beans,
    sing at supper, chop the firewood, feed the geese, knead the dough, mind the ducklings,
    oil the hinges, pick the pears, dig the well, comb the wool, stack the hay, grind the corn,
    rake the leaves, shell the peas, polish the spoons, milk the cows""",
)
_words("birds", "sparrow wren pigeon robin thrush finch")
_words("insects", "moth beetle cricket ladybird bumblebee spider")
_words("young", "lamb foal kitten calf puppy piglet")
_words("swimmers", "toad newt duckling turtle gosling frog")
_words("foods", "bread cheese berries plums honey soup turnips figs")
_words("things", "nest basket roof chair doll teapot wheel pillow")
_words("trees", "willow birch pine beech chestnut linden cedar maple")
_words("drifters", "clouds swallows leaves boats shadows sunbeams")
_words("grounds", "meadow field ditch stream hillside vineyard")
_words("tunes", "tune ballad hymn rhyme waltz lullaby")
_words("counted", "stones poppies ferns puddles mushrooms daisies")
_words("finds", "feather ribbon coin button marble thimble")
_words("flowers", "violets bluebells clover primroses")
_words("landmarks", "chapel windmill signpost well dovecote quarry")
_words("stuff", "twigs pebbles moss kindling")
_words("skies", "sunset rainbow moonrise fog")
_words("loudly", "loudly softly merrily")
_words("folk", "neighbors villagers farmers shepherds sailors millers")

# The small world's.
_words("small_names", "Ada Tilda Nell Rosa Hugo Otto Milo Gus")
_words("small_traits", "gentle loyal kindly merry greedy cruel proud vain")
_words("small_kinds", "fox bear hare mole badger rabbit squirrel mouse")
_words("small_wants", "kite drum boat crown garden violin puppet sled")
_words("small_tools", "rope lamp spade ladder saw")
_words("small_helpers", "goat crow")
