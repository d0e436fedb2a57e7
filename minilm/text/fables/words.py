"""The word lists of the fables. Words that follow "a" begin with a consonant."""

# Words are parted by spaces, phrases by commas.
_TEXTS = {
    "female": """Ada Beryl Clara Dora Elsie Flora Greta Hazel Ivy Juno Kira Luna Mabel Nell Olive
        Petra Rosa Sylvie Tilda Wanda""",
    "male": """Alfie Basil Casper Dorian Edgar Felix Gus Hugo Ivo Jasper Kaspar Linus Milo Ned Otto
        Percy Rufus Silas Tobias Victor""",
    "warm": """gentle generous kindly patient cheerful thoughtful faithful friendly helpful merciful
        humble tender loyal merry""",
    "cold": """greedy vain selfish jealous boastful cunning haughty stubborn lazy reckless spiteful
        proud cruel sly""",
    "kinds": """fox badger hare bear wolf lynx squirrel hedgehog beaver weasel goat mole rabbit
        donkey mouse hamster""",
    "helpers": "heron raven stork crow parrot swan magpie pelican tortoise pheasant crane gull",
    "places": """beside a quiet lake, under a stone bridge, behind the old mill,
        above a foggy harbor, near the salt marsh, inside a hollow trunk, below chalk cliffs,
        among tall reeds, on a grassy island, beyond the orchards, beneath a ruined tower,
        outside a fishing village, between two hills, by the north road, within a walled garden,
        at the forest edge""",
    "wants": """win the spring race, find a silver bell, build a tall windmill, learn the moon song,
        taste the royal honey, sail to the coral reef, see the northern lights, plant a rose hedge,
        hear the ocean sing, catch a falling star, paint the evening sky, bake the finest pie,
        map the hidden caves, meet the river king, grow a giant pumpkin, wear a velvet cape,
        climb the glass mountain, ring the temple bell, fly a scarlet kite, carve a wooden flute,
        own a golden comb, dance at the palace, light the great beacon, tame a wild pony""",
    "obstacles": """a wide river, a flooded valley, a dark cave, a haunted hollow, a steep cliff,
        a snowy pass, a thorny wood, a locked gate""",
    # What helps against each two obstacles in turn.
    "tools/0": "raft canoe paddle barge boat kayak plank barrel",
    "tools/1": "lantern candle torch lamp drum whistle mirror trumpet",
    "tools/2": "rope ladder hook pickaxe sled cloak scarf shovel",
    "tools/3": "hatchet saw sickle scythe key hammer crowbar chisel",
    "services": """sweep the chimney, guard the hives, mend the fence, paint the barn,
        water the beans, sing at supper, chop the firewood, feed the geese, knead the dough,
        mind the ducklings, oil the hinges, pick the pears, dig the well, comb the wool,
        stack the hay, grind the corn, rake the leaves, shell the peas, polish the spoons,
        milk the cows""",
    "birds": "sparrow wren pigeon robin thrush finch",
    "insects": "moth beetle cricket ladybird bumblebee spider",
    "young": "lamb foal kitten calf puppy piglet",
    "swimmers": "toad newt duckling turtle gosling frog",
    "foods": "bread cheese berries plums honey soup turnips figs",
    "things": "nest basket roof chair doll teapot wheel pillow",
    "trees": "willow birch pine beech chestnut linden cedar maple",
    "drifters": "clouds swallows leaves boats shadows sunbeams",
    "grounds": "meadow field ditch stream hillside vineyard",
    "tunes": "tune ballad hymn rhyme waltz lullaby",
    "counted": "stones poppies ferns puddles mushrooms daisies",
    "finds": "feather ribbon coin button marble thimble",
    "flowers": "violets bluebells clover primroses",
    "landmarks": "chapel windmill signpost well dovecote quarry",
    "stuff": "twigs pebbles moss kindling",
    "skies": "sunset rainbow moonrise fog",
    "loudly": "loudly softly merrily",
    "folk": "neighbors villagers farmers shepherds sailors millers",
    # The small world's.
    "small_names": "Ada Tilda Nell Rosa Hugo Otto Milo Gus",
    "small_traits": "gentle loyal kindly merry greedy cruel proud vain",
    "small_kinds": "fox bear hare mole badger rabbit squirrel mouse",
    "small_wants": "kite drum boat crown garden violin puppet sled",
    "small_tools": "rope lamp spade ladder saw",
    "small_helpers": "goat crow",
}
LISTS: dict[str, tuple[str, ...]] = {
    name: tuple(" ".join(each.split()) for each in text.split("," if "," in text else None))
    for name, text in _TEXTS.items()
}
FEMALE, WARM, OBSTACLES = LISTS["female"], LISTS["warm"], LISTS["obstacles"]
LISTS["names"] = FEMALE + LISTS["male"]
LISTS["traits"] = WARM + LISTS["cold"]
LISTS["tools"] = sum((LISTS[f"tools/{i}"] for i in range(len(OBSTACLES) // 2)), ())
