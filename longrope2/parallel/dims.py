"""The process grid: a sequence axis inside a context axis inside a data axis, and their groups.

Consecutive ranks share a segment: those of the sequence axis (innermost, so that it stays inside a
node) exchange heads for tokens, those of the context axis gather keys and values. Ranks of
different data index work on different segments. ZeRO shards over the whole grid: every rank reduces
gradients with every other. DeepSpeed is told of one sequence-parallel group, all ranks that share a
segment.
"""

import math
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from longrope2.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class ParallelConfig:
    """How many processes work together, and on what."""

    processes: int = 1
    """Processes started on this machine; ignored when torchrun or Slurm has started them."""
    sequence: int = 1
    """Processes that exchange heads for tokens of one segment (sequence-parallel size); the model's
    heads must divide among them."""
    context: int = 1
    """Groups of ``sequence`` processes that share one segment and gather its keys and values
    (context-parallel size); heads do not limit it. ``sequence`` * ``context`` share a segment."""
    zero_stage: int = 3
    """DeepSpeed ZeRO stage: 0 replicates everything, 3 shards parameters, gradients and optimizer
    state."""
    replicate_below: int = 100_000
    """Parameters with fewer elements than this stay whole on every rank under ZeRO-3 (saves many
    small gathers)."""
    timeout_seconds: int = 1800
    """How long a collective may wait before the run is stopped."""

    @property
    def segment_ranks(self) -> int:
        """Processes that share a segment."""
        return self.sequence * self.context


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the three axes and this process's place on them."""

    data: int
    """Groups that work on different segments; the loss and gradients are summed over all axes."""
    sequence: int
    """Ranks of a segment between which attention exchanges heads for tokens."""
    rank: int = 0
    context: int = 1
    """Ranks of a segment over which attention gathers keys and values."""

    @property
    def segment_ranks(self) -> int:
        """Ranks that share a segment."""
        return self.context * self.sequence

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.data * self.segment_ranks

    @property
    def data_rank(self) -> int:
        """Index on the data axis."""
        return self.rank // self.segment_ranks

    @property
    def segment_rank(self) -> int:
        """Index among the ranks that share the segment."""
        return self.rank % self.segment_ranks

    @property
    def context_rank(self) -> int:
        """Index on the context axis."""
        return self.segment_rank // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Index on the sequence axis."""
        return self.rank % self.sequence

    def describe(self) -> str:
        """The grid in words, the outermost axis first."""
        context = f"{self.context} context x " if self.context > 1 else ""
        return f"{self.data} data x {context}{self.sequence} sequence"

    @classmethod
    def from_world(
        cls, world_size: int, sequence: int, rank: int = 0, context: int = 1
    ) -> "ParallelDims":
        """Split ``world_size`` processes.

        Raises:
            ConfigError: ``sequence * context`` does not divide ``world_size``.
        """
        if faults := grid_faults(world_size, sequence, context):
            raise ConfigError(faults)
        return cls(world_size // (sequence * context), sequence, rank, context)


def grid_faults(world_size: int, sequence: int, context: int) -> list[str]:
    """Why so many processes form no such grid; empty when they do."""
    if min(sequence, context) < 1:
        given = f"parallel.sequence={sequence} and parallel.context={context}"
        return [f"{given} must both be at least 1"]
    if world_size % (sequence * context) == 0:
        return []
    allowed = [n for n in range(1, world_size + 1) if world_size % n == 0]
    given = f"parallel.sequence={sequence}"
    if context == 1:
        return [f"{given} does not divide {world_size} processes; use {allowed}"]
    given += f" x parallel.context={context} = {sequence * context}"
    return [f"{given} does not divide {world_size} processes; their product may be {allowed}"]


def token_multiple(sequence: int, context: int) -> int:
    """What a segment's length must be a multiple of to be shared evenly.

    Ranks hold equal shares; a context rank's is two chunks of a segment (zigzag).
    """
    return sequence if context == 1 else context * math.lcm(2, sequence)


def head_faults(sequence: int, num_query_heads: int, num_kv_heads: int) -> list[str]:
    """Why the model's heads cannot be shared by ``sequence`` ranks; empty when they can."""

    def fits(n: int) -> bool:
        shares_kv_heads = num_kv_heads % n == 0 or n % num_kv_heads == 0
        return num_query_heads % n == 0 and shares_kv_heads

    allowed = list(filter(fits, range(1, num_query_heads + 1)))
    if sequence in allowed:
        return []
    heads = f"{num_query_heads} query and {num_kv_heads} key/value heads"
    fault = f"parallel.sequence={sequence} cannot share {heads}; use one of {allowed}"
    return [f"{fault}; parallel.context shares a segment without sharing heads"]


class Groups(NamedTuple):
    """This rank's groups; None where it would be alone in one."""

    sequence: "ProcessGroup | None"
    mpu: ModuleType | None
    """DeepSpeed's view: ranks that share a segment are its sequence-parallel group."""
    context: "ProcessGroup | None" = None
    segment: "ProcessGroup | None" = None
    """All ranks that share the segment."""


def make_groups(dims: ParallelDims) -> Groups:
    """The groups of this rank; every rank calls this."""
    import torch.distributed as dist  # loads for seconds; a configuration is checked without it

    assert dist.get_world_size() == dims.world_size
    if dims.segment_ranks == 1:
        return Groups(None, None)
    from deepspeed.runtime.sequence_parallel import parallel_state_sp  # loads for seconds

    parallel_state_sp.initialize_sequence_parallel(dims.segment_ranks)
    segment = parallel_state_sp.get_sequence_parallel_group()
    assert isinstance(segment, dist.ProcessGroup)
    if dims.context == 1:
        return Groups(segment, parallel_state_sp, None, segment)
    if dims.sequence == 1:
        return Groups(None, parallel_state_sp, segment, segment)
    starts = range(0, dims.world_size, dims.segment_ranks)
    sequences = [range(n, n + dims.sequence) for n in range(0, dims.world_size, dims.sequence)]
    places = product(starts, range(dims.sequence))
    contexts = [range(s + place, s + dims.segment_ranks, dims.sequence) for s, place in places]
    sequence, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in sequences])
    context, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in contexts])
    assert isinstance(sequence, dist.ProcessGroup) and isinstance(context, dist.ProcessGroup)
    return Groups(sequence, parallel_state_sp, context, segment)
