"""Bytes and parquet batches from a path or a URL, in bounded memory, surviving a connection that
breaks.

A fault of the *file* (missing, truncated, damaged) is the same every time and is raised as
``FaultyFile``; readers count it and go on. A fault of the *connection* passes: reading goes on
where it stopped, and after ``MAX_FAILURES`` in a row the unit fails with a ``DataError``, because
leaving text out for it would make the result depend on the network.

Where the files of a public corpus stand: a mirror or a public place, listed and tried before any
work starts.
"""

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from longrope2.errors import ConfigError, DataError

READ_BYTES = 2**20
# Compressed bytes handed to the decoder at once; deflate grows them at most 1,032-fold, so at most
# 16 MiB come back.
DECODE_BYTES = 2**14
MAX_FAILURES = 6
ROWS_PER_BATCH = 64
Item = TypeVar("Item")
HUB_TIMEOUT_SECONDS = 20.0
Result = TypeVar("Result")


class FaultyFile(Exception):
    """The stored file itself is at fault; ``str()`` is the reason to count it under."""


def is_remote(location: str) -> bool:
    """Whether a location is a URL and not a path."""
    return "://" in location


def open_binary(location: str) -> Any:
    """Open a path or URL for reading bytes; seekable where the server allows ranges."""
    if not is_remote(location):
        return Path(location).open("rb")
    file_system, path = fsspec.url_to_fs(location, **_options(location))
    return file_system.open(path, "rb")


def first_byte(location: str) -> None:
    """Read one byte, to learn whether a location can be read; raises what the file system raises."""
    with open_binary(location) as handle:
        handle.read(1)


def byte_blocks(location: str) -> Iterator[bytes]:
    """Decompressed content of a file (.gz, .zst, .zstd or plain), block by block.

    Raises:
        FaultyFile: ``missing file``, or after everything readable was yielded ``truncated file`` or
            ``damaged file``.
        DataError: the file cannot be reached any more, or may not be read.
    """
    stored = _resumed(location, lambda position: _read_from(location, position), len)
    if location.endswith(".gz"):
        return _decoded(stored, lambda: zlib.decompressobj(wbits=31))
    if location.endswith((".zst", ".zstd")):
        return _decoded(
            stored, lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        )
    return stored


def parquet_batches(location: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Rows of a parquet file, a few at a time; columns the file does not have are left out.

    Memory: the pages of one row group's columns.

    Raises:
        FaultyFile: as ``byte_blocks``; a parquet file without its end is ``damaged file``.
        DataError: as ``byte_blocks``.
    """
    try:
        yield from _resumed(
            location,
            lambda row: _batches_from(location, row, columns),
            lambda batch: batch.num_rows,
        )
    except pa.ArrowInvalid:
        raise FaultyFile("damaged file") from None


def _options(location: str) -> dict[str, Any]:
    """Options of the file system that serves a URL."""
    if not location.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
    return {
        "client_kwargs": {"trust_env": True, "timeout": timeout}
    }  # trust_env: obey the proxy variables


def _read_from(location: str, position: int) -> Iterator[bytes]:
    """Stored bytes from a position on."""
    with open_binary(location) as handle:
        if position:
            handle.seek(position)
        while block := handle.read(READ_BYTES):
            yield block


def _batches_from(
    location: str, first_row: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Rows from a row on; row groups before it are not read."""
    with open_binary(location) as handle:
        file = pq.ParquetFile(handle)
        present = [name for name in columns if name in file.schema_arrow.names]
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            skip = max(0, first_row - start)
            start = end
            if first_row >= end:
                continue
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=present):
                if skip < batch.num_rows:
                    yield batch.slice(skip)
                skip = max(0, skip - batch.num_rows)


def _resumed(
    location: str, read_from: Callable[[int], Iterator[Item]], size: Callable[[Item], int]
) -> Iterator[Item]:
    """Items of ``read_from(0)``; after a broken connection those of ``read_from(what was read so far)``."""
    position, failures = 0, 0
    while True:
        try:
            for item in read_from(position):
                position, failures = position + size(item), 0
                yield item
            return
        except (FaultyFile, pa.ArrowInvalid):
            raise
        except Exception as error:  # every file system has errors of its own
            if _is_missing(error):
                raise FaultyFile("missing file") from None
            if not is_remote(location) and isinstance(error, OSError) and error.errno is None:
                raise FaultyFile(
                    "damaged file"
                ) from None  # Arrow's own words for pages it cannot decode
            failures += 1
            if failures >= MAX_FAILURES or not is_remote(location):
                raise DataError(
                    f"{location} cannot be read at byte or row {position:,}: {type(error).__name__}: {error}; run the "
                    "same command again to go on, or read the corpus from a mirror (corpus.SOURCE.root=FOLDER)"
                ) from None
            time.sleep(2.0 ** (failures - 2))


def _is_missing(error: BaseException) -> bool:
    """Whether the server or the disk says that there is no such file; fsspec says it of a lost connection, too."""
    if not isinstance(error, FileNotFoundError):
        return getattr(error, "status", None) in (404, 410)
    cause = error.__cause__ or error.__context__
    return cause is None or _is_missing(cause)


