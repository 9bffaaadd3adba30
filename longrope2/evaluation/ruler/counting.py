"""RULER's counting and tracing (arXiv 2404.06654) in our own wording: cwe, fwe and vt.

Everything is drawn anew for every sample, the order of words included.

- cwe, common words: a numbered list in which ten words are far more frequent than all others,
  behind a solved example. Ten words 30 times and the others 3 times, as in RULER; 6 times and once
  below 4,096 tokens, or where a tokenizer needs more than the length for the long form. All lengths
  use the same vocabulary.
- fwe, frequent coded words: made-up words, the one of rank k floor(n k^-2 / zeta(2)) times, as in
  RULER. Rank 1 is noise (dots), ranks 2 to 4 are the answer.
- vt, variable tracking: one chain of four hops among lines of noise, as in RULER, so that five
  variables hold one value. Names are distinct; a short solved example stands in front.
"""

import math
import random
import re
import string
from dataclasses import dataclass

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import Block, Draft, Piece, PieceTable, PromptEncoder, too_short
from longrope2.evaluation.ruler import haystacks
from longrope2.evaluation.ruler.haystacks import NOISE_LINE, NUM_PAIRS, NoiseHaystack

CWE_NUM_COMMON = 10
# RULER's border of 4,096 tokens less the answer.
_CWE_SHORT_BUDGET = 3900
_CWE_TASK = "The numbered list below repeats some words more often than others. Find out which."
_CWE_HEAD = f"{_CWE_TASK}\nList:"
_CWE_TAIL = (
    " (End of the list.)\n",
    f"Question: which {CWE_NUM_COMMON} words are the most frequent in the list?",
    f" Answer: the {CWE_NUM_COMMON} most frequent words in the list are:",
)
# RULER: one coded word per 50 tokens of input.
_FWE_TOKENS_PER_WORD = 50
FWE_LETTERS = 6
_FWE_NOISE = "..."
_FWE_SMALLEST_STOCK = 2048
_FWE_HEAD = (
    "The text below is written in code. Count how often each coded word comes up; dots are no "
    "words.\nText:"
)
_FWE_TAIL = (
    " (End of the text.)\n",
    "Question: which three coded words come up most often?",
    " Answer: the three coded words that come up most often in the text are:",
)
_VT_HEAD = "Some lines of the text below assign values to variables. Keep track of them.\n"
VT_NUM_HOPS = 4
VT_LETTERS = 5
_VT_EXAMPLE_LETTERS, _VT_EXAMPLE_LINES = 3, 4


@dataclass(frozen=True)
class _CweForm:
    """How often words are repeated, in the list and in its example."""

    often: int
    seldom: int
    example_words: int
    example_often: int
    example_seldom: int

    @property
    def smallest(self) -> int:
        """Entries of the example and of a list with a few uncommon words."""
        uncommon = (self.example_words - CWE_NUM_COMMON) * self.example_seldom
        common = CWE_NUM_COMMON * (self.example_often + self.often + 2 * self.seldom)
        return uncommon + common


_CWE_LONG = _CweForm(often=30, seldom=3, example_words=40, example_often=10, example_seldom=3)
_CWE_SHORT = _CweForm(often=6, seldom=1, example_words=12, example_often=2, example_seldom=1)


class WordLists:
    """All words and the numbers in front of them, tokenized once, for at most so many entries."""

    def __init__(self, encoder: PromptEncoder, most_entries: int) -> None:
        numbers = [f" {number}." for number in range(1, most_entries + 1)]
        self.encoder = encoder
        self.num_numbers = len(numbers)
        self._table = PieceTable(
            [*numbers, *(f" {word}" for word in haystacks.all_pairs(joint=""))], encoder
        )
        self.number_sizes, self.word_sizes = np.split(self._table.sizes, [self.num_numbers])

    def expected_tokens(self, form: _CweForm) -> float:
        """Tokens that the smallest prompt of a form takes on average."""
        entry = self.word_sizes.mean() + self.number_sizes[: form.smallest].mean()
        return form.smallest * entry + self.encoder.fixed_total([_CWE_HEAD, *_CWE_TAIL])

    def listed(self, words: np.ndarray) -> Block:
        """Numbered list of words, given by their indices."""
        pieces = np.empty(2 * len(words), dtype=np.int64)
        pieces[0::2] = np.arange(len(words))
        pieces[1::2] = self.num_numbers + words
        return self._table.block(pieces)

    def word(self, index: int) -> str:
        """One word."""
        return self._table.pieces[self.num_numbers + index].strip()


