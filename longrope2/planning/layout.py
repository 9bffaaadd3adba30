"""One way to run a training on a number of processes: what the planner chooses between."""

from dataclasses import dataclass
from enum import Enum

from longrope2.planning.shape import ModelShape, Workload

__all__ = ["Layout", "RecomputePolicy", "ZeroBuffers"]

BYTES_FP32, BYTES_BF16 = 4, 2


class RecomputePolicy(Enum):
    """What the backward pass computes again; the values of ``training.recompute``."""

    none = "none"
    dense = "dense"
    """All of a layer but attention: queries, keys, values and output are kept."""
    full = "full"


@dataclass(frozen=True)
class ZeroBuffers:
    """Sizes that DeepSpeed's ZeRO-3 is given, in elements (``zero.*`` of the configuration)."""

    reduce_bucket: int = 500_000_000
    max_live: int = 1_000_000_000
    hpz_size: int = 1
    gradient_bytes: int = BYTES_FP32
    """Bytes of a gradient on its way under sequence parallelism, float32 by default."""


@dataclass(frozen=True)
class Layout:
    """Processes and what each of them keeps."""

    data: int
    """Groups that work on different segments."""
    sequence: int
    """Processes that share a segment."""
    recompute: RecomputePolicy
    micro_batch: int = 1
    """Segments that a group works on at once."""
    offload: bool = False
    """Keep what recompute leaves between layers in CPU memory."""
    bf16: bool = True
    """bf16 with float32 master weights; False is float32 throughout, as on a CPU."""
    zero: ZeroBuffers = ZeroBuffers()
    fused_norms: bool = False
    """Norms in one kernel (``training.norm``), which keeps no float32 copy of its input."""

    @property
    def num_processes(self) -> int:
        """All processes."""
        return self.data * self.sequence

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in forward and backward."""
        return BYTES_BF16 if self.bf16 else BYTES_FP32

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient on its way: without sequence parallelism those of the compute format."""
        return self.zero.gradient_bytes if self.sequence > 1 else self.compute_bytes

    def local_tokens(self, workload: Workload) -> int:
        """Tokens a process holds in one micro-step."""
        return self.micro_batch * workload.target_len // self.sequence

    def kv_width(self, shape: ModelShape) -> int:
        """Width of the exchanged keys, and of the values: repeated where there are fewer heads than processes."""
        return max(shape.num_kv_heads, self.sequence) * shape.head_dim

    def micro_steps(self, workload: Workload) -> float:
        """Micro-steps of one optimizer step."""
        return workload.segments_per_step / (self.data * self.micro_batch)
