"""Subjects of an evaluation: weights and rescale factors, checked before anything runs."""

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrope2.config import DocumentStart, StageConfig
from longrope2.corpora.tokenizer import start_ids
from longrope2.errors import ArtifactError, FactorsError
from longrope2.evaluation.before import (
    read_factors_beside,
    require_subject,
    require_unchanged_subject,
    subject_place,
    trained_folder,
)
from longrope2.evaluation.config import EvaluateRoot
from longrope2.files.artifacts import Manifest, describe_input, read_manifest, sha256_of_bytes
from longrope2.model.exported import before_export, describe_export, export_manifest
from longrope2.model.factors_source import RopeConfig, factors_path, resolve_factors
from longrope2.model.folder import given_folder, model_identity, weights_sha256
from longrope2.model.loading import (
    check_model,
    find_weights,
    load_tokenizer,
    load_windowed_model,
    rope_geometry,
)
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry


@dataclass(frozen=True)
class Subject:
    """One model of the comparison."""

    name: str
    folder: Path
    """Hugging Face folder of its weights: the base model's, a checkpoint's or an export's."""
    factors: RescaleFactors
    weights_sha256: str
    trained: bool
    source: dict[str, Any]
    """Input record for the manifest."""

    def table_identity(self, window: Window) -> str:
        """Hash of all that decides the RoPE of one window; equal for subjects that share it."""
        frequencies = self.factors.inverse_frequencies(window).numpy().tobytes()
        scale = repr(self.factors.attention_scale(window)).encode()
        return hashlib.sha256(frequencies + scale).hexdigest()


class SubjectModels:
    """The one model in memory: it stays for subjects with its weights, and is freed for others."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._weights_sha256 = ""
        self._model: WindowedModel | None = None

    def of(self, subject: Subject) -> WindowedModel:
        """The subject's model, with its factors."""
        if self._model is None or self._weights_sha256 != subject.weights_sha256:
            self._model = None
            place: Any = {"device": self.device, "dtype": self.dtype}
            self._model = load_windowed_model(subject.folder, subject.factors, **place).eval()
            self._weights_sha256 = subject.weights_sha256
        if self._model.factors is not subject.factors:
            self._model.set_factors(subject.factors)
        return self._model


def resolve_subjects(
    config: EvaluateRoot, base_folder: Path, *, missing: Container[str] = ()
) -> list[Subject]:
    """All subjects of the configuration, in its order.

    Args:
        config: Checked.
        base_folder: The base model's.
        missing: Places of subjects to leave out, in a dry run before they are made.

    Raises:
        ArtifactError: a checkpoint or factors file is missing, damaged, or was made for another
            model or target; names the subject's key and the path.
    """
    check_model(base_folder, config.model.original_len)
    find_weights(base_folder)
    geometry = rope_geometry(base_folder, config.model.original_len)
    base_weights = weights_sha256(base_folder)
    subjects = []
    for index, subject in enumerate(config.evaluation.subjects):
        if (place := subject_place(index, subject)) in missing:
            continue
        try:
            if subject.checkpoint is not None:
                given = Path(subject.checkpoint)
                folder, factors, trained, source = _own_factors(given, base_folder, config)
                sha256 = weights_sha256(folder)
            else:
                trained = False
                rope, folder, sha256 = subject.rope or RopeConfig(), base_folder, base_weights
                factors, source = _base_factors(rope, config, base_folder, geometry)
            of = (subject.name, folder, factors, sha256)
            subjects.append(Subject(*of, trained=trained, source=source))
        except (ArtifactError, FactorsError) as error:
            raise ArtifactError(f"{place}: {error}") from None
    return subjects


def find_checkpoint(
    config: StageConfig, key: str, given: str | None
) -> tuple[Path, RescaleFactors]:
    """The checkpoint of a stage and its factors: ``given`` at ``key``, else what the run trained.

    Raises:
        ArtifactError: it is missing, unfinished, belongs to another model or other lengths, or its
            weights are not those of its class.
    """
    checkpoint = trained_folder(config, key, given)
    factors = read_factors_beside(checkpoint, config.model.original_len, config.target_len)
    require_unchanged_subject(checkpoint)
    base_folder = given_folder(config.model, config.target_len)
    check_same_model(f"{key}={checkpoint}", model_identity(checkpoint), base_folder)
    check_model(checkpoint, config.model.original_len)
    find_weights(checkpoint)
    manifest = read_manifest(checkpoint, "checkpoint")
    _check_same_start(f"{key}={checkpoint}", manifest, checkpoint, config.model.document_start)
    return checkpoint, factors


