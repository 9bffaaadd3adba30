"""The process grid: a sequence axis inside a data axis, and the groups that reduce over them.

Consecutive ranks share a segment (sequence axis, innermost, so that it stays inside a node); ranks
of different data index work on different segments. ZeRO shards over the whole grid: every rank
reduces gradients with every other.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from longrope2.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class ParallelConfig:
    """How many processes work together, and on what."""

    processes: int = 1
    """Processes started on this machine; ignored when torchrun or Slurm has started them."""
    sequence: int = 1
    """Processes that share one segment (sequence-parallel size)."""
    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 0 replicates everything, 3 shards parameters, gradients and optimizer
    state."""
    replicate_below: int = 100_000
    """Parameters with fewer elements than this stay whole on every rank under ZeRO-3 (saves many
    small gathers)."""
    timeout_seconds: int = 1800
    """How long a collective may wait before the run is stopped."""


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the two axes and this process's place on them."""

    data: int
    """Groups that work on different segments; the loss and gradients are summed over this axis and
    the next."""
    sequence: int
    """Ranks that share a segment; attention exchanges heads for tokens over this axis."""
    rank: int = 0

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.data * self.sequence

    @property
    def data_rank(self) -> int:
        """Index on the data axis."""
        return self.rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Index on the sequence axis, 0 holds the start of the segment."""
        return self.rank % self.sequence

    @classmethod
    def from_world(cls, world_size: int, sequence: int, rank: int = 0) -> "ParallelDims":
        """Split ``world_size`` processes.

        Raises:
            ConfigError: ``sequence`` does not divide ``world_size``.
        """
        if sequence < 1 or world_size % sequence:
            allowed = [n for n in range(1, world_size + 1) if world_size % n == 0]
            fault = f"parallel.sequence={sequence} does not divide {world_size} processes"
            raise ConfigError([f"{fault}; use {allowed}"])
        return cls(data=world_size // sequence, sequence=sequence, rank=rank)


def head_faults(sequence: int, num_query_heads: int, num_kv_heads: int) -> list[str]:
    """Why the model's heads cannot be shared by ``sequence`` ranks; empty when they can."""

    def fits(n: int) -> bool:
        shares_kv_heads = num_kv_heads % n == 0 or n % num_kv_heads == 0
        return num_query_heads % n == 0 and shares_kv_heads

    allowed = list(filter(fits, range(1, num_query_heads + 1)))
    if sequence in allowed:
        return []
    heads = f"{num_query_heads} query and {num_kv_heads} key/value heads"
    return [f"parallel.sequence={sequence} cannot share {heads}; use one of {allowed}"]


def make_groups(dims: ParallelDims) -> "tuple[ProcessGroup | None, ModuleType | None]":
    """This rank's sequence-parallel group and DeepSpeed's ``mpu``; None where there is no group."""
    import torch.distributed as dist  # loads for seconds; a configuration is checked without it

    assert dist.get_world_size() == dims.world_size
    if dims.sequence == 1:
        return None, None
    from deepspeed.runtime.sequence_parallel import parallel_state_sp  # loads for seconds

    parallel_state_sp.initialize_sequence_parallel(dims.sequence)
    group = parallel_state_sp.get_sequence_parallel_group()
    assert isinstance(group, dist.ProcessGroup)
    return group, parallel_state_sp
