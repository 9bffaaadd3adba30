"""Start and end of one process among others: device, process group, grid.

A rank does not outlive the process that started it: without its agent nobody would stop it, and the
next start of the run would meet it in the run's folder.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Generic, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from longrope2.command import LAUNCHER_VARIABLE, REQUEUE_EXIT_CODE
from longrope2.errors import ArtifactError
from longrope2.parallel.dims import ParallelConfig, ParallelDims, make_groups

# A build of DeepSpeed's extension for CPU processes takes less than a minute, where cores are free.
_STALE_LOCK_MINUTES = 15
_SUSPECT_LOCK_SECONDS = 60.0
_SECONDS_BETWEEN_LOOKS = 30.0
_MEETING_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    dims: ParallelDims
    device: torch.device
    sequence_group: ProcessGroup | None
    mpu: ModuleType | None
    context_group: ProcessGroup | None = None
    segment_group: ProcessGroup | None = None
    """All processes that share this one's segment."""

    @property
    def is_main(self) -> bool:
        """The process that writes."""
        return self.dims.rank == 0


def world_size_from_environment() -> int | None:
    """Processes started by torchrun, or None outside it."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def join_processes(parallel: ParallelConfig) -> Processes:
    """Join torchrun's process group, or make one of this process alone; NCCL or, on CPUs, gloo.

    A stop signal that comes meanwhile ends the process with ``REQUEUE_EXIT_CODE``.

    Raises:
        ArtifactError: a build of a DeepSpeed extension that was killed left its lock; every process
            would wait for it without a word.
    """
    _refuse_stale_locks()
    if world_size_from_environment() is not None:
        end_with_parent(os.environ.get(LAUNCHER_VARIABLE))
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # DeepSpeed warns when it has to find out by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _hush_deepspeed()
    with _ending_at_once(says_so=local_rank == 0), _naming_locks(speaks=local_rank == 0):
        import deepspeed

        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=parallel.timeout_seconds),
            auto_mpi_discovery=False,
            verbose=False,
        )
    dims = ParallelDims.from_world(
        dist.get_world_size(), parallel.sequence, dist.get_rank(), parallel.context
    )
    return Processes(dims, device, *make_groups(dims))


def _hush_deepspeed() -> None:
    """No warning for each of DeepSpeed's collectives (0.19.8, torch 2.13).

    It calls two of torch's by names that are deprecated, which warns its authors of a change; users
    of a training could do nothing about the lines. Every other warning is shown.
    """
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings(
        "ignore",
        message=rf"`torch\.distributed\.({names})` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.c10d_logger",
    )


def end_with_parent(parent: str | None) -> None:
    """Have the system kill this process when the one that started it has ended, however it ended.

    ``parent`` is its process id as this process was told, if it was: it may be gone already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if parent is not None and os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    """What work returned, or why it did not."""

    value: Result | None
    error: Exception | None = None

    @classmethod
    def of(cls, work: Callable[[], Result]) -> "_Outcome[Result]":
        """Of work that is done now."""
        try:
            return cls(work())
        except (ArtifactError, OSError) as error:
            return cls(None, error)
        except Exception:  # of any class, which need not travel
            return cls(None, RuntimeError(traceback.format_exc()))

    def result(self) -> Any:
        """What was returned; raises what was raised."""
        if self.error is not None:
            raise self.error
        return self.value


def done_by_main(work: Callable[[], Result], mark: Callable[[str], None]) -> Result:
    """What ``work`` returns on the main rank, on all ranks; every rank calls this.

    However long it takes: ranks meet every second, so that no collective comes to its time limit.
    ``mark`` is told what the rank does; the main rank is behind the others until it is done. What
    ``work`` raises is raised on all ranks.
    """
    answer: list[_Outcome[Result] | None] = [None]
    if dist.get_rank() != 0:
        mark("waiting for rank 0")
        while answer[0] is None:
            dist.broadcast_object_list(answer)
        return answer[0].result()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="main-rank-only") as pool:
        future = pool.submit(_Outcome.of, work)
        while answer[0] is None:
            if wait([future], timeout=_MEETING_SECONDS).done:
                answer = [future.result()]
                mark("telling the other ranks")
            dist.broadcast_object_list(answer)
    return answer[0].result()


def done_by_each(work: Callable[[], Result], mark: Callable[[str], None]) -> list[Result]:
    """What ``work`` returned on every rank, by rank, on all ranks; every rank calls this.

    As ``done_by_main``: however long it takes, and ranks that are not done are behind the others;
    what ``work`` raises on one rank is raised on all.
    """
    answers: list[Any] = [None] * dist.get_world_size()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="own-share") as pool:
        future, is_done = pool.submit(_Outcome.of, work), False
        while not all(answers):
            if not is_done and wait([future], timeout=_MEETING_SECONDS).done:
                is_done = True
                mark("waiting for the other ranks")
            elif is_done:
                time.sleep(_MEETING_SECONDS / 10)
            dist.all_gather_object(answers, future.result() if is_done else None)
    return [answer.result() for answer in answers]


def smallest_gpu_bytes(device: torch.device) -> int | None:
    """Memory of the smallest GPU among all ranks, the same on each; None on a CPU.

    Every rank calls this; outside a process group it is this GPU's.
    """
    if device.type != "cuda":
        return None
    own = torch.cuda.get_device_properties(device).total_memory
    smallest = torch.tensor(own, device=device)
    if dist.is_initialized():
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def _locks() -> Iterator[tuple[Path, float]]:
    """Builds of extensions are locked by files, which killed processes leave behind: age in s."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given) if given else Path.home() / ".cache" / "torch_extensions"
    for lock in root.glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):  # a build that has just ended
            yield lock, time.time() - lock.stat().st_mtime


def _refuse_stale_locks() -> None:
    for lock, seconds in _locks():
        if seconds > 60 * _STALE_LOCK_MINUTES:
            raise ArtifactError(
                f"{lock} is {seconds / 60:.0f} minutes old: the build of an extension was killed; "
                "each process waits for it since: remove this file, and the extension is built "
                "again"
            )


@contextlib.contextmanager
def _ending_at_once(*, says_so: bool) -> Iterator[None]:
    """While open, a stop signal ends this process and all that it has started: nothing is to save.

    An extension may be built for minutes, by compilers that would go on without this process. Torch
    removes its lock on the way out, which a kill would leave.
    """

    def end(number: int, frame: FrameType | None) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        if says_so:
            os.write(2, b"stopped before anything was computed; the same command begins again\n")
        sys.exit(REQUEUE_EXIT_CODE)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # which alone can hear signals
        heard = [n for n in _STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _naming_locks(*, speaks: bool) -> Iterator[None]:
    """While open, a lock that this process may be waiting for is named, again and again."""
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for lock, seconds in _locks():
                if seconds > _SUSPECT_LOCK_SECONDS:
                    print(
                        "an extension is built, once for this machine, for minutes where it is "
                        f"busy: {lock} is {seconds:.0f} s old. If no compiler runs (its build was "
                        "killed), remove this file: it is built again",
                        file=sys.stderr,
                        flush=True,
                    )
            done.wait(_SECONDS_BETWEEN_LOOKS)

    if speaks:
        threading.Thread(target=look, name="lock-watch", daemon=True).start()
    try:
        yield
    finally:
        done.set()


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
