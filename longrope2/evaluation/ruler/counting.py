"""Common words, in our own wording: a numbered list in which ten words are far more frequent than
all others.

Ten words 30 times and the others 3 times, as in RULER (arXiv 2404.06654), shuffled anew in every
sample, behind a solved example; 6 times and once below 4,096 tokens, or where a tokenizer needs
more than the length for the long form. All lengths use the same vocabulary.

Frequent coded words, in our own wording: made-up words with zeta-distributed counts, of which three
lead.

Counts are floor(n k^-2 / zeta(2)) for rank k, as in RULER (arXiv 2404.06654): rank 1 is noise
(dots), ranks 2 to 4 are the answer. The words and their order are drawn anew for every sample.

Variable tracking, in our own wording: a chain of assignments among lines of noise; which variables
hold the value?

One chain of four hops, as in RULER (arXiv 2404.06654): five variables hold one value. Names are
distinct, and a short solved example stands in front of the task, with its own names and value in
every sample.
"""

import math
import random
import string
from dataclasses import dataclass

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.prompts import Block, Draft, Piece, PieceTable, PromptEncoder
from longrope2.evaluation.ruler.haystacks import NOISE_LINE, NUM_PAIRS, NoiseHaystack, all_pairs

NUM_COMMON = 10
SHORT_BUDGET = 3900  # RULER's border of 4,096 tokens less the answer
CWE_HEAD = (
    "The numbered list below repeats some words more often than others. Find out which.\nList:"
)
CWE_TAIL = (" (End of the list.)\n", f"Question: which {NUM_COMMON} words are the most frequent in the list?",
        f" Answer: the {NUM_COMMON} most frequent words in the list are:")  # fmt: skip
ZETA_2 = math.pi**2 / 6
TOKENS_PER_WORD_IN_VOCABULARY = 50  # RULER: one coded word per 50 tokens of input
FWE_LETTERS = 6
NOISE = "..."
SMALLEST_STOCK = 2048
FWE_HEAD = "The text below is written in code. Count how often each coded word comes up; dots are no words.\nText:"
FWE_TAIL = (" (End of the text.)\n", "Question: which three coded words come up most often?",
        " Answer: the three coded words that come up most often in the text are:")  # fmt: skip
NUM_HOPS = 4
VT_HEAD = "Some lines of the text below assign values to variables. Keep track of them.\n"
EXAMPLE_LINES = 4
EXAMPLE_LETTERS, VT_LETTERS = 3, 5


@dataclass(frozen=True)
class _Form:
    """How often words are repeated, in the list and in its example."""

    often: int
    seldom: int
    example_words: int
    example_often: int
    example_seldom: int

    @property
    def smallest(self) -> int:
        """Entries of the example and of a list with a few uncommon words."""
        example = (
            NUM_COMMON * self.example_often
            + (self.example_words - NUM_COMMON) * self.example_seldom
        )
        return example + NUM_COMMON * (self.often + 2 * self.seldom)


LONG = _Form(30, 3, 40, 10, 3)
SHORT = _Form(6, 1, 12, 2, 1)


class WordLists:
    """All words and the numbers in front of them, tokenized once.

    Args:
        encoder: Tokenizer of the prompts.
        most_entries: Longest list that will be made.
    """

    def __init__(self, encoder: PromptEncoder, most_entries: int) -> None:
        numbers = [f" {number}." for number in range(1, most_entries + 1)]
        self.encoder = encoder
        self.num_numbers = len(numbers)
        self.table = PieceTable([*numbers, *(f" {word}" for word in all_pairs(joint=""))], encoder)

    @property
    def number_sizes(self) -> np.ndarray:
        """Tokens of each list number, from 1."""
        return self.table.sizes[: self.num_numbers]

    @property
    def word_sizes(self) -> np.ndarray:
        """Tokens of each word, [NUM_PAIRS]."""
        return self.table.sizes[self.num_numbers :]

    def expected_tokens(self, form: _Form) -> float:
        """Tokens that the smallest prompt of a form takes on average."""
        entry = self.word_sizes.mean() + self.number_sizes[: form.smallest].mean()
        return form.smallest * entry + self.encoder.fixed_total([CWE_HEAD, *CWE_TAIL])

    def listed(self, words: np.ndarray) -> Block:
        """Numbered list of words, given by their indices."""
        pieces = np.empty(2 * len(words), dtype=np.int64)
        pieces[0::2] = np.arange(len(words))
        pieces[1::2] = self.num_numbers + words
        return self.table.block(pieces)

    def word(self, index: int) -> str:
        """One word."""
        return self.table.pieces[self.num_numbers + index].strip()


