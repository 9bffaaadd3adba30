"""What a run folder holds for its report: None where a stage has not run, damage is an error."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope2.errors import ArtifactError
from longrope2.evaluation.schema import EvaluationSummary, SuiteSummary, read_summary
from longrope2.files import artifacts
from longrope2.files.artifacts import PRODUCT_FOLDERS, Manifest, product_folder, run_with
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.rope.factors import RescaleFactors
from longrope2.tracking.metrics import read_metrics

HISTORY_FILE = "history.json"


@dataclass(frozen=True)
class StageState:
    """How far one stage has come."""

    product: str
    """Key of ``PRODUCT_FOLDERS``."""
    manifest: Manifest | None
    """None while the stage is missing or unfinished."""
    started: bool
    """Whether its folder holds anything."""


@dataclass(frozen=True)
class RunRecord:
    """Everything the report shows."""

    folder: Path
    stages: dict[str, StageState]
    factors: RescaleFactors | None
    """The searched factors, or else those the checkpoint was trained with."""
    search_history: dict[str, Any] | None
    """Content of ``2_factors/history.json``."""
    training_metrics: list[dict[str, Any]]
    """Records of ``3_checkpoints/metrics.jsonl``, oldest first; of a step that was repeated, the
    last one."""
    evaluation: EvaluationSummary | None
    suite: SuiteSummary | None
    """RULER, needle map, long and short tasks."""
    taken_from: dict[str, Path] = field(default_factory=dict)
    """Products that another run made (``run.from_run``) -> its folder."""

    @property
    def mix_tokens(self) -> dict[str, dict[str, int]]:
        """Source -> window -> tokens of the packed segments; empty before packing."""
        manifest = self.stages["segments"].manifest
        tokens = manifest.counts.get("tokens", {}) if manifest else {}
        return {k: dict(v) for k, v in tokens.items() if isinstance(v, Mapping)}


def load_run(folder: Path) -> RunRecord:
    """Read what is there.

    Raises:
        ArtifactError: the folder does not exist or holds no product of a run, or one of its files
            is damaged.
    """
    if not folder.is_dir():
        fault = "is a file" if folder.is_file() else "does not exist"
        way_out = "give the run folder, or run.name=NAME of a run in run.root"
        raise ArtifactError(f"{folder} {fault}; {way_out}")
    runs = {product: run_with(folder, product) for product in ("segments", "factors")}
    stages = {product: _stage(runs.get(product, folder), product) for product in PRODUCT_FOLDERS}
    if not any(stage.started for stage in stages.values()):
        known = ", ".join(PRODUCT_FOLDERS.values())
        raise ArtifactError(f"{folder} holds no product of a run ({known})")
    searched = product_folder(runs["factors"], "factors")
    checkpoints = product_folder(folder, "checkpoints")
    factors_files = [searched / FACTORS_FILE, checkpoints / "final" / FACTORS_FILE]
    found = [path.read_text(encoding="utf-8") for path in factors_files if path.is_file()]
    evaluations = product_folder(folder, "evaluations")
    return RunRecord(
        folder=folder,
        stages=stages,
        factors=RescaleFactors.from_json(found[0]) if found else None,
        search_history=_read_json(searched / HISTORY_FILE),
        training_metrics=_last_record_of_each_step(read_metrics(checkpoints)),
        evaluation=read_summary(EvaluationSummary, evaluations),
        suite=read_summary(SuiteSummary, evaluations),
        taken_from={product: run for product, run in runs.items() if run != folder},
    )


def _stage(run_folder: Path, product: str) -> StageState:
    folder = product_folder(run_folder, product)
    finished = (folder / artifacts.MANIFEST_NAME).is_file()
    started = folder.is_dir() and any(folder.iterdir())
    manifest = artifacts.read_manifest(folder, product) if finished else None
    return StageState(product, manifest, started)


def _last_record_of_each_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run that resumes from a checkpoint repeats the steps after it; the later record holds."""
    by_step = {record["step"]: record for record in records if "step" in record}
    return [by_step[step] for step in sorted(by_step)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path} is damaged ({error}); run its stage again") from None
