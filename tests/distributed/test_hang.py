"""A rank of a real run that is stopped.

The other one names it, and the command ends with the code of a hang.
"""

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.pack import main as pack_main
from longrope2.command import HANG_EXIT_CODE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "experiment=tiny_extend",
        "rope=yarn",
        "target_len=256",
        "model.from_scratch=true",
        "training.global_batch_tokens=512",
        "training.tokens=512000",
        "training.checkpoint_steps=100000",
        "training.hang_timeout_s=60",
        "tracking.wandb=disabled",
        f"run.root={folder}",
        "run.name=hang",
        f"segments={folder}/packed/1_segments",
    ]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
        )


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
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
            f"run.root={tmp_path}",
            "quotas.stdlib_modules={short: 4000, long: 4000}",
            "quotas.stdlib_topics={short: 0, long: 0}",
            "quotas.retrieval={short: 0, long: 0}",
        ]
    )
    log = tmp_path / "log"
    process = start(tmp_path, log)
    metrics = tmp_path / "hang" / "3_checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    ranks = {
        int(p.environ()["RANK"]): p
        for p in psutil.Process(process.pid).children()
        if "--config" in p.cmdline()
    }
    ranks[1].send_signal(signal.SIGSTOP)
    assert process.wait(timeout=300) == HANG_EXIT_CODE, log.read_text()[-3000:]
    printed = log.read_text()
    assert "rank 0: no progress for training.hang_timeout_s=60 s at step" in printed
    stopped = next(line for line in printed.splitlines() if line.startswith("  rank 1 (host"))
    assert f"process {ranks[1].pid}): step" in stopped and "no sign of life for" in stopped
    assert "stacks of rank 0:" in printed and "in run_step" in printed
    beat = json.loads(
        (tmp_path / "hang" / "3_checkpoints" / "heartbeats" / "rank_00001.json").read_text()
    )
    assert f"step {beat['step']}, {beat['phase']}" in stopped
    compare = next(line for line in printed.splitlines() if line.startswith("latest collectives"))
    record = tmp_path / "hang" / "3_checkpoints" / "heartbeats" / "collectives_0"
    assert compare.startswith(f"latest collectives of rank 0: {record}; ")
    # torchfrtrace itself fails on gloo's dumps, whose pg_config is empty (torch 2.13: KeyError).
    assert shlex.split(compare.rpartition(": ")[2])[0] == "torchfrtrace"
    entries = pickle.loads(record.read_bytes())["entries"]
    assert "gloo:all_reduce" in {entry["profiling_name"] for entry in entries}
