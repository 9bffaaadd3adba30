"""Products on disk: atomic writes, hashes, manifests, and the names of the run folder.

A product is a folder with a ``manifest.json`` that is written last, so a folder without one is
unfinished. Files are written to a temporary name in the same folder, fsynced and renamed: a reader
never sees half a file. A manifest holds a hash of itself (``sha256``), so that a changed one is
known; whether the files that it lists are still as they were written asks ``unchanged.py``.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError, DamagedError, DiskFullError, is_disk_full
from longrope2.files.checked import read_object, read_settings

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PRODUCT_FOLDERS = {
    "segments": "1_segments",
    "factors": "2_factors",
    "checkpoints": "3_checkpoints",
    "evaluations": "4_evaluations",
    "exports": "5_exports",
}
SOURCE_FILE = "from_run"
"""In a run folder: the path from there to the run that it takes segments and factors from."""
# Inside that of exports: those of untrained weights, a product with a manifest of its own.
UNTRAINED_FOLDER = "untrained"
RECORDED_PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "pyarrow", "numpy")


@dataclass
class Manifest:
    """What a product is, what it was made from, and what it holds.

    Attributes:
        kind: Product name, a key of ``PRODUCT_FOLDERS``, or the name of a single artifact such as
            ``checkpoint``.
        inputs: Role -> {"path", "sha256"} (or a model identity) of everything the product was made
            from.
        config: Resolved configuration of the stage.
        seeds: Name -> seed.
        counts: Name with its unit (``num_``, ``_tokens``, ``_seconds``) -> number.
        files: File name inside the product folder -> SHA-256.
        details: Whatever else a reader of this kind needs; plain JSON values.
    """

    kind: str
    inputs: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    commit: str = field(default_factory=lambda: _code_commit())
    versions: dict[str, str] = field(default_factory=lambda: library_versions())


_SEAL = "sha256"
_WHAT = "a manifest of this project"
_WAY_OUT = "bring it back, or remove it and run the stage that makes it again"
_FIELD_TYPES: dict[str, tuple[type, str]] = {
    field.name: {str: (str, "a text"), int: (int, "a whole number")}.get(
        field.type, (dict, "an object")
    )  # pyright: ignore[reportArgumentType]
    for field in fields(Manifest)
}


def product_folder(run_folder: Path, product: str) -> Path:
    """Folder of one product inside a run folder, e.g. ``runs/demo/1_segments``."""
    return run_folder / PRODUCT_FOLDERS[product]


def source_of(run_folder: Path) -> Path | None:
    """The run folder that a run takes segments and factors from (``run.from_run``), if any."""
    note = run_folder / SOURCE_FILE
    if not note.is_file():
        return None
    return Path(os.path.normpath(run_folder / note.read_text(encoding="utf-8").strip()))


def run_with(run_folder: Path, product: str) -> Path:
    """The run folder whose product counts for a run: its own, or one that it takes from."""
    source: Path | None = run_folder
    while source is not None:
        if product_folder(source, product).exists():
            return source
        source = source_of(source)
    return run_folder


def find_segments(run_folder: Path) -> Path | None:
    """The segments that count for a run: those its training was given, its own, or another run's.

    Theirs in the same order, of the run that it takes from. None where there are none at all.
    """
    source: Path | None = run_folder
    while source is not None:
        own = product_folder(source, "segments")
        found = _given_segments(source) or (own if own.exists() else None)
        if found is not None:
            return found
        source = source_of(source)
    return None


def _given_segments(run_folder: Path) -> Path | None:
    """What the training of a run was given as ``segments``; finished or not."""
    config = product_folder(run_folder, "checkpoints") / "config.yaml"
    if not config.is_file():
        return None
    way_out = "bring it back, or remove it: launch.train with the same settings writes it"
    given = read_settings(config, way_out).get("segments")
    return None if given is None else Path(str(given))


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``: fsynced and renamed on success, else removed.

    The file has the mode that the umask gives: some libraries write files for their owner alone.

    Raises:
        DiskFullError: there is no space for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process id: processes in containers on a shared disk have equal ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(path, error) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes_of(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files of a folder, for its manifest, which is not among them."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: sha256_of_file(path) for path in paths if path.name != MANIFEST_NAME}


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data``, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def describe_input(path: Path) -> dict[str, str]:
    """Path and SHA-256 of an input file; for a product folder, the SHA-256 of its manifest."""
    file = path / MANIFEST_NAME if path.is_dir() else path
    return {"path": str(path), "sha256": sha256_of_file(file)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; call it last, it marks the product as finished."""
    plain = asdict(manifest)
    sealed = {**plain, _SEAL: _seal_of(plain)}
    write_text(folder / MANIFEST_NAME, json.dumps(sealed, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check the manifest of a finished product.

    Raises:
        ArtifactError: the folder or its manifest is missing or unreadable, or its ``kind`` or
            ``schema_version`` is not the expected one; names the field.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} holds no finished {kind}: {MANIFEST_NAME} is missing; "
            "run the stage that makes it"
        )
    content = read_object(path, _WHAT, _WAY_OUT)
    found = content.get("kind")
    if isinstance(found, str) and found != kind:
        raise ArtifactError(f"{path}: kind is {found!r}, expected {kind!r}")
    manifest = _checked(path, content)
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version is {manifest.schema_version}, "
            f"this version reads {SCHEMA_VERSION}; make it again"
        )
    return manifest


def _checked(path: Path, content: dict[str, Any]) -> Manifest:
    """The manifest in the JSON object of a file.

    Raises:
        DamagedError: a field is missing, unknown or of a wrong type, or it is not as written.
    """
    seal = content.pop(_SEAL, None)  # those of earlier versions have none
    faults = [f"it lacks {name}" for name in _FIELD_TYPES if name not in content]
    faults += [f"it has an unknown field {name}" for name in content if name not in _FIELD_TYPES]
    for name, (kind, words) in _FIELD_TYPES.items():
        if name in content and type(content[name]) is not kind:
            faults.append(f"{name} must be {words}")
    files = content.get("files")
    for name, digest in files.items() if isinstance(files, dict) else ():
        if not isinstance(digest, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            faults.append(f"files[{name!r}] must be a hash of a file inside the folder")
    if faults:
        raise DamagedError(f"{path} is not {_WHAT}: {'; '.join(faults[:3])}; {_WAY_OUT}")
    if seal not in (None, _seal_of(content)):
        raise DamagedError(f"{path} is not as it was written (its sha256 differs); {_WAY_OUT}")
    return Manifest(**content)


def _seal_of(plain: dict[str, Any]) -> str:
    """Hash of all that a manifest says."""
    return sha256_of_bytes(json.dumps(plain, sort_keys=True).encode())


def _code_commit() -> str:
    """Commit of the source tree, ``+dirty`` when files differ; ``unknown`` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=20)
    try:
        commit = run([*git, "rev-parse", "HEAD"]).stdout.strip()
        changed = run([*git, "status", "--porcelain", "-uno"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+dirty" if changed else "")


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that shape results."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def fsync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
