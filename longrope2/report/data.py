"""What a run folder holds for its report: None where a stage has not run, damage is an error."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.corpora.run_corpus import segments_of
from longrope2.errors import ArtifactError, FactorsError
from longrope2.evaluation.schema import EvaluationSummary, SuiteSummary, read_summary
from longrope2.files import artifacts
from longrope2.files.artifacts import (
    PRODUCT_FOLDERS,
    UNTRAINED_FOLDER,
    Manifest,
    find_segments,
    product_folder,
    run_with,
)
from longrope2.files.checked import read_object
from longrope2.files.unchanged import require_as_listed
from longrope2.model.factors_source import FACTORS_FILE, read_factors_file
from longrope2.rope.factors import RescaleFactors
from longrope2.segments.format import SegmentStore
from longrope2.tracking.metrics import METRICS_FILE, read_metrics

HISTORY_FILE = "history.json"
# Whose documents are enough to tell how often each angle was met.
_MOST_SEGMENTS = 256
_WAY_OUT = "bring it back, or run its stage again"


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
class DocumentLengths:
    """Documents between every two edges, BOS and EOS included."""

    edges_tokens: tuple[int, ...]
    tokenized: tuple[int, ...]
    chosen: tuple[int, ...]
    """Those that were packed, cut ones by their parts."""
    original_len: int
    target_len: int


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
    segments: Manifest | None
    """Of the segments that were trained on: the run's own, or those that it took from elsewhere."""
    untrained_exports: Manifest | None
    short_documents: tuple[int, ...] = ()
    """Tokens of documents in short windows, of some segments; none where they are not here."""
    taken_from: dict[str, Path] = field(default_factory=dict)
    """Products that another run made (``run.from_run``) -> its folder."""

    @property
    def mix_tokens(self) -> dict[str, dict[str, int]]:
        """Source -> window -> tokens of the packed segments; empty before packing."""
        tokens = self.segments.counts.get("tokens", {}) if self.segments else {}
        return {k: dict(v) for k, v in tokens.items() if isinstance(v, Mapping)}

    @property
    def document_lengths(self) -> DocumentLengths | None:
        """Documents by length, summed over sources; None where packing did not count them."""
        details = self.segments.details if self.segments else {}
        if (histogram := details.get("length_histogram")) is None:
            return None
        rows = list(histogram["num_documents"].values())
        sums = {
            kind: tuple(map(sum, zip(*(row[kind] for row in rows), strict=True)))
            for kind in ("tokenized", "chosen")
        }
        windows = {name: details[name] for name in ("original_len", "target_len")}
        return DocumentLengths(tuple(histogram["edges_tokens"]), **sums, **windows)

    @property
    def resumed_after_steps(self) -> list[int]:
        """Steps after which the training was interrupted and went on."""
        marks = (record.get("train/resumed_after_step") for record in self.training_metrics)
        return [step for step in marks if step is not None]

    def corpus_of(self, product: str) -> str | None:
        """Name and folder of the corpus that a product's text came from; None where not known."""
        of_training = product in ("segments", "checkpoints")
        manifest = self.segments if of_training else self.stages[product].manifest
        corpus = manifest.config.get("corpus") if manifest else None
        if not corpus:
            return None
        return f"{corpus['name']} ({corpus['folder']})" if corpus.get("folder") else corpus["name"]


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
    given = find_segments(folder)
    if given is not None and given == product_folder(given.parent, "segments"):
        runs["segments"] = given.parent
    stages = {product: _stage(runs.get(product, folder), product) for product in PRODUCT_FOLDERS}
    untrained = _untrained_exports(folder)
    if untrained is None and not any(stage.started for stage in stages.values()):
        known = ", ".join(PRODUCT_FOLDERS.values())
        raise ArtifactError(f"{folder} holds no product of a run ({known})")
    searched = product_folder(runs["factors"], "factors")
    checkpoints = product_folder(folder, "checkpoints")
    factors_files = [searched / FACTORS_FILE, checkpoints / "final" / FACTORS_FILE]
    for path in factors_files:
        require_as_listed(path, _WAY_OUT)
    found = [path for path in factors_files if path.is_file()]
    evaluations = product_folder(folder, "evaluations")
    return RunRecord(
        folder=folder,
        stages=stages,
        factors=_read_factors(found[0]) if found else None,
        search_history=_read_json(searched / HISTORY_FILE),
        training_metrics=_last_record_of_each_step(read_metrics(checkpoints)),
        evaluation=read_summary(EvaluationSummary, evaluations),
        suite=read_summary(SuiteSummary, evaluations),
        segments=_segments_of_training(folder),
        untrained_exports=untrained,
        short_documents=_short_documents(folder),
        taken_from={product: run for product, run in runs.items() if run != folder},
    )


def _stage(run_folder: Path, product: str) -> StageState:
    folder = product_folder(run_folder, product)
    finished = (folder / artifacts.MANIFEST_NAME).is_file()
    started = folder.is_dir() and any(p.name != UNTRAINED_FOLDER for p in folder.iterdir())
    manifest = artifacts.read_manifest(folder, product) if finished else None
    return StageState(product, manifest, started)


def _segments_of_training(run_folder: Path) -> Manifest | None:
    """The manifest of the segments that the run was trained on, or else has."""
    segments = segments_of(run_folder)
    return None if segments is None else artifacts.read_manifest(segments, "segments")


def _short_documents(run_folder: Path) -> tuple[int, ...]:
    """Lengths of the documents in up to ``_MOST_SEGMENTS`` short segments, evenly chosen."""
    segments = segments_of(run_folder)
    if segments is None or not (segments / artifacts.MANIFEST_NAME).is_file():
        return ()
    names = artifacts.read_manifest(segments, "segments").files
    if not names or not all((segments / name).is_file() for name in names):
        return ()  # only the record is here
    store = SegmentStore(segments)
    ids = store.short_ids
    lengths: list[int] = []
    for index in ids[:: max(1, len(ids) // _MOST_SEGMENTS)]:
        segment = store.segment(index)
        own = np.diff(segment.doc_ends, prepend=0)
        lengths += [int(n) for n, pad in zip(own, segment.doc_is_padding, strict=True) if not pad]
    return tuple(lengths)


def _untrained_exports(run_folder: Path) -> Manifest | None:
    folder = product_folder(run_folder, "exports") / UNTRAINED_FOLDER
    finished = (folder / artifacts.MANIFEST_NAME).is_file()
    return artifacts.read_manifest(folder, "exports") if finished else None


def _last_record_of_each_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run that resumes from a checkpoint repeats the steps after it; the later record holds."""
    by_step = {record["step"]: record for record in records if "step" in record}
    for step, record in by_step.items():
        if type(record.get("train/tokens")) is not int:
            fault = f"{METRICS_FILE} is damaged: the record of step {step} has no train/tokens"
            raise ArtifactError(f"{fault}; remove that line and all after it to keep the rest")
    return [by_step[step] for step in sorted(by_step)]


def _read_factors(path: Path) -> RescaleFactors:
    try:
        return read_factors_file(path)
    except FactorsError as error:
        raise ArtifactError(f"{path} is damaged ({error}); {_WAY_OUT}") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    require_as_listed(path, _WAY_OUT)
    if not path.is_file():
        return None
    return read_object(path, "the history of a search", _WAY_OUT)