def cwe_prompt(lists: WordLists, rng: random.Random, budget: int) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted.

    Raises:
        DataError: the budget cannot hold example and common words, or more words are needed than
            there are.
    """
    too_long = budget < _CWE_SHORT_BUDGET or lists.expected_tokens(_CWE_LONG) > budget
    form = _CWE_SHORT if too_long else _CWE_LONG
    words = np.asarray(rng.sample(range(NUM_PAIRS), NUM_PAIRS))
    borders = [form.example_words, form.example_words + CWE_NUM_COMMON]
    example, common, others = np.split(words, borders)
    head = _cwe_example([lists.word(index) for index in example], rng, form)
    room = budget - lists.encoder.fixed_total([head, *_CWE_TAIL])
    num_others = _fitting_others(lists, common, others, form=form, room=room)
    repeated = np.repeat(common, form.often), np.repeat(others[:num_others], form.seldom)
    entries = _shuffled(np.concatenate(repeated), rng)
    counts = {"num_entries": len(entries), "num_words": CWE_NUM_COMMON + num_others}
    facts = {**counts, "repeats": [form.often, form.seldom]}
    answers = tuple(lists.word(index) for index in common)
    return Draft([head, lists.listed(entries), *_CWE_TAIL], answers, facts)


def _fitting_others(
    lists: WordLists, common: np.ndarray, others: np.ndarray, form: _CweForm, room: int
) -> int:
    """How many uncommon words fit: prefix sums over words and list numbers, one binary search."""
    entries = len(common) * form.often + form.seldom * np.arange(len(others) + 1)
    entries = entries[entries <= lists.num_numbers]
    number_sums = np.concatenate([[0], lists.number_sizes.cumsum()])
    word_sums = np.concatenate([[0], lists.word_sizes[others].cumsum()])
    totals = form.often * lists.word_sizes[common].sum() + number_sums[entries]
    totals = totals + form.seldom * word_sums[: len(entries)]
    fitting = int(np.searchsorted(totals, room, side="right")) - 1
    if fitting < 1:
        raise too_short("cwe", room, f"a list of {totals[1]}")
    if fitting == len(others):
        fault = f"the length is too long for cwe: its vocabulary has {NUM_PAIRS} words"
        raise DataError(f"{fault}; use a shorter one")
    return fitting


def _cwe_example(words: list[str], rng: random.Random, form: _CweForm) -> str:
    """A small solved list and the instruction of the real one."""
    common, others = words[:CWE_NUM_COMMON], words[CWE_NUM_COMMON:]
    entries = common * form.example_often + others * form.example_seldom
    rng.shuffle(entries)
    listed = "".join(f" {number}. {word}" for number, word in enumerate(entries, start=1))
    solved = "".join(f" {number}. {word}" for number, word in enumerate(common, start=1))
    return _CWE_HEAD + listed + "".join(_CWE_TAIL) + solved + "\n\n" + _CWE_HEAD


def coded_words(encoder: PromptEncoder, length: int) -> PieceTable:
    """The noise and a stock of distinct words of random letters, for samples to draw from.

    For prompts of ``length`` tokens three times as many are in stock as one of them draws.
    """
    stock = max(_FWE_SMALLEST_STOCK, 3 * length // _FWE_TOKENS_PER_WORD)
    words = draw_names(random.Random("coded words"), stock, FWE_LETTERS, upper=False)
    return PieceTable([f" {word}" for word in (_FWE_NOISE, *words)], encoder)


def fwe_prompt(encoder: PromptEncoder, coded: PieceTable, rng: random.Random, budget: int) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted.

    Raises:
        DataError: the budget is too small for three words to lead clearly.
    """
    num_words = max(budget // _FWE_TOKENS_PER_WORD, 5)
    # The first piece is the noise.
    words = np.asarray([0, *rng.sample(range(1, len(coded.pieces)), num_words)])
    room = budget - encoder.fixed_total([_FWE_HEAD, *_FWE_TAIL])
    shares = 1.0 / (np.arange(1, len(words) + 1) ** 2 * (math.pi**2 / 6))
    size = _largest_fitting(shares, coded.sizes[words], room)
    counts = np.floor(size * shares).astype(int)
    if not counts[1] > counts[2] > counts[3] > counts[4]:
        raise too_short("fwe", room, "its text")
    text = _shuffled(np.repeat(words, counts), rng)
    facts = {"counts": counts[:5].tolist(), "num_words": len(text)}
    answers = tuple(coded.pieces[word].strip() for word in words[1:4])
    return Draft([_FWE_HEAD, coded.block(text), *_FWE_TAIL], answers, facts)


def _largest_fitting(shares: np.ndarray, sizes: np.ndarray, room: int) -> int:
    """The largest n whose text fits into ``room`` tokens; the text grows with n, so bisection."""
    low, high = 0, max(room, 0) * 2
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.floor(middle * shares).astype(np.int64) @ sizes) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _shuffled(items: np.ndarray, rng: random.Random) -> np.ndarray:
    """In an order of NumPy's legacy generator, whose stream is frozen."""
    return np.random.RandomState(rng.getrandbits(32)).permutation(items)