def _decoded(stored: Iterator[bytes], new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress members (gzip) or frames (zstd) that follow each other."""
    decoder, any_member = None, False
    for block in stored:
        for start in range(0, len(block), DECODE_BYTES):
            data = block[start : start + DECODE_BYTES]
            while data:
                if decoder is None:
                    data = data.lstrip(b"\0")  # padding after the last member
                    if not data:
                        break
                    decoder, any_member = new_decoder(), True
                try:
                    yield decoder.decompress(data)
                except (zlib.error, zstandard.ZstdError):
                    raise FaultyFile("damaged file") from None
                data = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    if decoder is not None or not any_member:
        raise FaultyFile("truncated file")


@dataclass(frozen=True)
class SourceInfo:
    """What a message about a source says.

    Attributes:
        key: Name of its settings: ``corpus.<key>.root``.
        title: Its public name.
        repository: Hub dataset.
        layout: A path as a mirror must have it.
        gated: Whether its terms must be accepted on the hub.
    """

    key: str
    title: str
    repository: str
    layout: str
    gated: bool = False


@dataclass(frozen=True)
class StoredFile:
    """A file below a base, with its stored size where it is known."""

    path: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class FileSet:
    """Files below a base (folder or URL prefix), sorted by path."""

    base: str
    files: tuple[StoredFile, ...]

    def location(self, path: str) -> str:
        """Path or URL of a file."""
        return f"{self.base}/{path}"

    def describe(self) -> dict[str, Any]:
        """Base, number and size of the files, and a SHA-256 over their paths and sizes."""
        listing = "".join(f"{file.path}\t{file.size_bytes}\n" for file in self.files)
        return {
            "base": self.base,
            "num_files": len(self.files),
            "size_bytes": sum(file.size_bytes or 0 for file in self.files),
            "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }


def reached(info: SourceInfo, tried: str, root: str | None, action: Callable[[], Result]) -> Result:
    """Result of ``action``, which lists or tries a source.

    Raises:
        ConfigError: it failed; says what was tried, how to log in, how to name a mirror, and what
            works offline.
    """
    try:
        return action()
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub, a server or the disk answers
        reason = _first_cause(error)
        if root is not None:
            text = f"corpus.{info.key}.root={root}: {tried} cannot be read ({reason}); expected {info.layout}"
        else:
            text = f"corpus.{info.key} ({info.title}) cannot be reached: tried {tried} ({reason}). {_remedies(info)}"
        raise ConfigError([text]) from None


def _first_cause(error: BaseException) -> str:
    """What started it, in one line: fsspec calls a name that cannot be resolved a missing file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _remedies(info: SourceInfo) -> str:
    """How to get at a source."""
    page = f"https://huggingface.co/datasets/{info.repository}"
    login = (
        f"accept the terms at {page} and log in with `hf auth login`"
        if info.gated
        else "no account is needed, but `hf auth login` raises the hub's limits"
    )
    return (
        f"To read it from the hub, {login}. To read a mirror, set corpus.{info.key}.root=FOLDER ({info.layout}). "
        "`--corpus sample` works offline"
    )


def hub_base(info: SourceInfo, revision: str) -> str:
    """URL prefix of a hub dataset, pinned to the commit the revision means now."""
    from huggingface_hub import HfApi

    commit = (
        HfApi().dataset_info(info.repository, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    )
    return f"hf://datasets/{info.repository}@{commit}"


def hub_files(
    info: SourceInfo, base: str, folder: str, suffixes: Sequence[str]
) -> list[StoredFile]:
    """Files of a hub dataset below ``folder`` (all of it where empty), sorted by path.

    Raises:
        FileNotFoundError: there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(
        info.repository,
        folder or None,
        recursive=True,
        revision=base.rpartition("@")[2],
        repo_type="dataset",
    )
    return _wanted(
        [StoredFile(e.path, e.size) for e in tree if isinstance(e, RepoFile)],
        f"{base}/{folder}",
        suffixes,
    )


def list_files(base: str, folder: str, suffixes: Sequence[str]) -> list[StoredFile]:
    """Files below ``base/folder`` whose names end in one of ``suffixes``, sorted by path.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_remote(base):
        import fsspec

        file_system, path = fsspec.url_to_fs(base)
        found = file_system.find(f"{path}/{folder}".rstrip("/"), detail=True)
        files = [
            StoredFile(name.removeprefix(path).lstrip("/"), entry["size"])
            for name, entry in found.items()
        ]
    else:
        top = Path(base)
        paths = (path for path in (top / folder).rglob("*") if path.is_file())
        files = [
            StoredFile(path.relative_to(top).as_posix(), path.stat().st_size) for path in paths
        ]
    return _wanted(files, f"{base}/{folder}", suffixes)


def _wanted(files: Sequence[StoredFile], place: str, suffixes: Sequence[str]) -> list[StoredFile]:
    """Those of the files whose names end in one of the suffixes."""
    kept = sorted(
        (f for f in files if f.path.endswith(tuple(suffixes))), key=lambda file: file.path
    )
    if not kept:
        raise FileNotFoundError(
            f"no file ending in {', '.join(suffixes)} below {place.rstrip('/')}"
        )
    return kept


def parquet_files(info: SourceInfo, root: str | None, revision: str, folder: str) -> FileSet:
    """Parquet files of a source that is a hub dataset: of the mirror ``root``, or of the hub; the
    first one is tried.

    Raises:
        ConfigError: they cannot be listed or read; says what to do.
    """
    tried = (
        f"{root}/{folder}".rstrip("/")
        if root is not None
        else f"hub dataset {info.repository}/{folder}".rstrip("/")
    )

    def found() -> FileSet:
        if root is not None:
            base, files = root.rstrip("/"), list_files(root.rstrip("/"), folder, [".parquet"])
        else:
            base = hub_base(info, revision)
            files = hub_files(info, base, folder, [".parquet"])
        first_byte(f"{base}/{files[0].path}")
        return FileSet(base, tuple(files))

    return reached(info, tried, root, found)


def listed_names(location: str) -> list[str]:
    """Lines of a text file that lists names; raises at once what is in the way."""
    first_byte(location)  # byte_blocks would try again for a while
    lines = b"".join(byte_blocks(location)).decode("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]
