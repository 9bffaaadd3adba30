"""What the machine decides of a run: number formats, kernels, and how many layers fit its memory.

Looked at without touching a device where a run is only planned; kernels are tried on the device of
a rank that trains.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from longrope2.attention.kernels import choose_kernel
from longrope2.kernel_choice import AttentionKernel, KernelChoice, KernelError, NormKernel
from longrope2.model.norms import choose_norm
from longrope2.model.shape import ModelShape, Workload
from longrope2.parallel.processes import smallest_gpu_bytes
from longrope2.planning.choice import fewest_recomputed_layers
from longrope2.planning.hardware import HardwareConfig
from longrope2.planning.memory import Layout, ZeroBuffers
from longrope2.training.config import (
    AUTO_LAYERS,
    LAYER_WORDS,
    Precision,
    TrainRoot,
    ZeroConfig,
    compute_dtype,
)
from longrope2.training.optimizer import optimizer_fault

_FP32_BYTES, _BF16_BYTES = 4, 2


@dataclass(frozen=True)
class MachineSetup:
    """What the machine decides of a run."""

    device: torch.device
    dtype: torch.dtype
    """Of the forward and backward pass; the master weights are always float32."""
    final_dtype: torch.dtype
    """Of the weights in ``final/``."""
    attention: KernelChoice[AttentionKernel]
    norm: KernelChoice[NormKernel]
    faults: tuple[str, ...]
    """What was asked for by name and cannot run here."""
    fused_update: bool = False
    """Whether torch's AdamW is one kernel on a CPU too, as it is on a GPU."""

    @property
    def bf16(self) -> bool:
        """Whether forward and backward pass are in bf16, with float32 master weights."""
        return self.dtype is torch.bfloat16

    def kernels(self) -> dict[str, str]:
        """The kernels, as metrics and manifests name them."""
        return {"attention_kernel": str(self.attention), "norm_kernel": str(self.norm)}


def machine_setup(config: TrainRoot, device: torch.device, *, run: bool) -> MachineSetup:
    """Number formats and kernels of a run on a device; ``run`` also tries the kernels on it."""
    training, faults = config.training, list[str]()
    dtype = compute_dtype(training.precision, device)
    final = training.final_dtype

    def chosen(choose: Callable[..., KernelChoice[Any]], wanted: Enum) -> KernelChoice[Any]:
        """The kernel, whether it can run or not."""
        try:
            return choose(wanted, device, dtype, run=run)
        except KernelError as error:
            faults.extend(error.faults)
            return KernelChoice(wanted, "forced", error.fault)

    attention = chosen(choose_kernel, config.attention.kernel)
    norm = chosen(choose_norm, training.norm)
    if fault := optimizer_fault(training.optimizer, device):
        faults.append(fault)
    final_dtype = dtype if final is Precision.auto else compute_dtype(final, device)
    formats = (device, dtype, final_dtype)
    return MachineSetup(*formats, attention=attention, norm=norm, faults=tuple(faults))


def configured_layout(
    config: TrainRoot, num_processes: int, *, bf16: bool, norm: NormKernel
) -> Layout:
    """The layout of a run as the planner sees it, every layer under its policy of recompute."""
    training, parallel = config.training, config.parallel
    return Layout(
        data=num_processes // parallel.segment_ranks,
        sequence=parallel.sequence,
        context=parallel.context,
        recompute=training.recompute,
        offload=training.offload_activations,
        bf16=bf16,
        zero=replace(zero_buffers(config.zero), replicate_below=parallel.replicate_below),
        fused_norms=norm is not NormKernel.model,
    )


def zero_buffers(zero: ZeroConfig) -> ZeroBuffers:
    """The sizes that ZeRO is given."""
    in_fp32 = zero.sequence_gradient_dtype is Precision.fp32
    return ZeroBuffers(
        reduce_bucket=zero.reduce_bucket_elements,
        max_live=zero.max_live_elements,
        hpz_size=zero.hpz_size,
        gradient_bytes=_FP32_BYTES if in_fp32 else _BF16_BYTES,
    )


def recomputed_layers(
    config: TrainRoot, shape: ModelShape, layout: Layout, *, usable_bytes: float | None
) -> int | None:
    """What ``training.recompute_layers`` means for a model; None is all layers.

    Args:
        config: Checked.
        shape: The model's.
        layout: The run's.
        usable_bytes: Of each GPU; None where there is none.
    """
    given = config.training.recompute_layers
    if given == AUTO_LAYERS and usable_bytes is not None:
        # The kind of window does not matter: a micro-step has as many tokens in each.
        work = Workload(config.target_len, config.target_len, 0, 1.0, config.target_len)
        return fewest_recomputed_layers(shape, work, layout, usable_bytes)
    if given in LAYER_WORDS or int(given) == shape.num_layers:
        return None
    return int(given)


def usable_bytes_of(device: torch.device) -> float | None:
    """What the smallest GPU of the run can hold, the planner's usual share of it."""
    smallest = smallest_gpu_bytes(device)
    return None if smallest is None else HardwareConfig.usable_memory * smallest
