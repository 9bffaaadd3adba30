"""The process grid and its groups."""

from longrope2.parallel.dims import ParallelConfig, ParallelDims, head_faults, make_groups

__all__ = ["ParallelConfig", "ParallelDims", "head_faults", "make_groups"]
