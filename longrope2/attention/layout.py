"""What attention must know about one segment, worked out once per micro-step for all layers.

A short window confines attention to each document; a long window is causal over the whole segment
(paper, section 3.3). Two axes share a segment. Ranks of the *sequence* axis exchange heads for
tokens, so that each attends over all tokens of its place on the *context* axis. Ranks of the
context axis keep their queries and gather the keys and values of the whole segment.

A long segment is cut into twice as many chunks as the context axis has ranks, of which rank r of n
holds chunks r and 2n - 1 - r: a late query reads many keys, an early one few, and every rank reads
as many (zigzag, as in Llama 3, arXiv 2407.21783, section 3.3.2). Documents of a short segment are
short, so that contiguous chunks are even enough. When none of them crosses a rank's border (the
packer's ``align``), the rank attends locally and nothing is exchanged or gathered.

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
class Axis:
    """A rank's place on one axis of the process grid."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    """The ranks along it; None where there is one, or where nothing is sent."""


@dataclass(frozen=True)
class Dense:
    """One document by ``sdpa`` or flash-attn; of fewer queries than keys, they are the last."""

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


Documents = Dense | Varlen | Padded


@dataclass(frozen=True)
class Part:
    """Consecutive queries of a context rank, and the keys they read; both end at one token."""

    queries: tuple[int, int]
    """First and one-past-last, of the tokens this rank attends over."""
    keys: tuple[int, int]
    """First and one-past-last, of the segment."""
    documents: Documents


@dataclass(frozen=True)
class Gathered:
    """What attends by itself where a rank has queries of some tokens and keys of all."""

    context: Axis
    zigzag: bool
    """Whether ranks hold an early and a late chunk, or a contiguous one."""
    parts: tuple[Part, ...]
    """Their queries, laid end to end, are those of this rank."""


