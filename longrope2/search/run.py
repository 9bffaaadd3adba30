"""Run a prepared search and write its product, last of it the manifest."""

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn

from longrope2.config import to_plain
from longrope2.files.artifacts import Manifest, sha256_of_file, write_manifest, write_text
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import ten_period_index, theoretical_critical_index
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.search.config import Algorithm, Objective, Pruning, SearchRoot, most_candidates
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution
from longrope2.search.journal import Journal
from longrope2.search.objective import NeedleGuidance, check_factors_matter, samples_sha256
from longrope2.search.prepare import NEEDLES_FILE, SECONDS_PER_HOUR, PreparedSearch, projected_hours
from longrope2.search.space import SearchSpace
from longrope2.search.workers import Score, Workers
from longrope2.tracking.metrics import MetricsLog, progress_line, read_metrics

_BASELINE_METHODS = (RopeMethod.none, RopeMethod.pi, RopeMethod.ntk, RopeMethod.yarn)
HISTORY_FILE = "history.json"
# The samples, and for readers the record of what they are made of.
_NEEDLES_FILES = (NEEDLES_FILE, "needles.json")


@dataclass(frozen=True)
class SearchBudget:
    """What a finished search has cost: counted, measured, and projected to other hardware.

    Attributes:
        num_candidates: Distinct candidates evaluated.
        num_terminated: Those of them stopped early.
        num_forwards: Forward passes of one sample in all the journals, closed forms included.
        num_forwards_saved: Those that early termination saved.
        forward_tokens: ``num_forwards`` times the tokens of a sample.
        seconds: Wall time of this run of the command, not of those that it resumed.
        device_hours: The same times the number of processes.
        sustained_tflops: TFLOP/s of one process in this run; None when all was known already.
        projected_hours: The forward passes on the hardware that ``search.projected_*`` describe.
    """

    num_candidates: int
    num_terminated: int
    num_forwards: int
    num_forwards_saved: int
    forward_tokens: int
    seconds: float
    device_hours: float
    sustained_tflops: float | None
    projected_hours: float


def run_search(prepared: PreparedSearch, folder: Path, workers: Workers) -> None:
    """Search, or go on with a killed search, and write the product; every process calls it.

    Raises:
        ArtifactError: a journal is damaged, in use, or of another search; or self-test (b) failed.
        FactorsError: no candidate gave a finite loss.
    """
    started, config = time.monotonic(), prepared.config
    if workers.is_main and prepared.needles is not None:
        prepared.needles.save(folder / NEEDLES_FILE)
    header = _journal_header(prepared)
    with Journal(folder, header, workers.worker, writes=workers.is_leader) as journal:
        num_known = journal.num_losses
        workers.wait_for_all("journals are read")  # from here on they grow
        losses, is_pruning = prepared.losses, config.search.pruning is not Pruning.none
        num_scored = losses.num_scored_tokens
        evaluator = Evaluator(losses, journal, num_scored_tokens=num_scored, is_pruning=is_pruning)
        scores = _baseline_scores(prepared.space, evaluator, workers)
        check_factors_matter(scores[RopeMethod.none], scores[RopeMethod.pi])
        given = (prepared.space, config.search, evaluator)
        evolution = Evolution(*given, seed=config.seed, workers=workers)
        if workers.is_main:
            _run_with_progress(config, evolution, folder)
        else:
            deque(evolution.steps(), maxlen=0)
    workers.wait_for_all("journals are written")
    if workers.is_main:
        num_forwards = Journal(folder, header, writes=False).num_losses
        budget = _budget(
            prepared,
            evolution,
            num_forwards=num_forwards,
            num_new=num_forwards - num_known,
            seconds=time.monotonic() - started,
            processes=workers.processes.dims.world_size if workers.processes else 1,
        )
        baselines = {m.value: evaluator.value(score.loss_sum) for m, score in scores.items()}
        _write_product(prepared, evolution, folder, baselines=baselines, budget=budget)
    workers.wait_for_all("the product is written")


def _journal_header(prepared: PreparedSearch) -> dict[str, Any]:
    """All that a loss depends on besides the factors."""
    config = prepared.config
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


def _baseline_scores(
    space: SearchSpace, evaluator: Evaluator, workers: Workers
) -> dict[RopeMethod, Score]:
    """Scores of the closed-form methods on the same samples."""
    queue = workers.queue("baselines", len(_BASELINE_METHODS))
    while (task := queue.claim()) is not None:
        factors = closed_form_factors(_BASELINE_METHODS[task], space.geometry, space.target_len)
        queue.publish(task, evaluator.evaluate(factors))
    scores = dict(queue.remaining())
    return {method: scores[number] for number, method in enumerate(_BASELINE_METHODS)}


def _run_with_progress(config: SearchRoot, evolution: Evolution, folder: Path) -> None:
    """Run the search to its end, showing the best candidate and logging metrics round by round."""
    name = _value_name(config.search.objective)
    # A resume logs no round twice.
    num_logged = sum("iteration" in record for record in read_metrics(folder))
    tracking = MetricsLog(
        folder,
        tracking=config.tracking,
        run_name=config.run.name,
        stage="search",
        config=to_plain(config),
    )
    with tracking, progress_line("search", MofNCompleteColumn()) as progress:
        bar = progress.add_task("", total=most_candidates(config.search))
        for _ in evolution.steps():
            text = "no value yet"
            if evolution.kept:
                value = evolution.evaluator.value(evolution.best.loss_sum)
                text = f"{name} {value:.4g} at c={evolution.best.candidate.critical_index}"
            progress.update(bar, advance=1, description=text)
            num_logged = _log_rounds(tracking, evolution, name, num_logged)
        _log_rounds(tracking, evolution, name, num_logged)
        progress.update(bar, total=evolution.num_candidates)


