"""A rank without progress names the ranks that are behind and leaves with its own exit code."""

import json
import os
import re
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from longrope2.command import HANG_EXIT_CODE
from longrope2.training.heartbeat import Beat, Heartbeat, describe_hang

NOW = 1000.0
WAITING = Beat(rank=0, host="a", pid=10, marks=7, step=4, phase="update", since=900.0, written=NOW)
BEHIND = Beat(
    rank=1, host="b", pid=11, marks=5, step=4, phase="reading segments", since=890.0, written=NOW
)


def test_the_rank_with_fewest_marks_is_behind() -> None:
    lines = describe_hang([WAITING, BEHIND, replace(WAITING, rank=2)], 0, 100, 20).splitlines()
    assert lines == [
        "rank 0: no progress for training.hang_timeout_s=100 s at step 4, update",
        "1 of 3 ranks are behind:",
        "  rank 1 (host b, process 11): step 4, reading segments, for 110 s",
    ]


def test_a_stopped_rank_gives_no_sign_of_life() -> None:
    text = describe_hang([WAITING, replace(BEHIND, written=NOW - 60)], 0, 100, 20)
    assert "for 110 s; no sign of life for 60 s: stopped, dead, or its file system stalls" in text


def test_nobody_is_behind() -> None:
    text = describe_hang([WAITING, replace(WAITING, rank=1)], 1, 100, 20)
    assert "all ranks are at the same place; the stacks tell what they wait for:" in text
    assert text.count("  rank ") == 2


def test_a_rank_that_never_wrote() -> None:
    assert "rank 1: wrote no heartbeat" in describe_hang([WAITING, None], 0, 100, 20)


def test_marks_reach_the_file(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, rank=3, world_size=4, timeout_s=None) as heartbeat:
        heartbeat.mark("loading the model")
        heartbeat.mark("update", 12)
    beat = Beat(**json.loads((tmp_path / "heartbeats" / "rank_00003.json").read_text()))
    assert (beat.rank, beat.step, beat.phase, beat.marks) == (3, 12, "ended", 3)


def test_a_hang_ends_the_process_and_leaves_the_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    left = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    folder = tmp_path / "heartbeats"
    folder.mkdir()
    other = replace(BEHIND, marks=0, since=time.time() - 90, written=time.time() - 90)
    (folder / "rank_00001.json").write_text(json.dumps(other.__dict__))
    with Heartbeat(tmp_path, rank=0, world_size=2, timeout_s=1.0, leave=leave) as heartbeat:
        for _ in range(4):  # progress: no hang, though it takes longer than the timeout in all
            time.sleep(0.3)
            heartbeat.mark("update", 4)
        assert not left.is_set()
        assert left.wait(10)
    assert codes == [HANG_EXIT_CODE] == [76]
    printed = capfd.readouterr().err
    assert "no progress for training.hang_timeout_s=1 s at step 4, update" in printed
    line = r"rank 1 \(host b, process 11\): step 4, reading segments, for 9\d s; "
    line += r"no sign of life for 9\d s: stopped"
    assert re.search(line, printed)
    assert "stacks of rank 0:" in printed and "test_a_hang_ends_the_process" in printed
    stacks = (folder / "rank_00000.stacks").read_text()
    assert "1 of 2 ranks are behind" in stacks and "test_heartbeat.py" in stacks


@pytest.fixture
def watched(tmp_path: Path):
    """A heartbeat of rank 0 of 2 with a limit of 1 s, and the event of its end."""
    left = threading.Event()
    heartbeat = Heartbeat(
        tmp_path, rank=0, world_size=2, timeout_s=1.0, leave=lambda code: left.set()
    )
    with heartbeat:
        yield heartbeat, left


def read_slowly(file: Path, seconds: float) -> None:
    """Three MiB every tenth of a second."""
    with file.open("rb", buffering=0) as data:
        for _ in range(round(10 * seconds)):
            data.seek(0)
            data.read(3 * 2**20)
            time.sleep(0.1)


@pytest.mark.parametrize("moves_bytes", [True, False])
def test_bytes_are_progress_where_they_are_to_move(
    watched, tmp_path: Path, moves_bytes: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    heartbeat, left = watched
    (tmp_path / "data").write_bytes(bytes(3 * 2**20))
    heartbeat.mark("verifying checkpoints", moves_bytes=moves_bytes)
    read_slowly(tmp_path / "data", 2.5)
    assert left.is_set() is not moves_bytes
    assert left.wait(10)  # nothing moves any more
    printed = capfd.readouterr().err
    assert ("bytes last moved" in printed) is moves_bytes


def test_bytes_of_children_count(watched) -> None:
    """As of DeepSpeed's converter of checkpoints."""
    heartbeat, left = watched
    heartbeat.mark("converting a checkpoint", moves_bytes=True)
    slow_copy = "for i in 1 2 3 4 5 6 7 8; do head -c 3000000 /dev/zero; sleep 0.3; done"
    subprocess.run(["bash", "-c", f"({slow_copy}) > /dev/null; true"], check=True)
    assert not left.is_set()


def test_a_rank_waits_for_another_that_moves(watched, tmp_path: Path) -> None:
    """Rank 0 waits in a collective, and makes no marks, while rank 1 loads."""
    _, left = watched
    file = tmp_path / "heartbeats" / "rank_00001.json"
    for _ in range(25):
        beat = replace(BEHIND, written=time.time(), progress=time.time())
        file.with_suffix(".new").write_text(json.dumps(beat.__dict__))
        file.with_suffix(".new").replace(file)
        time.sleep(0.1)
    assert not left.is_set()
    assert left.wait(10)  # that one has stopped too


def test_a_file_system_that_stalls_does_not_keep_a_hung_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank's file is a pipe without a reader.

    Whoever opens it waits, as on a file server that is gone.
    """
    monkeypatch.setattr("longrope2.training.heartbeat.REPORT_SECONDS", 0.5)
    left = threading.Event()
    heartbeat = Heartbeat(
        tmp_path, rank=0, world_size=1, timeout_s=1.0, leave=lambda code: left.set()
    )
    heartbeat.__enter__()
    pipe = tmp_path / "heartbeats" / "rank_00000.new"
    os.mkfifo(pipe)
    stacks = tmp_path / "heartbeats" / "rank_00000.stacks"
    os.mkfifo(stacks)
    try:
        assert left.wait(10)
        assert (
            f"rank 0: no progress, and {tmp_path / 'heartbeats'} cannot be read or written"
            in capfd.readouterr().err
        )
    finally:
        for path in (pipe, stacks):  # let the threads go on
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        heartbeat._stop.set()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Heartbeat(tmp_path, rank=0, world_size=1, timeout_s=None) as heartbeat:
        (tmp_path / "heartbeats" / "rank_00000.json").unlink()
        (tmp_path / "heartbeats").rmdir()
        heartbeat.mark("update", 1)
    assert "rank_00000.json could not be written" in capfd.readouterr().err
