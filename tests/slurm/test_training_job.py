"""``sbatch slurm/train_llama3_128k.sh`` on emulated nodes: 4 CPU ranks on 2, ZeRO-3, sp = 2.

An undisturbed run, and runs that are requeued, lose a rank or a node, or reach their time limit:
each goes on by itself and ends with the same losses and weights.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from emulated import INSIDE, EmulatedSlurm, wait_until

from longrope2.files.artifacts import sha256_of_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS = 60
TRAIN = [
    "experiment=tiny", "rope=yarn", "target_len=256", "model.from_scratch=true",
    "training.same_kind_segments=2",
    "training.global_batch_tokens=512", f"training.tokens={512 * STEPS}", "training.warmup_steps=2",
    "training.checkpoint_steps=10", "tracking.wandb=disabled", "parallel.replicate_below=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(checkout: Path) -> Path:
    """The folder of runs, with packed segments."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "data_prep.pack",
            "--target",
            "256",
            "--corpus",
            "sample",
            "--model",
            "tiny",
            "--align",
            "2",
            "run.name=packed",
            "quotas.stdlib_modules={short: 8000, long: 8000}",
            "quotas.stdlib_topics={short: 0, long: 0}",
            "quotas.retrieval={short: 0, long: 0}",
        ],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    return checkout / "runs"


class Job:
    """A submitted training."""

    def __init__(self, cluster: EmulatedSlurm, runs: Path, name: str, *options: str) -> None:
        self.cluster, self.checkout, self.product = (
            cluster,
            runs.parent,
            runs / name / "3_checkpoints",
        )
        words = [
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--gpus-per-node=2",
            f"--job-name={name}",
            *options,
            "slurm/train_llama3_128k.sh",
            *TRAIN,
            f"run.name={name}",
            "segments=runs/packed/1_segments",
        ]
        submitted = subprocess.run(
            words,
            cwd=self.checkout,
            env=cluster.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        self.id = submitted.stdout.strip()
        self.logs = self.checkout / "slurm" / "logs" / f"{name}-{self.id}"

    @property
    def log(self) -> str:
        return self.logs.with_suffix(".log").read_text()

    def records(self) -> list[dict]:
        file = self.product / "metrics.jsonl"
        return (
            [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        )

    def nodes(self) -> list[str]:
        """Nodes it runs on now."""
        return self.cluster.command(
            "scontrol", "show", "hostnames", self.cluster.job(self.id)["NodeList"]
        ).split()

    def restarts(self) -> int:
        """Times that Slurm has started it again."""
        return int(self.cluster.job(self.id)["Restarts"])

    def freeze_ranks(self) -> list[int]:
        """Stop all ranks where they are, as a file system that hangs does."""
        ranks = [
            pid for node in self.nodes() for pid in self.cluster.processes(node) if is_rank(pid)
        ]
        assert len(ranks) == 4
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        return ranks

    def end_in_about_two_minutes(self) -> None:
        """Move the time limit, which counts in whole minutes from the start."""
        running = (
            time.time() - datetime.fromisoformat(self.cluster.job(self.id)["StartTime"]).timestamp()
        )
        self.cluster.command(
            "scontrol", "update", f"JobId={self.id}", f"TimeLimit={math.ceil(running / 60) + 1}"
        )

    def attempts(self) -> list[tuple[str, int]]:
        """Outcome and exit code of every attempt, as the run folder keeps them."""
        lines = [
            json.loads(line) for line in (self.product / "attempts.jsonl").read_text().splitlines()
        ]
        return [(line["outcome"], line["exit_code"]) for line in lines]

    def wait_for_steps(self, steps: int, seconds: float = 1200) -> None:
        def reached() -> bool:
            state = self.cluster.job(self.id)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), (
                f"{state}\n{self.log}"
            )
            return len(self.records()) >= steps

        wait_until(reached, seconds, f"{steps} steps")

    def wait(self, seconds: float = 1800) -> dict[str, str]:
        ended = self.cluster.wait_for(self.id, seconds)
        assert ended["JobState"] == "COMPLETED", self.log
        return ended

    def result(self) -> tuple[dict[int, tuple[float, float]], str]:
        """Loss and gradient norm by step, repeated ones equal; hash of the weights."""
        found: dict[int, tuple[float, float]] = {}
        for record in self.records():
            values = (record["train/loss"], record["train/grad_norm"])
            assert found.setdefault(record["step"], values) == values
        return found, sha256_of_file(self.product / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(small_cluster: EmulatedSlurm, runs: Path) -> Job:
    job = Job(small_cluster, runs, "undisturbed")
    job.wait()
    return job


def test_trains_over_two_nodes(undisturbed: Job) -> None:
    losses, _ = undisturbed.result()
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS][0] < losses[1][0]
    assert "4: 2 data x 2 sequence, ZeRO stage 3" in undisturbed.log
    ranks = undisturbed.logs / "start-0" / "ranks"
    assert {path.name for path in ranks.glob("rank-*")} == {
        f"rank-00{i}.{kind}" for i in range(4) for kind in ("out", "err")
    }
    nodes = sorted(
        json.loads(path.read_text())["node"]
        for path in (undisturbed.logs / "start-0").glob("node-*.json")
    )
    assert len(nodes) == 2
    assert undisturbed.attempts() == [("begun", 0), ("done", 0)]


def test_requeued_then_a_rank_killed(
    small_cluster: EmulatedSlurm, runs: Path, undisturbed: Job
) -> None:
    """A requeue goes on from the last checkpoint; a killed rank's node is left out."""
    job = Job(small_cluster, runs, "disturbed")
    job.wait_for_steps(12)
    small_cluster.command("scontrol", "requeue", job.id)
    job.wait_for_steps(36)
    second = job.nodes()[1]
    rank = next(pid for pid in small_cluster.processes(second) if is_rank(pid))
    os.kill(rank, signal.SIGKILL)
    ended = job.wait()
    assert job.result() == undisturbed.result()
    assert ended["Restarts"] == "2" and ended["ExcNodeList"] == second
    outcomes = job.attempts()
    assert outcomes[-4:] == [("begun", 0), ("failed", 1), ("begun", 0), ("done", 0)], outcomes
    assert "killed by signal 9" in job.log
    assert f"failed: starts again without {second}, from " in job.log


def test_node_dies(small_cluster: EmulatedSlurm, runs: Path, undisturbed: Job) -> None:
    job = Job(small_cluster, runs, "node_dies")
    job.wait_for_steps(15)
    second = job.nodes()[1]
    small_cluster.crash_node(second)
    ended = job.wait()
    small_cluster.start_node(second)
    assert job.result() == undisturbed.result()
    assert (
        second
        not in small_cluster.command("scontrol", "show", "hostnames", ended["NodeList"]).split()
    )


def test_time_limit(small_cluster: EmulatedSlurm, runs: Path, undisturbed: Job) -> None:
    """The real limit, twice: first the ranks, frozen, cannot save before it, then they can.

    The limit is moved while the job runs, so that it comes in the middle of training at any speed
    of the machine.
    """
    job = Job(small_cluster, runs, "time_limit", "--time=60", "--signal=B:USR1@45")
    job.wait_for_steps(12)
    job.freeze_ranks()
    job.end_in_about_two_minutes()
    wait_until(
        lambda: job.restarts() == 1, 300, "the job is requeued although its ranks had not saved"
    )
    small_cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    # Slurm's SIGCONT and SIGTERM let the frozen ranks save after all, so wait for the new ones
    # before counting steps.
    wait_until((job.logs / "start-1" / "ranks").is_dir, 600, "ranks start again")
    job.wait_for_steps(len(job.records()) + 3)
    frozen = job.freeze_ranks()
    job.end_in_about_two_minutes()
    wait_until(
        lambda: job.log.count("asked to stop\n") == 2, 300, "the job is told of its limit again"
    )
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: job.restarts() == 2, 300, "the job is requeued")
    small_cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait()
    ended = [outcome for outcome in job.attempts() if outcome[0] != "begun"]
    assert ended == [("stopped", 1), ("stopped", 75), ("done", 0)], job.log
    assert "asked to stop, but the ranks had not saved in time: goes on from 10 " in job.log
    assert "stopped by SIGUSR1 after step" in job.log
    assert job.result() == undisturbed.result()


