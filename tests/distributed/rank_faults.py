"""What is made to happen to a rank of ``ForkedRanks`` (``before``), in it, before it trains."""

import hashlib
import os
import threading
import time
from pathlib import Path
from typing import Any

from longrope2.files import artifacts
from longrope2.training.heartbeat import Heartbeat

CHUNK = 2**19


def stop_signal(rank: int, step: int, phase: str, number: int) -> None:
    """Rank ``rank`` gets signal ``number`` when ``phase`` of ``step`` begins."""
    mark = Heartbeat.mark

    def marked(self: Heartbeat, name: str, at: int | None = None, **options: Any) -> None:
        mark(self, name, at, **options)
        print(f"rank {os.environ['RANK']} step {self._now[1]}: {name}", flush=True)
        if int(os.environ["RANK"]) == rank and self._now[1] == step and name.startswith(phase):
            os.kill(os.getpid(), number)

    Heartbeat.mark = marked


def slow_hash(seconds: float) -> None:
    """Files of finished checkpoints are hashed one by one, a chunk every ``seconds``."""
    hashed, one_at_a_time = artifacts.sha256_of_file, threading.Lock()

    def throttled(path: Path) -> str:
        if not path.parent.name.startswith("step_"):
            return hashed(path)
        digest = hashlib.sha256()
        with one_at_a_time, path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                time.sleep(seconds)
        print(f"hashed {path.name}", flush=True)
        return digest.hexdigest()

    artifacts.sha256_of_file = throttled


def stuck_hash() -> None:
    """On rank 1 hashing its files of a finished checkpoint never ends, and reads nothing."""
    hashed = artifacts.sha256_of_file

    def stuck(path: Path) -> str:
        if path.parent.name.startswith("step_") and os.environ["RANK"] == "1":
            threading.Event().wait()
        return hashed(path)

    artifacts.sha256_of_file = stuck
