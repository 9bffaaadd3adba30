"""A folder of ``launch.export`` read as what it was made from: weights, and factors beside them.

An export says its RoPE in config.json, for other programs. Ours takes the factors from
``factors.json`` and tells the model the window of every forward; so it needs config.json as it was
before. What an export changes there is put back as the base model has it, in a view of the folder
(``folder.py``); everything else must be the base model's, which ``model_identity`` compares.
"""

from pathlib import Path

from longrope2.errors import ArtifactError, DamagedError
from longrope2.files.artifacts import (
    MANIFEST_NAME,
    UNTRAINED_FOLDER,
    Manifest,
    product_folder,
    read_manifest,
    sha256_of_file,
)
from longrope2.model.folder import config_view
from longrope2.model.shape import CONFIG_FILE, read_raw_config

# All that ``export/`` writes into a config.json, but for the number format.
CHANGED_KEYS = (
    "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor",
    "max_position_embeddings", "original_max_position_embeddings", "sliding_window", "head_dim",
    "auto_map",
)  # fmt: skip


def untrained_exports(run_folder: Path) -> list[Path]:
    """Finished exports of a run that were made without a training."""
    folder = product_folder(run_folder, "exports") / UNTRAINED_FOLDER
    try:
        manifest = read_manifest(folder, "exports")
    except ArtifactError:
        return []
    names = (Path(file) for file in manifest.files)
    return [folder / name.parent for name in names if name.name == CONFIG_FILE]


def export_manifest(folder: Path) -> Manifest | None:
    """The manifest of the finished export that ``folder`` is a variant of; None if it is none.

    Raises:
        DamagedError: there is one that is not as it was written.
    """
    if (folder / MANIFEST_NAME).is_file():  # a checkpoint: variants have one beside them
        return None
    try:
        manifest = read_manifest(folder.absolute().parent, "exports")
    except DamagedError:
        raise
    except ArtifactError:
        return None
    return manifest if f"{folder.name}/{CONFIG_FILE}" in manifest.files else None


def describe_export(folder: Path) -> dict[str, str]:
    """Input record of an exported folder: its path, and the SHA-256 of its export's manifest."""
    manifest_file = folder.absolute().parent / MANIFEST_NAME
    return {"path": str(folder), "sha256": sha256_of_file(manifest_file)}


def before_export(folder: Path, base_folder: Path) -> Path:
    """The exported ``folder`` with the RoPE keys of the base model's config.json.

    Raises:
        ArtifactError: a config.json is missing or damaged, or the cache cannot be written.
    """
    exported = read_raw_config(folder / CONFIG_FILE)
    base = read_raw_config(base_folder / CONFIG_FILE)
    kept = {key: value for key, value in exported.items() if key not in CHANGED_KEYS}
    put_back = {key: base[key] for key in CHANGED_KEYS if key in base}
    return config_view(folder / CONFIG_FILE, kept | put_back)
