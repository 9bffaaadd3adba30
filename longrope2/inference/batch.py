"""Greedy generation for many prompts, each in the window that its own length asks for.

Prompts are read one at a time, bit for bit as the prompt alone. Only the decoding is batched, over
rows of one window and similar length: shorter rows are padded on the left of the cache, masked
there, and keep their positions. Matrix products of another shape round differently, by about 1e-6
of the largest logit in float32 (tests/reference/test_generation_batch.py); ``max_rows=1`` is bit
for bit generation one by one. A row that outgrows L0 leaves its batch and is read again with the
rescaled RoPE once the short rows are done.

Shape legend: B = rows, V = vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from longrope2.errors import DataError
from longrope2.inference import generation
from longrope2.inference.cache import join_caches, next_logits, single_row
from longrope2.inference.config import KvPolicy
from longrope2.inference.generation import GeneratedToken
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window


@dataclass
class _Row:
    """One sequence on its way."""

    ids: list[int]
    num_left: int
    """New tokens it may still get; 0 once it has stopped."""
    tokens: list[GeneratedToken] = field(default_factory=list)
    cache: DynamicCache | None = None
    """Its keys and values while it belongs to no batch."""

    def append(self, token_id: int, window: Window, stop_ids: frozenset[int]) -> None:
        """Take the token chosen for it."""
        self.ids.append(token_id)
        self.tokens.append(GeneratedToken(token_id, window))
        self.num_left = 0 if token_id in stop_ids else self.num_left - 1


def generate_batch(
    model: WindowedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    stop_ids: Collection[int] = (),
    prefill_chunk: int | None = None,
    kv_policy: KvPolicy = KvPolicy.reprefill,
    max_rows: int = 8,
) -> list[list[GeneratedToken]]:
    """Continue many sequences, each with its most likely tokens.

    Options are those of ``generate_tokens``; ``max_new_tokens`` is one for all or one per prompt,
    and ``max_rows`` sequences are decoded together: their caches stand in memory at the same time.

    Returns:
        New tokens of each prompt, in the order given.

    Raises:
        DataError: an empty prompt, one that exceeds the target length, or an option outside its
            range; names the prompt.
    """
    if max_rows < 1:
        raise DataError(f"max_rows={max_rows} must be at least 1")
    rows = _checked_rows(model, prompts, max_new_tokens, prefill_chunk)
    group = _GroupDecoder(model, frozenset(stop_ids), prefill_chunk, kv_policy)
    # A row only ever moves from the first window to the second.
    for window in (Window.SHORT, Window.LONG):
        waiting = [row for row in rows if group.belongs(row, window)]
        waiting.sort(key=lambda row: len(row.ids))
        for first in range(0, len(waiting), max_rows):
            group.decode(waiting[first : first + max_rows], window)
    return [row.tokens for row in rows]


def _checked_rows(
    model: WindowedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    prefill_chunk: int | None,
) -> list[_Row]:
    """A row per prompt; all prompts are checked before the first is read."""
    is_common = isinstance(max_new_tokens, int)
    limits = [max_new_tokens] * len(prompts) if is_common else list(max_new_tokens)
    if len(limits) != len(prompts):
        fault = f"max_new_tokens has {len(limits)} values for {len(prompts)} prompts"
        raise DataError(f"{fault}; give one each, or one")
    target_len = model.factors.target_len
    for number, (ids, limit) in enumerate(zip(prompts, limits, strict=True)):
        generation.check_request(ids, limit, target_len, prefill_chunk, name=f"prompt {number}")
    return [_Row(list(ids), limit) for ids, limit in zip(prompts, limits, strict=True)]


@dataclass(frozen=True)
class _GroupDecoder:
    """Decodes rows of one window together."""

    model: WindowedModel
    stop_ids: frozenset[int]
    prefill_chunk: int | None
    kv_policy: KvPolicy

    def belongs(self, row: _Row, window: Window) -> bool:
        """Whether the row still wants tokens and its length asks for this window."""
        original_len = self.model.factors.geometry.original_len
        its_window = generation.window_for_length(len(row.ids), original_len)
        return row.num_left > 0 and its_window is window

    def decode(self, rows: list[_Row], window: Window) -> None:
        """Continue all rows until each has stopped or outgrown the window."""
        for row in rows:
            chunk, policy = self.prefill_chunk, self.kv_policy
            logits_V, row.cache = generation.switch_window(
                self.model, row.ids, row.cache, prefill_chunk=chunk, kv_policy=policy
            )
            row.append(int(logits_V.argmax()), window, self.stop_ids)
        active = self._still_in(rows, window)
        if not active:
            return
        cache, first_key_B = join_caches([row.cache for row in active if row.cache is not None])
        for row in active:
            row.cache = None
        while active:
            token_ids = self._step(active, cache, first_key_B, window)
            for row, token_id in zip(active, token_ids, strict=True):
                row.append(token_id, window, self.stop_ids)
            active, first_key_B = self._drop_leavers(active, cache, first_key_B, window)

    def _step(
        self, rows: list[_Row], cache: DynamicCache, first_key_B: Tensor, window: Window
    ) -> list[int]:
        """The most likely next token of each row."""
        device = self.model.hf.device
        tokens_B1 = torch.tensor([row.ids[-1:] for row in rows])
        positions_B1 = torch.tensor([[len(row.ids) - 1] for row in rows], device=device)
        padding_B = first_key_B.to(device) if first_key_B.any() else None
        logits_BV = next_logits(
            self.model, tokens_B1, cache, window, positions_BT=positions_B1, first_key_B=padding_B
        )
        return logits_BV.argmax(dim=-1).tolist()

    def _drop_leavers(
        self, rows: list[_Row], cache: DynamicCache, first_key_B: Tensor, window: Window
    ) -> tuple[list[_Row], Tensor]:
        """Take rows that stopped or outgrew the window out; one to be re-rotated keeps its keys."""
        staying = [number for number, row in enumerate(rows) if self.belongs(row, window)]
        if len(staying) == len(rows):
            return rows, first_key_B
        if self.kv_policy is KvPolicy.rerotate:
            for number in set(range(len(rows))) - set(staying):
                if rows[number].num_left > 0:
                    rows[number].cache = single_row(cache, number, int(first_key_B[number]))
        index_B = torch.tensor(staying, dtype=torch.long)
        cache.batch_select_indices(index_B.to(self.model.hf.device))
        return [rows[number] for number in staying], first_key_B[index_B]

    def _still_in(self, rows: list[_Row], window: Window) -> list[_Row]:
        """Rows that go on in this window; one that leaves keeps its cache only to be re-rotated."""
        staying = [row for row in rows if self.belongs(row, window)]
        for row in rows:
            is_done = row.num_left == 0 or self.kv_policy is KvPolicy.reprefill
            if is_done and not self.belongs(row, window):
                row.cache = None
        return staying
