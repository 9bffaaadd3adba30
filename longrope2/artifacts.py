"""Products on disk: atomic writes, hashes, manifests, and the names of the run folder.

A product is a folder with a ``manifest.json`` that is written last, so a folder without one is unfinished. Files are
written to a temporary name in the same folder, fsynced and renamed: a reader never sees half a file.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError
from longrope2.gguf_model import GGUF_PREFIX, converted_folder

__all__ = [
    "PRODUCT_FOLDERS",
    "SCHEMA_VERSION",
    "Manifest",
    "atomic_path",
    "describe_input",
    "fsync_folder",
    "model_identity",
    "product_folder",
    "read_manifest",
    "resolve_model_folder",
    "sha256_of_bytes",
    "sha256_of_file",
    "weights_sha256",
    "write_manifest",
    "write_text",
]

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
PRODUCT_FOLDERS = {
    "segments": "1_segments",
    "factors": "2_factors",
    "checkpoints": "3_checkpoints",
    "evaluations": "4_evaluations",
    "exports": "5_exports",
}
RECORDED_PACKAGES = ("torch", "transformers", "deepspeed", "tokenizers", "pyarrow", "numpy")
# RoPE scaling is what the project changes; the rest of config.json says which model it is.
SCALING_KEYS = ("rope_scaling", "rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
BOOKKEEPING_KEYS = ("transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "rope_theta",
                    "initializer_range")  # fmt: skip


@dataclass
class Manifest:
    """What a product is, what it was made from, and what it holds.

    Attributes:
        kind: Product name, a key of ``PRODUCT_FOLDERS``, or the name of a single artifact such as ``checkpoint``.
        inputs: Role -> {"path", "sha256"} (or a model identity) of everything the product was made from.
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
    versions: dict[str, str] = field(default_factory=lambda: _library_versions())


def product_folder(run_folder: Path, product: str) -> Path:
    """Folder of one product inside a run folder, e.g. ``runs/demo/1_segments``."""
    return run_folder / PRODUCT_FOLDERS[product]


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it to ``path``, on failure remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, not the process id: processes in containers on a shared disk have equal ones.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
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


def sha256_of_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data``, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def describe_input(path: Path) -> dict[str, str]:
    """Path and SHA-256 of an input file; for a product folder, the SHA-256 of its manifest."""
    file = path / MANIFEST_NAME if path.is_dir() else path
    return {"path": str(path), "sha256": sha256_of_file(file)}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``; call it last, it marks the product as finished."""
    write_text(folder / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check the manifest of a finished product.

    Raises:
        ArtifactError: the folder or its manifest is missing or unreadable, or its ``kind`` or ``schema_version`` is
            not the expected one; names the field.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            f"{folder} holds no finished {kind}: {MANIFEST_NAME} is missing; run the stage that makes it"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest(**fields)
    except (ValueError, TypeError) as error:  # ValueError: no JSON, or no UTF-8
        raise ArtifactError(f"{path} is not a manifest of this project: {error}") from None
    if manifest.kind != kind:
        raise ArtifactError(f"{path}: kind is {manifest.kind!r}, expected {kind!r}")
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path}: schema_version is {manifest.schema_version}, this version reads {SCHEMA_VERSION}; make it again"
        )
    return manifest


def resolve_model_folder(path: str) -> Path:
    """Local folder of a model given as a folder, a Hugging Face hub id, or ``gguf://PACKAGE/FILE``.

    Raises:
        ArtifactError: neither a folder with config.json nor a hub id that can be reached, or a packaged GGUF file that
            is not there or cannot be converted.
    """
    if path.startswith(GGUF_PREFIX):
        return converted_folder(path)
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir():
        raise ArtifactError(f"model.path={path} holds no config.json; give a Hugging Face model folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"model.path={path} is neither a folder nor a hub id that can be reached ({reason}); "
            "give a local Hugging Face model folder, or log in with `hf auth login`"
        ) from None


def model_identity(folder: Path) -> dict[str, str]:
    """What makes two model folders the same model for this project: architecture and tokenizer, not weights.

    RoPE scaling fields are left out, so an extended model still counts as the model it was made from.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = {k: v for k, v in config.items() if k not in SCALING_KEYS + BOOKKEEPING_KEYS}
    canonical = json.dumps(architecture, sort_keys=True).encode()
    tokenizer_files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not tokenizer_files:
        raise ArtifactError(f"{folder} holds neither tokenizer.json nor tokenizer.model")
    return {"architecture_sha256": sha256_of_bytes(canonical), "tokenizer_sha256": sha256_of_file(tokenizer_files[0])}


def weights_sha256(folder: Path) -> str:
    """One hash over the weight files (``*.safetensors``) of a model folder.

    Raises:
        ArtifactError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtifactError(f"{folder} holds no *.safetensors weights; check model.path or the checkpoint")
    return sha256_of_bytes(" ".join(f"{file.name} {sha256_of_file(file)}" for file in files).encode())


def _code_commit() -> str:
    """Commit of the source tree, with ``+dirty`` when files differ from it; ``unknown`` outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+dirty" if changed else "")


def _library_versions() -> dict[str, str]:
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
