"""What a needle says and how it is asked for: keys, values, and the two wordings.

They are those of method section 6 (LongRoPE2, arXiv 2502.20082, sec. 3.2): the paper's prompt (its
Appendix C), or a short one whose instruction and question are our own, so that a whole sample fits
in a window of 128 tokens. Every sample is drawn from its own seed, so sample 7 is the same whether
8 or 800 are asked for.
"""

import random
from dataclasses import dataclass
from enum import StrEnum

from longrope2.errors import DataError

# Keys are ``adjective-noun``: common words, lower case.
ADJECTIVES = """
    amber blue bold brave brief bright broad calm cheap clean clear clever cold cool cosy crisp
    curly damp dark deep dry dusty eager early fair fast fine firm flat fresh gentle giant glad
    gold grand green grey happy heavy hollow humble jolly kind lazy light little lively loud
    lucky mild narrow neat noble odd orange pale plain proud purple quick quiet rapid rare red
    rich round rusty sharp
""".split()
NOUNS = """
    anchor apple arrow basket beach bell bird boat book bottle bridge brush candle castle chair
    cherry cloud coat coin corn crown desert door dragon drum eagle engine farm feather field
    fish flower forest garden glass hammer harbor hat hill horse house island jacket kettle
    ladder lake lamp lemon lion market mirror moon mountain needle ocean orchid owl paper pepper
    piano pillow planet pocket river rocket ship shoe spoon
""".split()
INSTRUCTION = "Remember the magic numbers in this text.\n"
PAPER_INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
VALUE_DIGITS = 7
# Windows that hold the paper's prompt with ease; a model of a shorter one is our miniature.
PAPER_WORDING_FROM = 2048


class Wording(StrEnum):
    """How a needle is announced and asked for."""

    auto = "auto"
    """``paper`` for models with an original window of at least 2,048 tokens, else ``short``."""
    paper = "paper"
    """The prompt of the paper's Appendix C."""
    short = "short"
    """Short instruction and question; the retrieval documents of the training mix have it too."""


@dataclass(frozen=True)
class NeedleWording:
    """The texts of one needle; joined as they stand, no spaces are added between them."""

    instruction: str
    needle: str
    question: str
    answer_prefix: str
    answer: str


def choose_wording(wording: Wording, original_len: int) -> Wording:
    """The wording that is meant, ``auto`` decided by the model's original window in tokens."""
    if wording is not Wording.auto:
        return wording
    return Wording.paper if original_len >= PAPER_WORDING_FROM else Wording.short


def needle_wording(key: str, value: str, wording: Wording = Wording.short) -> NeedleWording:
    """Texts for one key and value; ``wording`` is a chosen one, not ``auto``."""
    assert wording is not Wording.auto, "choose_wording decides what auto is"
    asked = f"special magic number for {key} mentioned in the provided text"
    is_short = wording is Wording.short
    return NeedleWording(
        instruction=INSTRUCTION if is_short else PAPER_INSTRUCTION,
        needle=f"\nOne of the special magic numbers for {key} is: {value}.\n",
        question=f"\nWhich number belongs to {key}?\n" if is_short else f"\nWhat is the {asked}?",
        answer_prefix=f"The {asked} is" if is_short else f" The {asked} is",
        answer=f" {value}",
    )


def draw_key(rng: random.Random) -> str:
    """An adjective-noun key."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_value(rng: random.Random) -> str:
    """A value of seven digits, the first not zero."""
    return str(rng.randrange(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS))


def draw_value_and_start(seed: int, number: int) -> tuple[str, float]:
    """Value of a sample, and where in a long book it starts (0 to 1)."""
    rng = random.Random(f"needle/{seed}/{number}")
    draw_key(rng)  # the first draw is the key's, see draw_keys
    return draw_value(rng), rng.random()


def draw_keys(seed: int, num_keys: int, excluded: set[str]) -> list[str]:
    """``num_keys`` distinct keys; the first n of them are the same for every larger number."""
    every = {f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS}
    most = len(every - excluded)
    if not 1 <= num_keys <= most:
        given = f"num_keys={num_keys} (by default one per sample)"
        left = f"the keys there are without {len(every) - most} excluded ones"
        there = left if most < len(every) else "the keys there are"
        raise DataError(f"{given} must be from 1 to {most}, {there}")
    keys: dict[str, None] = {}
    for number in range(num_keys):
        rng = random.Random(f"needle/{seed}/{number}")
        key = draw_key(rng)
        while key in keys or key in excluded:
            key = draw_key(rng)
        keys[key] = None
    return list(keys)
