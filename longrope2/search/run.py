"""Run a prepared search and write its product: journal, factors, history, metrics and, last, the manifest."""

import collections
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longrope2.artifacts import Manifest, sha256_of_file, write_manifest, write_text
from longrope2.config import StageConfig, to_plain
from longrope2.model import FACTORS_FILE, ForwardCost
from longrope2.parallel import ParallelConfig
from longrope2.rope import RescaleFactors, RopeMethod, closed_form_factors
from longrope2.search.budget import SECONDS_PER_HOUR, SearchBudget, most_candidates, projected_hours
from longrope2.search.config import Pruning, SearchConfig
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.journal import JOURNAL_FILE, Journal
from longrope2.search.objective import SampleLosses, samples_sha256
from longrope2.search.outcome import BASELINE_METHODS, best_factors, search_history, value_name
from longrope2.search.selftests import NeedleGuidance, check_factors_matter
from longrope2.search.space import SearchSpace
from longrope2.search.workers import Score, Workers
from longrope2.segments.needle_set import NeedleSet
from longrope2.tracking import MetricsLog, TrackingConfig, read_metrics

__all__ = ["HISTORY_FILE", "JOURNAL_FILE", "NEEDLES_FILE", "PreparedSearch", "SearchRoot", "run_search"]

HISTORY_FILE = "history.json"
NEEDLES_FILE = "needles.arrow"
NEEDLES_FILES = (NEEDLES_FILE, "needles.json")  # the samples, and for readers the record of what they are made of


@dataclass
class SearchRoot(StageConfig):
    """Configuration of the search stage, without the corpus its samples come from."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """The evolutionary search."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Processes that share the candidates; ``parallel.sequence`` of them hold every sample together."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""


@dataclass(frozen=True)
class PreparedSearch:
    """What a search works on, after the self-tests.

    Attributes:
        space: Where candidates lie.
        losses: Losses of the samples under given factors.
        cost: Floating-point operations of a forward pass.
        sample_len: Tokens of a sample: the target window, or the original one for short-window factors.
        long_factors: The long window's factors when the search is for the short window's; else None.
        guidance: Figures of the needle self-test; None for the plain-perplexity objective.
        needles: The needle set to freeze; None for the plain-perplexity objective.
        inputs: ``model`` and ``corpus`` for the manifest.
    """

    space: SearchSpace
    losses: SampleLosses
    cost: ForwardCost
    sample_len: int
    long_factors: RescaleFactors | None
    guidance: NeedleGuidance | None
    needles: NeedleSet | None
    inputs: dict[str, dict[str, Any]]


def run_search(config: SearchRoot, prepared: PreparedSearch, folder: Path, workers: Workers) -> None:
    """Search, or go on with a killed search, and write the product into ``folder``; every process calls it.

    Raises:
        ArtifactError: the folder's journal is damaged, in use, or of another search; or the model does not apply the
            factors it is given (self-test b).
        FactorsError: no candidate gave a finite loss.
    """
    started = time.monotonic()
    if workers.is_main and prepared.needles is not None:
        prepared.needles.save(folder / NEEDLES_FILE)
    header = _journal_header(config, prepared)
    with Journal(folder, header, workers.worker, writes=workers.is_leader) as journal:
        num_known = journal.num_losses
        workers.wait_for_all("journals are read")  # from here on they grow
        evaluator = Evaluator(
            prepared.losses,
            journal,
            num_scored_tokens=prepared.losses.num_scored_tokens,
            is_pruning=config.search.pruning is not Pruning.none,
        )
        scores = _baseline_scores(prepared.space, evaluator, workers)
        check_factors_matter(scores[RopeMethod.none], scores[RopeMethod.pi])
        baselines = {method.value: evaluator.value(score.loss_sum) for method, score in scores.items()}
        evolution = Evolution(prepared.space, config.search, evaluator, config.seed, workers)
        if workers.is_main:
            _run_with_progress(config, evolution, evaluator, folder)
        else:
            collections.deque(evolution.steps(), maxlen=0)
    workers.wait_for_all("journals are written")
    if workers.is_main:
        num_forwards = Journal(folder, header, writes=False).num_losses
        budget = _budget(config, prepared, evolution, workers, num_forwards, num_known, time.monotonic() - started)
        _write_product(config, prepared, evolution, evaluator, baselines, folder, budget)
    workers.wait_for_all("the product is written")


