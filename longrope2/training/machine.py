"""What a run asks of the machine it runs on, beyond the configuration: its attention kernel and its optimizer."""

import torch

from longrope2.attention import KernelChoice, choose_kernel
from longrope2.errors import ConfigError
from longrope2.training.config import TrainRoot, compute_dtype
from longrope2.training.optimizer import optimizer_fault

__all__ = ["check_machine"]


def check_machine(config: TrainRoot, device: torch.device | None = None) -> KernelChoice:
    """Check that the machine can do what is configured, and choose the attention kernel.

    Args:
        config: The run.
        device: Device of this rank, on which kernels are tried; None looks at the machine without touching its devices.

    Raises:
        ConfigError: a kernel or optimizer was asked for that cannot run here; all faults together.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    faults = [fault for fault in [optimizer_fault(config.training.optimizer, place)] if fault]
    dtype = compute_dtype(config.training.precision, place)
    try:
        kernel = choose_kernel(config.attention.kernel, place, dtype, run=device is not None)
    except ConfigError as error:
        raise ConfigError([*error.faults, *faults]) from None
    if faults:
        raise ConfigError(faults)
    return kernel
