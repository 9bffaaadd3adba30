"""What attention must know about one segment, worked out once per micro-step and shared by all
layers.

A short window confines attention to each document; a long window is causal over the whole segment
(paper, section 3.3). Under sequence parallelism a rank holds one contiguous chunk of the segment.
When no document of a short segment crosses a chunk border (the packer's ``align``), the rank
attends locally and nothing is exchanged.

Shape legend: T = tokens this rank attends over, N = documents (of a bucket), S = padded length of a
bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from longrope2.attention.kernels import AttentionKernel
from longrope2.rope.factors import Window

# Measured on a CPU (benchmarks/attention.py): below about 100 tokens one call per document is
# slower than a padded batch.
BATCHED_BELOW_TOKENS = 96


@dataclass(frozen=True)
class DocumentBucket:
    """Small documents of similar length, padded on the right to one length and attended in one
    batched call.

    Right padding is exact under a causal mask: no real query sees a later key. Lengths inside a
    bucket differ by less than a factor of two, so at most half of the work is padding.
    """

    token_index_NS: Tensor
    """Position of each slot's token in the rank's tokens; padding slots repeat the document's last
    token."""
    slot_index_T: Tensor
    """Flat slots (n * S + s) that hold real tokens, in reading order."""


@dataclass(frozen=True)
class SegmentLayout:
    """Attention structure of one micro-step on one rank."""

    window: Window
    positions_BT: Tensor
    """RoPE positions of the rank's own tokens, int64, [1, local tokens]: restart per document in a
    short window."""
    buckets: tuple[DocumentBucket, ...]
    """Small documents, batched by length."""
    spans: tuple[tuple[int, int], ...]
    """First and one-past-last token of every other document, attended one by one."""
    restore_T: Tensor | None
    """Puts the outputs of buckets and spans, laid end to end, back into token order; None when they
    are in it."""
    exchange_group: ProcessGroup | None
    """Sequence-parallel group when heads must be exchanged for tokens, else None."""
    kernel: AttentionKernel = AttentionKernel.sdpa
    """What computes the attention; buckets, spans and ``restore_T`` are for sdpa alone."""
    cu_lens_N: Tensor | None = None
    """For varlen kernels: cumulative ends of what attends by itself, with a leading 0, int32."""
    max_len: int = 0
    """For varlen kernels: the longest of them, in tokens."""

    def to(self, device: torch.device | str) -> "SegmentLayout":
        """The same layout with its tensors on ``device``."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        buckets = tuple(
            DocumentBucket(
                b.token_index_NS.to(device, non_blocking=True),
                b.slot_index_T.to(device, non_blocking=True),
            )
            for b in self.buckets
        )
        return replace(
            self,
            positions_BT=self.positions_BT.to(device, non_blocking=True),
            buckets=buckets,
            restore_T=moved(self.restore_T),
            cu_lens_N=moved(self.cu_lens_N),
        )


def chunk_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """First and one-past-last token of a sequence rank's contiguous chunk; ``size`` must divide ``length``."""
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
    """Work out positions, document buckets and the need for an exchange.

    Args:
        window: The segment's tag. It decides; positions never do.
        doc_ends: Cumulative document ends of the whole segment, the last one is its length in
            tokens.
        sequence_rank: Which contiguous chunk this rank holds.
        sequence_group: Ranks that share the segment; needed when ``sequence_size`` > 1.
        sequence_size: Number of ranks that share the segment.
        device: Where the index tensors are made.
        kernel: What will compute the attention; not ``auto``.
    """
    length = doc_ends[-1]
    start, stop = chunk_bounds(length, sequence_rank, sequence_size)
    if window is Window.LONG:
        positions_T = torch.arange(start, stop, device=device)
        exchange = sequence_group if sequence_size > 1 else None
        if kernel is AttentionKernel.torch_varlen:
            return _varlen_layout(window, positions_T[None], [(0, length)], exchange, kernel)
        return SegmentLayout(window, positions_T[None], (), ((0, length),), None, exchange, kernel)
    bounds = [0, *doc_ends]
    chunk = length // sequence_size
    aligned = all(border in set(bounds) for border in range(chunk, length, chunk))
    spans = list(pairwise(bounds))
    positions_T = torch.cat([torch.arange(b - a, device=device) for a, b in spans])[start:stop]
    if aligned and sequence_size > 1:
        spans = [(a - start, b - start) for a, b in spans if start <= a < stop]
    exchange = None if aligned else sequence_group
    if kernel is not AttentionKernel.sdpa:
        return _varlen_layout(window, positions_T[None], spans, exchange, kernel)
    small = [(a, b) for a, b in spans if b - a < BATCHED_BELOW_TOKENS]
    large = tuple((a, b) for a, b in spans if b - a >= BATCHED_BELOW_TOKENS)
    buckets, order = _bucket_documents(small, device)
    restore_T = None
    if buckets:
        restore_T = torch.argsort(
            torch.cat([*order, *(torch.arange(a, b, device=device) for a, b in large)])
        )
    return SegmentLayout(window, positions_T[None], buckets, large, restore_T, exchange)


def _varlen_layout(
    window: Window,
    positions_BT: Tensor,
    spans: Sequence[tuple[int, int]],
    exchange: ProcessGroup | None,
    kernel: AttentionKernel,
) -> SegmentLayout:
    """What a varlen kernel reads: where each of the spans, laid end to end, ends, and the longest of them."""
    ends = torch.tensor([0, *(b for _, b in spans)], dtype=torch.int32, device=positions_BT.device)
    longest = max(b - a for a, b in spans)
    return SegmentLayout(window, positions_BT, (), (), None, exchange, kernel, ends, longest)


def _bucket_documents(
    spans: Sequence[tuple[int, int]], device: torch.device | str
) -> tuple[tuple[DocumentBucket, ...], list[Tensor]]:
    """Group documents by the power of two above their length; also the tokens of each bucket in its order."""
    by_width: dict[int, list[tuple[int, int]]] = {}
    for a, b in spans:
        by_width.setdefault((b - a - 1).bit_length(), []).append((a, b))
    buckets: list[DocumentBucket] = []
    order: list[Tensor] = []
    for _, members in sorted(by_width.items()):
        starts_N = torch.tensor([a for a, _ in members], device=device)
        lengths_N = torch.tensor([b - a for a, b in members], device=device)
        slots_S = torch.arange(int(lengths_N.max()), device=device)
        real_NS = slots_S < lengths_N[:, None]
        token_index_NS = starts_N[:, None] + torch.minimum(slots_S, lengths_N[:, None] - 1)
        buckets.append(DocumentBucket(token_index_NS, real_NS.flatten().nonzero().squeeze(1)))
        order.append(token_index_NS[real_NS])
    return tuple(buckets), order
