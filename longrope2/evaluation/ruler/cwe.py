"""Common words, in our own wording: a numbered list in which ten words are far more frequent than all others.

Ten words 30 times and the others 3 times, as in RULER (arXiv 2404.06654), shuffled anew in every sample, behind a solved
example; 6 times and once below 4,096 tokens, or where a tokenizer needs more than the length for the long form. All
lengths use the same vocabulary.
"""

import random
from dataclasses import dataclass

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.ruler.prompts import Block, Draft, PieceTable, PromptEncoder
from longrope2.evaluation.ruler.words import NUM_PAIRS, all_pairs

__all__ = ["WordLists", "cwe_prompt"]

NUM_COMMON = 10
SHORT_BUDGET = 3900  # RULER's border of 4,096 tokens less the answer
HEAD = "The numbered list below repeats some words more often than others. Find out which.\nList:"
TAIL = (" (End of the list.)\n", f"Question: which {NUM_COMMON} words are the most frequent in the list?",
        f" Answer: the {NUM_COMMON} most frequent words in the list are:")  # fmt: skip


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
        example = NUM_COMMON * self.example_often + (self.example_words - NUM_COMMON) * self.example_seldom
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
        return form.smallest * entry + self.encoder.fixed_total([HEAD, *TAIL])

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
        DataError: the budget cannot hold example and common words, or more words are needed than there are.
    """
    form = SHORT if budget < SHORT_BUDGET or lists.expected_tokens(LONG) > budget else LONG
    often, seldom, num_example = form.often, form.seldom, form.example_words
    words = np.asarray(rng.sample(range(NUM_PAIRS), NUM_PAIRS))
    example, common, others = np.split(words, [num_example, num_example + NUM_COMMON])
    head = _example([lists.word(index) for index in example], rng, form)
    room = budget - lists.encoder.fixed_total([head, *TAIL])
    num_others = _fitting(lists, common, others, often, seldom, room)
    entries = np.concatenate([np.repeat(common, often), np.repeat(others[:num_others], seldom)])
    shuffled = np.random.RandomState(rng.getrandbits(32)).permutation(entries)  # its stream is frozen
    facts = {"num_entries": len(entries), "num_words": NUM_COMMON + num_others, "repeats": [often, seldom]}
    answers = tuple(lists.word(index) for index in common)
    return Draft([head, lists.listed(shuffled), *TAIL], answers, facts)


def _fitting(lists: WordLists, common: np.ndarray, others: np.ndarray, often: int, seldom: int, room: int) -> int:
    """How many uncommon words fit: prefix sums over words and over list numbers, one binary search."""
    entries = len(common) * often + seldom * np.arange(len(others) + 1)
    entries = entries[entries <= lists.num_numbers]
    number_sums = np.concatenate([[0], lists.number_sizes.cumsum()])
    word_sums = np.concatenate([[0], lists.word_sizes[others].cumsum()])
    totals = often * lists.word_sizes[common].sum() + seldom * word_sums[: len(entries)] + number_sums[entries]
    fitting = int(np.searchsorted(totals, room, side="right")) - 1
    if fitting < 1:
        raise DataError(
            f"the length is too short for cwe: {room} tokens are left for a list of {totals[1]}; use a longer one"
        )
    if fitting == len(others):
        raise DataError(f"the length is too long for cwe: its vocabulary has {NUM_PAIRS} words; use a shorter one")
    return fitting


def _example(words: list[str], rng: random.Random, form: _Form) -> str:
    """A small solved list and the instruction of the real one."""
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    entries = common * form.example_often + others * form.example_seldom
    rng.shuffle(entries)
    listed = "".join(f" {number}. {word}" for number, word in enumerate(entries, start=1))
    solved = "".join(f" {number}. {word}" for number, word in enumerate(common, start=1))
    return HEAD + listed + "".join(TAIL) + solved + "\n\n" + HEAD
