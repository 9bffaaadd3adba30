"""Append-only logs of JSON lines, and the one rule for what a crash may leave in them.

A record is one line, written together with its line end and flushed at once, so a killed process
keeps what it has logged. A crash can tear only the last line: one that has no line end, or is no
JSON, was never recorded. Readers leave it out (another process may still be writing it); the log's
writer cuts it off when it opens the file, before it appends anything, or the next record would be
glued to it and lost as well. A writer that will repeat its last records may cut them off too. A
line before the last that is no JSON object is damage that no crash explains, and is refused.

A log whose records decide a result is *sealed*: each line ends in a checksum of itself, so that a
changed one is refused too. Lines of earlier versions have none.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError, DiskFullError, is_disk_full
from longrope2.files.lease import take_lock

_SEAL = "crc32"
_SEALED = re.compile(rb'(\{.*?)(?:, )?"crc32": "([0-9a-f]{8})"\}\n', re.DOTALL)


class AppendLog:
    """A log that this process appends to; use it in ``with``, or close it."""

    def __init__(
        self, path: Path, *, durable: bool = False, sealed: bool = False, in_use: str | None = None
    ) -> None:
        """Open or start a log, and cut off a torn last line.

        ``durable`` forces every record to the disk, not only to the operating system; ``sealed``
        gives each a checksum. ``in_use`` is what a second process that opens the log is told after
        the file's name; None lets it in.

        Raises:
            ArtifactError: the log is in use, or a line before the last is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._durable, self._sealed, self._path = durable, sealed, path
        self._file = path.open("ab", buffering=0)  # no rest that is written by the closing
        try:
            if in_use is not None:
                _lock(self._file.fileno(), f"{path} {in_use}")
            data = path.read_bytes()
            _, num_whole_bytes = _parse(path, data)
            if num_whole_bytes < len(data):
                self._file.truncate(num_whole_bytes)
        except BaseException:
            self._file.close()
            raise

    def append(self, *records: dict[str, Any]) -> None:
        """Add a line for each record; all have left this process when it returns.

        Raises:
            DiskFullError: there is no space for all of them, and none was added.
        """
        lines = (json.dumps(record) for record in records)
        text = "".join((_sealed(line) if self._sealed else line) + "\n" for line in lines)
        size = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(text.encode())
            while rest:
                rest = rest[self._file.write(rest) :]
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)
            if is_disk_full(error):
                raise DiskFullError(self._path, error) from None
            raise

    def cut_from(self, is_lost: Callable[[Any], bool]) -> int:
        """Remove the first record for which ``is_lost`` and all behind it; returns how many."""
        data = self._path.read_bytes()
        records, _ = _parse(self._path, data)
        kept = next((n for n, record in enumerate(records) if is_lost(record)), len(records))
        if kept < len(records):
            self._file.truncate(sum(map(len, data.splitlines(keepends=True)[:kept])))
        return len(records) - kept

    def close(self) -> None:
        """Close the file and let another process have it."""
        self._file.close()

    def __enter__(self) -> "AppendLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_log(path: Path) -> list[Any]:
    """Records of a log, oldest first, entry i from line i + 1; none where there is no file.

    Raises:
        ArtifactError: a line before the last is damaged; names file and line.
    """
    return _parse(path, path.read_bytes())[0] if path.is_file() else []


def damaged_line(path: Path, number: int) -> ArtifactError:
    """The error for a line (counted from 1) that this project cannot have written."""
    return ArtifactError(
        f"{path} is damaged at line {number}; remove that line and all after it to keep the rest"
    )


def _parse(path: Path, data: bytes) -> tuple[list[Any], int]:
    """The whole records, and the bytes they take up."""
    lines = data.splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no line end")
            records.append(_record(line))
        except _BrokenSeal:
            raise damaged_line(path, number) from None
        except (ValueError, RecursionError):
            if number < len(lines):
                raise damaged_line(path, number) from None
    return records, sum(map(len, lines[: len(records)]))


class _BrokenSeal(Exception):
    """A whole line that is not as it was written."""


def _sealed(line: str) -> str:
    """A record of JSON with the checksum of its text as its last entry."""
    body = line[:-1]
    comma = ", " if len(body) > 1 else ""
    return f'{body}{comma}"{_SEAL}": "{zlib.crc32(body.encode()):08x}"}}'


def _record(line: bytes) -> dict[str, Any]:
    """The record of a line.

    Raises:
        ValueError: it is no JSON object.
        _BrokenSeal: it has a checksum, and another one than its text.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    if record.pop(_SEAL, None) is not None:
        found = _SEALED.fullmatch(line)
        if found is None or zlib.crc32(found[1]) != int(found[2], 16):
            raise _BrokenSeal
    return record


def _lock(descriptor: int, refusal: str) -> None:
    """Keep a second writer out, where the file system has locks."""
    if take_lock(descriptor) is False:
        raise ArtifactError(refusal)
