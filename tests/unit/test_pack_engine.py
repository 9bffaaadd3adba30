"""Units on processes and job arrays: all are done, failures told, a killed worker ends the run."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep import engine
from data_prep.engine import ClusterConfig, ClusterKind, run_units, worker_count
from longrope2.errors import DataError


@dataclass(frozen=True)
class Squares:
    """Squares; one unit may fail or kill its process."""

    folder: Path
    failing: int = -1
    killing: int = -1

    def run(self, number: int) -> int:
        if number == self.failing:
            raise DataError(f"unit {number} is not to be had")
        if number == self.killing:
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / str(number)).touch()
        return number * number


def collect(job, numbers, tmp_path, *, workers=1, cluster=None):
    return dict(
        run_units(job, numbers, cluster or ClusterConfig(), workers=workers, logs=tmp_path / "logs")
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_all_units_are_done_and_failures_told_at_the_end(tmp_path, workers):
    assert collect(Squares(tmp_path), range(7), tmp_path, workers=workers) == {
        n: n * n for n in range(7)
    }
    (tmp_path / "failing").mkdir()
    with pytest.raises(
        DataError, match=r"1 of 7 units failed; all others are done and kept:\n  - unit 2 is not"
    ):
        collect(Squares(tmp_path / "failing", failing=2), range(7), tmp_path, workers=workers)
    assert sorted(p.name for p in (tmp_path / "failing").iterdir()) == [
        "0",
        "1",
        "3",
        "4",
        "5",
        "6",
    ]


def test_a_killed_worker_ends_the_run_with_advice(tmp_path):
    with pytest.raises(
        DataError, match="a worker process was killed.*run the same command again.*workers=N"
    ):
        collect(Squares(tmp_path, killing=1), range(4), tmp_path, workers=2)


@pytest.mark.parametrize("failing", [-1, 3])
def test_job_arrays(tmp_path, monkeypatch, failing):
    """The path of cluster=slurm with submitit's own local executor in place of sbatch."""
    submitit = pytest.importorskip("submitit")

    def local(cluster, logs):
        executor = submitit.AutoExecutor(folder=logs, cluster="local")
        executor.update_parameters(timeout_min=5)
        return executor

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the tasks find this module
    monkeypatch.setattr(engine, "slurm_executor", local)
    monkeypatch.setattr(engine, "SLURM_POLL_SECONDS", 0.1)
    cluster = ClusterConfig(kind=ClusterKind.slurm, jobs=2)
    job = Squares(tmp_path, failing=failing)
    if failing < 0:
        assert collect(job, range(5), tmp_path, cluster=cluster) == {n: n * n for n in range(5)}
    else:
        with pytest.raises(DataError, match="unit 3 is not to be had"):
            collect(job, range(5), tmp_path, cluster=cluster)


def test_slurm_without_sbatch_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="cluster=slurm: .*use cluster=local"):
        collect(
            Squares(tmp_path), range(2), tmp_path, cluster=ClusterConfig(kind=ClusterKind.slurm)
        )


def test_worker_count():
    cores = len(os.sched_getaffinity(0))
    assert worker_count(0, 10**6, small=False) == cores
    assert worker_count(0, 10**6, small=True) == 1
    assert worker_count(5, 10**6, small=True) == 5
    assert worker_count(5, 3, small=False) == 3
    assert worker_count(5, 0, small=False) == 1


def test_cluster_faults():
    faults = ClusterConfig(jobs=0, memory_gb=-1, minutes=0).faults()
    assert faults == [
        "cluster.jobs=0 must be above 0",
        "cluster.memory_gb=-1 must be above 0",
        "cluster.minutes=0 must be above 0",
    ]
