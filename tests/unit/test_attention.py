"""Windowed attention against a brute-force softmax with an explicit mask."""

import math

import pytest
import torch
from torch import Tensor

from longrope2.attention.layout import Axis, Padded, build_layout, chunk_bounds
from longrope2.attention.windowed import windowed_attention
from longrope2.rope.factors import Window

HEADS, HEAD_DIM = 4, 8


def brute_force(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """[1, T, H, D] in float64, one score matrix per head."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / math.sqrt(HEAD_DIM)
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v).transpose(1, 2)


def random_qkv(length: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [
        (1, HEADS, length, HEAD_DIM),
        (1, kv_heads, length, HEAD_DIM),
        (1, kv_heads, length, HEAD_DIM),
    ]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "doc_ends", [(64,), (1, 2, 3, 64), (5, 21, 22, 40, 63, 64), (32, 64), tuple(range(1, 65))]
)
def test_short_window_stays_inside_documents(doc_ends: tuple[int, ...], kv_heads: int) -> None:
    q, k, v = random_qkv(64, kv_heads)
    document = torch.searchsorted(torch.tensor(doc_ends), torch.arange(64), right=True)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril() & (document[:, None] == document[None, :])
    found = windowed_attention(q, k, v, build_layout(Window.SHORT, doc_ends), HEAD_DIM**-0.5)
    torch.testing.assert_close(found.double(), brute_force(q, k, v, allowed), rtol=0, atol=2e-6)


@pytest.mark.parametrize("doc_ends", [(120, 240, 256), (20, 140, 150, 256), (256,)])
def test_large_documents_beside_small_ones(doc_ends: tuple[int, ...]) -> None:
    q, k, v = random_qkv(256, 2)
    document = torch.searchsorted(torch.tensor(doc_ends), torch.arange(256), right=True)
    allowed = torch.ones(256, 256, dtype=torch.bool).tril() & (
        document[:, None] == document[None, :]
    )
    layout = build_layout(Window.SHORT, doc_ends)
    assert isinstance(layout.documents, Padded)
    assert len(layout.documents.spans) == sum(
        b - a >= 96 for a, b in zip((0, *doc_ends), doc_ends, strict=False)
    )
    found = windowed_attention(q, k, v, layout, HEAD_DIM**-0.5)
    torch.testing.assert_close(found.double(), brute_force(q, k, v, allowed), rtol=0, atol=2e-6)


def test_long_window_spans_documents() -> None:
    q, k, v = random_qkv(64, 2)
    allowed = torch.ones(64, 64, dtype=torch.bool).tril()
    found = windowed_attention(q, k, v, build_layout(Window.LONG, (10, 64)), HEAD_DIM**-0.5)
    torch.testing.assert_close(found.double(), brute_force(q, k, v, allowed), rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_queries", [1, 5])
def test_cached_queries_are_the_last_ones(num_queries: int) -> None:
    q, k, v = random_qkv(32, 4)
    allowed = torch.ones(32, 32, dtype=torch.bool).tril()
    found = windowed_attention(q[:, :, -num_queries:], k, v, None, HEAD_DIM**-0.5)
    expected = brute_force(q, k, v, allowed)[:, -num_queries:]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_positions_restart_per_document_only_in_short_windows() -> None:
    ends = (3, 8, 10)
    assert build_layout(Window.SHORT, ends).positions_BT.tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 0, 1]
    ]
    assert build_layout(Window.LONG, ends).positions_BT.tolist() == [list(range(10))]


def test_rank_chunks_cover_the_segment() -> None:
    ends = (3, 8, 10, 12)
    whole = build_layout(Window.SHORT, ends).positions_BT[0].tolist()
    parts = [
        build_layout(Window.SHORT, ends, sequence=Axis(r, 3)).positions_BT[0].tolist()
        for r in range(3)
    ]
    assert [p for part in parts for p in part] == whole
    assert [chunk_bounds(12, r, 3) for r in range(3)] == [(0, 4), (4, 8), (8, 12)]


def test_padding_work_is_bounded() -> None:
    """Lengths of one bucket differ by less than two, so at most half of the slots are padding."""
    ends = tuple(
        torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()
    )
    layout = build_layout(Window.SHORT, ends)
    assert isinstance(layout.documents, Padded)
    slots = sum(bucket.token_index_NS.numel() for bucket in layout.documents.buckets)
    assert ends[-1] <= slots < 2 * ends[-1]
