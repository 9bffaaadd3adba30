"""Units of work on the cores of this machine or on a Slurm cluster.

A job numbers its units; every unit writes its result under a temporary name, fsyncs and renames it,
and is skipped once that is there. Units may therefore run anywhere, in any order, twice, and after
any interruption, and give the same bytes.

Why not datatrove's executors: its local pool waits for ever when a worker is killed (a process pool
of ``concurrent.futures`` fails at once, and the next run resumes), and its Slurm executor fixes the
number of tasks of every stage when the first is submitted, while here each stage's units follow
from what the one before has measured. Slurm is reached through submitit: one job array per stage.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import Enum
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longrope2.errors import DataError, UserError

# As many threads as processes, not their product.
SINGLE_THREADED = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
LINES_OF_A_LOG = 12
SLURM_POLL_SECONDS = 2.0


class ClusterKind(Enum):
    """Where units run."""

    local = "local"
    slurm = "slurm"


@dataclass
class ClusterConfig:
    """Where units run (``conf/cluster``); changes no byte of the result."""

    kind: ClusterKind = ClusterKind.local
    """``local``: processes of this machine. ``slurm``: job arrays; needs ``sbatch`` here and a
    file system shared by all nodes under ``run.root``."""
    partition: str | None = None
    """Slurm partition; null: the cluster's default."""
    account: str | None = None
    """Slurm account; null: the user's default."""
    jobs: int = 64
    """Array tasks per stage at most; each takes one core and works through its share of the
    units."""
    memory_gb: float = 4.0
    """Memory of an array task in GiB."""
    minutes: int = 720
    """Time limit of an array task; one that reaches it is requeued and goes on with its unfinished
    units."""

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        limits = {"jobs": self.jobs, "memory_gb": self.memory_gb, "minutes": self.minutes}
        return [f"cluster.{key}={n} must be above 0" for key, n in limits.items() if n <= 0]


class UnitJob(Protocol):
    """Work on numbered units; can be pickled."""

    def run(self, number: int) -> Any:
        """Do unit ``number``, unless its result is there; returns a small summary."""
        ...


def worker_count(workers: int, num_units: int, *, small: bool) -> int:
    """Processes to use, at most one per unit.

    0 ``workers`` means: as many as there are cores, or none but this one if the work is so small
    that starting processes would take longer.
    """
    wanted = workers or (1 if small else len(os.sched_getaffinity(0)))
    return max(1, min(wanted, num_units))


