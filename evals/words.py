"""Plain English words that prompts are made of: nouns, adjectives, and pairs of any two.

RULER draws from the lists of the package wonderwords, some 8,000 words; these are about 700, and
pairs of them are more than a prompt ever needs. Knows nothing of prompts or tokenizers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_KEYS = """
anchor apple arrow autumn badge barn basket beacon bell bench bird blanket boat bottle branch
bread bridge bronze brush bucket butter cabin candle canyon carpet castle cedar chair cherry
circle cloud coast copper coral cotton cradle crown crystal curtain desert diamond dragon drum
eagle engine falcon feather fence field flame flower forest fountain garden ginger glacier glass
guitar hammer harbor hill honey horse island ivory jacket jungle kettle kitchen ladder lake
lantern lemon letter lion lizard maple marble meadow melon mirror monkey moon mountain needle
ocean olive orange orchid otter oyster paddle palace paper parrot pearl pencil pepper piano
pillow planet pocket pond prairie puzzle rabbit raven ribbon river rocket saddle salmon
sandal shadow shell silver spider spoon spring stable statue stone storm summer sunset table
temple thunder tiger timber tower tractor tulip tunnel turtle valley velvet violin wagon walnut
whale willow window winter wizard yellow zebra
"""
KEYS = tuple(_KEYS.split())
"""The nouns of the plain needle. Prompts are drawn from them by seed: neither add nor move one."""

_MORE_NOUNS = """
acorn actor address album alley almond amber animal answer apron arcade artist atlas attic author
avenue bacon baker balcony ballad bamboo banana banner barrel beach beaver bicycle biscuit blossom
border boulder breeze brick broom bubble builder bullet bundle bunker button cabbage cable camel
camera canal canoe captain caravan carbon cargo carrot cattle cellar chapel chapter charcoal cheese
chimney cinema citizen clay cliff clinic clock clover coach cobbler coffee collar colony comet
compass concert corner cottage counter cousin cricket cushion customer cylinder daisy dancer
daughter deck dentist diary dinner doctor dolphin donkey doorway drawer driver eclipse editor
elbow elephant ember emblem errand evening fabric factory farmer ferry fiddle finger fisher flute
folder footpath freight frontier furnace gallery gate giraffe glove goblin granite grape guest
gutter hallway harvest hazel helmet heron highway hockey hotel hunter igloo insect invoice iron
jewel journal judge kangaroo kayak kernel kingdom kitten knight lagoon laundry lawyer leather
library lighthouse lobster locket lumber magnet mailbox manor market mason mattress medal merchant
meteor mitten morning mosaic museum mustard napkin neighbor nephew nickel notebook nugget nurse
oatmeal office onion opera orchard organ outpost package painter panther parade parcel pasture
peanut pebble penguin pepperoni pigeon pilot pirate plank platform plaza plumber pony porridge
portrait poster potato pottery printer prison pumpkin pupil quarry quilt racket radar radish
railway rattle recipe reindeer reporter rifle rooster rope runway sailor satchel scarf schooner
scooter sculptor seagull shelter sheriff shovel shuttle sketch sleeve soldier sparrow spiral
squirrel station steamer stocking studio suburb surgeon swallow tailor tavern teacher thimble
ticket tomato torch trader treasure trumpet turnip uncle vacation vessel viaduct village vineyard
volcano waiter wallet warrior waterfall weaver wharf whistle workshop zipper
"""
NOUNS = (*KEYS, *_MORE_NOUNS.split())

_ADJECTIVES = """
abrupt absent active adorable afraid agile alert amused ancient angry annual anxious arctic awake
awkward bashful beautiful bitter bland blind blunt bold boring brave brief bright brisk broad
broken busy calm careful careless cautious charming cheap cheerful chilly clean clever clumsy
coarse cold colorful common compact complete cool correct cozy crafty crisp crooked crowded cruel
curious curly daily damp daring dark deep delicate dense dim distant dizzy double drowsy dry dull
dusty eager early earnest easy elastic elegant empty enormous equal eternal exact faint fair
faithful famous fancy fast fearless fierce final firm flat flexible fluffy fond foolish forgetful
formal fragile frank free fresh friendly frozen funny fuzzy gentle giant glad gloomy golden
graceful grand grateful greedy grumpy handsome handy happy harmless harsh healthy heavy helpful
hidden hollow honest huge humble hungry icy ideal idle innocent jolly joyful juicy keen kind large
lazy lean light likely little lively local lonely long loose loud lovely loyal lucky mad major
mellow merry mighty mild modern modest moody muddy mute narrow nasty neat nervous nimble noble
noisy odd old open ordinary outer oval pale patient perfect plain playful pleasant polite poor
precious pretty proper proud pure quaint quick quiet rapid rare raw ready real regular rich rigid
ripe rough round royal rude rural rusty sacred sad safe salty scarce secret selfish serious shaggy
shallow sharp shiny short shy silent silly simple skinny sleepy slender slim slippery slow small
smart smooth sober soft solid sour spare spicy steady steep sticky stiff strange strict strong
stubborn sturdy sudden sweet swift tall tame tender tense thick thin thirsty tidy tight timid tiny
tired tough tropical true ugly unique upper urban urgent useful usual vague vast vivid warm wary
weak wealthy weary weird wet wicked wide wild wise witty wooden worn worthy young zealous
"""
ADJECTIVES = tuple(_ADJECTIVES.split())

_ALL = tuple(dict.fromkeys((*NOUNS, *ADJECTIVES)))


def phrase(chance: random.Random) -> str:
    """An adjective and a noun, as the keys of RULER's needles are: `grumpy-kangaroo`."""
    return f"{chance.choice(ADJECTIVES)}-{chance.choice(NOUNS)}"


def singles(chance: random.Random) -> Iterator[str]:
    """Every word once, in an order drawn by chance."""
    yield from chance.sample(_ALL, len(_ALL))


def pairs(chance: random.Random) -> Iterator[str]:
    """Every two words joined, in an order drawn by chance."""
    seen: set[str] = set()
    while len(seen) < len(_ALL) ** 2:
        pair = f"{chance.choice(_ALL)}-{chance.choice(_ALL)}"
        if pair not in seen:
            seen.add(pair)
            yield pair
