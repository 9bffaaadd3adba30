"""Settings of DeepSpeed's ZeRO beyond the stage, and the checks that cross them."""

from dataclasses import dataclass
from enum import Enum

__all__ = ["CommunicationType", "ZeroConfig", "zero_faults"]


class CommunicationType(Enum):
    """Number format in which gradients travel between ranks."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class ZeroConfig:
    """How ZeRO shards and communicates; the stage itself is ``parallel.zero_stage``. Defaults are DeepSpeed's.

    Sizes count elements, not bytes: larger buckets mean fewer, longer messages and more memory for buffers.
    """

    hpz_size: int = 1
    """Ranks (a node, say) that together hold a second full copy of the parameters, so that the gathers of the backward pass
    stay among them; 1 keeps none. Stage 3 only; divides the number of processes."""
    reduce_bucket_elements: int = 500_000_000
    """Gradients reduced in one message. Stages 1 to 3."""
    gather_bucket_elements: int = 500_000_000
    """Updated parameters gathered in one message. Stages 1 and 2."""
    prefetch_elements: int = 50_000_000
    """Parameters gathered ahead of their use. Stage 3."""
    max_live_elements: int = 1_000_000_000
    """Gathered parameters kept at most before the next are released. Stage 3."""
    overlap_communication: bool | None = None
    """Reduce gradients while the backward pass goes on; null is on for stage 3 and off below."""
    gradient_dtype: CommunicationType = CommunicationType.auto
    """Format of reduced gradients without sequence parallelism; ``auto`` is that of the forward pass."""
    sequence_gradient_dtype: CommunicationType = CommunicationType.fp32
    """The same with ``parallel.sequence`` > 1; bf16 halves the traffic, fp32 sums the chunks of a segment exactly."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in CPU memory and update there. Stages 1 to 3, ``training.optimizer=torch_adamw``."""
    pin_memory: bool = True
    """Page-locked CPU memory for the offloaded state: faster copies."""


def zero_faults(zero: ZeroConfig, *, stage: int, world_size: int, optimizer: str) -> list[str]:
    """Values that are out of range or do not fit the stage, the processes or the optimizer; empty when all fit."""
    faults = [
        f"zero.{name}={getattr(zero, name)} must be above 0"
        for name in ("hpz_size", "reduce_bucket_elements", "gather_bucket_elements", "max_live_elements")
        if getattr(zero, name) <= 0
    ]
    if zero.prefetch_elements < 0:
        faults.append(f"zero.prefetch_elements={zero.prefetch_elements} must not be negative")
    if zero.hpz_size > 1 and stage != 3:
        faults.append(f"zero.hpz_size={zero.hpz_size} needs parallel.zero_stage=3, this run has {stage}; use 1")
    if zero.hpz_size > 0 and world_size > 0 and world_size % zero.hpz_size:
        allowed = [n for n in range(1, world_size + 1) if world_size % n == 0]
        faults.append(f"zero.hpz_size={zero.hpz_size} does not divide {world_size} processes; use one of {allowed}")
    if zero.offload_optimizer and stage == 0:
        faults.append("zero.offload_optimizer=true needs parallel.zero_stage=1, 2 or 3, this run has 0")
    if zero.offload_optimizer and optimizer != "torch_adamw":
        faults.append(
            f"zero.offload_optimizer=true updates on the CPU, where training.optimizer={optimizer} cannot run; "
            "use training.optimizer=torch_adamw"
        )
    return faults
