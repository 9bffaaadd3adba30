"""SHA-256 of the files of a folder: once, with progress, and not again while they are unchanged.

What was hashed is kept in the cache folder, by the folder's path; a file whose size and times (of
its content and of its entry, which no copy keeps) are the same is not read again. One that changed
within ``SETTLED_SECONDS`` before it was hashed is: file systems tell times apart no
finer than that. Small folders are hashed every time.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from longrope2.files.artifacts import sha256_of_bytes, sha256_of_file, write_text

CACHE_VARIABLE = "LONGROPE2_CACHE"
SMALL_BYTES = 2**26  # hashed in a fraction of a second
SETTLED_SECONDS = 3.0


def cache_folder() -> Path:
    """Where what is costly is kept: ``$LONGROPE2_CACHE``, else ``~/.cache/longrope2``."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".cache" / "longrope2"


def sha256_of_files(folder: Path, names: Sequence[str], cache: Path) -> dict[str, str]:
    """Name -> SHA-256 of files below ``folder``, in the order given.

    Args:
        folder: Where the files are.
        names: Their paths below it.
        cache: Folder of the cache; nothing is kept where it cannot be written.

    Raises:
        OSError: a file cannot be read.
    """
    stats = {name: (folder / name).stat() for name in names}
    total = sum(stat.st_size for stat in stats.values())
    if total <= SMALL_BYTES:
        return {name: sha256_of_file(folder / name) for name in names}
    place = cache / "hashes" / f"{sha256_of_bytes(str(folder.resolve()).encode())[:16]}.json"
    known = _read(place)
    keys = {
        name: f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        for name, stat in stats.items()
    }
    found = {name: known[name][1] for name in names if known.get(name, ("", ""))[0] == keys[name]}
    missing = [name for name in names if name not in found]
    if missing:
        sizes = [stats[name].st_size for name in missing]
        found |= _hashed(folder, missing, sizes)
        latest = (time.time() - SETTLED_SECONDS) * 1e9
        settled = [name for name in names if stats[name].st_mtime_ns < latest]
        _keep(place, {name: (keys[name], found[name]) for name in settled})
    return {name: found[name] for name in names}


def _hashed(folder: Path, names: Sequence[str], sizes: Sequence[int]) -> dict[str, str]:
    """Hash files with a bar on a terminal, and a line at the end."""
    console, began, hashes = Console(stderr=True), time.monotonic(), {}
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    shown = bar.add_task("hashing", total=sum(sizes))
    with bar:
        for name, size in zip(names, sizes, strict=True):
            hashes[name] = sha256_of_file(folder / name)
            bar.update(shown, advance=size)
    seconds = time.monotonic() - began
    what = f"{len(names):,} files, {sum(sizes) / 2**30:.2f} GiB of {folder}"
    print(f"hashing: {what} in {seconds:.0f} s", file=sys.stderr)
    return hashes


def _read(place: Path) -> dict[str, tuple[str, str]]:
    try:
        return {name: tuple(entry) for name, entry in json.loads(place.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # none yet, or not one of ours: hash again


def _keep(place: Path, entries: dict[str, tuple[str, str]]) -> None:
    try:
        write_text(place, json.dumps(entries))
    except OSError:
        pass  # hashed again next time
