"""What a model makes of given tokens: retrieved values and negative log-likelihoods, one forward per batch.

Only the positions that are scored pass through the LM head.

Shape legend: B = rows, T = tokens of a row, K = scored tokens of a row, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from longrope2.errors import DataError
from longrope2.inference import window_for_length
from longrope2.model import WindowedModel, token_nll
from longrope2.segments.needle_set import NeedleSet

__all__ = ["ValueScore", "WindowScore", "score_values", "score_windows"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class ValueScore:
    """How the model did on the value of one needle sample."""

    exact: bool
    """Greedy decoding after the prompt would give exactly the value's tokens."""
    nll: float
    """Sum of the negative log-likelihoods of the value's tokens, natural logarithm."""
    num_tokens: int
    """Tokens of the value."""


@dataclass(frozen=True)
class WindowScore:
    """How likely the model finds the scored tokens of one text window."""

    nll: float
    """Sum of their negative log-likelihoods, natural logarithm."""
    num_tokens: int
    """How many they are."""


@torch.inference_mode()
def score_values(model: WindowedModel, needle_set: NeedleSet, batch_tokens: int) -> list[ValueScore]:
    """Exact match and likelihood of the value of every sample, from one teacher-forced forward per batch.

    Greedy decoding reproduces the value exactly when, given the prompt and any part of the value, the most likely next
    token is the value's next one. That is what the argmax at the teacher-forced positions says, so no token is ever
    generated (tests/reference compares with real greedy generation). The two agree as long as prompt and value are read
    in the same window, which is checked.

    Args:
        model: Model with the subject's factors; the window follows from the length of the samples.
        needle_set: Samples of one length.
        batch_tokens: Tokens of one forward pass; at least one sample is taken.

    Raises:
        DataError: the window changes inside the value of a sample.
    """
    original_len = model.factors.geometry.original_len
    window = window_for_length(needle_set.length, original_len)
    for sample in needle_set.samples:
        if window_for_length(sample.value_start, original_len) is not window:
            raise DataError(
                f"evaluation.lengths: a needle sample of {needle_set.length} tokens has its value across the end of "
                f"the original window ({original_len} tokens); use {original_len} or a length well above it"
            )
    scores = []
    for batch in _batches(needle_set.samples, needle_set.length, batch_tokens):
        tokens_BT = torch.from_numpy(np.stack([sample.through_value for sample in batch])).to(model.hf.device)
        first = min(sample.value_start for sample in batch)
        logits_BKV = model.logits(tokens_BT, window, keep=slice(first - 1, -1))
        targets_BK = tokens_BT[:, first:]
        hits_BK = (logits_BKV.argmax(-1) == targets_BK).cpu()
        nll_BK = -torch.log_softmax(logits_BKV, dim=-1).gather(-1, targets_BK[..., None]).squeeze(-1).cpu()
        for row, sample in enumerate(batch):
            skipped = sample.value_start - first
            exact, nll = bool(hits_BK[row, skipped:].all()), float(nll_BK[row, skipped:].sum())
            scores.append(ValueScore(exact, nll, len(sample.through_value) - sample.value_start))
    return scores


def score_windows(
    model: WindowedModel, windows: Sequence[np.ndarray], *, num_scored: int | None, batch_tokens: int
) -> list[WindowScore]:
    """Negative log-likelihood of text windows.

    Args:
        model: Model with the subject's factors; the RoPE follows from each text window's length.
        windows: Token ids of each window, at least two.
        num_scored: Only so many last tokens of each window are scored; None scores all but the first.
        batch_tokens: Tokens of one forward pass; windows of equal length share one.

    Returns:
        One score per window, in the order given.
    """
    by_length: dict[int, list[int]] = {}
    for index, window_tokens in enumerate(windows):
        by_length.setdefault(len(window_tokens), []).append(index)
    scores: dict[int, WindowScore] = {}
    for length, indices in by_length.items():
        window = window_for_length(length, model.factors.geometry.original_len)
        num_targets = length - 1 if num_scored is None else min(num_scored, length - 1)
        for batch in _batches(indices, length, batch_tokens):
            tokens_BT = torch.from_numpy(np.stack([windows[index] for index in batch]).astype(np.int64))
            nll_BK = token_nll(model, tokens_BT.to(model.hf.device), window, first_scored=length - num_targets)
            sums = nll_BK.double().sum(dim=1).tolist()
            scores.update({index: WindowScore(nll, num_targets) for index, nll in zip(batch, sums, strict=True)})
    return [scores[index] for index in range(len(windows))]


def _batches(items: Sequence[Item], length: int, batch_tokens: int) -> Iterator[Sequence[Item]]:
    """Consecutive groups of items of ``length`` tokens each that fit one forward pass."""
    size = max(batch_tokens // length, 1)
    for first in range(0, len(items), size):
        yield items[first : first + size]
