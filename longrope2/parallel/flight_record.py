"""Torch's flight recorder: the latest collectives of every rank, for a run that hangs.

Torch keeps them anyway; here they are written where the run's heartbeats are, by torch itself when
a collective runs out of time (NCCL), and by the hang watch. ``torchfrtrace``, which comes with
torch, sets the files of all ranks side by side and names the collective that some of them are not
in.
"""

import faulthandler
import os
from pathlib import Path

import torch.distributed as dist

_PREFIX = "collectives_"
_NUM_COLLECTIVES = "2000"
_DUMP_SECONDS = 30.0


def keep_flight_record(folder: Path) -> None:
    """Have torch write into ``folder`` if a collective runs out of time; before ranks meet.

    What the environment says already stays.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _NUM_COLLECTIVES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / _PREFIX))


def write_flight_record(folder: Path, rank: int) -> str:
    """Write this rank's latest collectives into ``folder``; a line that says where, or why not.

    Whoever calls this is about to end the process: should torch itself hang, it ends here, with
    exit code 1.
    """
    from torch._C import _distributed_c10d as c10d

    if not dist.is_initialized():
        return "no collective was begun"
    # NCCL's own, where torch has it and ranks meet over it.
    names = ("_dump_nccl_trace", "_dump_fr_trace")[dist.get_backend() != "nccl" :]
    dump = next((getattr(c10d, name) for name in names if hasattr(c10d, name)), None)
    if dump is None:
        return "this torch keeps no record of collectives"
    path = folder / f"{_PREFIX}{rank}"
    # Not by a thread of Python's: torch holds the interpreter meanwhile.
    faulthandler.dump_traceback_later(_DUMP_SECONDS, exit=True)
    try:
        path.write_bytes(dump())
    except (OSError, RuntimeError) as error:
        return f"the latest collectives could not be written to {path}: {error}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return (
        f"latest collectives of rank {rank}: {path}; those of all ranks compared: "
        f"torchfrtrace --allow-incomplete-ranks --prefix {_PREFIX} {folder}"
    )
