"""Variable tracking, in our own wording: a chain of assignments among lines of noise; which variables hold the value?

One chain of four hops, as in RULER (arXiv 2404.06654): five variables hold one value. Names are distinct, and a short
solved example stands in front of the task, with its own names and value in every sample.
"""

import random
import string

from longrope2.errors import DataError
from longrope2.evaluation.ruler.haystacks import NOISE_LINE, NoiseHaystack
from longrope2.evaluation.ruler.prompts import Draft, Piece, PromptEncoder

__all__ = ["vt_prompt"]

NUM_HOPS = 4
HEAD = "Some lines of the text below assign values to variables. Keep track of them.\n"
EXAMPLE_LINES = 4
EXAMPLE_LETTERS, LETTERS = 3, 5


def vt_prompt(encoder: PromptEncoder, noise: NoiseHaystack, rng: random.Random, depth: float, budget: int) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted; the chain starts at ``depth``, its hops follow anywhere.

    Raises:
        DataError: the budget cannot hold example and chain.
    """
    value, example_value = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    names = _draw_names(rng, LETTERS)
    pieces: list[Piece] = list(_example(rng, example_value))
    chain = [_pieces(line) for line in _statements(names, value)]
    tail = _question(value)
    fixed = [piece for piece in [*pieces, *(p for line in chain for p in line), *tail] if isinstance(piece, str)]
    room = budget - encoder.fixed_total(fixed)
    num_lines, rest, used = noise.fit(room) if room > 0 else (0, [], 0)
    if num_lines < len(chain):
        raise DataError(f"the length is too short for vt: {room} tokens are left for its noise; use a longer one")
    # The first hop stands where the sample is asked to have it, within what leaves the others a place of their own.
    first = min(round(depth * num_lines), num_lines - NUM_HOPS)
    places = [first, *sorted(rng.sample(range(first + 1, num_lines + 1), NUM_HOPS))]
    done = 0
    for place, line in zip(places, chain, strict=True):
        pieces += [*noise.lines(place - done), *line]
        done = place
    pieces += [*noise.lines(num_lines - done), *rest, *tail]
    depths = [place * noise.line_tokens / used for place in places]
    return Draft(pieces, tuple(names), {"depth": depths[0], "depths": depths, "value": value})


def _example(rng: random.Random, value: str) -> list[str]:
    """A small solved problem and the instruction of the real one."""
    names = _draw_names(rng, EXAMPLE_LETTERS)
    lines = ["".join(NOISE_LINE)] * EXAMPLE_LINES
    places = sorted(rng.sample(range(EXAMPLE_LINES + 1), NUM_HOPS + 1), reverse=True)
    for place, line in zip(places, reversed(_statements(names, value)), strict=True):
        lines.insert(place, line)
    solved = "".join(_question(value)) + " " + ", ".join(names)
    return [HEAD + "".join(lines) + solved + "\n\n" + HEAD]


def _question(value: str) -> list[str]:
    """Pieces of the question and the answer prefix."""
    return [
        " (End of the text.)\n",
        f"Question: which variables hold the value {value}?",
        f" Answer: the {NUM_HOPS + 1} variables that hold the value {value} are:",
    ]


def _statements(names: list[str], value: str) -> list[str]:
    """The chain, one line each."""
    hops = [f"VAR {name} = VAR {before}\n" for before, name in zip(names, names[1:], strict=False)]
    return [f"VAR {names[0]} = {value}\n", *hops]


def _pieces(line: str) -> list[str]:
    """A statement, cut in front of its spaces."""
    first, *others = line.split(" ")
    return [first, *(f" {word}" for word in others)]


def _draw_names(rng: random.Random, letters: int) -> list[str]:
    """Distinct names of upper-case letters."""
    names: dict[str, None] = {}
    while len(names) < NUM_HOPS + 1:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)
