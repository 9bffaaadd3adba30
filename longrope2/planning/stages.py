"""What the stages around the training cost: forward passes only, at the rates of the kernel-efficiency model."""

from collections.abc import Iterable

from longrope2.planning.hardware import Machine
from longrope2.planning.shape import ModelShape

__all__ = ["forward_hours"]

SECONDS_PER_HOUR = 3600.0


def forward_hours(shape: ModelShape, machine: Machine, samples: Iterable[tuple[int, float]]) -> float:
    """Hours of forward passes spread evenly over all GPUs; loading and elementwise kernels are not in it.

    Args:
        shape: The model; the LM head is left out, which the search and the evaluation give a few positions only.
        machine: The cluster.
        samples: Length in tokens and number of samples of that length.
    """
    seconds = 0.0
    for length, number in samples:
        products = 2.0 * shape.num_layers * shape.layer_parameters / machine.gemm_flops
        attention = shape.attention_flops(length) / machine.attention_flops
        seconds += number * length * (products + attention)
    return seconds / machine.num_gpus / SECONDS_PER_HOUR