def _journal_header(config: SearchRoot, prepared: PreparedSearch) -> dict[str, Any]:
    """All that a loss depends on besides the factors."""
    return {
        **prepared.inputs["model"],
        "samples_sha256": samples_sha256(prepared.losses.samples),
        "objective": config.search.objective.value,
        "batch_size": config.search.batch_size,
        "sequence": config.parallel.sequence,
        "rotary_dim": prepared.space.geometry.rotary_dim,
        "rope_base": prepared.space.geometry.rope_base,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _baseline_scores(space: SearchSpace, evaluator: Evaluator, workers: Workers) -> dict[RopeMethod, Score]:
    """Scores of the closed-form methods on the same samples."""
    queue = workers.queue("baselines", len(BASELINE_METHODS))
    while (task := queue.claim()) is not None:
        factors = closed_form_factors(BASELINE_METHODS[task], space.geometry, space.target_len)
        queue.publish(task, evaluator.evaluate(factors))
    scores = dict(queue.remaining())
    return {method: scores[number] for number, method in enumerate(BASELINE_METHODS)}


def _budget(
    config: SearchRoot,
    prepared: PreparedSearch,
    evolution: Evolution,
    workers: Workers,
    num_forwards: int,
    num_known: int,
    seconds: float,
) -> SearchBudget:
    """What the search has cost, and what it would cost elsewhere."""
    processes = workers.processes.dims.world_size if workers.processes else 1
    flops = prepared.cost.flops(prepared.sample_len) * (num_forwards - num_known)
    return SearchBudget(
        num_candidates=evolution.num_candidates,
        num_terminated=evolution.num_terminated,
        num_forwards=num_forwards,
        num_forwards_saved=evolution.num_candidates * prepared.losses.num_samples - evolution.num_losses,
        forward_tokens=num_forwards * prepared.sample_len,
        seconds=round(seconds, 1),
        device_hours=round(processes * seconds / SECONDS_PER_HOUR, 4),
        sustained_tflops=flops / seconds / processes / 1e12 if flops else None,
        projected_hours=projected_hours(prepared.cost, prepared.sample_len, num_forwards, config.search),
    )


def _run_with_progress(config: SearchRoot, evolution: Evolution, evaluator: Evaluator, folder: Path) -> None:
    """Run the search to its end, showing the best candidate and logging metrics round by round."""
    search, name = config.search, value_name(config.search.objective)
    columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    num_logged = sum("iteration" in record for record in read_metrics(folder))  # a resume logs no round twice
    tracking = MetricsLog(folder, config.tracking, config.run.name, "search", to_plain(config))
    with tracking, Progress(*columns) as progress:
        bar = progress.add_task("", total=most_candidates(search))
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
    budget: SearchBudget,
) -> None:
    """Factors, history, and the manifest that marks the search as finished."""
    samples_hash = samples_sha256(prepared.losses.samples)
    factors = best_factors(
        evolution,
        evaluator,
        prepared.space,
        config.search,
        long_factors=prepared.long_factors,
        model=config.model.name,
        samples_sha256=samples_hash,
    )
    history = search_history(
        evolution, evaluator, prepared.space, config.search, baselines=baselines, guidance=prepared.guidance,
        sample_len=prepared.sample_len, budget=budget,
    )  # fmt: skip
    write_text(folder / FACTORS_FILE, factors.to_json())
    write_text(folder / HISTORY_FILE, json.dumps(history, indent=2) + "\n")
    files = [FACTORS_FILE, HISTORY_FILE, *(NEEDLES_FILES if prepared.needles is not None else ())]
    write_manifest(folder, Manifest(
        "factors",
        inputs={**prepared.inputs, "samples": {"sha256": samples_hash}},
        config=to_plain(config),
        seeds={"seed": config.seed},
        counts=asdict(budget),
        files={name: sha256_of_file(folder / name) for name in files},
    ))  # fmt: skip