def _log_rounds(tracking: MetricsLog, evolution: Evolution, name: str, num_logged: int) -> int:
    """Log the rounds finished since the last call; returns how many are logged now."""
    for finished in evolution.rounds[num_logged:]:
        values = {f"search/best_{name}": finished.best_value}
        values["search/critical_index"] = finished.best_critical_index
        values["search/evaluations"] = finished.num_candidates
        tracking.log(values, iteration=finished.iteration)
    return max(num_logged, len(evolution.rounds))


def _budget(
    prepared: PreparedSearch,
    evolution: Evolution,
    *,
    num_forwards: int,
    num_new: int,
    seconds: float,
    processes: int,
) -> SearchBudget:
    """What the search has cost, with ``num_new`` of its forward passes in this run."""
    shape, sample_len = prepared.shape, prepared.sample_len
    flops = shape.forward_flops(sample_len) * num_new
    most_forwards = evolution.num_candidates * prepared.losses.num_samples
    return SearchBudget(
        num_candidates=evolution.num_candidates,
        num_terminated=evolution.num_terminated,
        num_forwards=num_forwards,
        num_forwards_saved=most_forwards - evolution.num_losses,
        forward_tokens=num_forwards * sample_len,
        seconds=round(seconds, 1),
        device_hours=round(processes * seconds / SECONDS_PER_HOUR, 4),
        sustained_tflops=flops / seconds / processes / 1e12 if flops else None,
        projected_hours=projected_hours(shape, sample_len, num_forwards, prepared.config.search),
    )


def _value_name(objective: Objective) -> str:
    return "needle_ppl" if objective is Objective.needle else "ppl"


def best_factors(
    evolution: Evolution, *, long_factors: RescaleFactors | None = None, **provenance: str
) -> RescaleFactors:
    """The rescale factors of the best candidate, with what they were chosen by.

    With ``long_factors``, the long window's, the candidate gives those of the short window.
    """
    best, config = evolution.best, evolution.config
    critical = "searched" if config.critical is None else "fixed"
    found = evolution.space.to_factors(
        best.candidate,
        method=config.algorithm.value,
        objective=config.objective.value,
        dims=config.dims.value,
        critical="none" if config.algorithm is Algorithm.longrope else critical,
        **{_value_name(config.objective): repr(evolution.evaluator.value(best.loss_sum))},
        **provenance,
    )
    if long_factors is None:
        return found
    short = {f"short_{key}": value for key, value in found.provenance.items()}
    both = {**long_factors.provenance, **short}
    return replace(long_factors, short_factors=found.factors, provenance=both)


def search_history(
    evolution: Evolution,
    *,
    baselines: Mapping[str, float],
    guidance: NeedleGuidance | None,
    sample_len: int,
    budget: SearchBudget,
) -> dict[str, Any]:
    """Everything a report needs, as plain JSON values.

    All but ``budget`` and the costs in ``rounds`` is the same however often the search was
    interrupted and for any number of workers. ``baselines`` are values of the closed forms on the
    same samples, ``rounds`` of ``Round``, ``kept`` the best candidates; ``*_ppl_at_original`` come
    from self-test (c), null without one.
    """
    space, config, value = evolution.space, evolution.config, evolution.evaluator.value
    kept = [
        {
            "value": value(ranked.loss_sum),
            "critical_index": ranked.candidate.critical_index if space.is_bounded else None,
            "factors": list(space.to_factors(ranked.candidate).factors),
        }
        for ranked in evolution.kept
    ]
    return {
        "algorithm": config.algorithm.value,
        "objective": config.objective.value,
        "value_name": _value_name(config.objective),
        "best_value": kept[0]["value"],
        "critical_index": kept[0]["critical_index"],
        "theoretical_critical_index": theoretical_critical_index(space.geometry),
        "ten_period_index": ten_period_index(space.geometry),
        "original_len": space.geometry.original_len,
        "target_len": space.target_len,
        "sample_len": sample_len,
        "budget": asdict(budget),
        "baselines": dict(baselines),
        "needle_ppl_at_original": guidance.needle_ppl if guidance else None,
        "control_ppl_at_original": guidance.control_ppl if guidance else None,
        "rounds": [asdict(finished) for finished in evolution.rounds],
        "kept": kept,
    }


def _write_product(
    prepared: PreparedSearch,
    evolution: Evolution,
    folder: Path,
    *,
    baselines: dict[str, float],
    budget: SearchBudget,
) -> None:
    """Factors, history, and the manifest that marks the search as finished."""
    config = prepared.config
    samples_hash = samples_sha256(prepared.losses.samples)
    origin = {"model": config.model.name, "samples_sha256": samples_hash}
    factors = best_factors(evolution, long_factors=prepared.long_factors, **origin)
    history = search_history(
        evolution,
        baselines=baselines,
        guidance=prepared.guidance,
        sample_len=prepared.sample_len,
        budget=budget,
    )
    write_text(folder / FACTORS_FILE, factors.to_json())
    write_text(folder / HISTORY_FILE, json.dumps(history, indent=2) + "\n")
    files = [FACTORS_FILE, HISTORY_FILE, *(_NEEDLES_FILES if prepared.needles is not None else ())]
    manifest = Manifest(
        "factors",
        inputs={**prepared.inputs, "samples": {"sha256": samples_hash}},
        config=to_plain(config),
        seeds={"seed": config.seed},
        counts=asdict(budget),
        files={name: sha256_of_file(folder / name) for name in files},
    )
    write_manifest(folder, manifest)
