"""Fused RMS norms in place of the model's own.

Transformers' passes over its input once per elementary operation. ``liger`` is Liger's Triton
kernel, ``apex`` NVIDIA's, ``torch`` torch's own fused operator, which also runs on a CPU. All
compute x / sqrt(mean(x^2) + eps) * weight with the mean in float32, and round differently in bf16.
``model`` leaves transformers' module alone. A kernel is tried on a few tokens before it is taken
(kernel_choice.py says why). ``choose_norm`` is asked once a run: what it returns is recorded, and
its kernel is what ``use_norm`` applies.

Shape legend: T = tokens, H = hidden size.
"""

import functools
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longrope2.kernel_choice import (
    KernelChoice,
    NormKernel,
    apex_fault,
    first_that_runs,
    forced_kernel,
    why_it_fails,
)

_NormFunction = Callable[[Tensor, Tensor, float], Tensor]
"""Input [..., H], weight [H] and epsilon to the normed input."""


def choose_norm(
    wanted: NormKernel, device: torch.device, dtype: torch.dtype, *, run: bool = True
) -> KernelChoice[NormKernel]:
    """The norm kernel to use on a device.

    Args:
        wanted: ``training.norm``.
        device: Where the model will run.
        dtype: Number format of inputs and weights.
        run: Also run the kernel on a few tokens; False only looks, and leaves the device alone.

    Raises:
        ConfigError: a kernel was asked for by name that cannot run here.
    """
    fault_of = partial(norm_fault, device=device, dtype=dtype, run=run)
    if wanted is not NormKernel.auto:
        return forced_kernel("training.norm", wanted, fault_of(wanted), instead="auto or model")
    if device.type != "cuda":
        return KernelChoice(NormKernel.model, "auto, no GPU")
    fused = (NormKernel.liger, NormKernel.apex, NormKernel.torch)
    return first_that_runs(fused, fault_of, otherwise=NormKernel.model)


def norm_fault(
    kernel: NormKernel, device: torch.device, dtype: torch.dtype, *, run: bool = True
) -> str | None:
    """Why a kernel cannot run on a device in a number format; None when it can."""
    if kernel is NormKernel.model:
        return None
    if kernel is not NormKernel.torch and device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if kernel is NormKernel.liger and importlib.util.find_spec("liger_kernel") is None:
        return "the liger-kernel package is not installed (pip install liger-kernel)"
    if kernel is NormKernel.apex and (fault := apex_fault()):
        return fault
    if not run:
        return None

    def attempt() -> None:
        x_TH = torch.ones(4, 64, device=device, dtype=dtype, requires_grad=True)
        weight_H = torch.ones(64, device=device, dtype=dtype, requires_grad=True)
        _function(kernel)(x_TH, weight_H, 1e-5).sum().backward()

    return why_it_fails(attempt, device)


def use_norm(model: nn.Module, kernel: NormKernel) -> int:
    """Make a transformers model's RMS norms call a kernel (any but ``auto``).

    Parameters, names and module hooks stay as they are.

    Returns:
        How many modules call it. Norms that compute something else (Gemma's, which adds 1 to its
        weight; layer norms) are left alone.
    """
    if kernel is NormKernel.model:
        return 0
    function, replaced = _function(kernel), 0
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
            continue
        if _is_plain(kind):
            # On the instance: DeepSpeed's hooks around the call gather the weight before it.
            module.forward = partial(_forward, function, module)
            replaced += 1
    return replaced


def _forward(function: _NormFunction, module: nn.Module, hidden: Tensor) -> Tensor:
    """One norm; weight and epsilon are read at the call, when the weight is whole."""
    weight_H, epsilon = module.weight, module.variance_epsilon
    assert isinstance(weight_H, Tensor) and isinstance(epsilon, float)
    return function(hidden, weight_H, epsilon)


@functools.cache
def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether a module class computes the formula above, found out with random numbers."""
    hidden_size, epsilon = 8, 1e-5
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        module = kind(hidden_size, epsilon)
        weight_H = torch.rand(hidden_size) + 0.5
        module.weight = nn.Parameter(weight_H)
        x_TH = torch.randn(4, hidden_size)
        found_TH = module(x_TH).double()
    x_TH, weight_H = x_TH.double(), weight_H.double()
    expected_TH = x_TH / (x_TH.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight_H
    return bool(torch.allclose(found_TH, expected_TH, rtol=1e-5, atol=1e-6))


def _function(kernel: NormKernel) -> _NormFunction:
    """The kernel as a function."""
    if kernel is NormKernel.liger:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

        # No offset; transformers' rounding for Llama; the gradient it is given is not overwritten.
        options = (0.0, "llama", False)
        return lambda x, weight_H, epsilon: LigerRMSNormFunction.apply(
            x, weight_H, epsilon, *options
        )
    if kernel is NormKernel.apex:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine as apex_norm  # pyright: ignore[reportMissingImports]

        return lambda x, weight_H, epsilon: apex_norm(x, weight_H, weight_H.shape, epsilon)
    return lambda x, weight_H, epsilon: F.rms_norm(x, weight_H.shape, weight_H, epsilon)
