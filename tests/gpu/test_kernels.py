"""Every attention kernel of this machine against sdpa in float32, output and gradients."""

import pytest
import torch
from torch import Tensor

from longrope2.attention.kernels import choose_kernel, kernel_fault
from longrope2.attention.layout import Axis, Gathered, build_layout
from longrope2.attention.windowed import attend_parts, windowed_attention
from longrope2.kernel_choice import AttentionKernel
from longrope2.rope.factors import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
LENGTH = 1024
DOC_ENDS = (1, 3, 40, 167, 168, 700, 1023, 1024)
ALONE = Axis()
# A bf16 number carries 8 bits; attention rounds q, k, v, the weights and the result, so a few times
# 2 ** -8 of the largest.
BF16_TOLERANCE = 4 * 2**-8


def attended(
    kernel: AttentionKernel,
    dtype: torch.dtype,
    window: Window,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: Axis = ALONE,
) -> list[Tensor]:
    """Output and gradients of q, k and v, float32, from values that bf16 holds exactly.

    On a rank of a context axis its own queries, and the keys that it gathers.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (1, heads, LENGTH, head_dim),
        *[(1, kv_heads, LENGTH, head_dim)] * 2,
        (1, LENGTH, heads, head_dim),
    ]
    values = [
        torch.randn(shape, generator=generator).bfloat16().to(DEVICE, dtype) for shape in shapes
    ]
    q, k, v = (x.requires_grad_() for x in values[:3])
    layout = build_layout(window, DOC_ENDS, context=context, device=DEVICE, kernel=kernel)
    if isinstance(layout.documents, Gathered):
        own = torch.cat([q[:, :, a:b] for a, b in layout.own_spans], dim=2)
        keys = [tuple(x[:, :, slice(*p.keys)] for x in (k, v)) for p in layout.documents.parts]
        out = attend_parts(own, keys, layout.documents, head_dim**-0.5)
    else:
        out = windowed_attention(q, k, v, layout, head_dim**-0.5)
    out.backward(values[3][:, : out.shape[1]])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [x.detach().float() for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 96), (4, 1, 128), (8, 2, 64)])
@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("context", [ALONE, Axis(0, 2), Axis(1, 2), Axis(2, 4)], ids=str)
@pytest.mark.parametrize("kernel", list(AttentionKernel)[1:])
def test_kernel_equals_sdpa(
    kernel: AttentionKernel, context: Axis, window: Window, heads: int, kv_heads: int, head_dim: int
) -> None:
    fault = kernel_fault(kernel, DEVICE, torch.bfloat16)
    if fault:
        pytest.skip(f"{kernel.value}: {fault}")
    sizes = (window, heads, kv_heads, head_dim, context)
    expected = attended(AttentionKernel.sdpa, torch.float32, *sizes)
    found = attended(kernel, torch.bfloat16, *sizes)
    for name, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < BF16_TOLERANCE, f"{name}: {error}"


def test_something_faster_than_sdpa_is_chosen() -> None:
    """Torch has carried a varlen kernel since 2.10: a GPU for bf16 never falls back to sdpa."""
    assert (
        choose_kernel(AttentionKernel.auto, DEVICE, torch.bfloat16).kernel
        is not AttentionKernel.sdpa
    )
