"""Greedy answers that read a common beginning of prompts once.

Prompts are read in chunks of fixed size, counted from the first token. The cache of the last prompt is kept, and the
next prompt takes over the whole chunks that both have in common: those keys and values were computed from the same ids
in the same chunks, so they are bit for bit what reading them again would give. A cache is taken over only under the same
weights and the same RoPE table; a sequence that will outgrow L0 starts anew.

Shape legend: T = tokens, V = vocabulary.
"""

import weakref
from collections.abc import Collection, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from longrope2.evaluation.samples import Sample
from longrope2.inference import generate_tokens, window_for_length
from longrope2.inference.cache import next_logits
from longrope2.model import WindowedModel
from longrope2.rope import Window

__all__ = ["PrefixDecoder"]


class PrefixDecoder:
    """Answers one question after another, keeping the last prompt's keys and values.

    Attributes:
        num_reused: Prompt tokens that did not have to be read again, over all questions.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.num_reused = 0
        self._cache: DynamicCache | None = None
        self._prompt_T = np.empty(0, dtype=np.int32)
        self._table = b""
        self._weights: weakref.ref | None = None

    def __call__(self, model: WindowedModel, samples: Sequence[Sample], stop_ids: Collection[int]) -> list[list[int]]:
        """Greedy answers: the new ids of each, a stop id included."""
        return [self._answer(model, sample, stop_ids) for sample in samples]

    def forget(self) -> None:
        """Free the cache."""
        self._cache = None

    def _answer(self, model: WindowedModel, sample: Sample, stop_ids: Collection[int]) -> list[int]:
        """One answer."""
        original_len = model.factors.geometry.original_len
        window = window_for_length(len(sample.prompt_T), original_len)
        longest_read = len(sample.prompt_T) + sample.max_new_tokens - 1
        if window_for_length(longest_read, original_len) is not window or longest_read >= model.factors.target_len:
            self.forget()  # it changes its window on the way, or does not fit: the plain decoder knows both
            tokens = generate_tokens(
                model, sample.prompt_T.tolist(), max_new_tokens=sample.max_new_tokens, stop_ids=stop_ids,
                prefill_chunk=self.chunk_tokens,
            )  # fmt: skip
            return [token.token_id for token in tokens]
        try:
            return self._decode(model, sample, window, frozenset(stop_ids))
        except BaseException:
            self.forget()
            raise

    def _decode(self, model: WindowedModel, sample: Sample, window: Window, stop_ids: frozenset[int]) -> list[int]:
        """Read what is new of the prompt, then decode."""
        cache, start = self._taken_over(model, sample.prompt_T, window)
        self.num_reused += start
        prompt_1T = torch.from_numpy(sample.prompt_T.astype(np.int64))[None]
        logits_1V = torch.empty(0)
        for first in range(start, prompt_1T.shape[1], self.chunk_tokens):
            logits_1V = next_logits(model, prompt_1T[:, first : first + self.chunk_tokens], cache, window)
        new_ids = [int(logits_1V[0].argmax())]
        while len(new_ids) < sample.max_new_tokens and new_ids[-1] not in stop_ids:
            new_ids.append(int(next_logits(model, torch.tensor([new_ids[-1:]]), cache, window)[0].argmax()))
        self._cache, self._prompt_T = cache, sample.prompt_T
        self._table, self._weights = _table(model, window), weakref.ref(model.hf)
        return new_ids

    def _taken_over(self, model: WindowedModel, prompt_T: np.ndarray, window: Window) -> tuple[DynamicCache, int]:
        """The last cache cut back to the whole chunks in common, or a fresh one; and how many tokens it holds."""
        cache, self._cache = self._cache, None
        same_weights = self._weights is not None and self._weights() is model.hf
        if cache is None or not same_weights or self._table != _table(model, window):
            return DynamicCache(), 0
        # The last token of a prompt is always read: its logits are needed.
        both = min(len(prompt_T) - 1, len(self._prompt_T))
        differ = np.flatnonzero(prompt_T[:both] != self._prompt_T[:both])
        common = int(differ[0]) if len(differ) else both
        kept = common // self.chunk_tokens * self.chunk_tokens
        if kept == 0:
            return DynamicCache(), 0
        if (removed := cache.get_seq_length() - kept) > 0:
            cache.crop(-removed)
        return cache, kept


def _table(model: WindowedModel, window: Window) -> bytes:
    """All that decides the RoPE of a window."""
    scale = repr(model.factors.attention_scale(window)).encode()
    return model.factors.inverse_frequencies(window).numpy().tobytes() + scale
