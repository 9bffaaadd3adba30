"""Stopping, killing and damaging a run of ``launch.train``.

What follows is the undisturbed run, bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.pack import main as pack_main
from longrope2.command import REQUEUE_EXIT_CODE
from longrope2.files.artifacts import sha256_of_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
STEPS = 6
TRAIN = [
    sys.executable, "-m", "launch.train", "experiment=tiny_extend", "rope=yarn", "target_len=256",
    "model.from_scratch=true", "training.global_batch_tokens=512", f"training.tokens={512 * STEPS}",
    "training.warmup_steps=2", "training.checkpoint_steps=2", "tracking.wandb=disabled",
    "parallel.replicate_below=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with packed segments in ``packed/1_segments``."""
    folder = tmp_path_factory.mktemp("runs")
    pack_main(
        [
            "--target",
            "256",
            "--corpus",
            "sample",
            "--model",
            "tiny",
            "--align",
            "2",
            "run.name=packed",
            f"run.root={folder}",
            "quotas.stdlib_modules={short: 4000, long: 4000}",
            "quotas.stdlib_topics={short: 0, long: 0}",
            "quotas.retrieval={short: 0, long: 0}",
        ]
    )
    return folder


def command(runs: Path, name: str, *overrides: str) -> list[str]:
    return [
        *TRAIN,
        f"run.root={runs}",
        f"run.name={name}",
        f"segments={runs}/packed/1_segments",
        *overrides,
    ]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        arguments, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-5000:]
    return ended


def losses(runs: Path, name: str) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm.

    A step repeated after a kill must repeat its numbers exactly.
    """
    found: dict[int, tuple[float, float]] = {}
    for line in (runs / name / "3_checkpoints" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values = (record["train/loss"], record["train/grad_norm"])
        assert found.setdefault(record["step"], values) == values
    return found


def weights_hash(runs: Path, name: str) -> str:
    return sha256_of_file(runs / name / "3_checkpoints" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(runs: Path) -> tuple[dict[int, tuple[float, float]], str]:
    run(command(runs, "undisturbed"))
    found = losses(runs, "undisturbed")
    assert sorted(found) == list(range(1, STEPS + 1))
    return found, weights_hash(runs, "undisturbed")


def test_stopped_and_continued(runs: Path, undisturbed: tuple) -> None:
    run(command(runs, "stopped", "training.stop_after_step=3"))
    assert not (runs / "stopped" / "3_checkpoints" / "final").exists()
    run(command(runs, "stopped"))
    assert (losses(runs, "stopped"), weights_hash(runs, "stopped")) == undisturbed
    assert "already complete" in run(command(runs, "stopped")).stdout
    kept = sorted(p.name for p in (runs / "stopped" / "3_checkpoints").glob("step_*"))
    assert kept == ["step_00000004", "step_00000006"]


def test_killed_rank(runs: Path, undisturbed: tuple) -> None:
    process = subprocess.Popen(
        command(runs, "killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = runs / "killed" / "3_checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it could be killed"
        )
        time.sleep(0.02)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    run(command(runs, "killed"))
    assert (losses(runs, "killed"), weights_hash(runs, "killed")) == undisturbed


def ranks_of(pid: int) -> list[int]:
    """The processes that torchrun's agent started in our command."""
    return [child.pid for child in psutil.Process(pid).children() if "--config" in child.cmdline()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "ctrl_c"])
def test_stop_signal_to_the_command(number: signal.Signals, runs: Path, undisturbed: tuple) -> None:
    """It reaches both ranks, which stop after the same step; 75 comes back.

    SIGINT goes to the whole group of processes, as from a terminal.
    """
    name = number.name
    process = subprocess.Popen(
        command(runs, name),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = runs / name / "3_checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before the signal"
        )
        time.sleep(0.005)
    os.killpg(process.pid, number) if number is signal.SIGINT else process.terminate()
    output, errors = process.communicate(timeout=200)
    assert process.returncode == REQUEUE_EXIT_CODE, errors[-3000:]
    assert f"stopped by {name} after step" in output
    assert errors.count("Ctrl-C: ") == (number is signal.SIGINT)
    assert "Traceback" not in errors and "exitcode" not in errors
    assert "going on after step" in run(command(runs, name)).stdout
    assert (losses(runs, name), weights_hash(runs, name)) == undisturbed


def test_ranks_do_not_outlive_their_launcher(runs: Path) -> None:
    process = subprocess.Popen(
        command(runs, "orphans"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = runs / "orphans" / "3_checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    ranks = [psutil.Process(pid) for pid in ranks_of(process.pid)]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_damaged_checkpoint_falls_back_to_the_one_before(runs: Path, undisturbed: tuple) -> None:
    run(command(runs, "damaged", "training.stop_after_step=4"))
    newest = runs / "damaged" / "3_checkpoints" / "step_00000004"
    state = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    ended = run(command(runs, "damaged"))
    assert "skipping a damaged checkpoint" in ended.stdout + ended.stderr
    assert (losses(runs, "damaged"), weights_hash(runs, "damaged")) == undisturbed
