"""Run a prepared search and write its product: journal, factors, history, metrics and, last, the manifest."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longrope2.artifacts import Manifest, sha256_of_file, write_manifest, write_text
from longrope2.config import StageConfig, to_plain
from longrope2.model import FACTORS_FILE
from longrope2.rope import closed_form_factors
from longrope2.search.config import SearchConfig
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses, samples_sha256
from longrope2.search.outcome import BASELINE_METHODS, best_factors, search_history, value_name
from longrope2.search.selftests import NeedleGuidance
from longrope2.search.space import SearchSpace
from longrope2.segments.needle_set import NeedleSet
from longrope2.tracking import MetricsLog, TrackingConfig, read_metrics

__all__ = ["HISTORY_FILE", "JOURNAL_FILE", "NEEDLES_FILE", "PreparedSearch", "SearchRoot", "run_search"]

HISTORY_FILE = "history.json"
JOURNAL_FILE = "journal.jsonl"
NEEDLES_FILE = "needles.arrow"


@dataclass
class SearchRoot(StageConfig):
    """Configuration of the search stage, without the corpus its samples come from."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """The evolutionary search."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""


@dataclass(frozen=True)
class PreparedSearch:
    """What a search works on, after the self-tests.

    Attributes:
        space: Where candidates lie.
        losses: Losses of the samples under given factors.
        guidance: Figures of the needle self-test; None for the plain-perplexity objective.
        needles: The needle set to freeze; None for the plain-perplexity objective.
        inputs: ``model`` and ``corpus`` for the manifest.
    """

    space: SearchSpace
    losses: SampleLosses
    guidance: NeedleGuidance | None
    needles: NeedleSet | None
    inputs: dict[str, dict[str, Any]]


def run_search(config: SearchRoot, prepared: PreparedSearch, folder: Path) -> None:
    """Search, or go on with a killed search, and write the product into ``folder``.

    Raises:
        ArtifactError: the folder's journal is damaged, in use, or of another search.
        FactorsError: no candidate gave a finite loss.
    """
    started = time.monotonic()
    if prepared.needles is not None:
        prepared.needles.save(folder / NEEDLES_FILE)
    with Journal(folder / JOURNAL_FILE, _journal_header(config, prepared)) as journal:
        evaluator = Evaluator(
            prepared.losses,
            journal,
            num_samples=len(prepared.losses.samples),
            num_scored_tokens=prepared.losses.num_scored_tokens,
            early_termination=config.search.early_termination,
        )
        baselines = _baseline_values(prepared.space, evaluator)
        evolution = Evolution(prepared.space, config.search, evaluator, config.seed)
        _run_with_progress(config, evolution, evaluator, folder)
    _write_product(config, prepared, evolution, evaluator, baselines, folder, time.monotonic() - started)


def _journal_header(config: SearchRoot, prepared: PreparedSearch) -> dict[str, Any]:
    """All that a loss depends on besides the factors."""
    return {
        **prepared.inputs["model"],
        "samples_sha256": samples_sha256(prepared.losses.samples),
        "objective": config.search.objective.value,
        "batch_size": config.search.batch_size,
        "rotary_dim": prepared.space.geometry.rotary_dim,
        "rope_base": prepared.space.geometry.rope_base,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _baseline_values(space: SearchSpace, evaluator: Evaluator) -> dict[str, float]:
    """Objective of the closed-form methods on the same samples."""
    values = {}
    for method in BASELINE_METHODS:
        factors = closed_form_factors(method, space.geometry, space.target_len)
        values[method.value] = evaluator.value(evaluator.evaluate(factors).loss_sum)
    return values


def _run_with_progress(config: SearchRoot, evolution: Evolution, evaluator: Evaluator, folder: Path) -> None:
    """Run the search to its end, showing the best candidate and logging metrics round by round."""
    search, name = config.search, value_name(config.search.objective)
    columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    num_logged = sum("iteration" in record for record in read_metrics(folder))  # a resume logs no round twice
    tracking = MetricsLog(folder, config.tracking, config.run.name, "search", to_plain(config))
    with tracking, Progress(*columns) as progress:
        bar = progress.add_task("", total=search.population + search.iterations * search.parents)
        for _ in evolution.steps():
            best = evolution.kept[0] if evolution.kept else None
            text = f"{name} {evaluator.value(best.loss_sum):.4g} at c={best.critical_index}" if best else "no value yet"
            progress.update(bar, advance=1, description=text)
            num_logged = _log_rounds(tracking, evolution, name, num_logged)
        _log_rounds(tracking, evolution, name, num_logged)
        progress.update(bar, total=evolution.num_candidates)


def _log_rounds(tracking: MetricsLog, evolution: Evolution, name: str, num_logged: int) -> int:
    """Log the rounds finished since the last call; returns how many are logged now."""
    for finished in evolution.rounds[num_logged:]:
        values = {
            f"search/best_{name}": finished.best_value,
            "search/critical_index": finished.best_critical_index,
            "search/evaluations": finished.num_candidates,
        }
        tracking.log(values, iteration=finished.iteration)
    return max(num_logged, len(evolution.rounds))


def _write_product(
    config: SearchRoot,
    prepared: PreparedSearch,
    evolution: Evolution,
    evaluator: Evaluator,
    baselines: dict[str, float],
    folder: Path,
    seconds: float,
) -> None:
    """Factors, history, and the manifest that marks the search as finished."""
    samples_hash = samples_sha256(prepared.losses.samples)
    factors = best_factors(
        evolution, evaluator, prepared.space, config.search, model=config.model.name, samples_sha256=samples_hash
    )
    history = search_history(
        evolution, evaluator, prepared.space, config.search, baselines=baselines, guidance=prepared.guidance
    )
    write_text(folder / FACTORS_FILE, factors.to_json())
    write_text(folder / HISTORY_FILE, json.dumps(history, indent=2) + "\n")
    files = [FACTORS_FILE, HISTORY_FILE, *([NEEDLES_FILE] if prepared.needles is not None else [])]
    write_manifest(folder, Manifest(
        "factors",
        inputs={**prepared.inputs, "samples": {"sha256": samples_hash}},
        config=to_plain(config),
        seeds={"seed": config.seed},
        counts={
            "num_candidates": evolution.num_candidates,
            "num_terminated": evaluator.num_terminated,
            "search_tokens": evaluator.num_losses_used * config.target_len,
            "forward_tokens_of_last_process": evaluator.num_losses_computed * config.target_len,
            "seconds_of_last_process": round(seconds, 1),
        },
        files={name: sha256_of_file(folder / name) for name in files},
    ))  # fmt: skip
