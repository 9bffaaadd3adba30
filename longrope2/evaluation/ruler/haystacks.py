"""What needles are hidden in, and the words of our own generators.

A haystack is running text, white space collapsed as RULER does with its essays (read past its end
it starts again), or lines of noise.

The words are keys of needles and words to count. They are frozen: a change needs a new generator
version. Every adjective goes with every noun, which makes 16,384 keys (``red-lamp``) and as many
single words (``redlamp``): one vocabulary for all lengths, where RULER changes to another list.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import Block, Piece, PromptEncoder

ADJECTIVES = tuple(
    """
    amber ample arid basic beige black bland blank blue blunt bold brave brief bright brisk broad
    bronze brown bulky calm cheap chief chilly civil clean clear clever cold cool coral cosy crisp
    crude curly damp dark dear deep dense dim dire dry dull dusty eager early elder empty equal
    exact faint fair false fancy fast final fine firm flat fond frail free fresh full funny gentle
    giant glad gold grand grave great green grey grim happy harsh hasty heavy hollow humble icy
    idle jolly keen kind large late lazy light little lively lone long loud loyal lucky main mellow
    mild minor misty modest moist naive narrow near neat new noble numb odd orange pale plain
    polite prime proud pure purple quick quiet rapid rare raw red rough silver
    """.split()
)
NOUNS = tuple(
    """
    acorn anchor anvil apple apron arrow badge bamboo banjo barn basket beach bell bench bird boat
    book boot bottle bowl branch bread bridge broom brush bucket butter button cabin cable camel
    candle canoe carpet castle cedar chair cherry cliff clock cloud coat coin comb copper corn
    cotton cradle crown cup curtain desert desk door dragon drum eagle engine falcon farm feather
    fence fiddle field fish flag flask flower forest fork fox garden gate glass glove goose grape
    hammer harbor hat hill honey horse house island jacket jar jewel jungle kettle kite ladder lake
    lamp lemon lion lock maple market meadow melon mirror moon mountain nest ocean olive orchid
    oven owl paddle panda paper parrot pebble pepper piano pillow planet pocket pond river rocket
    saddle shell shovel spoon stone
    """.split()
)
NUM_PAIRS = len(ADJECTIVES) * len(NOUNS)
NOISE_LINE = (
    "The kettle is warm.", " The door is shut.", " The floor is dry.", " Nothing moves.",
    " The clock ticks on.\n",
)  # fmt: skip
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
# About 2.7M tokens: twenty samples of 131,072 tokens that do not overlap.
_MOST_WORDS = 2_000_000


def all_pairs(joint: str = "-") -> list[str]:
    """All pairs of an adjective and a noun."""
    return [f"{adjective}{joint}{noun}" for adjective in ADJECTIVES for noun in NOUNS]


def draw_pairs(rng: random.Random, count: int, joint: str = "-") -> list[str]:
    """Distinct pairs of an adjective and a noun, at most ``NUM_PAIRS``."""
    chosen = rng.sample(range(NUM_PAIRS), count)
    return [f"{ADJECTIVES[pair // len(NOUNS)]}{joint}{NOUNS[pair % len(NOUNS)]}" for pair in chosen]


def draw_distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """The first ``count`` distinct values of a draw, in their order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


