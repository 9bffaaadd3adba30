"""Files at places (paths, URLs, the hub): listed and tried first, then read in bounded memory.

A fault of the *file* (missing, truncated, damaged) is the same every time and is raised as
``FaultyFile``; readers count it and go on. A fault of the *connection* passes: reading goes on
where it stopped, and after ``MAX_FAILURES`` in a row the unit fails with a ``DataError``, because
leaving text out for it would make the result depend on the network.

A public corpus is listed, and its first file tried, before any work starts; if that fails, a
``ConfigError`` says what was tried, how to log in, how to name a mirror, and what works offline.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from longrope2.corpora.corpus import Document, Split, Unit, source_documents
from longrope2.corpora.decoding import DamagedData, TruncatedData, decoded
from longrope2.corpora.losses import Losses
from longrope2.errors import ConfigError, DataError
from longrope2.files.folder_walk import walk_folder
from longrope2.system_errors import explain

READ_BYTES = 2**20
RANGE_BYTES = 2**28  # larger files of plain lines are read in ranges
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")  # in small letters
# Kind of address -> extra of this project that brings its package, and the package.
EXTRAS = {
    "s3": ("s3", "s3fs"),
    "s3a": ("s3", "s3fs"),
    "gs": ("gcs", "gcsfs"),
    "gcs": ("gcs", "gcsfs"),
}
MAX_FAILURES = 6
ROWS_PER_BATCH = 64
BATCH_BYTES = 2**31
# Text shrinks to a twentieth at best; a large row group that claims more is no text.
SMALL_GROUP_BYTES, MOST_EXPANSION = 2**27, 200
HUB_TIMEOUT_SECONDS = 20.0
Item = TypeVar("Item")
Result = TypeVar("Result")


class FaultyFile(Exception):
    """The stored file itself is at fault; ``str()`` is the reason to count it under."""


def _is_remote(location: str) -> bool:
    return "://" in location


def is_web(location: str) -> bool:
    """Whether a location is an address of the web, where nothing can be listed."""
    return location.startswith(("http://", "https://"))


def _open_binary(location: str) -> Any:
    """Open a path or URL for reading bytes; seekable where the server allows ranges."""
    if not _is_remote(location):
        return Path(location).open("rb")
    options: dict[str, Any] = {}
    if is_web(location):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
        # trust_env: obey the proxy variables.
        options["client_kwargs"] = {"trust_env": True, "timeout": timeout}
    file_system, path = fsspec.url_to_fs(location, **options)
    return file_system.open(path, "rb")


def first_byte(location: str) -> None:
    """Read one byte, to learn whether it can be read; raises what the file system raises."""
    with _open_binary(location) as handle:
        handle.read(1)


def byte_blocks(location: str, start: int = 0) -> Iterator[bytes]:
    """Decompressed content of a file (``decoding.PACKED`` or plain), block by block.

    ``start``: first byte, of plain files only.

    Raises:
        FaultyFile: ``missing file``, or after everything readable was yielded ``truncated file`` or
            ``damaged file``.
        DataError: the file cannot be reached any more, or may not be read.
    """
    stored = _resumed(location, lambda position: _read_from(location, start + position), len)
    try:
        yield from decoded(location, stored)
    except DamagedData:
        raise FaultyFile("damaged file") from None
    except TruncatedData:
        raise FaultyFile("truncated file") from None


def parquet_batches(location: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows of a parquet file, a few at a time; columns the file does not have are left out.

    Memory: the pages of one row group's columns.

    Raises:
        FaultyFile: as ``byte_blocks``; a parquet file without its end is ``damaged file``.
        DataError: as ``byte_blocks``.
    """
    try:
        batches_from = partial(_batches_from, location, columns=columns)
        yield from _resumed(location, batches_from, lambda batch: batch.num_rows)
    except pa.ArrowException:
        raise FaultyFile("damaged file") from None


def column_names(location: str) -> list[str]:
    """Names of the columns of a parquet file that can be read."""
    with _open_binary(location) as handle:
        return pq.ParquetFile(handle).schema_arrow.names


def _read_from(location: str, position: int) -> Iterator[bytes]:
    with _open_binary(location) as handle:
        if position:
            handle.seek(position)
        while block := handle.read(READ_BYTES):
            yield block


