"""Frequent coded words, in our own wording: made-up words with zeta-distributed counts, of which three lead.

Counts are floor(n k^-2 / zeta(2)) for rank k, as in RULER (arXiv 2404.06654): rank 1 is noise (dots), ranks 2 to 4 are
the answer. The words and their order are drawn anew for every sample.
"""

import math
import random
import string

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.ruler.prompts import Draft, PieceTable, PromptEncoder

__all__ = ["CodedWords", "fwe_prompt"]

ZETA_2 = math.pi**2 / 6
TOKENS_PER_WORD_IN_VOCABULARY = 50  # RULER: one coded word per 50 tokens of input
LETTERS = 6
NOISE = "..."
SMALLEST_STOCK = 2048
HEAD = "The text below is written in code. Count how often each coded word comes up; dots are no words.\nText:"
TAIL = (" (End of the text.)\n", "Question: which three coded words come up most often?",
        " Answer: the three coded words that come up most often in the text are:")  # fmt: skip


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
            words["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
        self.encoder = encoder
        self.table = PieceTable([f" {word}" for word in (NOISE, *words)], encoder)


def fwe_prompt(coded: CodedWords, rng: random.Random, budget: int) -> Draft:
    """A prompt of at most ``budget`` tokens, BOS not counted.

    Raises:
        DataError: the budget is too small for three words to lead clearly.
    """
    num_words = max(budget // TOKENS_PER_WORD_IN_VOCABULARY, 5)
    words = np.asarray([0, *rng.sample(range(1, coded.stock + 1), num_words)])  # the stock's first piece is the noise
    room = budget - coded.encoder.fixed_total([HEAD, *TAIL])
    shares = 1.0 / (np.arange(1, len(words) + 1) ** 2 * ZETA_2)
    counts = np.floor(_fitting(shares, coded.table.sizes[words], room) * shares).astype(int)
    if not counts[1] > counts[2] > counts[3] > counts[4]:
        raise DataError(f"the length is too short for fwe: {room} tokens are left for its text; use a longer one")
    text = np.random.RandomState(rng.getrandbits(32)).permutation(np.repeat(words, counts))  # its stream is frozen
    facts = {"counts": [int(count) for count in counts[:5]], "num_words": len(text)}
    answers = tuple(coded.table.pieces[word].strip() for word in words[1:4])
    return Draft([HEAD, coded.table.block(text), *TAIL], answers, facts)


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