def cwe_prompt(lists: WordLists, rng: random.Random, budget: int) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted.

    Raises:
        DataError: the budget cannot hold example and common words, or more words are needed than
            there are.
    """
    form = SHORT if budget < SHORT_BUDGET or lists.expected_tokens(LONG) > budget else LONG
    often, seldom, num_example = form.often, form.seldom, form.example_words
    words = np.asarray(rng.sample(range(NUM_PAIRS), NUM_PAIRS))
    example, common, others = np.split(words, [num_example, num_example + NUM_COMMON])
    head = _cwe_example([lists.word(index) for index in example], rng, form)
    room = budget - lists.encoder.fixed_total([head, *CWE_TAIL])
    num_others = _cwe_fitting(lists, common, others, often, seldom, room)
    entries = np.concatenate([np.repeat(common, often), np.repeat(others[:num_others], seldom)])
    shuffled = np.random.RandomState(rng.getrandbits(32)).permutation(
        entries
    )  # its stream is frozen
    facts = {
        "num_entries": len(entries),
        "num_words": NUM_COMMON + num_others,
        "repeats": [often, seldom],
    }
    answers = tuple(lists.word(index) for index in common)
    return Draft([head, lists.listed(shuffled), *CWE_TAIL], answers, facts)


def _cwe_fitting(
    lists: WordLists, common: np.ndarray, others: np.ndarray, often: int, seldom: int, room: int
) -> int:
    """How many uncommon words fit: prefix sums over words and over list numbers, one binary search."""
    entries = len(common) * often + seldom * np.arange(len(others) + 1)
    entries = entries[entries <= lists.num_numbers]
    number_sums = np.concatenate([[0], lists.number_sizes.cumsum()])
    word_sums = np.concatenate([[0], lists.word_sizes[others].cumsum()])
    totals = (
        often * lists.word_sizes[common].sum()
        + seldom * word_sums[: len(entries)]
        + number_sums[entries]
    )
    fitting = int(np.searchsorted(totals, room, side="right")) - 1
    if fitting < 1:
        raise DataError(
            f"the length is too short for cwe: {room} tokens are left for a list of {totals[1]}; use a longer one"
        )
    if fitting == len(others):
        raise DataError(
            f"the length is too long for cwe: its vocabulary has {NUM_PAIRS} words; use a shorter one"
        )
    return fitting


def _cwe_example(words: list[str], rng: random.Random, form: _Form) -> str:
    """A small solved list and the instruction of the real one."""
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    entries = common * form.example_often + others * form.example_seldom
    rng.shuffle(entries)
    listed = "".join(f" {number}. {word}" for number, word in enumerate(entries, start=1))
    solved = "".join(f" {number}. {word}" for number, word in enumerate(common, start=1))
    return CWE_HEAD + listed + "".join(CWE_TAIL) + solved + "\n\n" + CWE_HEAD


class CodedWords:
    """A stock of distinct words of random letters, tokenized once; samples draw theirs from it.

    Args:
        encoder: Tokenizer of the prompts.
        length: Tokens of the prompts; three times as many words are in stock as one of them draws.
    """

    def __init__(self, encoder: PromptEncoder, length: int) -> None:
        self.stock = max(SMALLEST_STOCK, 3 * length // TOKENS_PER_WORD_IN_VOCABULARY)
        rng = random.Random("coded words")
        words: dict[str, None] = {}
        while len(words) < self.stock:
            words["".join(rng.choices(string.ascii_lowercase, k=FWE_LETTERS))] = None
        self.encoder = encoder
        self.table = PieceTable([f" {word}" for word in (NOISE, *words)], encoder)


def fwe_prompt(coded: CodedWords, rng: random.Random, budget: int) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted.

    Raises:
        DataError: the budget is too small for three words to lead clearly.
    """
    num_words = max(budget // TOKENS_PER_WORD_IN_VOCABULARY, 5)
    words = np.asarray(
        [0, *rng.sample(range(1, coded.stock + 1), num_words)]
    )  # the stock's first piece is the noise
    room = budget - coded.encoder.fixed_total([FWE_HEAD, *FWE_TAIL])
    shares = 1.0 / (np.arange(1, len(words) + 1) ** 2 * ZETA_2)
    counts = np.floor(_fitting(shares, coded.table.sizes[words], room) * shares).astype(int)
    if not counts[1] > counts[2] > counts[3] > counts[4]:
        raise DataError(
            f"the length is too short for fwe: {room} tokens are left for its text; use a longer one"
        )
    text = np.random.RandomState(rng.getrandbits(32)).permutation(
        np.repeat(words, counts)
    )  # its stream is frozen
    facts = {"counts": [int(count) for count in counts[:5]], "num_words": len(text)}
    answers = tuple(coded.table.pieces[word].strip() for word in words[1:4])
    return Draft([FWE_HEAD, coded.table.block(text), *FWE_TAIL], answers, facts)


def _fitting(shares: np.ndarray, sizes: np.ndarray, room: int) -> int:
    """The largest n whose text fits into ``room`` tokens; the text grows with n, so bisection finds it."""
    low, high = 0, max(room, 0) * 2
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.floor(middle * shares).astype(np.int64) @ sizes) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def vt_prompt(
    encoder: PromptEncoder, noise: NoiseHaystack, rng: random.Random, depth: float, budget: int
) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted; the chain starts at ``depth``, its
    hops follow anywhere.

    Raises:
        DataError: the budget cannot hold example and chain.
    """
    value, example_value = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    names = _draw_names(rng, VT_LETTERS)
    pieces: list[Piece] = list(_vt_example(rng, example_value))
    chain = [_pieces(line) for line in _statements(names, value)]
    tail = _question(value)
    fixed = [
        piece
        for piece in [*pieces, *(p for line in chain for p in line), *tail]
        if isinstance(piece, str)
    ]
    room = budget - encoder.fixed_total(fixed)
    num_lines, rest, used = noise.fit(room) if room > 0 else (0, [], 0)
    if num_lines < len(chain):
        raise DataError(
            f"the length is too short for vt: {room} tokens are left for its noise; use a longer one"
        )
    # The first hop stands where the sample is asked to have it, within what leaves the others a
    # place of their own.
    first = min(round(depth * num_lines), num_lines - NUM_HOPS)
    places = [first, *sorted(rng.sample(range(first + 1, num_lines + 1), NUM_HOPS))]
    done = 0
    for place, line in zip(places, chain, strict=True):
        pieces += [*noise.lines(place - done), *line]
        done = place
    pieces += [*noise.lines(num_lines - done), *rest, *tail]
    depths = [place * noise.line_tokens / used for place in places]
    return Draft(pieces, tuple(names), {"depth": depths[0], "depths": depths, "value": value})


def _vt_example(rng: random.Random, value: str) -> list[str]:
    """A small solved problem and the instruction of the real one."""
    names = _draw_names(rng, EXAMPLE_LETTERS)
    lines = ["".join(NOISE_LINE)] * EXAMPLE_LINES
    places = sorted(rng.sample(range(EXAMPLE_LINES + 1), NUM_HOPS + 1), reverse=True)
    for place, line in zip(places, reversed(_statements(names, value)), strict=True):
        lines.insert(place, line)
    solved = "".join(_question(value)) + " " + ", ".join(names)
    return [VT_HEAD + "".join(lines) + solved + "\n\n" + VT_HEAD]


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
