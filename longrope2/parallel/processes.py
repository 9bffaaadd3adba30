"""Start and end of one process among others: device, process group, grid."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longrope2.errors import ArtifactError
from longrope2.parallel.dims import ParallelConfig, ParallelDims, make_groups

# A build of DeepSpeed's extension for CPU processes takes less than a minute.
_STALE_LOCK_MINUTES = 15


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    dims: ParallelDims
    device: torch.device
    sequence_group: ProcessGroup | None
    mpu: ModuleType | None

    @property
    def is_main(self) -> bool:
        """The process that writes."""
        return self.dims.rank == 0


def world_size_from_environment() -> int | None:
    """Processes started by torchrun, or None outside it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def join_processes(parallel: ParallelConfig) -> Processes:
    """Join torchrun's process group, or make one of this process alone; NCCL or, on CPUs, gloo.

    Raises:
        ArtifactError: a build of a DeepSpeed extension that was killed left its lock; every process
            would wait for it without a word.
    """
    _refuse_stale_locks()
    if world_size_from_environment() is None:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # DeepSpeed warns when it has to find out by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=parallel.timeout_seconds),
        auto_mpi_discovery=False,
        verbose=False,
    )
    dims = ParallelDims.from_world(dist.get_world_size(), parallel.sequence, dist.get_rank())
    sequence_group, mpu = make_groups(dims)
    return Processes(dims, device, sequence_group, mpu)


def _refuse_stale_locks() -> None:
    """A build of extensions is locked by a file, which a killed process leaves behind."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given) if given else Path.home() / ".cache" / "torch_extensions"
    for lock in root.glob("**/lock"):
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if minutes > _STALE_LOCK_MINUTES:
            raise ArtifactError(
                f"{lock} is {minutes:.0f} minutes old: the build of an extension was killed; each "
                "process waits for it since: remove this file, and the extension is built again"
            )


def leave_processes(*, failed: bool = False) -> None:
    """Leave the process group; without it gloo and NCCL warn at exit.

    Args:
        failed: This rank ends with an error, perhaps alone. NCCL's orderly end would wait for the
            other ranks and for what they were to do together, and the error would not be shown
            before: the end of the process aborts it instead.
    """
    if not dist.is_initialized():
        return
    if failed and dist.get_backend() == "nccl" and dist.get_world_size() > 1:
        return
    dist.destroy_process_group()
