"""Packing onto a disk that is full, or can only be read: one line, and the same bytes later."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.pack import main as pack_main
from longrope2.files.artifacts import sha256_of_file

WORDS = "sea wind stone river night morning horse letter candle garden winter road lamp".split()


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few hundred kilobytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place))
    yield place
    # Later: shards are still mapped into memory.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def pack(texts: Path, root: Path) -> int | str | None:
    """Exit code of the command; 0 where it returns."""
    words = ["--target", "512", "--corpus", "folder", "--model", "tiny", "workers=1"]
    try:
        pack_main([*words, f"corpus.folder={texts}", f"run.root={root}", "run.name=x"])
    except SystemExit as stopped:
        return stopped.code
    return 0


def shards(root: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in root.rglob("segments-*.arrow")}


@pytest.mark.slow
def test_a_full_disk_and_one_that_can_only_be_read(disk, tmp_path, capsys) -> None:
    (tmp_path / "texts").mkdir()
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=300))}) for _ in range(400)]
    (tmp_path / "texts/a.jsonl").write_text("\n".join(lines))
    texts = tmp_path / "texts"
    assert pack(texts, tmp_path / "free") == 0 and shards(tmp_path / "free")
    capsys.readouterr()
    assert pack(texts, disk) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "No space left on device: the disk is full: make" in told
    assert "Traceback" not in told
    assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("manifest.json"))
    mount("-o", "remount,ro", str(disk))
    assert pack(texts, disk) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert (
        told.startswith(f"error: {disk}/x") and "the file system can only be read: run.root" in told
    )
    mount("-o", "remount,rw,size=64m", str(disk))
    assert pack(texts, disk) == 0
    assert shards(disk) == shards(tmp_path / "free")
