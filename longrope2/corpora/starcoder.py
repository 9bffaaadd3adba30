"""The StarCoder training data: gated parquet, a folder per language, a row per source file.

Columns: max_stars_repo_path, max_stars_repo_name, max_stars_count (an integer in some files, a
float in others, and not read for that reason), id, content. Four folders hold notebooks, issues and
commits with other columns; they are read only if they are named, a document per row. Some files
start with control text of the StarCoder tokenizer; it is no source code.

Files of a repository come in any order. They are spilled to temporary partitions by a hash of their
repository, then every partition is read, sorted and joined by itself (as a partitioned hash join
does). Memory: ``BUFFER_CHARACTERS`` and a ``NUM_PARTITIONS``-th of the text, or its largest
repository; temporary disk: the text, compressed.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from longrope2.corpora.config import StarcoderConfig
from longrope2.corpora.corpus import Document, Unit, stable_fraction
from longrope2.corpora.document_ids import name_in_id, with_unique_ids
from longrope2.corpora.losses import Losses
from longrope2.corpora.records import parquet_records, usable_text
from longrope2.corpora.remote import FileCorpus, SourceInfo, StoredFile, parquet_files
from longrope2.errors import ConfigError

BUFFER_CHARACTERS = 2**24
NUM_PARTITIONS = 64
FIELDS = ("repository", "path", "place", "content")  # of a ``_SourceFile``
SCHEMA = pa.schema([(name, pa.large_string()) for name in FIELDS])
SEPARATOR = "\n\n"
LAYOUT = "FOLDER/python/train-00000-of-00059.parquet"
STARCODER = SourceInfo("starcoder", "StarCoder data", "bigcode/starcoderdata", LAYOUT, gated=True)
OTHER_COLUMNS = (
    "jupyter-scripts-dedup-filtered",
    "jupyter-structured-clean-dedup",
    "github-issues-filtered-structured",
    "git-commits-cleaned",
)
CONTROL_TEXT = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^\n<]*\n?)+")
REPOSITORY, PATH = "max_stars_repo_name", "max_stars_repo_path"


@dataclass(frozen=True)
class _SourceFile:
    """A source file: its repository, its path there, where its row stands, its text."""

    repository: str
    path: str
    place: str
    content: str


def _joined_repositories(
    files: Iterable[_SourceFile], most_characters: int
) -> Iterator[tuple[str, int, str]]:
    """Name, number and text of repositories, sorted by partition and name, files by path.

    A repository with more characters becomes several texts, cut between two files; a file is never
    cut.
    """
    with tempfile.TemporaryDirectory(prefix="repositories-") as folder:
        for partition in _spill(files, Path(folder)):
            with pa.OSFile(str(partition)) as handle, pa.ipc.open_stream(handle) as stream:
                table = stream.read_all()
            keys = table.select(["repository", "path", "place"]).to_pylist()
            names = [tuple(key.values()) for key in keys]
            order = sorted(range(len(names)), key=names.__getitem__)
            for repository, rows in groupby(order, key=lambda row: names[row][0]):
                contents = (table.column("content")[row].as_py() for row in rows)
                for number, text in enumerate(_texts(contents, most_characters), start=1):
                    yield repository, number, text
            partition.unlink()


def _spill(files: Iterable[_SourceFile], folder: Path) -> list[Path]:
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


def _buffers(files: Iterable[_SourceFile]) -> Iterator[dict[int, list[_SourceFile]]]:
    """Files by partition, some megabytes at a time."""
    buffer: dict[int, list[_SourceFile]] = {}
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


def starcoder(config: StarcoderConfig, heldout_fraction: float) -> FileCorpus:
    """Source code, the domain is the language.

    With ``join_repositories`` a unit is a few neighbouring files of a language, and a document the
    files of a repository in them, sorted by path, with an empty line between them. The published
    files do not keep a repository together, so what lies in other units makes further documents.
    Without it a unit is a file and a document a row.
    """
    for key in ("files_per_unit", "repository_characters"):
        if getattr(config, key) < 1:
            raise ConfigError([f"corpus.starcoder.{key}={getattr(config, key)} must be at least 1"])
    found = parquet_files(STARCODER, config.root, config.revision, "")
    by_language: dict[str, list[StoredFile]] = {}
    for file in found.files:
        by_language.setdefault(_language(file), []).append(file)
    wanted = config.languages or [name for name in by_language if name not in OTHER_COLUMNS]
    if missing := [language for language in wanted if language not in by_language]:
        there = f"no such folder; there are {', '.join(sorted(by_language))}"
        raise ConfigError([f"corpus.starcoder.languages={missing}: {there}"])
    groups: dict[str, list[StoredFile]] = {}
    for language in sorted(set(wanted)):
        step = config.files_per_unit if _joins(config, language) else 1
        for start in range(0, len(by_language[language]), step):
            files = by_language[language][start : start + step]
            more = f"+{len(files) - 1}" if len(files) > 1 else ""  # files that follow the first
            groups[f"{files[0].path.removesuffix('.parquet')}{more}"] = files
    used = replace(found, files=tuple(file for file in found.files if _language(file) in wanted))
    reader = partial(_read, config)
    return FileCorpus(
        STARCODER.key, used, groups, reader, heldout_fraction=heldout_fraction, domain_of=_language
    )


def _language(file: StoredFile) -> str:
    """``python/train-00000-of-00059.parquet`` -> ``python``."""
    return file.path.split("/")[0]


def _joins(config: StarcoderConfig, language: str) -> bool:
    """Whether a repository becomes one document; notebooks, issues and commits have none."""
    return config.join_repositories and language not in OTHER_COLUMNS


def _read(
    config: StarcoderConfig, unit: Unit, own: Sequence[StoredFile], skipped: Losses
) -> Iterator[Document]:
    """Repositories of one group of files, or files of one parquet file."""
    language = _language(own[0])
    joins = _joins(config, language)
    contents = _contents(config, own, joins, skipped)
    if joins:
        joined = _joined_repositories(contents, config.repository_characters)
        yield from with_unique_ids(_repositories(unit, language, joined), skipped)
        return
    for file in contents:
        yield Document(f"{unit.source}/{file.place}", file.content, unit.source, language)


def _repositories(
    unit: Unit, language: str, joined: Iterator[tuple[str, int, str]]
) -> Iterator[Document]:
    """A document for each text; the second of a repository has " (2)" behind its name."""
    for name, number, text in joined:
        suffix = f" ({number})" if number > 1 else ""
        # By its name, so that it does not depend on which files are read together.
        group = f"{unit.source}/{name}"
        doc_id = f"{unit.name}/{name_in_id(name)}{suffix}"
        yield Document(doc_id, text, unit.source, language, group)


def _contents(
    config: StarcoderConfig, own: Sequence[StoredFile], joins: bool, skipped: Losses
) -> Iterator[_SourceFile]:
    """Source files in the parquet files, without control text."""
    for file in own:
        named = [REPOSITORY, PATH]
        for row, record in parquet_records(file.location, ["content"], skipped, optional=named):
            content = record["content"]
            if config.strip_control_text and isinstance(content, str) and content.startswith("<"):
                content, num_stripped = CONTROL_TEXT.subn("", content)
                skipped["control text removed (kept)"] += num_stripped
            text = usable_text(content, skipped)
            if text is None:
                continue
            place = f"{file.path}:{row}"
            repository, path = (record[name] or "" for name in named)
            if not isinstance(repository, str) or not repository:
                repository = place
                skipped["no repository name (kept)"] += joins
            path = path if isinstance(path, str) else ""
            yield _SourceFile(repository, path, place, text)
