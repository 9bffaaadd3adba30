"""The context axis in one process: ranks simulated one by one, in float64, against a full mask.

The collectives themselves run in tests/distributed/test_parity.py.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from longrope2.attention.context import to_rank_order, to_segment_order
from longrope2.attention.kernels import AttentionKernel
from longrope2.attention.layout import (
    Axis,
    Dense,
    Gathered,
    Padded,
    SegmentLayout,
    Varlen,
    build_layout,
)
from longrope2.attention.windowed import attend_parts, windowed_attention
from longrope2.parallel.dims import token_multiple
from longrope2.rope.factors import Window

LENGTH, HEADS, HEAD_DIM = 96, 6, 4
SCALING = HEAD_DIM**-0.5
GRIDS = [(s, c) for s, c in product(range(1, 9), range(2, 9)) if LENGTH % token_multiple(s, c) == 0]
# Documents across every border, one that spans several ranks, single tokens, one that is all.
DOCUMENTS = [(96,), (5, 6, 7, 50, 96), (13, 75, 76, 96), (1, 95, 96), tuple(range(1, 97))]


def qkv(kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(1, heads, LENGTH, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]


def brute_force(q: Tensor, k: Tensor, v: Tensor, window: Window, ends: tuple[int, ...]) -> Tensor:
    """[1, T, H, D] by one score matrix per head."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if window is Window.SHORT:
        document = torch.searchsorted(torch.tensor(ends), torch.arange(LENGTH), right=True)
        allowed &= document[:, None] == document
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v).transpose(1, 2)


def own(x: Tensor, layout: SegmentLayout, dim: int = 2) -> Tensor:
    """What a rank holds of a tensor over the segment."""
    return torch.cat([x.narrow(dim, a, b - a) for a, b in layout.own_spans], dim=dim)


def attended(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout) -> Tensor:
    """Attention of one context rank, whose gathered keys are cut from the whole."""
    if not isinstance(layout.documents, Gathered):
        parts = (own(x, layout) for x in (q, k, v))
        return windowed_attention(*parts, layout, SCALING)
    keys = [tuple(x[:, :, slice(*part.keys)] for x in (k, v)) for part in layout.documents.parts]
    return attend_parts(own(q, layout), keys, layout.documents, SCALING)


