"""Repositories from source files that come in any order, in bounded memory.

Files are spilled to temporary partitions by a hash of their repository, then every partition is read, sorted and joined by
itself (as a partitioned hash join does). Memory: ``BUFFER_CHARACTERS`` and a ``NUM_PARTITIONS``-th of the text, or its
largest repository; temporary disk: the text, compressed.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from data_prep.corpora import stable_fraction

__all__ = ["SourceFile", "joined_repositories"]

BUFFER_CHARACTERS = 2**24
NUM_PARTITIONS = 64
SCHEMA = pa.schema([(name, pa.large_string()) for name in ("repository", "path", "place", "content")])
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class SourceFile:
    """A source file: its repository, its path there, where its row stands, its text."""

    repository: str
    path: str
    place: str
    content: str


def joined_repositories(files: Iterable[SourceFile], *, most_characters: int) -> Iterator[tuple[str, str]]:
    """Texts of repositories, files sorted by path.

    Args:
        files: Source files in any order.
        most_characters: A repository with more is cut between two files into several texts; a file is never cut.

    Yields:
        Name (``<repository>``, then ``<repository>#1``, ...) and text; sorted by partition and name.
    """
    with tempfile.TemporaryDirectory(prefix="repositories-") as folder:
        for partition in _spill(files, Path(folder)):
            with pa.OSFile(str(partition)) as handle, pa.ipc.open_stream(handle) as stream:
                table = stream.read_all()
            names, paths, places = (table.column(name).to_pylist() for name in ("repository", "path", "place"))
            order = sorted(range(len(names)), key=lambda row: (names[row], paths[row], places[row]))
            for repository, rows in groupby(order, key=lambda row: names[row]):
                contents = (table.column("content")[row].as_py() for row in rows)
                for number, text in enumerate(_texts(contents, most_characters)):
                    yield (f"{repository}#{number}" if number else repository), text
            partition.unlink()


def _spill(files: Iterable[SourceFile], folder: Path) -> list[Path]:
    """Write the files to partitions by repository; returns the partitions that hold something."""
    paths = [folder / f"{number:03d}.arrow" for number in range(NUM_PARTITIONS)]
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    writers = [pa.ipc.new_stream(str(path), SCHEMA, options=options) for path in paths]
    used: set[int] = set()
    try:
        for buffer in _buffers(files):
            used |= buffer.keys()
            for number, rows in buffer.items():
                columns = [[getattr(file, name) for file in rows] for name in SCHEMA.names]
                writers[number].write_batch(pa.record_batch(columns, schema=SCHEMA))
    finally:
        for writer in writers:
            writer.close()
    return [paths[number] for number in sorted(used)]


def _buffers(files: Iterable[SourceFile]) -> Iterator[dict[int, list[SourceFile]]]:
    """Files by partition, some megabytes at a time."""
    buffer: dict[int, list[SourceFile]] = {}
    size = 0
    for file in files:
        number = int(stable_fraction("repository", file.repository) * NUM_PARTITIONS)
        buffer.setdefault(number, []).append(file)
        size += len(file.content)
        if size >= BUFFER_CHARACTERS:
            yield buffer
            buffer, size = {}, 0
    if buffer:
        yield buffer


def _texts(contents: Iterable[str], most_characters: int) -> Iterator[str]:
    """Join contents, starting anew where the next one would not fit."""
    parts, size = [], 0
    for content in contents:
        if parts and size + len(content) > most_characters:
            yield SEPARATOR.join(parts)
            parts, size = [], 0
        parts.append(content)
        size += len(content) + len(SEPARATOR)
    if parts:
        yield SEPARATOR.join(parts)
