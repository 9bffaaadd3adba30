"""From a draft to a sample that fills its length and never exceeds it.

The generators fit their prompts by sums over tokens counted once. Whether joined pieces give the ids of the whole text
is a property of the tokenizer, so it is confirmed by tokenizing whole texts: thousands of words in random order, and
the first prompt of every file of samples. If it does not hold, prompts are
tokenized whole every time and the budget is lowered by what they exceed it, which ends: a budget only falls until the
prompt fits or the generator says that the length is too short.
"""

import random
import uuid
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from longrope2.evaluation.ruler.prompts import Draft, Piece, PromptEncoder, text_of
from longrope2.evaluation.ruler.words import draw_pairs
from longrope2.evaluation.samples import Sample

__all__ = ["Build", "fitted_sample", "joins_exactly"]

Build = Callable[[int], Draft]
"""A prompt of at most so many tokens, BOS not counted; the same budget gives the same prompt."""
ENOUGH = 0.99
TRIES = 10


def joins_exactly(build: Build, encoder: PromptEncoder, budget: int) -> bool:
    """Whether the ids of a prompt's pieces are those of its text: for this prompt, and for words of all kinds."""
    if not _joins_words(encoder):
        return False
    draft = build(budget)
    return np.array_equal(encoder.join(draft.pieces), encoder.encode_text(text_of(draft.pieces)))


@lru_cache(maxsize=8)
def _joins_words(encoder: PromptEncoder) -> bool:
    """The same for a few thousand words, numbers, uuids and line ends in random order: no single prompt shows it all."""
    rng = random.Random("joins")
    pieces: list[Piece] = ["Text:"]
    for pair in draw_pairs(rng, 1000):
        number = str(rng.randrange(10 ** rng.randint(1, 7)))
        word = rng.choice([pair, pair.replace("-", " "), pair.replace("-", ""), f"({pair})", number, f"{number}.", "...",
                           pair.upper(), str(uuid.UUID(int=rng.getrandbits(128)))])  # fmt: skip
        pieces += rng.choice([[f" {word}"], [f" {word}.\n", pair], [f" {word},"], [f" {word}\n", pair.upper()]])
    return np.array_equal(encoder.join(pieces), encoder.encode_text(text_of(pieces)))


def fitted_sample(
    build: Build, encoder: PromptEncoder, *, length: int, max_new_tokens: int, tokenize_whole: bool = False
) -> Sample:
    """The sample of a generator at a length.

    Args:
        build: The generator.
        encoder: Tokenizer of the model.
        length: Tokens that BOS, prompt and answer may take together.
        max_new_tokens: Tokens kept free for the answer.
        tokenize_whole: The tokenizer's ids are not those of joined pieces (``joins_exactly``).

    Raises:
        DataError: the length is too short for the task, as the generator says.
    """
    budget = length - max_new_tokens - len(encoder.bos_ids)
    if tokenize_whole:
        draft, ids = _fit_whole(build, encoder, budget)
    else:
        draft = build(budget)
        ids = encoder.join(draft.pieces)
    assert len(ids) <= budget, f"a prompt of {len(ids)} tokens was built for {budget}"
    prompt = np.concatenate([np.asarray(encoder.bos_ids, dtype=np.int32), ids])
    characters = sum(len(piece) if isinstance(piece, str) else piece.num_characters for piece in draft.pieces)
    facts = {**draft.facts, "num_characters": characters, "fill": (len(prompt) + max_new_tokens) / length}
    return Sample(prompt, draft.answers, max_new_tokens, facts)


def _fit_whole(build: Build, encoder: PromptEncoder, limit: int) -> tuple[Draft, np.ndarray]:
    """Build and tokenize whole; lower the budget until the prompt fits, then close in on the largest that does."""

    def attempt(budget: int) -> tuple[Draft, np.ndarray]:
        draft = build(budget)
        return draft, np.asarray(encoder.encode_text(text_of(draft.pieces)), dtype=np.int32)

    fitting, exceeding = limit, None
    best = attempt(fitting)
    while len(best[1]) > limit:
        exceeding = fitting
        fitting -= len(best[1]) - limit
        best = attempt(fitting)
    for _ in range(TRIES):
        if len(best[1]) >= ENOUGH * limit:
            break
        budget = int(fitting * limit / len(best[1])) if exceeding is None else (fitting + exceeding) // 2
        draft, ids = attempt(budget)
        if len(ids) > limit:
            exceeding = budget
        elif len(ids) > len(best[1]):
            fitting, best = budget, (draft, ids)
    return best