def run_stage(
    title: str,
    job: UnitJob,
    sizes: Sequence[int | None],
    cluster: ClusterConfig,
    *,
    workers: int,
    small: bool,
    logs: Path,
) -> list[Any]:
    """All units of a job; returns their summaries, which tell ``num_tokens``, in order.

    Shows on stderr how far it is: a bar on a terminal, which goes by the ``sizes`` of the units
    where all are known, and one line at the end. For ``workers`` and ``small`` see
    ``worker_count``, for the other arguments and errors ``run_units``.
    """
    known = [size for size in sizes if size is not None]
    steps = known if len(known) == len(sizes) else [1] * len(sizes)
    done = MofNCompleteColumn() if steps is not known else TextColumn("{task.percentage:.0f}%")
    title_shown, rate_shown = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (title_shown, BarColumn(), done, rate_shown, TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    shown = bar.add_task(title, total=max(1, sum(steps)), rate="")
    told, tokens, rate, began = {}, 0, "", time.monotonic()
    processes = worker_count(workers, len(sizes), small=small)
    finished = run_units(job, range(len(sizes)), cluster, workers=processes, logs=logs)
    with bar:
        for number, summary in finished:
            told[number] = summary
            tokens += summary.num_tokens
            seconds = max(1e-6, time.monotonic() - began)
            rate = f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
            bar.update(shown, advance=steps[number], rate=rate)
    if told:
        print(f"{title}: {len(sizes)} units, {rate}", file=sys.stderr)
    return [told[number] for number in range(len(sizes))]


def run_units(
    job: UnitJob, numbers: Sequence[int], cluster: ClusterConfig, *, workers: int, logs: Path
) -> Iterator[tuple[int, Any]]:
    """Run units and yield (number, summary) as they finish.

    ``workers`` local processes do the work, or this one if it is 1; on Slurm ``logs`` is the folder
    of the jobs' files instead.

    Raises:
        DataError: units failed (all others were done first), a worker process was killed, or Slurm
            refused or lost a job.
    """
    if not numbers:
        return
    if cluster.kind is ClusterKind.slurm:
        finished = _on_slurm(job, numbers, cluster, logs)
    elif workers > 1:
        finished = _in_processes(job, numbers, workers)
    else:
        finished = ((number, _attempt(job, number)) for number in numbers)
    failures = []
    for number, outcome in finished:
        if isinstance(outcome, DataError):
            failures.append(str(outcome))
        else:
            yield number, outcome
    if failures:
        count = f"{len(failures)} of {len(numbers)} units failed; all others are done and kept"
        raise DataError("\n  - ".join([f"{count}:", *failures[:8]]))


@dataclass(frozen=True)
class _ShareOfUnits:
    """What an array task does, on the node."""

    job: UnitJob

    def __call__(self, numbers: tuple[int, ...]) -> list[tuple[int, Any]]:
        return [(number, _attempt(self.job, number)) for number in numbers]

    def checkpoint(self, numbers: tuple[int, ...]) -> Any:
        """Slurm's signal before the time limit: requeue as it is, finished units cost nothing."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, numbers)


def _attempt(job: UnitJob, number: int) -> Any:
    """Summary of a unit, or the error that tells the user why there is none."""
    try:
        return job.run(number)
    except UserError as error:
        return DataError(str(error))  # any kind, in a form that can be pickled


# Of this worker process; set once, so that large jobs are not sent with every unit.
_job: UnitJob | None = None


def _start_worker(job: UnitJob) -> None:
    """Take the job, use one thread, and end with the parent: a killed run leaves no workers."""
    global _job
    _job = job
    os.environ.update(SINGLE_THREADED)
    parent = parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _run_in_worker(number: int) -> Any:
    assert _job is not None
    return _attempt(_job, number)


def _in_processes(job: UnitJob, numbers: Sequence[int], workers: int) -> Iterator[tuple[int, Any]]:
    """On ``workers`` processes, forked from a server that has the imports done and no threads."""
    context = get_context("forkserver")
    context.set_forkserver_preload([type(job).__module__, __name__])
    with ProcessPoolExecutor(workers, context, _start_worker, (job,)) as pool:
        futures = {pool.submit(_run_in_worker, number): number for number in numbers}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for memory; run the same command again to "
                "go on, with a smaller workers=N if memory is short"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _on_slurm(
    job: UnitJob, numbers: Sequence[int], cluster: ClusterConfig, logs: Path
) -> Iterator[tuple[int, Any]]:
    """As one job array; yields as array tasks end."""
    from submitit.helpers import as_completed as jobs_as_completed

    executor = slurm_executor(cluster, logs)
    count = min(cluster.jobs, len(numbers))
    shares = [tuple(numbers[first::count]) for first in range(count)]
    submitted = executor.map_array(_ShareOfUnits(job), shares)
    first_id = submitted[0].job_id
    print(f"slurm: {count} array tasks, first id {first_id}, logs in {logs}", file=sys.stderr)
    for task in jobs_as_completed(submitted, poll_frequency=SLURM_POLL_SECONDS):
        error = task.exception()
        if error is not None:
            tail = "\n".join((task.stderr() or str(error)).splitlines()[-LINES_OF_A_LOG:])
            raise DataError(
                f"Slurm task {task.job_id} failed; run the same command again to go on. "
                f"Its log ends:\n{tail}"
            )
        yield from task.result()


def slurm_executor(cluster: ClusterConfig, logs: Path) -> Any:
    """Submitit's executor for single-core array tasks."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=logs, cluster="slurm", slurm_max_num_timeout=20)
    except RuntimeError as error:
        remedy = "run this where sbatch is, or use cluster=local"
        raise DataError(f"cluster=slurm: {error}; {remedy}") from None
    executor.update_parameters(
        name="pack",
        mem_gb=cluster.memory_gb,
        timeout_min=cluster.minutes,
        cpus_per_task=1,
        slurm_array_parallelism=cluster.jobs,
        slurm_additional_parameters={"account": cluster.account} if cluster.account else {},
        slurm_setup=[f"export {name}={value}" for name, value in SINGLE_THREADED.items()],
        **({"slurm_partition": cluster.partition} if cluster.partition else {}),
    )
    return executor
