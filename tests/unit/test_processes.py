"""Joining the other processes: what would make it wait for ever is refused."""

import os
import time
from pathlib import Path

import pytest

from longrope2.errors import ArtifactError
from longrope2.parallel import processes


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
    with pytest.raises(ArtifactError, match=r"lock is 40 minutes old: .*; remove this file"):
        processes._refuse_stale_locks()


def test_no_extensions_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    processes._refuse_stale_locks()
