"""``python -m benchmarks.attention``: a short window's attention, ours against three other ways.

All four compute the same thing, forward and backward, on one packed segment; results are compared
before times are. Printed are ratios to ours (above 1: slower than ours), best of several
interleaved rounds, so that a noisy machine touches all alike.

    ours          small documents of similar length in one batched call, large ones one by one
    loop          one scaled-dot-product call per document
    dense mask    one call over the segment with a [T, T] document mask
    full causal   what a long window does; not the same result, the cost of not masking
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longrope2.attention.layout import SegmentLayout, build_layout
from longrope2.attention.windowed import causal_attention, windowed_attention
from longrope2.rope.factors import Window

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def document_ends(length: int, longest: int, seed: int) -> list[int]:
    """Random documents of 1 to ``longest`` tokens that fill ``length``."""
    generator = torch.Generator().manual_seed(seed)
    ends: list[int] = []
    while not ends or ends[-1] < length:
        size = int(torch.randint(1, longest + 1, (1,), generator=generator))
        ends.append(min(length, (ends[-1] if ends else 0) + size))
    return ends


def ways(ends: list[int], layout: SegmentLayout, scaling: float) -> dict[str, Attention]:
    """The four ways, each [1, H, T, D] x 3 -> [1, T, H, D]."""
    length = ends[-1]
    document_T = torch.searchsorted(torch.tensor(ends), torch.arange(length), right=True)
    mask_TT = (document_T[:, None] == document_T[None]).tril()
    spans = list(zip([0, *ends], ends, strict=False))

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            causal_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], scaling) for a, b in spans
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask_TT, scale=scaling)
        return out.transpose(1, 2)

    return {
        "ours": lambda q, k, v: windowed_attention(q, k, v, layout, scaling),
        "loop": loop,
        "dense mask": dense,
        "full causal": lambda q, k, v: causal_attention(q, k, v, scaling).transpose(1, 2),
    }


def main() -> None:
    """Compare results, then print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens of the segment")
    parser.add_argument("--longest", type=int, default=512, help="longest document")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    ends = document_ends(arguments.length, arguments.longest, seed=0)
    heads, head_dim = 8, 64
    qkv = [torch.randn(1, heads, arguments.length, head_dim, requires_grad=True) for _ in range(3)]
    compared = ways(ends, build_layout(Window.SHORT, ends), head_dim**-0.5)
    reference = compared["dense mask"](*qkv)
    for name in ("ours", "loop"):
        torch.testing.assert_close(compared[name](*qkv), reference, rtol=0, atol=1e-5)
    best = dict.fromkeys(compared, float("inf"))
    for _ in range(arguments.rounds):
        for name, attention in compared.items():
            began = time.perf_counter()
            attention(*qkv).sum().backward()
            best[name] = min(best[name], time.perf_counter() - began)
    what = f"{len(ends)} documents in {arguments.length} tokens, {heads} heads of {head_dim}"
    print(f"{what}, forward and backward")
    for name, seconds in best.items():
        print(f"{name:12s} {seconds * 1000:9.1f} ms   {seconds / best['ours']:6.2f} x ours")


if __name__ == "__main__":
    main()