def check_equal_to_brute_force(
    window: Window, ends: tuple[int, ...], context: int, kv_heads: int
) -> None:
    q, k, v = qkv(kv_heads)
    expected = brute_force(q, k, v, window, ends)
    weights = torch.arange(expected.numel(), dtype=torch.float64).view_as(expected).cos()
    wanted = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(context):
        layout = build_layout(window, ends, context=Axis(rank, context))
        found = attended(q, k, v, layout)
        torch.testing.assert_close(found, own(expected, layout, 1), rtol=0, atol=1e-13)
        total = total + (found * own(weights, layout, 1)).sum()
    for found, gradient in zip(torch.autograd.grad(total, [q, k, v]), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("context", [2, 3, 4, 8])
def test_long_window_equals_full_attention(context: int, kv_heads: int) -> None:
    check_equal_to_brute_force(Window.LONG, (30, LENGTH), context, kv_heads)


@pytest.mark.parametrize("context", [2, 3, 4, 8])
@pytest.mark.parametrize("ends", DOCUMENTS)
def test_short_window_stays_inside_documents(ends: tuple[int, ...], context: int) -> None:
    check_equal_to_brute_force(Window.SHORT, ends, context, 3)


@pytest.mark.parametrize(("sequence", "context"), GRIDS)
@pytest.mark.parametrize("ends", [*DOCUMENTS, (12, 24, 48, 72, 84, 96)])
@pytest.mark.parametrize("window", list(Window))
def test_ranks_hold_every_token_once(
    window: Window, ends: tuple[int, ...], sequence: int, context: int
) -> None:
    whole = build_layout(window, ends).positions_BT[0].tolist()
    found = {}
    for place in range(sequence * context):
        layout = build_layout(
            window,
            ends,
            sequence=Axis(place % sequence, sequence),
            context=Axis(place // sequence, context),
        )
        tokens = [t for span in layout.own_spans for t in range(*span)]
        assert len(tokens) == LENGTH // (sequence * context)
        assert not found.keys() & set(tokens)
        found |= dict(zip(tokens, layout.positions_BT[0].tolist(), strict=True))
    assert [found[token] for token in range(LENGTH)] == whole


def test_sequence_ranks_share_what_their_context_rank_holds() -> None:
    """Together, in order, as the exchange of heads for tokens lays them end to end."""
    spans = [
        build_layout(Window.LONG, (96,), sequence=Axis(r, 3), context=Axis(1, 2)).own_spans
        for r in range(3)
    ]
    assert spans == [((24, 40),), ((40, 48), (48, 56)), ((56, 72),)]
    first, last = (build_layout(Window.LONG, (96,), context=Axis(r, 4)) for r in (0, 3))
    assert first.own_spans == ((0, 12), (84, 96)) and last.own_spans == ((36, 48), (48, 60))


@pytest.mark.parametrize("context", [2, 3, 4, 8, 16])
def test_causal_work_of_a_long_segment_is_the_same_on_every_rank(context: int) -> None:
    work = set()
    for rank in range(context):
        documents = build_layout(Window.LONG, (LENGTH,), context=Axis(rank, context)).documents
        assert isinstance(documents, Gathered) and documents.zigzag
        sizes = [(b - a, d - c) for a, b, c, d in (p.queries + p.keys for p in documents.parts)]
        work.add(sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in sizes))
    assert work == {LENGTH * (LENGTH + 1) // 2 // context}


def test_aligned_short_segments_neither_exchange_nor_gather() -> None:
    everyone: object = object()
    grid = [(Axis(s, 2, everyone), Axis(c, 2, everyone)) for c, s in product(range(2), range(2))]  # type: ignore[arg-type]
    for sequence, context in grid:
        layout = build_layout(
            Window.SHORT, (7, 24, 48, 72, 80, 96), sequence=sequence, context=context
        )
        assert layout.exchange_group is None and isinstance(layout.documents, Padded)
    assert layout.own_spans == ((72, 96),) and layout.documents.buckets[0].slot_index_T.numel() == 8
    for sequence, context in grid:
        layout = build_layout(Window.SHORT, (30, 48, 96), sequence=sequence, context=context)
        assert layout.exchange_group is everyone and isinstance(layout.documents, Padded)
        assert layout.own_spans[0][0] == 48 * context.rank + 24 * sequence.rank
    layout = build_layout(Window.SHORT, (30, 60, 96), sequence=sequence, context=context)
    assert layout.exchange_group is everyone and isinstance(layout.documents, Gathered)


def test_only_the_first_document_of_a_chunk_reads_keys_before_it() -> None:
    documents = build_layout(Window.SHORT, (10, 60, 70, 96), context=Axis(1, 2)).documents
    assert isinstance(documents, Gathered) and not documents.zigzag
    first, others = documents.parts
    assert (first.queries, first.keys) == ((0, 12), (10, 60))
    assert (others.queries, others.keys) == ((12, 48), (60, 96))
    assert isinstance(first.documents, Dense) and isinstance(others.documents, Padded)


def test_varlen_kernels_are_told_of_fewer_queries_than_keys() -> None:
    documents = build_layout(
        Window.LONG, (LENGTH,), context=Axis(1, 2), kernel=AttentionKernel.torch_varlen
    ).documents
    assert isinstance(documents, Gathered)
    late = documents.parts[1].documents
    assert isinstance(late, Varlen) and late.cu_keys_N is not None
    assert (late.cu_lens_N.tolist(), late.max_len) == ([0, 24], 24)
    assert (late.cu_keys_N.tolist(), late.max_keys) == ([0, 72], 72)
    flash = build_layout(
        Window.LONG, (LENGTH,), context=Axis(1, 2), kernel=AttentionKernel.flash_attn
    ).documents
    assert isinstance(flash, Gathered)
    assert flash.parts[1].documents == Dense(AttentionKernel.flash_attn)


@pytest.mark.parametrize("zigzag", [False, True])
def test_order_of_gathered_tokens(zigzag: bool) -> None:
    segment = torch.arange(12).view(1, 1, 12, 1)
    by_rank = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    if zigzag:
        by_rank = [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    ranks = to_rank_order(segment, 3, zigzag=zigzag)
    assert ranks[:, 0, 0, :, 0].tolist() == by_rank
    assert torch.equal(to_segment_order(ranks, zigzag=zigzag), segment)


def test_a_layout_moves_with_all_its_parts() -> None:
    layout = build_layout(Window.SHORT, (3, 60, 64, 96), context=Axis(1, 2))
    moved = layout.to("meta")
    assert isinstance(moved.documents, Gathered)
    assert moved.own_spans == layout.own_spans and moved.positions_BT.is_meta
    documents = moved.documents.parts[1].documents
    assert isinstance(documents, Padded) and documents.buckets[0].token_index_NS.is_meta


def test_what_a_segment_must_be_a_multiple_of() -> None:
    found = {(s, c): token_multiple(s, c) for s, c in [(1, 1), (8, 1), (1, 8), (8, 8), (3, 2)]}
    assert found == {(1, 1): 1, (8, 1): 8, (1, 8): 16, (8, 8): 64, (3, 2): 12}
