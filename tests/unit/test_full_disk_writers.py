"""No space: one true message, nothing half-written, and the same command goes on with space."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope2.errors import ArtifactError, DiskFullError
from longrope2.evaluation.results import Measurement, ResultsLog
from longrope2.files.append_log import AppendLog, read_log
from longrope2.files.artifacts import Manifest, atomic_path, read_manifest, write_manifest
from longrope2.model.weights import write_weights
from longrope2.training.checkpoint import CheckpointWriter

SIZE_BYTES = 2**20
WAY_ON = "the disk is full: make room there and run the same command again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, left: int = 0) -> Path:
    """Use all space but about ``left`` bytes."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - left))
    return filler


def record(number: int) -> dict[str, Any]:
    return {"number": number, "text": "x" * 3000}


def test_a_log_keeps_what_was_whole_and_goes_on(small_disk: Path) -> None:
    path = small_disk / "log.jsonl"
    with AppendLog(path, durable=True, sealed=True) as log:
        log.append(record(0))
        filler = fill(small_disk, left=8192)
        with pytest.raises(DiskFullError, match=rf"^{path}: No space left on device: {WAY_ON}"):
            log.append(*map(record, range(1, 9)))
        assert read_log(path) == [record(0)] and path.read_bytes().endswith(b"\n")
        filler.unlink()
        log.append(record(1))
    assert read_log(path) == [record(0), record(1)]


def test_results_are_measured_again_only_where_they_were_not_kept(small_disk: Path) -> None:
    def measured(results: ResultsLog, name: str) -> Measurement:
        return results.measured(name, "needle", 128, name, lambda: {"values": "y" * 3000})

    measured(ResultsLog(small_disk / "results.jsonl"), "kept")
    filler = fill(small_disk)
    with pytest.raises(DiskFullError):
        for number in range(9):
            measured(ResultsLog(small_disk / "results.jsonl"), f"lost {number}")
    filler.unlink()
    results = ResultsLog(small_disk / "results.jsonl")
    assert results.find("kept") and results.find("lost 8") is None
    assert measured(results, "lost 8").values == {"values": "y" * 3000}


def write_large_manifest(folder: Path) -> None:
    write_manifest(folder, Manifest("factors", details={"text": "z" * 20_000}))


def write_large_weights(folder: Path) -> None:
    write_weights({"w": torch.zeros(2**16)}, folder / "model.safetensors")


def write_bytes(folder: Path) -> None:
    with atomic_path(folder / "page.html") as temporary:
        temporary.write_bytes(b"a" * 20_000)


@pytest.mark.parametrize("write", [write_large_manifest, write_large_weights, write_bytes])
def test_a_file_is_whole_or_not_there(small_disk: Path, write: Callable[[Path], None]) -> None:
    filler = fill(small_disk, left=8192)
    with pytest.raises(DiskFullError, match=rf"{WAY_ON}.*; nothing of the file was left behind"):
        write(small_disk)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    filler.unlink()
    write(small_disk)
    (written,) = small_disk.iterdir()
    assert written.stat().st_size > 10_000
    if written.name == "manifest.json":
        assert read_manifest(small_disk, "factors").details == {"text": "z" * 20_000}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "repair the disk: there is none before it, and the same command begins again"),
        (("step_00000002",), "disk: the one before is intact, and the same command goes on from"),
    ],
)
def test_the_message_of_a_checkpoint_is_true(
    tmp_path: Path, names: tuple[str, ...], words: str
) -> None:
    """Whether there is one before it is looked up."""
    for name in names:
        (tmp_path / name).mkdir()
    writer = CheckpointWriter(None, tmp_path, {}, keep=2, in_background=False)
    writer._failure = DiskFullError(tmp_path / "x.pt", OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(ArtifactError) as failed:
        writer.raise_if_failed()
    assert f"x.pt: No space left on device: {WAY_ON}" in str(failed.value)
    assert words in str(failed.value)


WRITE = """
import sys, torch
from pathlib import Path
from longrope2.files.append_log import AppendLog
from longrope2.files.artifacts import Manifest, write_manifest
from longrope2.files.lease import only_writer
from longrope2.model.weights import write_weights
from longrope2.segments.needle_set import NeedleSet
folder = Path(sys.argv[1])
write_weights({"w": torch.zeros(3)}, folder / "model.safetensors")
NeedleSet([], 8).save(folder / "needles.arrow")
write_manifest(folder / "a", Manifest("factors", commit="x"))
with AppendLog(folder / "log.jsonl") as log, only_writer(folder, "x"):
    log.append({"a": 1})
    names = {p.relative_to(folder): oct(p.stat().st_mode & 0o777) for p in folder.rglob("*")}
for name, mode in sorted(names.items()):
    print(name, mode)
"""


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, "644", "755"), (0o027, "640", "750")]
)
def test_every_file_has_the_mode_that_the_umask_gives(
    tmp_path: Path, umask: int, file: str, folder: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path)],
        capture_output=True, text=True, check=True, umask=umask,
    )  # fmt: skip
    found = dict(line.rsplit(" ", 1) for line in ended.stdout.splitlines())
    assert len(found) == 9 and {found.pop("a"), found.pop(".leases")} == {f"0o{folder}"}
    assert set(found.values()) == {f"0o{file}"}, found
