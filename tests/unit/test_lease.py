"""One writer per product: live ones are named, dead ones replaced, with locks and without."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from longrope2.errors import ArtifactError
from longrope2.files import lease
from longrope2.files.lease import Holder, only_writer, refuse_second_writer, take_lock

ROOT = Path(__file__).parent.parent.parent
PRODUCT = "3_checkpoints"
HOLD = """
import errno, fcntl, sys, time
from pathlib import Path
from longrope2.files import lease
lease._TOUCH_SECONDS, lease._SETTLE_SECONDS = 0.1, 1.0
def no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
if sys.argv[2] == "without locks":
    fcntl.flock = no_locks
with lease.only_writer(Path(sys.argv[1]), "3_checkpoints", watch_seconds=2.0):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def start_holder(run: Path, locks: str = "with locks", seconds: float = 60) -> subprocess.Popen:
    """Another process that holds the lease, or is refused."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), locks, str(seconds)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@contextmanager
def holder(run: Path, locks: str = "with locks") -> Iterator[subprocess.Popen]:
    """A process that holds the lease while open."""
    process = start_holder(run, locks)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def leave_note(run: Path, **changes: str | int) -> Path:
    """What a writer of another machine left."""
    note = run / ".leases" / f"{PRODUCT}.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    other = replace(Holder.this_process(), kernel="other", host="far", **changes)  # pyright: ignore
    note.write_text(json.dumps(asdict(other)))
    return note


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_a_second_writer_is_refused_by_the_first_ones_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, locks: str
) -> None:
    with holder(tmp_path, locks) as first:
        if locks == "without locks":
            monkeypatch.setattr("fcntl.flock", no_locks)
        with pytest.raises(ArtifactError) as refused, only_writer(tmp_path, PRODUCT):
            pass
    found = str(refused.value)
    assert found.startswith(f"{tmp_path / PRODUCT} is being written by -c (host ")
    assert f"process {first.pid}, since " in found
    assert found.endswith("wait until it has ended, or stop it, or give another run.name")


@pytest.mark.parametrize("locks", ["with locks", "without locks"])
def test_a_killed_writers_lease_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, locks: str
) -> None:
    """The lock is gone, or the process id is: nothing has to be waited for."""
    with holder(tmp_path, locks) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        if locks == "without locks":
            monkeypatch.setattr("fcntl.flock", no_locks)
        began = time.monotonic()
        with only_writer(tmp_path, PRODUCT):
            assert time.monotonic() - began < lease.WATCH_SECONDS / 2


def test_it_ends_with_its_block_and_products_do_not_share_one(tmp_path: Path) -> None:
    with only_writer(tmp_path, PRODUCT), only_writer(tmp_path, "2_factors"):
        with pytest.raises(ArtifactError, match="2_factors is being written by"):
            refuse_second_writer(tmp_path, "2_factors")
        assert {path.suffix for path in (tmp_path / ".leases").iterdir()} == {".lock", ".json"}
    refuse_second_writer(tmp_path, PRODUCT)
    assert not list(tmp_path.iterdir())


def test_a_refused_writer_leaves_no_folder_and_one_that_writes_leaves_its_own(
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs" / "a" / "b"
    with pytest.raises(ArtifactError, match="not mine"), only_writer(run, PRODUCT):
        raise ArtifactError("not mine")
    assert not list(tmp_path.iterdir())
    with only_writer(run, PRODUCT):
        (run / PRODUCT).mkdir()
    assert [path.name for path in run.iterdir()] == [PRODUCT]


def test_a_lock_that_its_former_holder_removed_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a third writer would lock another file of the same name."""
    lock, removals = tmp_path / ".leases" / f"{PRODUCT}.lock", iter([True])

    def as_if_it_just_ended(descriptor: int) -> bool | None:
        if next(removals, False):
            lock.unlink()
            lock.parent.rmdir()
        return take_lock(descriptor)

    monkeypatch.setattr(lease, "take_lock", as_if_it_just_ended)
    with only_writer(tmp_path, PRODUCT):
        monkeypatch.undo()
        with pytest.raises(ArtifactError, match="is being written by"):
            refuse_second_writer(tmp_path, PRODUCT)


def test_a_writer_on_another_machine_is_watched(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lock that is free says nothing of another machine; a name that nobody touches does."""
    leave_note(tmp_path, command="launch.train of job 7", pid=1)
    began = time.monotonic()
    with only_writer(tmp_path, PRODUCT, watch_seconds=0.5):
        assert time.monotonic() - began >= 0.5
    said = capsys.readouterr().err
    assert "looks for 0.5 s whether launch.train of job 7 (host far, process 1, since" in said


def test_a_writer_on_another_machine_that_lives_is_named(tmp_path: Path) -> None:
    note = leave_note(tmp_path, command="launch.train of job 7")
    script = f"import os, time\nwhile True: time.sleep(0.2); os.utime({str(note)!r})"
    living = subprocess.Popen([sys.executable, "-c", script])
    try:
        with pytest.raises(ArtifactError, match=r"by launch.train of job 7 \(host far"):
            refuse_second_writer(tmp_path, PRODUCT)
    finally:
        living.kill()
        living.wait()
    assert note.is_file()


def test_a_name_left_long_ago_and_a_torn_one_are_not_watched(tmp_path: Path) -> None:
    note, began = leave_note(tmp_path), time.monotonic()
    os.utime(note, (0, 0))
    refuse_second_writer(tmp_path, PRODUCT)
    leave_note(tmp_path)
    note.write_text('{"host": "fa')
    refuse_second_writer(tmp_path, PRODUCT)
    assert time.monotonic() - began < lease.WATCH_SECONDS / 2


def test_of_two_that_come_at_once_without_locks_one_stays(tmp_path: Path) -> None:
    both = [start_holder(tmp_path, "without locks", seconds=3) for _ in range(2)]
    ended = [process.communicate() for process in both]
    assert sorted(out for out, _ in ended) == ["", "held\n"], ended
    assert sum("is being written by" in err for _, err in ended) == 1


def test_a_writer_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    """Suspended until another had its place: it must not go on beside that one."""
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        leave_note(tmp_path, command="launch.train of job 8")
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate(timeout=30)
    assert first.returncode == lease._USER_FAULT
    assert f"error: {tmp_path / PRODUCT} is written by launch.train of job 8 (host far" in said