@dataclass(frozen=True)
class SegmentLayout:
    """Attention structure of one micro-step on one rank."""

    own_spans: tuple[tuple[int, int], ...]
    """First and one-past-last token of the segment of each stretch that this rank holds."""
    positions_BT: Tensor
    """RoPE positions of the rank's own tokens, int64, [1, local tokens]: restart per document in a
    short window."""
    documents: Documents | Gathered
    """What attends by itself, over more than the rank's own tokens where heads are exchanged."""
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
    """First and one-past-last token of a rank's contiguous chunk."""
    assert length % size == 0, f"{size} ranks cannot share {length} tokens evenly"
    return rank * (length // size), (rank + 1) * (length // size)


def build_layout(
    window: Window,
    doc_ends: Sequence[int],
    *,
    sequence: Axis = Axis(),
    context: Axis = Axis(),
    device: torch.device | str = "cpu",
    kernel: AttentionKernel = AttentionKernel.sdpa,
) -> SegmentLayout:
    """Work out own tokens, positions, documents and the need for an exchange.

    ``window`` is the segment's tag: it decides, positions never do. ``doc_ends`` are cumulative
    over the whole segment, of which this rank holds a share.
    """
    length, is_long = doc_ends[-1], window is Window.LONG
    spans = [(0, length)] if is_long else list(pairwise([0, *doc_ends]))
    is_local = _none_crosses(spans, length, sequence.size * context.size)
    gathers = not is_local and not _none_crosses(spans, length, context.size)
    zigzag = gathers and len(spans) == 1
    own_spans = _own_spans(length, sequence, context, zigzag=zigzag)
    if gathers:
        parts = _zigzag_parts if zigzag else _contiguous_parts
        documents = Gathered(context, zigzag, parts(spans, context, kernel, device))
    else:
        start, stop = own_spans[0] if is_local else chunk_bounds(length, context.rank, context.size)
        inside = [(a - start, b - start) for a, b in spans if start <= a < stop]
        documents = (
            _dense(kernel, length, length, device) if is_long else _packed(kernel, inside, device)
        )
    positions_L = torch.cat([torch.arange(b - a, device=device) for a, b in spans])
    positions_T = torch.cat([positions_L[a:b] for a, b in own_spans])
    exchange_group = None if is_local else sequence.group
    return SegmentLayout(own_spans, positions_T[None], documents, exchange_group)


def _none_crosses(spans: Sequence[tuple[int, int]], length: int, size: int) -> bool:
    """Whether no document crosses a border between the contiguous chunks of ``size`` ranks."""
    starts = {a for a, _ in spans}
    return all(border in starts for border in range(length // size, length, length // size))


def _own_spans(
    length: int, sequence: Axis, context: Axis, *, zigzag: bool
) -> tuple[tuple[int, int], ...]:
    """What one rank holds: its share, along the sequence axis, of what its context rank holds."""
    if not zigzag:
        rank = context.rank * sequence.size + sequence.rank
        return (chunk_bounds(length, rank, context.size * sequence.size),)
    half = length // (2 * context.size)
    start, stop = chunk_bounds(2 * half, sequence.rank, sequence.size)
    spans = []
    for place, chunk in enumerate(zigzag_chunks(context)):
        first, last = (min(max(token - place * half, 0), half) for token in (start, stop))
        if first < last:
            spans.append((chunk * half + first, chunk * half + last))
    return tuple(spans)


def zigzag_chunks(context: Axis) -> tuple[int, int]:
    """The two of ``2 * context.size`` chunks that a rank holds."""
    return context.rank, 2 * context.size - 1 - context.rank


def _zigzag_parts(
    spans: Sequence[tuple[int, int]],
    context: Axis,
    kernel: AttentionKernel,
    device: torch.device | str,
) -> tuple[Part, ...]:
    """Of one document: each of a rank's two chunks reads all keys up to its own end."""
    ((_, length),) = spans
    half = length // (2 * context.size)
    return tuple(
        Part(
            (place * half, (place + 1) * half),
            (0, (chunk + 1) * half),
            _dense(kernel, half, (chunk + 1) * half, device),
        )
        for place, chunk in enumerate(zigzag_chunks(context))
    )


def _contiguous_parts(
    spans: Sequence[tuple[int, int]],
    context: Axis,
    kernel: AttentionKernel,
    device: torch.device | str,
) -> tuple[Part, ...]:
    """Of many documents: only the chunk's first one can have begun before it."""
    start, stop = chunk_bounds(spans[-1][1], context.rank, context.size)
    inside = [(a, min(b, stop)) for a, b in spans if b > start and a < stop]
    parts = []
    first_start, first_stop = inside[0]
    if first_start < start:
        queries, keys = first_stop - start, first_stop - first_start
        dense = _dense(kernel, queries, keys, device)
        parts.append(Part((0, queries), (first_start, first_stop), dense))
        inside = inside[1:]
    if inside:
        begin = inside[0][0]
        packed = _packed(kernel, [(a - begin, b - begin) for a, b in inside], device)
        parts.append(Part((begin - start, stop - start), (begin, stop), packed))
    return tuple(parts)


def _dense(
    kernel: AttentionKernel, num_queries: int, num_keys: int, device: torch.device | str
) -> Dense | Varlen:
    """One document, of which the queries are the last tokens."""
    if kernel is not AttentionKernel.torch_varlen:
        return Dense(kernel)
    varlen = _varlen(kernel, [(0, num_queries)], device)
    if num_queries == num_keys:
        return varlen
    keys = _varlen(kernel, [(0, num_keys)], device)
    return replace(varlen, cu_keys_N=keys.cu_lens_N, max_keys=keys.max_len)


def _packed(
    kernel: AttentionKernel, spans: Sequence[tuple[int, int]], device: torch.device | str
) -> Varlen | Padded:
    """Documents laid end to end, each with all its queries and keys."""
    if kernel is AttentionKernel.sdpa:
        return _padded(spans, device)
    return _varlen(kernel, spans, device)


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
