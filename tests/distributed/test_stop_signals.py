"""A stop signal to a real ``launch.train``: saved, code 75, and continued as if undisturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.pack import main as pack_main
from longrope2.command import REQUEUE_EXIT_CODE
from longrope2.files.artifacts import sha256_of_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
STEPS = 30
TRAIN = [
    sys.executable, "-m", "launch.train", "experiment=tiny_extend", "parallel=single", "rope=yarn",
    "target_len=256",
    "model.from_scratch=true", "training.global_batch_tokens=512", f"training.tokens={512 * STEPS}",
    "training.warmup_steps=2", "training.checkpoint_steps=1000", "tracking.wandb=disabled",
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
            "run.name=packed",
            f"run.root={folder}",
            "quotas.stdlib_modules={short: 4000, long: 4000}",
            "quotas.stdlib_topics={short: 0, long: 0}",
            "quotas.retrieval={short: 0, long: 0}",
        ]
    )
    return folder


def start(runs: Path, name: str) -> subprocess.Popen[bytes]:
    """Start the command; what it prints goes to a file, a pipe could fill up."""
    command = [*TRAIN, f"run.root={runs}", f"run.name={name}", f"segments={runs}/packed/1_segments"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (runs / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def printed(runs: Path, name: str) -> str:
    return (runs / f"{name}.log").read_text()


def records(runs: Path, name: str) -> list[dict]:
    file = runs / name / "3_checkpoints" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def losses(runs: Path, name: str) -> dict[int, tuple[float, float]]:
    return {r["step"]: (r["train/loss"], r["train/grad_norm"]) for r in records(runs, name)}


def weights_hash(runs: Path, name: str) -> str:
    return sha256_of_file(runs / name / "3_checkpoints" / "final" / "model.safetensors")


def test_stopped_by_a_signal_and_continued(runs: Path) -> None:
    undisturbed = start(runs, "undisturbed")
    assert undisturbed.wait(timeout=400) == 0, printed(runs, "undisturbed")[-3000:]
    stopped = start(runs, "stopped")
    deadline = time.monotonic() + 400
    while len(records(runs, "stopped")) < 3:
        assert stopped.poll() is None and time.monotonic() < deadline, printed(runs, "stopped")[
            -3000:
        ]
        time.sleep(0.005)
    stopped.send_signal(signal.SIGUSR1)
    assert stopped.wait(timeout=200) == REQUEUE_EXIT_CODE, printed(runs, "stopped")[-3000:]
    last = records(runs, "stopped")[-1]["step"]
    assert 3 <= last < STEPS
    words = f"stopped by SIGUSR1 after step {last}, all of it saved"
    words += "; the same command goes on from there"
    assert words in printed(runs, "stopped")
    checkpoints = runs / "stopped" / "3_checkpoints"
    assert [p.name for p in checkpoints.glob("step_*")] == [f"step_{last:08d}"]
    assert not (checkpoints / "final").exists()
    assert start(runs, "stopped").wait(timeout=400) == 0, printed(runs, "stopped")[-3000:]
    assert [r["step"] for r in records(runs, "stopped")] == list(range(1, STEPS + 1))
    assert losses(runs, "stopped") == losses(runs, "undisturbed")
    assert weights_hash(runs, "stopped") == weights_hash(runs, "undisturbed")
