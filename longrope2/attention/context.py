"""Keys and values of a whole segment on every rank of the context axis, and their gradients back.

A context rank keeps its queries; the keys and values of all ranks are gathered in one collective
(all-gather context parallelism, as in Llama 3, arXiv 2407.21783, section 3.3.2): small under
grouped heads, and no step of attention waits for another rank. Their gradients return by a
reduce-scatter. It is written as an all-to-all and a sum over ranks in float32: the same bytes on
the way, one rounding instead of one per rank, and the same result every time.

Shape legend: B = rows, K = key/value heads, T = tokens of this context rank, C = keys of a part, L
= tokens of the segment, R = context ranks, W = width of a key and a value side by side.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrope2.attention.layout import Gathered

_TOKEN_DIM = 2
# Its name since torch 2.13, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def gather_keys(k_BKTD: Tensor, v_BKTD: Tensor, gathered: Gathered) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that each part of ``gathered`` reads, [B, K, C, D] each.

    Every rank of the context axis calls this. Parts share memory: they must not be written to.
    """
    widths = [k_BKTD.shape[-1], v_BKTD.shape[-1]]
    parts_BKCW = _Gather.apply(torch.cat([k_BKTD, v_BKTD], dim=-1), gathered)
    assert isinstance(parts_BKCW, tuple)
    return [tuple(part_BKCW.split(widths, dim=-1)) for part_BKCW in parts_BKCW]


class _Gather(torch.autograd.Function):
    """All parts at once: sliced outside, each would cost a gradient as long as the segment."""

    @staticmethod
    def forward(ctx: Any, own_BKTW: Tensor, gathered: Gathered) -> tuple[Tensor, ...]:
        ctx.gathered = gathered
        all_RBKTW = own_BKTW.new_empty((gathered.context.size, *own_BKTW.shape))
        _all_gather(all_RBKTW.flatten(0, 1), own_BKTW.contiguous(), group=gathered.context.group)
        all_BKLW = to_segment_order(all_RBKTW, zigzag=gathered.zigzag)
        return tuple(all_BKLW[:, :, slice(*part.keys)] for part in gathered.parts)

    @staticmethod
    def backward(ctx: Any, *gradients_BKCW: Tensor) -> tuple[Tensor, None]:
        gathered: Gathered = ctx.gathered
        first, size = gradients_BKCW[0], gathered.context.size
        num_tokens = size * gathered.parts[-1].queries[1]
        sum_BKLW = first.new_zeros((*first.shape[:2], num_tokens, first.shape[-1]))
        for part, gradient_BKCW in zip(gathered.parts, gradients_BKCW, strict=True):
            sum_BKLW[:, :, slice(*part.keys)] += gradient_BKCW
        sent_RBKTW = to_rank_order(sum_BKLW, size, zigzag=gathered.zigzag)
        received_RBKTW = torch.empty_like(sent_RBKTW)
        dist.all_to_all_single(received_RBKTW, sent_RBKTW, group=gathered.context.group)
        wide = torch.promote_types(first.dtype, torch.float32)
        return received_RBKTW.sum(0, dtype=wide).to(first.dtype), None


def to_segment_order(all_RBKTW: Tensor, *, zigzag: bool) -> Tensor:
    """What the ranks hold, rank by rank, in the order of the segment: [B, K, L, W]."""
    if not zigzag:
        return torch.cat(all_RBKTW.unbind(0), dim=_TOKEN_DIM)
    early_RBKTW, late_RBKTW = all_RBKTW.chunk(2, dim=1 + _TOKEN_DIM)
    chunks = [*early_RBKTW.unbind(0), *reversed(late_RBKTW.unbind(0))]
    return torch.cat(chunks, dim=_TOKEN_DIM)


def to_rank_order(all_BKLW: Tensor, size: int, *, zigzag: bool) -> Tensor:
    """The way back: [R, B, K, T, W]."""
    if not zigzag:
        return torch.stack(all_BKLW.chunk(size, dim=_TOKEN_DIM))
    chunks = all_BKLW.chunk(2 * size, dim=_TOKEN_DIM)
    late_first = chunks[: size - 1 : -1]
    pairs = zip(chunks[:size], late_first, strict=True)
    return torch.stack([torch.cat(pair, dim=_TOKEN_DIM) for pair in pairs])
