"""Joining and leaving the process group: nothing that would wait for ever."""

import contextlib
import os
import signal
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.file_baton import FileBaton

from longrope2.command import REQUEUE_EXIT_CODE
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


def test_a_lock_that_is_waited_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    locks = {name: tmp_path / name / "lock" for name in ("old", "young")}
    for lock in locks.values():
        lock.parent.mkdir()
        lock.touch()
    left = time.time() - 200
    os.utime(locks["old"], (left, left))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(processes, "_SECONDS_BETWEEN_LOOKS", 0.01)
    for speaks in (False, True):
        with processes._naming_locks(speaks=speaks):
            time.sleep(0.3)
        printed = capfd.readouterr().err
        assert (f"{locks['old']} is 200 s old. If no compiler runs" in printed) is speaks
        assert str(locks["young"]) not in printed
    time.sleep(0.1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_ends_the_build_of_an_extension_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """Its compilers too, though they are no children; and no lock stays."""
    lock, pid_file = tmp_path / "lock", tmp_path / "pid"
    building = os.fork()
    if building == 0:
        code = 1
        try:
            with processes._ending_at_once(says_so=True):
                baton = FileBaton(str(lock))
                baton.try_acquire()
                try:
                    compiler = f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; sleep 60"
                    subprocess.run(["sh", "-c", f"sh -c '{compiler}; true'; true"], check=True)
                finally:
                    baton.release()
        except SystemExit as ended:
            code = int(ended.code or 0)
        os._exit(code)
    began = time.monotonic()
    while not pid_file.exists() and time.monotonic() - began < 30:
        time.sleep(0.01)
    assert lock.exists()
    os.kill(building, number)
    began = time.monotonic()
    status = os.waitpid(building, 0)[1]
    assert time.monotonic() - began < 10
    assert os.waitstatus_to_exitcode(status) == REQUEUE_EXIT_CODE
    assert not lock.exists() and _has_ended(int(pid_file.read_text()))
    said = "stopped before anything was computed; the same command begins again\n"
    assert capfd.readouterr().err == said


def _has_ended(pid: int) -> bool:
    """Or is a zombie, that whoever adopted it has not looked at yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_two_warnings_of_deepspeeds_calls_are_hidden_and_no_others(tmp_path: Path) -> None:
    """As torch gives them, from a process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    one, two = torch.zeros(1), torch.zeros(1)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        processes._hush_deepspeed()
        try:
            dist.all_gather_into_tensor(one, two)
            dist.reduce_scatter_tensor(one, two)
            assert not shown
            _warn("`torch.distributed.all_gather_into_tensor` is deprecated", "somewhere.else")
            _warn("`torch.distributed.reduce_op` is deprecated", "torch.distributed.c10d_logger")
        finally:
            dist.destroy_process_group()
    assert [str(warning.message)[19:28] for warning in shown] == ["all_gathe", "reduce_op"]


def _warn(text: str, module: str) -> None:
    warnings.warn_explicit(text, FutureWarning, "file.py", 1, module=module)


def test_a_rank_ends_with_the_process_that_started_it() -> None:
    """Also when that one is killed; and when it has gone before the rank could ask."""
    reading, writing = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            processes.end_with_parent(str(os.getppid()))
            os.write(writing, b"ready")
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 5) == b"ready"
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(reading, 1) == b""  # nobody is left who could write
    os.close(reading)
    orphan = os.fork()
    if orphan == 0:
        processes.end_with_parent(str(os.getpid()))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(orphan, 0)[1]) == -signal.SIGKILL


def test_work_of_the_main_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_MEETING_SECONDS", 0.01)
    store = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    marks: list[str] = []

    def fail() -> None:
        raise OSError("the disk is gone")

    try:
        assert processes.done_by_main(lambda: time.sleep(0.1), marks.append) is None
        with pytest.raises(OSError, match="the disk is gone"):
            processes.done_by_main(fail, marks.append)
    finally:
        dist.destroy_process_group()
    assert marks == ["telling the other ranks"] * 2


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
