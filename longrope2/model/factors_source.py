"""Where a run's factors come from: a closed form, its search, a file, or a published config."""

from dataclasses import dataclass, replace
from pathlib import Path

from longrope2.config import find_shipped
from longrope2.errors import ArtifactError, FactorsError
from longrope2.files.artifacts import product_folder
from longrope2.files.checked import read_text
from longrope2.files.unchanged import require_as_listed
from longrope2.model.folder import find_config_file
from longrope2.model.shape import CONFIG_FILE, read_model_config
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import from_hf_config
from longrope2.rope.methods import (
    CLOSED_FORMS,
    CRITICAL_INDEX_METHODS,
    RopeMethod,
    closed_form_factors,
    critical_index_factors,
)

FACTORS_FILE = "factors.json"


@dataclass
class RopeConfig:
    """Which RoPE rescaling the long window uses."""

    method: RopeMethod = RopeMethod.searched
    """``searched`` reads the run's own search result; ``yarn_rcd`` and ``ntk_rcd`` read its
    critical index; ``from_file`` and ``from_hf`` read ``factors``; the rest are closed forms."""
    factors: str | None = None
    """Factors JSON or CSV for ``from_file``; model folder, config.json or hub id for
    ``from_hf``; for ``searched``, ``yarn_rcd`` and ``ntk_rcd``, a factors JSON instead of the
    run's own."""
    attention_scale: float | None = None
    """Multiplier on cos and sin in the long window instead of the method's own; null keeps it."""
    both_windows: bool = False
    """True uses the rescaled RoPE inside the original window too, as methods without a factor
    switch do."""


def factors_path(rope: RopeConfig, run_folder: Path) -> Path | None:
    """The file the factors are read from, or None for a closed form.

    Raises:
        ArtifactError: ``from_file`` or ``from_hf`` without ``rope.factors``, or a published config
            that is not found.
    """
    needs = {
        RopeMethod.from_hf: "a model folder, a config.json or a hub id",
        RopeMethod.from_file: "a factors file, .json or .csv",
    }
    if rope.method in CLOSED_FORMS:
        return None
    if not rope.factors:
        if rope.method in needs:
            raise ArtifactError(
                f"rope.method={rope.method.value} needs rope.factors={needs[rope.method]}"
            )
        return product_folder(run_folder, "factors") / FACTORS_FILE
    if rope.method is RopeMethod.from_hf:
        return find_config_file(rope.factors, "rope.factors")
    return find_shipped(rope.factors)


def factors_faults(
    rope: RopeConfig, run_folder: Path, target_len: int, *, missing_is_a_fault: bool = True
) -> list[str]:
    """What can be said of the factors without the model: a missing file, or another target's."""
    faults, is_published = _scale_faults(rope), rope.method is RopeMethod.from_hf and rope.factors
    if is_published:  # may have to be fetched
        return faults
    try:
        path = factors_path(rope, run_folder)
        if path is None:
            return faults
        if path.is_file():
            if path.suffix.lower() != ".csv":  # which says neither model nor target
                _read_json(path, target_len, "rope.factors")
        elif missing_is_a_fault:
            faults.append(_missing(rope, path))
    except ArtifactError as error:
        faults.append(str(error))
    return faults


def missing_factors(rope: RopeConfig, run_folder: Path) -> str | None:
    """The fault of a factors file that is not there; None where it is, or where none is read."""
    if rope.method is RopeMethod.from_hf or (
        rope.method is RopeMethod.from_file and not rope.factors
    ):
        return None  # to be fetched, or a fault of its own
    path = factors_path(rope, run_folder)
    return None if path is None or path.is_file() else _missing(rope, path)


def _missing(rope: RopeConfig, path: Path) -> str:
    return (
        f"rope.method={rope.method.value} needs a factors file, but {path} does not exist; "
        "run launch.search first, or give rope.factors=FILE"
    )


def _scale_faults(rope: RopeConfig) -> list[str]:
    if rope.attention_scale is None or 0.5 <= rope.attention_scale <= 2:
        return []
    given = f"rope.attention_scale={rope.attention_scale}"
    return [f"{given}: must be null (the method's own) or from 0.5 to 2"]