def _batches_from(
    location: str, first_row: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Rows from a row on; row groups before it are not read.

    Raises:
        FaultyFile: there are other numbers of rows than the file says.
    """
    with _open_binary(location) as handle:
        size = handle.seek(0, os.SEEK_END)
        file = pq.ParquetFile(handle)
        present = [name for name in columns if name in file.schema_arrow.names]
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            skip = max(0, first_row - start)
            start = end
            if first_row >= end:
                continue
            rows = _rows_at_once(file.metadata.row_group(group).total_byte_size, size)
            missing = file.metadata.row_group(group).num_rows
            for batch in file.iter_batches(rows, row_groups=[group], columns=present):
                missing -= batch.num_rows
                if skip < batch.num_rows:
                    yield batch.slice(skip)
                skip = max(0, skip - batch.num_rows)
            if missing:
                raise FaultyFile("damaged file")
        if start != file.metadata.num_rows:
            raise FaultyFile("damaged file")


def _rows_at_once(group_bytes: int, file_bytes: int) -> int:
    """Rows of a row group that fit into memory together, whatever stands in them.

    A value of a dictionary is stored once and may come back in every row. Asks nothing of the
    group's columns: pyarrow ends the process where their metadata is damaged.

    Args:
        group_bytes: What it claims to be when decoded.
        file_bytes: Stored size of the file.

    Raises:
        FaultyFile: the group is made to fill memory.
    """
    if group_bytes > max(SMALL_GROUP_BYTES, MOST_EXPANSION * file_bytes):
        raise FaultyFile(f"parquet that grows more than {MOST_EXPANSION}-fold")
    return min(ROWS_PER_BATCH, max(1, BATCH_BYTES // max(1, group_bytes)))


def _resumed(
    location: str, read_from: Callable[[int], Iterator[Item]], size: Callable[[Item], int]
) -> Iterator[Item]:
    """Items of ``read_from(0)``; after a broken connection of ``read_from(what was read)``."""
    position, failures = 0, 0
    while True:
        try:
            for item in read_from(position):
                position, failures = position + size(item), 0
                yield item
            return
        except (FaultyFile, pa.ArrowException):
            raise
        except UnicodeError:  # a name inside the file
            raise FaultyFile("damaged file") from None
        except Exception as error:  # every file system has errors of its own
            if _is_missing(error):
                raise FaultyFile("missing file") from None
            if not _is_remote(location) and isinstance(error, OSError) and error.errno is None:
                # Arrow's own words for pages it cannot decode.
                raise FaultyFile("damaged file") from None
            failures += 1
            if failures >= MAX_FAILURES or not _is_remote(location):
                raise _unreadable(location, position, error) from None
            time.sleep(2.0 ** (failures - 2))


def _unreadable(location: str, position: int, error: Exception) -> DataError:
    place = f"{location} cannot be read at byte or row {position:,}"
    known = explain(error) if isinstance(error, OSError) else None
    if known is not None:
        return DataError(f"{place}: {known}")
    way_out = "read the corpus from a mirror (corpus.SOURCE.root=FOLDER)"
    again = f"run the same command again to go on, or {way_out}"
    return DataError(f"{place}: {type(error).__name__}: {error}; {again}")


def _is_missing(error: BaseException) -> bool:
    """Whether there is no such file; fsspec says it of a lost connection, too."""
    if not isinstance(error, FileNotFoundError):
        return getattr(error, "status", None) in (404, 410)
    cause = error.__cause__ or error.__context__
    return cause is None or _is_missing(cause)


@dataclass(frozen=True)
class SourceInfo:
    """What a message about a source says."""

    key: str  # name of its settings: ``corpus.<key>.root``
    title: str  # its public name
    repository: str  # hub dataset
    layout: str  # a path as a mirror must have it
    gated: bool = False  # its terms must be accepted on the hub


@dataclass(frozen=True)
class StoredFile:
    """A file below a base (folder or URL prefix)."""

    base: str
    path: str
    size_bytes: int | None = None  # stored size where it is known
    # First byte and the one behind the last of the lines to read, where it is a part of a file.
    span: tuple[int, int] | None = None

    @property
    def location(self) -> str:
        """Path or URL."""
        return f"{self.base}/{self.path}"


@dataclass(frozen=True)
class FileSet:
    """Files below one base, sorted by path."""

    base: str
    files: tuple[StoredFile, ...]

    def describe(self) -> dict[str, Any]:
        """Base, number and size of the files, and a SHA-256 over their paths and sizes.

        Of the hub the commit too: the base is only where the files were read.
        """
        listing = "".join(f"{file.path}\t{file.size_bytes}\n" for file in self.files)
        commit = self.base.rpartition("@")[2] if self.base.startswith("hf://") else None
        return {
            "base": self.base,
            **({} if commit is None else {"commit": commit}),
            "num_files": len(self.files),
            "size_bytes": sum(file.size_bytes or 0 for file in self.files),
            "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }


Groups = Mapping[str, Sequence[StoredFile]]  # unit, without its source -> files read together
Reader = Callable[[Unit, Sequence[StoredFile], Losses], Iterator[Document]]


@dataclass(frozen=True)
class FileCorpus:
    """A corpus of one source: files at a place, and a function that reads those of a unit."""

    source: str
    files: FileSet
    groups: Groups  # the units
    reader: Reader  # yields the documents of a unit, as ``Corpus.read``; can be pickled
    heldout_fraction: float  # share of documents held out, drawn by their text
    own_heldout: Groups | None = None  # units of the corpus' own held-out split, where it has one
    domain_of: Callable[[StoredFile], str] | None = None  # of all documents of a file
    # Domain -> tokens by what was published of the corpus; serves where sizes are unknown.
    published_tokens: Mapping[str, float] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """The one source."""
        return (self.source,)

    def units(self) -> Sequence[Unit]:
        """All units but those of the corpus' own held-out split."""
        return self._units(self.groups)

    def read(self, unit: Unit, skipped: Losses) -> Iterator[Document]:
        """Documents of one unit."""
        groups = {**self.groups, **(self.own_heldout or {})}
        return self.reader(unit, groups[unit.name.removeprefix(f"{self.source}/")], skipped)

    def documents(self, split: Split, skipped: Losses | None = None) -> Iterator[Document]:
        """Documents of one split."""
        if split is Split.train or self.own_heldout is None:
            yield from source_documents(self, split, skipped)
            return
        yield from self._reserved(Losses() if skipped is None else skipped)

    def reserved(self) -> Iterator[Document]:
        """Documents of the corpus' own held-out split."""
        return self._reserved(Losses())

    def _reserved(self, skipped: Losses) -> Iterator[Document]:
        for unit in self._units(self.own_heldout or {}):
            yield from self.read(unit, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self.files.describe()

    def _units(self, groups: Groups) -> list[Unit]:
        """A unit per group, with the stored size of its files where all are known."""
        domains = {
            name: None if self.domain_of is None else self.domain_of(files[0])
            for name, files in groups.items()
        }
        number = Counter(domains.values())
        units = []
        for name, files in groups.items():
            sizes = [file.size_bytes for file in files if file.size_bytes is not None]
            size, domain = sum(sizes) if len(sizes) == len(files) else None, domains[name]
            tokens = self.published_tokens.get(domain) if domain is not None else None
            tokens = None if tokens is None else tokens / number[domain]
            units.append(Unit(f"{self.source}/{name}", self.source, size, domain, tokens))
        return units


def one_by_one(files: Sequence[StoredFile]) -> Groups:
    """A unit per file."""
    return {file.path: [file] for file in files}


def in_ranges(files: Sequence[StoredFile]) -> Groups:
    """A unit per file; a large one with plain lines becomes several, each a range of its bytes."""
    groups: dict[str, list[StoredFile]] = {}
    for file in files:
        spans = line_ranges(file.path, file.size_bytes)
        if not spans:
            groups[file.path] = [file]
        for start, end in spans:
            part = replace(file, size_bytes=end - start, span=(start, end))
            groups[ranged_name(file.path, (start, end))] = [part]
    return groups


def line_ranges(path: str, size_bytes: int | None) -> list[tuple[int, int]]:
    """Ranges of bytes that a large file of plain lines is read in; none for any other file."""
    if size_bytes is None or size_bytes <= RANGE_BYTES or not has_plain_lines(path):
        return []
    number = -(-size_bytes // RANGE_BYTES)
    edges = [size_bytes * n // number for n in range(number + 1)]
    return list(pairwise(edges))


def has_plain_lines(path: str) -> bool:
    """Whether a file holds a record per line, and is not packed, by its name."""
    return path.lower().endswith(LINE_SUFFIXES)


def ranged_name(path: str, span: tuple[int, int]) -> str:
    """Name of the unit that is a range of a file."""
    return f"{path}@{span[0]}-{span[1]}"


def split_ranged_name(name: str) -> tuple[str, tuple[int, int] | None]:
    """Path and range of a unit's name; no range where it is a whole file."""
    path, _, span = name.rpartition("@")
    first, _, last = span.partition("-")
    if has_plain_lines(path) and first.isdecimal() and last.isdecimal():
        return path, (int(first), int(last))
    return name, None


def _reached(
    info: SourceInfo, tried: str, root: str | None, action: Callable[[], Result]
) -> Result:
    """Result of ``action``, which lists or tries a source; its errors become ``ConfigError``."""
    try:
        return action()
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub, a server or the disk answers
        reason = _first_cause(error)
        if isinstance(error, ImportError) and root is not None:
            reason = _missing_package(root, reason)
    key = f"corpus.{info.key}"
    if root is not None:
        text = f"{key}.root={root}: {tried} cannot be read ({reason}); expected {info.layout}"
        raise ConfigError([text])
    login = "no account is needed, but `hf auth login` raises the hub's limits"
    if info.gated:
        page = f"https://huggingface.co/datasets/{info.repository}"
        login = f"accept the terms at {page} and log in with `hf auth login`"
    text = (
        f"{key} ({info.title}) cannot be reached: tried {tried} ({reason}). To read it from the "
        f"hub, {login}. To read a mirror, set {key}.root=FOLDER ({info.layout}). "
        "`--corpus sample` works offline"
    )
    raise ConfigError([text])


def _missing_package(root: str, reason: str) -> str:
    """How to get what reads addresses of this kind."""
    protocol = root.partition("://")[0]
    extra = EXTRAS.get(protocol)
    if extra is None:
        return reason
    return f"{protocol}:// needs {extra[1]}, which is not installed: pip install '.[{extra[0]}]'"


def _first_cause(error: BaseException) -> str:
    """What started it, in one line: fsspec calls a name that cannot be resolved a missing file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def hub_base(info: SourceInfo, revision: str) -> str:
    """URL prefix of a hub dataset, pinned to the commit the revision means now."""
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(info.repository, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    return f"hf://datasets/{info.repository}@{found.sha}"


def _hub_files(info: SourceInfo, base: str, folder: str) -> list[StoredFile]:
    """All files of a hub dataset below ``folder`` (everywhere where empty)."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    place, revision = folder or None, base.rpartition("@")[2]
    tree = HfApi().list_repo_tree(
        info.repository, place, recursive=True, revision=revision, repo_type="dataset"
    )
    return [StoredFile(base, e.path, e.size) for e in tree if isinstance(e, RepoFile)]


def _mirror_files(base: str, folder: str) -> list[StoredFile]:
    if not _is_remote(base):
        place = Path(base, folder)
        found = walk_folder(place).files if place.is_dir() else ()
        paths = [f"{folder}/{name}".lstrip("/") for name in found]
        return [StoredFile(base, path, Path(base, path).stat().st_size) for path in paths]
    file_system, top = fsspec.url_to_fs(base)
    found = file_system.find(f"{top}/{folder}".rstrip("/"), detail=True).items()
    return [StoredFile(base, n.removeprefix(top).lstrip("/"), e["size"]) for n, e in found]


def _wanted(files: Sequence[StoredFile], place: str, suffixes: Sequence[str]) -> list[StoredFile]:
    """Those of the files whose names end in one of the suffixes, sorted by path."""
    kept = [file for file in files if file.path.endswith(tuple(suffixes))]
    if not kept:
        allowed = ", ".join(suffixes)
        raise FileNotFoundError(f"no file ending in {allowed} below {place.rstrip('/')}")
    return sorted(kept, key=lambda file: file.path)


def mirror_files(
    info: SourceInfo, base: str, folder: str, suffixes: Sequence[str]
) -> list[StoredFile]:
    """Files of a mirror below ``base/folder`` that end in one of ``suffixes``; at least one."""
    place = f"{base}/{folder}"

    def found() -> list[StoredFile]:
        return _wanted(_mirror_files(base, folder), place, suffixes)

    return _reached(info, place, base, found)


def listed_files(
    info: SourceInfo, tried: str, root: str | None, base: str, paths: Callable[[], list[str]]
) -> list[StoredFile]:
    """Files below ``base`` that a list on the web names; the first one is tried."""

    def found() -> list[StoredFile]:
        names = paths()
        first_byte(f"{base}/{names[0]}")
        return [StoredFile(base, name) for name in sorted(names)]

    return _reached(info, tried, root, found)


def parquet_files(info: SourceInfo, root: str | None, revision: str, folder: str) -> FileSet:
    """Parquet files of the mirror ``root``, or of the hub; the first one is tried."""
    place = root if root is not None else f"hub dataset {info.repository}"

    def found() -> FileSet:
        if root is not None:
            base = root.rstrip("/")
            files = _mirror_files(base, folder)
        else:
            base = hub_base(info, revision)
            files = _hub_files(info, base, folder)
        wanted = _wanted(files, f"{base}/{folder}", [".parquet"])
        first_byte(wanted[0].location)
        return FileSet(base, tuple(wanted))

    return _reached(info, f"{place}/{folder}".rstrip("/"), root, found)


def listed_names(location: str) -> list[str]:
    """Lines of a text file that lists names; raises at once what is in the way."""
    first_byte(location)  # byte_blocks would try again for a while
    lines = b"".join(byte_blocks(location)).decode("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
