"""Leaving the process group: in order, unless a failed rank would wait for the others."""

import pytest
import torch.distributed as dist

from longrope2.parallel.processes import leave_processes


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
