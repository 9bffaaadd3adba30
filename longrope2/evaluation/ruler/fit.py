"""From a draft to a sample that fills its length and never exceeds it.

The generators fit their prompts by sums over tokens counted once. Whether joined pieces give the ids of the whole text
is a property of the tokenizer, so prompts are tokenized whole to confirm it. If it does not hold, prompts are
tokenized whole every time and the budget is lowered by what they exceed it, which ends: a budget only falls until the
prompt fits or the generator says that the length is too short.
"""

from collections.abc import Callable

import numpy as np

from longrope2.evaluation.ruler.prompts import Draft, PromptEncoder, text_of
from longrope2.evaluation.samples import Sample

__all__ = ["Build", "fitted_sample", "joins_exactly"]

Build = Callable[[int], Draft]
"""A prompt of at most so many tokens, BOS not counted; the same budget gives the same prompt."""
ENOUGH = 0.98


def joins_exactly(build: Build, encoder: PromptEncoder, budget: int) -> bool:
    """Whether the ids of a prompt's pieces are those of its text."""
    draft = build(budget)
    return np.array_equal(encoder.join(draft.pieces), encoder.encode_text(text_of(draft.pieces)))


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
    """Build, tokenize whole, and correct the budget by what is over or missing."""
    budget, best, raised = limit, None, False
    while best is None:
        draft = build(budget)
        ids = np.asarray(encoder.encode_text(text_of(draft.pieces)), dtype=np.int32)
        if len(ids) > limit:
            budget -= len(ids) - limit
        else:
            best = draft, ids
    while not raised and len(best[1]) < ENOUGH * limit:
        raised = True  # one try: the tokens that joining makes are about as many again
        draft = build(budget + (limit - len(best[1])))
        ids = np.asarray(encoder.encode_text(text_of(draft.pieces)), dtype=np.int32)
        best = (draft, ids) if len(best[1]) < len(ids) <= limit else best
    return best
