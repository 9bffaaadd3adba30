"""Prompts as token ids that fit: whole, cut in the middle where upstream cuts, or refused.

Shape legend: T = tokens of a prompt.
"""

from typing import Any

import numpy as np

from longrope2.errors import DataError
from longrope2.evaluation.ruler.prompts import PromptEncoder
from longrope2.evaluation.samples import Sample

__all__ = ["cut_sample", "whole_sample"]


def cut_sample(
    encoder: PromptEncoder,
    prompt: str,
    answers: tuple[str, ...],
    *,
    max_new_tokens: int,
    length: int,
    needle: str | None = None,
    facts: dict[str, Any] | None = None,
) -> Sample:
    """A prompt whose middle is cut out if it is too long: the first and the last half of the budget stay.

    Upstream turns both halves into text and tokenizes that anew, which may move a token or two at the seam; here the ids
    themselves are cut. BOS counts. The budget leaves room for the answer, so prompt and answer fit into ``length``.

    Args:
        encoder: The model's tokenizer.
        prompt: The whole prompt.
        answers: For the score.
        max_new_tokens: Tokens of the answer.
        length: Tokens that prompt and answer may take together.
        needle: Text that must be left for the question to be answerable; whether it is goes into the facts.
        facts: Further facts about the sample.

    Raises:
        DataError: the answer alone takes the whole length.
    """
    ids = encoder.bos_ids + encoder.encode_text(prompt)
    budget = length - max_new_tokens
    if budget < 2:
        raise DataError(
            f"suite.long_tasks.length={length} leaves no room for a prompt: an answer may take {max_new_tokens} tokens"
        )
    half = budget // 2
    kept = ids if len(ids) <= budget else [*ids[:half], *ids[len(ids) - half :]]
    known = dict(facts or {}) | {"prompt_tokens": len(kept), "tokens_cut": len(ids) - len(kept)}
    if needle is not None:
        parts = [ids] if len(kept) == len(ids) else [ids[:half], ids[len(ids) - half :]]
        known["needle_survived"] = any(needle in encoder.decode(part) for part in parts)
    return Sample(np.array(kept, dtype=np.int32), answers, max_new_tokens, known)


def whole_sample(
    encoder: PromptEncoder, prompt: str, answers: tuple[str, ...], *, max_new_tokens: int, length: int, name: str
) -> Sample:
    """A prompt that upstream never cuts.

    Raises:
        DataError: it does not fit; says how many tokens it takes.
    """
    ids = encoder.bos_ids + encoder.encode_text(prompt)
    if len(ids) + max_new_tokens > length:
        raise DataError(
            f"{name}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed {length} tokens, and this "
            "benchmark is never cut: it would lose the passages asked for. Use a smaller size of it, or leave it out"
        )
    return Sample(np.array(ids, dtype=np.int32), answers, max_new_tokens, {"prompt_tokens": len(ids), "tokens_cut": 0})
