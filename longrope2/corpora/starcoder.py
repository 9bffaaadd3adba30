"""The StarCoder training data: gated parquet, a folder per language, a row per source file.

Columns: max_stars_repo_path, max_stars_repo_name, max_stars_count (an integer in some files, a
float in others, and not read for that reason), id, content. Four folders hold notebooks, issues and
commits with other columns; they are read only if they are named, a document per row. Some files
start with control text of the StarCoder tokenizer; it is no source code.

Repositories from source files that come in any order, in bounded memory.

Files are spilled to temporary partitions by a hash of their repository, then every partition is
read, sorted and joined by itself (as a partitioned hash join does). Memory: ``BUFFER_CHARACTERS``
and a ``NUM_PARTITIONS``-th of the text, or its largest repository; temporary disk: the text,
compressed.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa

from longrope2.corpora.config import HELDOUT_FRACTION, StarcoderConfig
from longrope2.corpora.corpus import Document, Split, Unit, source_documents, stable_fraction
from longrope2.corpora.records import parquet_records, usable_text
from longrope2.corpora.remote import FileSet, SourceInfo, StoredFile, parquet_files
from longrope2.errors import ConfigError

BUFFER_CHARACTERS = 2**24
NUM_PARTITIONS = 64
SCHEMA = pa.schema(
    [(name, pa.large_string()) for name in ("repository", "path", "place", "content")]
)
SEPARATOR = "\n\n"
SOURCE = "starcoder"
INFO = SourceInfo(
    SOURCE,
    "StarCoder data",
    "bigcode/starcoderdata",
    "FOLDER/python/train-00000-of-00059.parquet",
    gated=True,
)
OTHER_COLUMNS = (
    "jupyter-scripts-dedup-filtered", "jupyter-structured-clean-dedup", "github-issues-filtered-structured",
    "git-commits-cleaned",
)  # fmt: skip
CONTROL_TEXT = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^\n<]*\n?)+")
REPOSITORY, PATH = "max_stars_repo_name", "max_stars_repo_path"


@dataclass(frozen=True)
class SourceFile:
    """A source file: its repository, its path there, where its row stands, its text."""

    repository: str
    path: str
    place: str
    content: str


def joined_repositories(
    files: Iterable[SourceFile], *, most_characters: int
) -> Iterator[tuple[str, str]]:
    """Texts of repositories, files sorted by path.

    Args:
        files: Source files in any order.
        most_characters: A repository with more is cut between two files into several texts; a file
            is never cut.

    Yields:
        Name (``<repository>``, then ``<repository>#1``, ...) and text; sorted by partition and
        name.
    """
    with tempfile.TemporaryDirectory(prefix="repositories-") as folder:
        for partition in _spill(files, Path(folder)):
            with pa.OSFile(str(partition)) as handle, pa.ipc.open_stream(handle) as stream:
                table = stream.read_all()
            names, paths, places = (
                table.column(name).to_pylist() for name in ("repository", "path", "place")
            )
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


class Starcoder:
    """Source code, the domain is the language.

    With ``join_repositories`` a unit is a few neighbouring files of a language, and a document the
    files of a repository in them, sorted by path, with an empty line between them. The published
    files do not keep a repository together, so what lies in other units makes further documents.
    Without it a unit is a file and a document a row.

    Args:
        config: Place, languages and form.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: a value is not allowed, or the files cannot be listed or read; says what to do.
    """

    sources = (SOURCE,)

    def __init__(
        self, config: StarcoderConfig, *, heldout_fraction: float = HELDOUT_FRACTION
    ) -> None:
        self.heldout_fraction = heldout_fraction
        self._config = config
        for key in ("files_per_unit", "repository_characters"):
            if getattr(config, key) < 1:
                raise ConfigError(
                    [f"corpus.starcoder.{key}={getattr(config, key)} must be at least 1"]
                )
        found = parquet_files(INFO, config.root, config.revision, "")
        there = sorted({_language(file) for file in found.files})
        wanted = config.languages or [
            language for language in there if language not in OTHER_COLUMNS
        ]
        if missing := [language for language in wanted if language not in there]:
            raise ConfigError(
                [
                    f"corpus.starcoder.languages={missing}: no such folder; there are {', '.join(there)}"
                ]
            )
        self._files = FileSet(
            found.base, tuple(file for file in found.files if _language(file) in wanted)
        )

    def units(self) -> Sequence[Unit]:
        """Groups of neighbouring files of a language, or single files."""
        return [
            Unit(_unit_name(files), SOURCE, sum(file.size_bytes or 0 for file in files) or None)
            for files in self._groups()
        ]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Repositories of one group of files, or files of one parquet file."""
        files = next(files for files in self._groups() if _unit_name(files) == unit.name)
        language = _language(files[0])
        if not self._joins(language):
            for file in self._contents(files, language, skipped):
                yield Document(f"{SOURCE}/{file.place}", file.content, SOURCE, language)
            return
        contents = self._contents(files, language, skipped)
        for name, text in joined_repositories(
            contents, most_characters=self._config.repository_characters
        ):
            yield Document(f"{unit.name}/{name}", text, SOURCE, language)

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split."""
        return source_documents(self, split, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()

    def _joins(self, language: str) -> bool:
        """Whether the files of a repository become one document; notebooks, issues and commits have none."""
        return self._config.join_repositories and language not in OTHER_COLUMNS

    def _groups(self) -> list[list[StoredFile]]:
        """Files of every unit."""
        groups: list[list[StoredFile]] = []
        for language in sorted({_language(file) for file in self._files.files}):
            files = [file for file in self._files.files if _language(file) == language]
            step = self._config.files_per_unit if self._joins(language) else 1
            groups += [files[start : start + step] for start in range(0, len(files), step)]
        return groups

    def _contents(
        self, files: Sequence[StoredFile], language: str, skipped: Counter[str]
    ) -> Iterator[SourceFile]:
        """Source files in the parquet files, without control text."""
        for file in files:
            location = self._files.location(file.path)
            for row, record in parquet_records(
                location, ["content"], skipped, optional=[REPOSITORY, PATH]
            ):
                content = record["content"]
                if (
                    self._config.strip_control_text
                    and isinstance(content, str)
                    and content.startswith("<")
                ):
                    content, num_stripped = CONTROL_TEXT.subn("", content)
                    skipped["control text removed (kept)"] += num_stripped
                text = usable_text(content, skipped)
                if text is None:
                    continue
                place = f"{file.path}:{row}"
                if record[REPOSITORY] is None and self._joins(language):
                    skipped["no repository name (kept)"] += 1
                yield SourceFile(record[REPOSITORY] or place, record[PATH] or "", place, text)


def _language(file: StoredFile) -> str:
    """``python/train-00000-of-00059.parquet`` -> ``python``."""
    return file.path.split("/")[0]


def _unit_name(files: Sequence[StoredFile]) -> str:
    """The first file, and how many follow."""
    more = f"+{len(files) - 1}" if len(files) > 1 else ""
    return f"{SOURCE}/{files[0].path.removesuffix('.parquet')}{more}"
