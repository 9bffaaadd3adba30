"""What attention must know about one segment, worked out once per micro-step for all layers.

A short window confines attention to each document; a long window is causal over the whole segment
(paper, section 3.3). Under sequence parallelism a rank holds one contiguous chunk of the segment.
When no document of a short segment crosses a chunk border (the packer's ``align``), the rank
attends locally and nothing is exchanged.

Shape legend: B = rows, T = tokens this rank attends over, N = documents (of a bucket), S = padded
length of a bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longrope2.attention.kernels import Varlen
from longrope2.kernel_choice import AttentionKernel
from longrope2.rope.factors import Window

# Measured on a CPU (benchmarks/attention.py): below about 100 tokens one call per document is
# slower than a padded batch.
BATCHED_BELOW_TOKENS = 96


@dataclass(frozen=True)
class Dense:
    """One document from the first token to the last: a long window, by ``sdpa`` or flash-attn."""

    kernel: AttentionKernel


@dataclass(frozen=True)
class DocumentBucket:
    """Small documents of similar length, padded on the right and attended in one batched call.

    Right padding is exact under a causal mask: no real query sees a later key. Lengths inside a
    bucket differ by less than a factor of two, so at most half of the work is padding.
    """

    token_index_NS: Tensor
    """Position of each slot's token; padding slots repeat the document's last token."""
    slot_index_T: Tensor
    """Flat slots (n * S + s) that hold real tokens, in reading order."""


@dataclass(frozen=True)
class Padded:
    """Documents for ``sdpa``: small ones in padded batches, large ones one by one."""

    buckets: tuple[DocumentBucket, ...]
    spans: tuple[tuple[int, int], ...]
    """First and one-past-last token of every large document."""
    restore_T: Tensor | None
    """Puts the outputs of buckets and spans, laid end to end, back into token order; None when they
    are in it."""


@dataclass(frozen=True)
class SegmentLayout:
    """Attention structure of one micro-step on one rank."""

    positions_BT: Tensor
    """RoPE positions of the rank's own tokens, int64, [1, local tokens]: restart per document in a
    short window."""
    documents: Dense | Varlen | Padded
    """What attends by itself, over the whole segment where heads are exchanged."""
    exchange_group: ProcessGroup | None
    """Sequence-parallel group when heads must be exchanged for tokens, else None."""

    def to(self, device: torch.device | str) -> "SegmentLayout":
        """The same layout with its tensors on ``device``."""
        return _moved(self, device)


@dataclass(frozen=True)
class CausalRows:
    """Rows that are plain causal, read into a cache or not."""

    first_needed: int = 0
    """In the last layer, whose output no other layer reads, earlier positions get zeros."""
    first_key_B: Tensor | None = None
    """Cached decoding, one token per row: each row's first key that is no padding."""


def chunk_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """First and one-past-last token of a sequence rank's contiguous chunk."""
    assert length % size == 0, f"{size} ranks cannot share {length} tokens evenly"
    return rank * (length // size), (rank + 1) * (length // size)


def build_layout(
    window: Window,
    doc_ends: Sequence[int],
    *,
    sequence_rank: int = 0,
    sequence_group: ProcessGroup | None = None,
    sequence_size: int = 1,
    device: torch.device | str = "cpu",
    kernel: AttentionKernel = AttentionKernel.sdpa,
) -> SegmentLayout:
    """Work out positions, documents and the need for an exchange.

    ``window`` is the segment's tag: it decides, positions never do. ``doc_ends`` are cumulative
    over the whole segment, of which this rank holds the contiguous chunk ``sequence_rank``.
    """
    length = doc_ends[-1]
    start, stop = chunk_bounds(length, sequence_rank, sequence_size)
    if window is Window.LONG:
        positions_T = torch.arange(start, stop, device=device)
        has_dense = kernel is not AttentionKernel.torch_varlen
        whole = Dense(kernel) if has_dense else _varlen(kernel, [(0, length)], device)
        exchange = sequence_group if sequence_size > 1 else None
        return SegmentLayout(positions_T[None], whole, exchange)
    bounds = [0, *doc_ends]
    chunk = length // sequence_size
    aligned = all(border in set(bounds) for border in range(chunk, length, chunk))
    spans = list(pairwise(bounds))
    positions_T = torch.cat([torch.arange(b - a, device=device) for a, b in spans])[start:stop]
    if aligned and sequence_size > 1:
        spans = [(a - start, b - start) for a, b in spans if start <= a < stop]
    is_varlen = kernel is not AttentionKernel.sdpa
    documents = _varlen(kernel, spans, device) if is_varlen else _padded(spans, device)
    return SegmentLayout(positions_T[None], documents, None if aligned else sequence_group)


def _varlen(
    kernel: AttentionKernel, spans: Sequence[tuple[int, int]], device: torch.device | str
) -> Varlen:
    """Where each of the spans ends, and the longest of them."""
    ends_N = torch.tensor([0, *(b for _, b in spans)], dtype=torch.int32, device=device)
    return Varlen(kernel, ends_N, max(b - a for a, b in spans))


def _padded(spans: Sequence[tuple[int, int]], device: torch.device | str) -> Padded:
    """Small documents grouped by the power of two above their length, and the others."""
    large = tuple((a, b) for a, b in spans if b - a >= BATCHED_BELOW_TOKENS)
    by_width: dict[int, list[tuple[int, int]]] = {}
    for a, b in spans:
        if b - a < BATCHED_BELOW_TOKENS:
            by_width.setdefault((b - a - 1).bit_length(), []).append((a, b))
    buckets, order = [], []
    for _, members in sorted(by_width.items()):
        starts_N = torch.tensor([a for a, _ in members], device=device)
        lengths_N = torch.tensor([b - a for a, b in members], device=device)
        slots_S = torch.arange(int(lengths_N.max()), device=device)
        real_NS = slots_S < lengths_N[:, None]
        token_index_NS = starts_N[:, None] + torch.minimum(slots_S, lengths_N[:, None] - 1)
        buckets.append(DocumentBucket(token_index_NS, real_NS.flatten().nonzero().squeeze(1)))
        order.append(token_index_NS[real_NS])
    if not buckets:
        return Padded((), large, None)
    order += [torch.arange(a, b, device=device) for a, b in large]
    return Padded(tuple(buckets), large, torch.argsort(torch.cat(order)))


def _moved(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor in it, however deep, on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _moved(part, device) for name, part in parts.items()})
    return value
