"""Where a run's rescale factors come from: a closed form, the run's search, or a file."""

from dataclasses import dataclass
from pathlib import Path

from longrope2.artifacts import product_folder
from longrope2.errors import ArtifactError
from longrope2.rope import RescaleFactors, RopeGeometry, RopeMethod, closed_form_factors

__all__ = ["FACTORS_FILE", "RopeConfig", "factors_path", "resolve_factors"]

FACTORS_FILE = "factors.json"


@dataclass
class RopeConfig:
    """Which RoPE rescaling the long window uses."""

    method: RopeMethod = RopeMethod.searched
    """``searched`` reads the run's own search result, ``from_file`` reads ``factors``, the rest are closed forms."""
    factors: str | None = None
    """Factors JSON for ``from_file``; overrides the run's own file for ``searched``."""


def factors_path(rope: RopeConfig, run_folder: Path) -> Path | None:
    """The file the factors are read from, or None for a closed form."""
    if rope.method is RopeMethod.searched:
        return Path(rope.factors) if rope.factors else product_folder(run_folder, "factors") / FACTORS_FILE
    if rope.method is RopeMethod.from_file:
        return Path(rope.factors or "")
    return None


def resolve_factors(rope: RopeConfig, geometry: RopeGeometry, target_len: int, run_folder: Path) -> RescaleFactors:
    """The factors for this model and target.

    Raises:
        ArtifactError: the file is missing, or its factors are for another model or target; names the key.
    """
    path = factors_path(rope, run_folder)
    if path is None:
        return closed_form_factors(rope.method, geometry, target_len)
    if not path.is_file():
        raise ArtifactError(
            f"rope.method={rope.method.value} needs a factors file, but {path} does not exist; "
            "run launch.search first, or give rope.factors=FILE"
        )
    factors = RescaleFactors.from_json(path.read_text(encoding="utf-8"))
    if factors.geometry != geometry:
        raise ArtifactError(f"{path} (rope.factors) is for {factors.geometry}, this model has {geometry}")
    if factors.target_len != target_len:
        raise ArtifactError(f"{path} (rope.factors) is for target_len={factors.target_len}, not {target_len}")
    return factors
