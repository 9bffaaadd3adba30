"""Where the files of a public corpus stand: a mirror or a public place, listed and tried before any work starts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.sources.remote import byte_blocks, first_byte, is_remote
from longrope2.errors import ConfigError

__all__ = ["FileSet", "SourceInfo", "StoredFile", "hub_base", "list_files", "listed_names", "parquet_files", "reached"]

HUB_TIMEOUT_SECONDS = 20.0
Result = TypeVar("Result")


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
        ConfigError: it failed; says what was tried, how to log in, how to name a mirror, and what works offline.
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
    )  # fmt: skip


def hub_base(info: SourceInfo, revision: str) -> str:
    """URL prefix of a hub dataset, pinned to the commit the revision means now."""
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(info.repository, revision=revision, timeout=HUB_TIMEOUT_SECONDS).sha
    return f"hf://datasets/{info.repository}@{commit}"


def hub_files(info: SourceInfo, base: str, folder: str, suffixes: Sequence[str]) -> list[StoredFile]:
    """Files of a hub dataset below ``folder`` (all of it where empty), sorted by path.

    Raises:
        FileNotFoundError: there is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(
        info.repository, folder or None, recursive=True, revision=base.rpartition("@")[2], repo_type="dataset"
    )
    return _wanted([StoredFile(e.path, e.size) for e in tree if isinstance(e, RepoFile)], f"{base}/{folder}", suffixes)


def list_files(base: str, folder: str, suffixes: Sequence[str]) -> list[StoredFile]:
    """Files below ``base/folder`` whose names end in one of ``suffixes``, sorted by path.

    Raises:
        FileNotFoundError: there is none.
    """
    if is_remote(base):
        import fsspec

        file_system, path = fsspec.url_to_fs(base)
        found = file_system.find(f"{path}/{folder}".rstrip("/"), detail=True)
        files = [StoredFile(name.removeprefix(path).lstrip("/"), entry["size"]) for name, entry in found.items()]
    else:
        top = Path(base)
        paths = (path for path in (top / folder).rglob("*") if path.is_file())
        files = [StoredFile(path.relative_to(top).as_posix(), path.stat().st_size) for path in paths]
    return _wanted(files, f"{base}/{folder}", suffixes)


def _wanted(files: Sequence[StoredFile], place: str, suffixes: Sequence[str]) -> list[StoredFile]:
    """Those of the files whose names end in one of the suffixes."""
    kept = sorted((f for f in files if f.path.endswith(tuple(suffixes))), key=lambda file: file.path)
    if not kept:
        raise FileNotFoundError(f"no file ending in {', '.join(suffixes)} below {place.rstrip('/')}")
    return kept


def parquet_files(info: SourceInfo, root: str | None, revision: str, folder: str) -> FileSet:
    """Parquet files of a source that is a hub dataset: of the mirror ``root``, or of the hub; the first one is tried.

    Raises:
        ConfigError: they cannot be listed or read; says what to do.
    """
    tried = (
        f"{root}/{folder}".rstrip("/") if root is not None else f"hub dataset {info.repository}/{folder}".rstrip("/")
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
