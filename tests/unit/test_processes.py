"""Joining and leaving the process group: nothing that would wait for ever."""

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from longrope2.errors import ArtifactError
from longrope2.parallel import processes
from longrope2.parallel.processes import leave_processes


@pytest.mark.parametrize(("minutes", "is_stale"), [(1, False), (40, True)])
def test_the_lock_of_a_killed_build(
    minutes: int, is_stale: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    left = time.time() - 60 * minutes
    os.utime(lock, (left, left))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    if not is_stale:
        processes._refuse_stale_locks()
        return
    with pytest.raises(ArtifactError, match=r"lock is 40 minutes old: .*: remove this file"):
        processes._refuse_stale_locks()


def test_no_extensions_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    processes._refuse_stale_locks()


@pytest.mark.parametrize(
    ("backend", "world_size", "failed", "left"),
    [
        ("nccl", 64, False, True),
        ("nccl", 64, True, False),
        ("nccl", 1, True, True),
        ("gloo", 2, True, True),
    ],
)
def test_nccl_is_not_waited_for_after_an_error(
    monkeypatch: pytest.MonkeyPatch, backend: str, world_size: int, failed: bool, left: bool
) -> None:
    destroyed: list[bool] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    leave_processes(failed=failed)
    assert bool(destroyed) is left
