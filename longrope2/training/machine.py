"""What a run asks of the machine it runs on, beyond the configuration: its kernels and its optimizer."""

from dataclasses import dataclass

import torch

from longrope2.attention import AttentionKernel, choose_kernel
from longrope2.errors import ConfigError
from longrope2.kernel_choice import KernelChoice
from longrope2.model import NormKernel, choose_norm
from longrope2.training.config import TrainRoot, compute_dtype
from longrope2.training.optimizer import optimizer_fault

__all__ = ["MachineKernels", "check_machine"]


@dataclass(frozen=True)
class MachineKernels:
    """The kernels of a run."""

    attention: KernelChoice[AttentionKernel]
    norm: KernelChoice[NormKernel]


def check_machine(config: TrainRoot, device: torch.device | None = None) -> MachineKernels:
    """Check that the machine can do what is configured, and choose the kernels.

    Args:
        config: The run.
        device: Device of this rank, on which kernels are tried; None looks at the machine without touching its devices.

    Raises:
        ConfigError: a kernel or optimizer was asked for that cannot run here; all faults together.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, run = compute_dtype(config.training.precision, place), device is not None
    attention = norm = None
    faults: list[str] = []
    try:
        attention = choose_kernel(config.attention.kernel, place, dtype, run=run)
    except ConfigError as error:
        faults += error.faults
    try:
        norm = choose_norm(config.training.norm, place, dtype, run=run)
    except ConfigError as error:
        faults += error.faults
    fault = optimizer_fault(config.training.optimizer, place)
    faults += [fault] if fault else []
    if attention is None or norm is None or faults:
        raise ConfigError(faults)
    return MachineKernels(attention, norm)