def resolve_factors(
    rope: RopeConfig, geometry: RopeGeometry, target_len: int, run_folder: Path
) -> RescaleFactors:
    """The factors for this model and target.

    Raises:
        ArtifactError: the file is missing or damaged, or its factors are for another model or
            target; names the key.
        FactorsError: a closed form that does not exist for this geometry.
    """
    path, method = factors_path(rope, run_folder), rope.method
    if path is None:
        factors = closed_form_factors(method, geometry, target_len)
    elif not path.is_file():
        raise ArtifactError(_missing(rope, path))
    elif method is RopeMethod.from_hf:
        factors = _read_published(path, geometry, target_len, "rope.factors")
    else:
        factors = _read_file(path, geometry, target_len, "rope.factors")
    if method in CRITICAL_INDEX_METHODS:
        if factors.critical_index is None:
            raise ArtifactError(
                f"{path} (rope.factors) has no critical_index, which rope.method={method.value} "
                "needs; give the factors.json of a finished longrope2 search"
            )
        factors = critical_index_factors(method, geometry, target_len, factors.critical_index)
    if rope.attention_scale is not None:
        if faults := _scale_faults(rope):
            raise ArtifactError(faults[0])
        factors = replace(factors, long_attention_scale=rope.attention_scale)
    return factors.in_both_windows() if rope.both_windows else factors


def read_factors(given: str, geometry: RopeGeometry, target_len: int, key: str) -> RescaleFactors:
    """Factors for this model and target from whatever holds some.

    Args:
        given: Factors file, JSON or CSV; or a published model: folder, config.json, or hub id.
        geometry: Rotary geometry of the model.
        target_len: L in tokens.
        key: Configuration key it was given with.

    Raises:
        ArtifactError: missing, damaged, or for another model or target; names path and ``key``.
    """
    path = find_shipped(given)
    if path.suffix.lower() in (".json", ".csv") and path.name != CONFIG_FILE:
        return _read_file(path, geometry, target_len, key)
    return _read_published(find_config_file(given, key), geometry, target_len, key)


def _read_file(path: Path, geometry: RopeGeometry, target_len: int, key: str) -> RescaleFactors:
    """Factors from CSV (by its suffix) or JSON."""
    if path.suffix.lower() != ".csv":
        factors = _read_json(path, target_len, key)
        _refuse_other_geometry(factors, geometry, path, key)
        return factors
    try:
        text, source = path.read_text(encoding="utf-8"), {"source": path.name}
        return RescaleFactors.from_csv(text, geometry, target_len, provenance=source)
    except (OSError, UnicodeDecodeError, FactorsError) as error:
        raise ArtifactError(f"{path} ({key}): {error}") from None


def _read_json(path: Path, target_len: int, key: str) -> RescaleFactors:
    """Factors of this target, of any model."""
    try:
        factors = read_factors_file(path)
    except (ArtifactError, FactorsError) as error:
        raise ArtifactError(f"{path} ({key}): {error}") from None
    if factors.target_len != target_len:
        raise ArtifactError(
            f"{path} ({key}) is for target_len={factors.target_len}, not {target_len}"
        )
    return factors


def read_factors_file(path: Path) -> RescaleFactors:
    """Factors of this project's JSON, as they were written.

    Raises:
        DamagedError: the file cannot be read, or the manifest beside it lists another hash.
        FactorsError: as ``RescaleFactors.from_json``.
    """
    way_out = (
        "bring it back or make it again; factors of your own belong into a file elsewhere, with "
        "rope=from_file rope.factors=FILE"
    )
    require_as_listed(path, way_out)
    return RescaleFactors.from_json(read_text(path, "a factors file", way_out))


def _read_published(
    path: Path, geometry: RopeGeometry, target_len: int, key: str
) -> RescaleFactors:
    """Factors of a published config.json, which must reach at least this far.

    ``dynamic`` reaches any length. Its own pre-trained window may differ from ours: public Phi-3
    configs say 4096 where the paper's window is 2048.
    """
    from longrope2.model.given import published_rotary  # loads for seconds

    config = read_model_config(path)
    try:
        rotary = published_rotary(config)
        published = from_hf_config(config, geometry.original_len, rotary=rotary)
        factors = from_hf_config(config, geometry.original_len, target_len, rotary)
    except FactorsError as error:
        raise ArtifactError(f"{path} ({key}): {error}") from None
    _refuse_other_geometry(factors, geometry, path, key)
    if published.target_len < target_len and published.provenance["rope_type"] != "dynamic":
        raise ArtifactError(
            f"{path} ({key}) reaches {published.target_len} tokens, not target_len={target_len}; "
            f"set target_len={published.target_len}, or give a config made for more"
        )
    return factors


def _refuse_other_geometry(
    factors: RescaleFactors, geometry: RopeGeometry, path: Path, key: str
) -> None:
    if factors.geometry != geometry:
        raise ArtifactError(f"{path} ({key}) is for {factors.geometry}, this model has {geometry}")
