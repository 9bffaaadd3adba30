"""Which attention kernel runs, and thin adapters to those that are not part of every torch.

``sdpa`` is torch's scaled_dot_product_attention, called per document: it runs everywhere, CPUs
included. ``flash_attn`` is the flash-attn package (FlashAttention-2, the only one for A100): varlen
for short windows, dense for long ones. ``torch_varlen`` is the same algorithm inside torch (2.10
and later). All are exact, though they round differently, and all take fewer key/value than query
heads.

A kernel is chosen by looking (package there? GPU? number format?) and, on a GPU, by running it on a
few tokens.

Shape legend: B = 1 row, T = tokens, H = query heads, K = key/value heads, D = head dim, N =
documents.
"""

import importlib.util
import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longrope2.kernel_choice import (
    AttentionKernel,
    KernelChoice,
    first_that_runs,
    forced_kernel,
    why_it_fails,
)

HALF_PRECISIONS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Varlen:
    """Documents laid end to end, attended in one call of a varlen kernel."""

    kernel: AttentionKernel
    """``flash_attn`` or ``torch_varlen``."""
    cu_lens_N: Tensor
    """Cumulative document ends with a leading 0, int32."""
    max_len: int
    """Tokens of the longest document."""
    cu_keys_N: Tensor | None = None
    """The same of the keys, where documents have fewer queries than keys: they are the last."""
    max_keys: int | None = None


def choose_kernel(
    wanted: AttentionKernel, device: torch.device, dtype: torch.dtype, *, run: bool = True
) -> KernelChoice[AttentionKernel]:
    """The kernel to use on a device; ``run=False`` only looks, and leaves the device alone.

    Raises:
        ConfigError: a kernel was asked for by name that cannot run here.
    """
    fault_of = partial(kernel_fault, device=device, dtype=dtype, run=run)
    if wanted is not AttentionKernel.auto:
        return forced_kernel("attention.kernel", wanted, fault_of(wanted), instead="auto or sdpa")
    candidates = (AttentionKernel.flash_attn, AttentionKernel.torch_varlen)
    return first_that_runs(candidates, fault_of, otherwise=AttentionKernel.sdpa)


def kernel_fault(
    kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, *, run: bool = True
) -> str | None:
    """Why a kernel cannot run on a device in a number format; None when it can."""
    if kernel is AttentionKernel.sdpa:
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if dtype not in HALF_PRECISIONS:
        return f"it needs bf16, this is {str(dtype).removeprefix('torch.')} (training.precision)"
    is_flash = kernel is AttentionKernel.flash_attn
    package = "flash_attn" if is_flash else "torch.nn.attention.varlen"
    if importlib.util.find_spec(package) is None:
        install = "pip install flash-attn --no-build-isolation"
        lacks = f"torch {torch.__version__} has no varlen_attn; it came with 2.10"
        return f"the flash-attn package is not installed ({install})" if is_flash else lacks
    return _fault_of_a_run(kernel, device, dtype) if run else None


def varlen_attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, documents: Varlen, scaling: float
) -> Tensor:
    """Causal attention inside each document by a varlen kernel, [T, H, D].

    Both kernels let the last query of a document read its last key (flash-attn since 2.1).
    """
    ends_N, longest = documents.cu_lens_N, documents.max_len
    keys_N = ends_N if documents.cu_keys_N is None else documents.cu_keys_N
    lens = (ends_N, keys_N, longest, documents.max_keys or longest)
    if documents.kernel is AttentionKernel.flash_attn:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(
            q_THD, k_TKD, v_TKD, *lens, softmax_scale=scaling, causal=True
        )
    from torch.nn.attention.varlen import varlen_attn  # not in every torch this project runs on

    # causal was is_causal in 2.10, and scale and grouped heads came later
    known = inspect.signature(varlen_attn).parameters
    keywords: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "scale" in known:
        keywords["scale"] = scaling
    elif not math.isclose(scaling, q_THD.shape[-1] ** -0.5):
        raise RuntimeError(
            f"varlen_attn of torch {torch.__version__} takes no scale, "
            f"and this model's is {scaling}"
        )
    group = q_THD.shape[1] // k_TKD.shape[1]
    if group > 1 and "enable_gqa" in known:
        keywords["enable_gqa"] = True
    elif group > 1:
        k_TKD, v_TKD = (x.repeat_interleave(group, dim=1) for x in (k_TKD, v_TKD))
    out_THD = varlen_attn(q_THD, k_TKD, v_TKD, *lens, **keywords)
    assert isinstance(out_THD, Tensor)  # a tuple only with return_aux
    return out_THD


def dense_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, scaling: float) -> Tensor:
    """Causal attention over whole rows by flash-attn's dense kernel, [B, T, H, D].

    Of fewer queries than keys, they are the last (flash-attn since 2.1).
    """
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q_BTHD, k_BTKD, v_BTKD, softmax_scale=scaling, causal=True)


def _fault_of_a_run(
    kernel: AttentionKernel, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Run two documents of a few tokens with grouped heads, forward and backward."""

    def attempt() -> None:
        ones = partial(torch.ones, device=device, dtype=dtype, requires_grad=True)
        q_THD, k_TKD, v_TKD = ones(16, 4, 64), ones(16, 2, 64), ones(16, 2, 64)
        ends_N = torch.tensor([0, 6, 16], dtype=torch.int32, device=device)
        varlen_attention(
            q_THD, k_TKD=k_TKD, v_TKD=v_TKD, documents=Varlen(kernel, ends_N, 10), scaling=0.125
        ).sum().backward()
        if kernel is AttentionKernel.flash_attn:
            dense_attention(q_THD[None], k_TKD[None], v_TKD[None], 0.125).sum().backward()

    return why_it_fails(attempt, device)
