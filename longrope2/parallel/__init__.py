"""The process grid, its groups, and how a process joins them."""

from longrope2.parallel.dims import ParallelConfig, ParallelDims, head_faults, make_groups
from longrope2.parallel.processes import Processes, join_processes, leave_processes, world_size_from_environment

__all__ = [
    "ParallelConfig",
    "ParallelDims",
    "Processes",
    "head_faults",
    "join_processes",
    "leave_processes",
    "make_groups",
    "world_size_from_environment",
]