class WordHaystack:
    """The first ``_MOST_WORDS`` words of texts, tokens known word by word, read in a circle.

    Raises:
        DataError: no text.
    """

    def __init__(self, texts: Sequence[str], encoder: PromptEncoder) -> None:
        words: list[str] = []
        for text in texts:
            words += text.split()
            if len(words) >= _MOST_WORDS:
                break
        self._words = words[:_MOST_WORDS]
        if not self._words:
            way_out = "give texts, e.g. a folder of *.txt files as ruler.essays"
            raise DataError(f"the haystack holds no words; {way_out}")
        encoded = encoder.encode_pieces([f" {word}" for word in self._words])
        self._ids = np.fromiter((i for ids in encoded for i in ids), dtype=np.int32)
        self._offsets = _prefix_sums(map(len, encoded))
        self._characters = _prefix_sums(len(word) + 1 for word in self._words)
        ends = [bool(_SENTENCE_END.search(word)) for word in self._words]
        self.sentence_starts = np.flatnonzero([True, *ends[:-1]])
        self.num_words = len(self._words)
        self.num_tokens = int(self._offsets[-1])

    def tokens_before(self, word: int) -> int:
        """Tokens in front of a word, counted from word 0 and through every turn of the circle."""
        turns, rest = divmod(word, self.num_words)
        return turns * self.num_tokens + int(self._offsets[rest])

    def word_at(self, tokens: int) -> int:
        """The last word that at most ``tokens`` tokens stand in front of."""
        turns, rest = divmod(tokens, self.num_tokens)
        return turns * self.num_words + int(np.searchsorted(self._offsets, rest, side="right")) - 1

    def nearest_sentence(self, word: int, first: int, stop: int) -> int:
        """The place between sentences that is nearest to ``word``, within [first, stop]."""
        turns, rest = divmod(word, self.num_words)
        index = int(np.searchsorted(self.sentence_starts, rest))
        places = self.sentence_starts[max(index - 1, 0) : index + 1].tolist()
        around = [turns * self.num_words + place for place in [*places, self.num_words]]
        allowed = [place for place in [*around, first, stop] if first <= place <= stop]
        return min(allowed, key=lambda place: abs(place - word))

    def blocks(self, first: int, stop: int) -> list[Block]:
        """The words [first, stop), one block for every turn of the circle."""
        found = []
        while first < stop:
            start = first % self.num_words
            end = min(start + stop - first, self.num_words)
            ids = self._ids[self._offsets[start] : self._offsets[end]]
            characters = int(self._characters[end] - self._characters[start])
            found.append(Block(ids, partial(self._text, start, end), characters))
            first += end - start
        return found

    def _text(self, start: int, stop: int) -> str:
        return "".join(f" {word}" for word in self._words[start:stop])


class NoiseHaystack:
    """One line of five plain sentences, again and again; the last may be cut behind a sentence."""

    def __init__(self, encoder: PromptEncoder) -> None:
        encoded = encoder.encode_pieces(NOISE_LINE)
        self._line = np.asarray([i for ids in encoded for i in ids], dtype=np.int32)
        self._sums = np.cumsum([len(ids) for ids in encoded])
        self.line_tokens = len(self._line)

    def fit(self, num_tokens: int) -> tuple[int, list[str], int]:
        """Whole lines, sentences of a last one, and the tokens of both: at most ``num_tokens``."""
        if num_tokens <= 0:
            return 0, [], 0
        lines, rest = divmod(num_tokens, self.line_tokens)
        last = int(np.searchsorted(self._sums, rest, side="right"))
        used = int(self._sums[last - 1]) if last else 0
        return lines, list(NOISE_LINE[:last]), lines * self.line_tokens + used

    def blocks(self, first: int, stop: int) -> list[Block]:
        """The whole lines [first, stop)."""
        count = stop - first
        if not count:
            return []
        line = "".join(NOISE_LINE)
        return [Block(np.tile(self._line, count), lambda: line * count, len(line) * count)]


def weave(
    haystack: WordHaystack | NoiseHaystack,
    first: int,
    stop: int,
    places: Sequence[int],
    parts: Sequence[Sequence[Piece]],
) -> list[Piece]:
    """The words or lines [first, stop), each of ``parts`` in front of its place."""
    pieces: list[Piece] = []
    for number in sorted(range(len(parts)), key=lambda number: places[number]):
        pieces += [*haystack.blocks(first, places[number]), *parts[number]]
        first = places[number]
    return [*pieces, *haystack.blocks(first, stop)]


def read_texts(path: Path) -> list[str]:
    """Texts of a file or of all ``*.txt`` files below a folder, in the order of their paths.

    ``.json`` files are read as RULER's ``PaulGrahamEssays.json``: one object with a field ``text``.

    Raises:
        DataError: nothing there, or a file that cannot be read.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        fault = f"ruler.essays={path}: no such file, or no *.txt in that folder"
        raise DataError(f"{fault}; give a file or folder of texts")
    try:
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        return [str(json.loads(texts[0])["text"])] if path.suffix == ".json" else texts
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"ruler.essays={path} cannot be read as texts: {error}") from None


def texts_sha256(texts: Sequence[str]) -> str:
    """One hash over texts, their borders included."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _prefix_sums(sizes: Iterable[int]) -> np.ndarray:
    """Sums with a leading zero, int64 [number of sizes + 1]."""
    return np.cumsum(np.fromiter(chain([0], sizes), dtype=np.int64))