def find_extended(config: StageConfig, key: str, given: str | None) -> tuple[Path, RescaleFactors]:
    """As ``find_checkpoint``; ``given`` may also be a folder of an export.

    Raises:
        ArtifactError: as ``find_checkpoint``.
    """
    manifest = None if given is None else export_manifest(Path(given))
    if given is None or manifest is None:
        return find_checkpoint(config, key, given)
    folder, factors = _open_export(f"{key}={given}", Path(given), manifest, config)
    check_model(folder, config.model.original_len)
    return folder, factors


def find_base_model(
    config: StageConfig, rope: RopeConfig
) -> tuple[Path, RescaleFactors, dict[str, Any]]:
    """The pre-trained model of a stage, its factors by ``rope``, and input records of both.

    Raises:
        ArtifactError: the model or the factors are missing, damaged, or do not fit each other.
        FactorsError: a closed form that does not exist for this model.
    """
    folder = given_folder(config.model, config.target_len)
    check_model(folder, config.model.original_len)
    find_weights(folder)
    geometry = rope_geometry(folder, config.model.original_len)
    factors, source = _base_factors(rope, config, folder, geometry)
    identity = {**model_identity(folder), "weights_sha256": weights_sha256(folder)}
    # Both windows or one, and a closed form's constants, stand in no file.
    resolved = {"resolved_sha256": sha256_of_bytes(factors.to_json().encode())}
    inputs = {
        "model": {"path": str(folder), **identity},
        "factors": source.get("factors", source) | resolved,
    }
    return folder, factors, inputs


def check_same_model(key: str, found: dict[str, str], base_folder: Path) -> None:
    """Refuse an artifact, called ``key``, whose ``model_identity`` is not that of ``model.path``.

    Raises:
        ArtifactError: names the fields that differ.
    """
    wanted = model_identity(base_folder)
    different = [name.removesuffix("_sha256") for name in wanted if found.get(name) != wanted[name]]
    if different:
        fault = f"{key} belongs to another model than model.path={base_folder}"
        raise ArtifactError(f"{fault} (other {' and '.join(different)})")


def _check_same_start(key: str, manifest: Manifest, folder: Path, wanted: DocumentStart) -> None:
    """Refuse a model whose training documents started otherwise than prompts would now."""
    made = manifest.config.get("model", {})
    rule = DocumentStart(made.get("document_start", wanted.value))
    if rule is wanted:
        return
    tokenizer = load_tokenizer(folder)
    if start_ids(tokenizer, rule) != start_ids(tokenizer, wanted):
        raise ArtifactError(
            f"{key} was made with model.document_start={rule.value}, but "
            f"model.document_start={wanted.value} is set; set model.document_start={rule.value}"
        )


def _own_factors(
    folder: Path, base_folder: Path, config: EvaluateRoot
) -> tuple[Path, RescaleFactors, bool, dict[str, Any]]:
    """Where a checkpoint or export is read, its factors, whether trained, and its input record."""
    require_subject(folder)
    named = f"checkpoint={folder}"
    if (manifest := export_manifest(folder)) is not None:
        opened, factors = _open_export(named, folder, manifest, config)
        # Before there were others, every export was of a trained model.
        trained = bool(manifest.details.get("trained", True))
        return opened, factors, trained, {"checkpoint": describe_export(folder)}
    factors = read_factors_beside(folder, config.model.original_len, config.target_len)
    require_unchanged_subject(folder)
    check_same_model(named, model_identity(folder), base_folder)
    find_weights(folder)
    start, manifest = config.model.document_start, read_manifest(folder, "checkpoint")
    _check_same_start(named, manifest, folder, start)
    return folder, factors, True, {"checkpoint": describe_input(folder)}


def _open_export(
    named: str, folder: Path, manifest: Manifest, config: StageConfig
) -> tuple[Path, RescaleFactors]:
    """An exported folder as the model before its export, and the factors that it applies."""
    factors = read_factors_beside(folder, config.model.original_len, config.target_len)
    require_unchanged_subject(folder)
    base_folder = given_folder(config.model, config.target_len)
    opened = before_export(folder, base_folder)
    check_same_model(named, model_identity(opened), base_folder)
    find_weights(opened)
    _check_same_start(named, manifest, opened, config.model.document_start)
    return opened, factors


def _base_factors(
    rope: RopeConfig, config: StageConfig, base_folder: Path, geometry: RopeGeometry
) -> tuple[RescaleFactors, dict[str, Any]]:
    """Factors for the base weights, if searched then on this model; and their input record."""
    run_folder = config.run.folder_with("factors")
    factors = resolve_factors(rope, geometry, config.target_len, run_folder)
    path = factors_path(rope, run_folder)
    if path is None:
        return factors, {"method": rope.method.value}
    if rope.factors is None:
        searched_on = read_manifest(path.parent, "factors").inputs.get("model", {})
        check_same_model(str(path), searched_on, base_folder)
    return factors, {"factors": describe_input(path)}