def test_all_of_it_in_containers_of_srun(
    small_cluster: EmulatedSlurm, runs: Path, undisturbed: Job
) -> None:
    """Checks, composing, ranks and bookkeeping; requeued, then at its time limit."""
    python, site = runs.parent / "python_inside", runs.parent / "slurm" / "site.env"
    python.write_text(INSIDE.format(python=sys.executable))
    python.chmod(0o755)
    usual = site.read_text()
    options = "SRUN_OPTIONS=(--export=ALL,INSIDE=yes --comment='a b')"
    site.write_text(f"{usual}PYTHON=({python})\n{options}\n")
    try:
        job = Job(small_cluster, runs, "in_containers", "--time=60", "--signal=B:USR1@45")
        job.wait_for_steps(12)
        small_cluster.command("scontrol", "requeue", job.id)
        wait_until((job.logs / "start-1" / "ranks").is_dir, 600, "ranks start again")
        job.wait_for_steps(len(job.records()) + 3)
        job.end_in_about_two_minutes()
        wait_until(lambda: job.restarts() == 2, 300, "the job is requeued at its limit")
        small_cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
        job.wait()
    finally:
        site.write_text(usual)
    assert job.attempts()[-3:] == [("stopped", 75), ("begun", 0), ("done", 0)], job.log
    assert "not there outside" not in job.log
    assert "Slurm kills a job 30 s after SIGTERM (KillWait), and a stop may take" in job.log
    assert job.result() == undisturbed.result()


def is_rank(pid: int) -> bool:
    """Whether a process is one of the trainers."""
    return (
        b"launch.train\0--config" in Path(f"/proc/{pid}/cmdline").read_bytes()
        and b"node_agent" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
