"""Every norm kernel against transformers' own norm in float32: output and gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from longrope2.kernel_choice import NormKernel
from longrope2.model.norms import choose_norm, norm_fault, use_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
# Relative to the largest entry: float32 sums of 4,096 terms in another order, and a few roundings
# to 8 bits in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8}


def normed(kernel: NormKernel, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of input and weight, float32, from values that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(2, 33, 4096, generator=generator).bfloat16().to(DEVICE, dtype) for _ in range(2)
    )
    norm = LlamaRMSNorm(4096, 1e-5)
    norm.weight = nn.Parameter(
        (torch.rand(4096, generator=generator) + 0.5).bfloat16().to(DEVICE, dtype)
    )
    model = nn.Sequential(norm)
    assert use_norm(model, kernel) == (kernel is not NormKernel.model)
    out = model(x.requires_grad_())
    out.backward(grad)
    assert x.grad is not None and norm.weight.grad is not None
    return [value.detach().float() for value in (out, x.grad, norm.weight.grad)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kernel", [NormKernel.liger, NormKernel.apex, NormKernel.torch])
def test_kernel_equals_transformers(kernel: NormKernel, dtype: torch.dtype) -> None:
    fault = norm_fault(kernel, DEVICE, dtype)
    if fault:
        pytest.skip(f"{kernel.value}: {fault}")
    expected = normed(NormKernel.model, torch.float32)
    for name, ours, theirs in zip(
        ("output", "dx", "dweight"), normed(kernel, dtype), expected, strict=True
    ):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < TOLERANCE[dtype], f"{name}: {error}"


def test_a_gpu_gets_a_fused_norm() -> None:
    assert choose_norm(NormKernel.auto, DEVICE, torch.bfloat16).kernel is not NormKernel.model
