"""The words of our own generators: keys of needles and words to count. Frozen; a change needs a new generator version.

Every adjective goes with every noun, which makes 16,384 keys (``red-lamp``) and as many single words (``redlamp``), so
one vocabulary serves all lengths up to 131,072 tokens and beyond, where RULER changes to another list.
"""

import random

__all__ = ["ADJECTIVES", "NOUNS", "NUM_PAIRS", "all_pairs", "draw_pairs"]

ADJECTIVES = tuple(
    """
    amber ample arid basic beige black bland blank blue blunt bold brave brief bright brisk broad bronze brown bulky calm
    cheap chief chilly civil clean clear clever cold cool coral cosy crisp crude curly damp dark dear deep dense dim dire
    dry dull dusty eager early elder empty equal exact faint fair false fancy fast final fine firm flat fond frail free
    fresh full funny gentle giant glad gold grand grave great green grey grim happy harsh hasty heavy hollow humble icy
    idle jolly keen kind large late lazy light little lively lone long loud loyal lucky main mellow mild minor misty
    modest moist naive narrow near neat new noble numb odd orange pale plain polite prime proud pure purple quick
    quiet rapid rare raw red rough silver
    """.split()
)
NOUNS = tuple(
    """
    acorn anchor anvil apple apron arrow badge bamboo banjo barn basket beach bell bench bird boat book boot bottle bowl
    branch bread bridge broom brush bucket butter button cabin cable camel candle canoe carpet castle cedar chair cherry
    cliff clock cloud coat coin comb copper corn cotton cradle crown cup curtain desert desk door dragon drum eagle engine
    falcon farm feather fence fiddle field fish flag flask flower forest fork fox garden gate glass glove goose grape
    hammer harbor hat hill honey horse house island jacket jar jewel jungle kettle kite ladder lake lamp lemon lion lock
    maple market meadow melon mirror moon mountain nest ocean olive orchid oven owl paddle panda paper parrot pebble
    pepper piano pillow planet pocket pond river rocket saddle shell shovel spoon stone
    """.split()
)
NUM_PAIRS = len(ADJECTIVES) * len(NOUNS)


def all_pairs(joint: str = "-") -> list[str]:
    """All pairs of an adjective and a noun; ``joint`` stands between them."""
    return [f"{adjective}{joint}{noun}" for adjective in ADJECTIVES for noun in NOUNS]


def draw_pairs(rng: random.Random, count: int, joint: str = "-") -> list[str]:
    """``count`` distinct pairs of an adjective and a noun; ``joint`` stands between them.

    ``count`` is at most ``NUM_PAIRS``.
    """
    chosen = rng.sample(range(NUM_PAIRS), count)
    return [f"{ADJECTIVES[pair // len(NOUNS)]}{joint}{NOUNS[pair % len(NOUNS)]}" for pair in chosen]