def vt_prompt(
    encoder: PromptEncoder, noise: NoiseHaystack, rng: random.Random, depth: float, budget: int
) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted; the chain starts at ``depth``.

    Raises:
        DataError: the budget cannot hold example and chain.
    """
    value, example_value = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    names = draw_names(rng, VT_NUM_HOPS + 1, VT_LETTERS)
    head = _vt_example(rng, example_value)
    # Each statement is cut in front of its spaces.
    chain = [re.split("(?= )", line) for line in _statements(names, value)]
    tail = _question(value)
    fixed = [head, *(piece for line in chain for piece in line), *tail]
    room = budget - encoder.fixed_total(fixed)
    num_lines, rest, used = noise.fit(room)
    if num_lines < len(chain):
        raise too_short("vt", room, "its noise")
    # The first hop stands where the sample is asked to have it, within what leaves the others a
    # place of their own; they follow anywhere.
    first = min(round(depth * num_lines), num_lines - VT_NUM_HOPS)
    places = [first, *sorted(rng.sample(range(first + 1, num_lines + 1), VT_NUM_HOPS))]
    woven = haystacks.weave(noise, 0, num_lines, places=places, parts=chain)
    pieces: list[Piece] = [head, *woven, *rest, *tail]
    depths = [place * noise.line_tokens / used for place in places]
    return Draft(pieces, tuple(names), {"depth": depths[0], "depths": depths, "value": value})


def draw_names(rng: random.Random, count: int, letters: int, *, upper: bool = True) -> list[str]:
    """Distinct names of random letters."""
    alphabet = string.ascii_uppercase if upper else string.ascii_lowercase
    return haystacks.draw_distinct(count, lambda: "".join(rng.choices(alphabet, k=letters)))


def _vt_example(rng: random.Random, value: str) -> str:
    """A small solved problem and the instruction of the real one."""
    names = draw_names(rng, VT_NUM_HOPS + 1, _VT_EXAMPLE_LETTERS)
    lines = ["".join(NOISE_LINE)] * _VT_EXAMPLE_LINES
    places = sorted(rng.sample(range(_VT_EXAMPLE_LINES + 1), VT_NUM_HOPS + 1), reverse=True)
    for place, line in zip(places, reversed(_statements(names, value)), strict=True):
        lines.insert(place, line)
    solved = "".join(_question(value)) + " " + ", ".join(names)
    return _VT_HEAD + "".join(lines) + solved + "\n\n" + _VT_HEAD


def _question(value: str) -> list[str]:
    return [
        " (End of the text.)\n",
        f"Question: which variables hold the value {value}?",
        f" Answer: the {VT_NUM_HOPS + 1} variables that hold the value {value} are:",
    ]


def _statements(names: list[str], value: str) -> list[str]:
    hops = [f"VAR {name} = VAR {before}\n" for before, name in zip(names, names[1:], strict=False)]
    return [f"VAR {names[0]} = {value}\n", *hops]
