"""Run a prepared search, compare what it found, and write its product, last of it the manifest."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import MofNCompleteColumn

from longrope2.config import to_plain
from longrope2.files.artifacts import Manifest, sha256_of_file, write_manifest, write_text
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.folder import given_folder, model_source
from longrope2.rope.factors import VERDICT, RescaleFactors
from longrope2.rope.frequencies import ten_period_index, theoretical_critical_index
from longrope2.search import journal as journals
from longrope2.search.config import Algorithm, Objective, Pruning, most_candidates
from longrope2.search.confirm import Confirmation, Confirming, as_plain, contestants
from longrope2.search.evaluator import Evaluator
from longrope2.search.evolution import Evolution, critical_index_shares
from longrope2.search.halving import Halving
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses, samples_sha256
from longrope2.search.prepare import (
    SECONDS_PER_HOUR,
    PreparedSearch,
    projected_hours,
    sample_lengths,
)
from longrope2.search.selftests import check_ranking
from longrope2.search.workers import Workers
from longrope2.tracking.metrics import MetricsLog, progress_line, read_metrics

HISTORY_FILE = "history.json"
_RESAMPLES = 2000


@dataclass(frozen=True)
class SearchBudget:
    """What a finished search has cost: counted, measured, and projected to other hardware.

    Attributes:
        num_candidates: Distinct candidates evaluated.
        num_terminated: Those of them that did not see every sample.
        num_forwards: Forward passes of one sample in all the journals.
        num_forwards_saved: Those that early termination saved.
        forward_tokens: Tokens of those forward passes.
        confirm_tokens: Tokens of the comparison on fresh samples, which come on top.
        seconds: Wall time of this run of the command, not of those that it resumed.
        device_hours: The same times the number of processes.
        sustained_tflops: TFLOP/s of one process in this run; None when all was known already.
        projected_hours: All the forward passes on the GPUs that ``search.projected_*`` describe;
            None without any, given or here.
    """

    num_candidates: int
    num_terminated: int
    num_forwards: int
    num_forwards_saved: int
    forward_tokens: int
    confirm_tokens: int
    seconds: float
    device_hours: float
    sustained_tflops: float | None
    projected_hours: float | None


@dataclass(frozen=True)
class Found:
    """One of the best factors of a search, with the value of its objective."""

    factors: RescaleFactors
    value: float


def run_search(prepared: PreparedSearch, folder: Path, workers: Workers) -> None:
    """Search, or go on with a killed search, and write the product; every process calls it.

    Raises:
        ArtifactError: a journal is damaged, in use, or of another search.
        DataError: the objective cannot rank the candidates (self-test (d)).
        FactorsError: no candidate gave a finite loss.
    """
    started = time.monotonic()
    if workers.is_main:
        for name, needles in prepared.needles.items():
            needles.save(folder / name)
    header = _journal_header(prepared, prepared.losses)
    with Journal(folder, header, workers.worker, writes=workers.is_leader) as journal:
        known = journal.num_losses_by_batch.copy()
        workers.wait_for_all("journals are read")  # from here on they grow
        search = _built(prepared, journal, workers)
        if workers.is_main:
            _run_with_progress(prepared, search, folder)
        else:
            for _ in _tested_steps(prepared, search):
                pass
    found = _found(search)
    workers.wait_for_all("journals are written")
    confirmation = None
    if prepared.fresh is not None:
        confirmation = _confirm(prepared, prepared.fresh, found, folder, workers)
    if workers.is_main:
        counts = Journal(folder, header, writes=False).num_losses_by_batch
        budget = _budget(
            prepared,
            search,
            confirmation,
            counts=counts,
            num_new=counts - known,
            seconds=time.monotonic() - started,
            processes=workers.processes.dims.world_size if workers.processes else 1,
        )
        _write_product(
            prepared, search, folder, found=found, confirmation=confirmation, budget=budget
        )
    workers.wait_for_all("the product is written")


def _built(prepared: PreparedSearch, journal: Journal, workers: Workers) -> Evolution | Halving:
    config, losses = prepared.config, prepared.losses
    if config.search.algorithm is Algorithm.halving:
        return Halving(
            prepared.space.geometry,
            prepared.space.target_len,
            config.search,
            losses=losses,
            journal=journal,
            seed=config.seed,
            workers=workers,
        )
    is_pruning, num_scored = config.search.pruning is not Pruning.none, losses.num_scored_tokens
    evaluator = Evaluator(losses, journal, num_scored_tokens=num_scored, is_pruning=is_pruning)
    given = (prepared.space, config.search, evaluator)
    return Evolution(*given, seed=config.seed, workers=workers)


def _tested_steps(prepared: PreparedSearch, search: Evolution | Halving) -> Iterator[object]:
    """The search's steps; self-test (d) once the first round is over."""
    waiting, config = prepared.control, prepared.config.search
    for step in chain(search.steps(), [None]):
        if waiting is not None and search.best_start is not None:
            check_ranking(search.best_start, waiting, config)
            waiting = None
        if step is not None:
            yield step


def _found(search: Evolution | Halving) -> list[Found]:
    """The best factors of a search, best first.

    Raises:
        FactorsError: no candidate gave a finite loss.
    """
    if isinstance(search, Halving):
        return [Found(search.factors(shape), search.value(shape)) for shape in search.kept]
    _ = search.best
    method, value = search.config.algorithm.value, search.evaluator.value
    return [
        Found(search.space.to_factors(ranked.candidate, method=method), value(ranked.loss_sum))
        for ranked in search.kept
    ]


def _confirm(
    prepared: PreparedSearch,
    fresh: SampleLosses,
    found: list[Found],
    folder: Path,
    workers: Workers,
) -> Confirmation:
    """Compare on fresh samples, with journals of its own."""
    header, space = _journal_header(prepared, fresh), prepared.space
    entrants = contestants([f.factors for f in found], space.geometry, space.target_len)
    opened = Journal(folder, header, workers.worker, workers.is_leader, name=journals.FRESH)
    with opened as journal:
        workers.wait_for_all("journals of fresh samples are read")
        return Confirming(fresh, journal, workers, entrants).run()


def _journal_header(prepared: PreparedSearch, losses: SampleLosses) -> dict[str, Any]:
    """All that a loss depends on besides the factors."""
    config = prepared.config
    return {
        **prepared.inputs["model"],
        "samples_sha256": samples_sha256(losses.samples),
        "objective": config.search.objective.value,
        "highest_loss": losses.highest_loss if math.isfinite(losses.highest_loss) else None,
        "batch_size": losses.batch_size,
        "sequence": config.parallel.sequence,
        **({"context": config.parallel.context} if config.parallel.context > 1 else {}),
        "rotary_dim": prepared.space.geometry.rotary_dim,
        "rope_base": prepared.space.geometry.rope_base,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def _run_with_progress(prepared: PreparedSearch, search: Evolution | Halving, folder: Path) -> None:
    """Run the search to its end, showing the best candidate and logging metrics round by round."""
    config, name = prepared.config, _value_name(prepared.config.search.objective)
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
        for _ in _tested_steps(prepared, search):
            text = f"{name} {search.rounds[-1].best_value:.4g}" if search.rounds else "first round"
            progress.update(bar, completed=search.num_candidates, description=text)
            num_logged = _log_rounds(tracking, search, name, num_logged)
        _log_rounds(tracking, search, name, num_logged)
        progress.update(bar, total=search.num_candidates)


def _log_rounds(
    tracking: MetricsLog, search: Evolution | Halving, name: str, num_logged: int
) -> int:
    """Log the rounds finished since the last call; returns how many are logged now."""
    for finished in search.rounds[num_logged:]:
        values: dict[str, float] = {f"search/best_{name}": finished.best_value}
        if finished.best_critical_index is not None:
            values["search/critical_index"] = finished.best_critical_index
        values["search/evaluations"] = finished.num_candidates
        tracking.log(values, iteration=finished.iteration)
    return max(num_logged, len(search.rounds))


def _budget(
    prepared: PreparedSearch,
    search: Evolution | Halving,
    confirmation: Confirmation | None,
    *,
    counts: Counter[int],
    num_new: Counter[int],
    seconds: float,
    processes: int,
) -> SearchBudget:
    """What the search has cost, with ``num_new`` of its losses (by batch) in this run."""
    shape, losses = prepared.shape, prepared.losses
    is_halving, lengths = isinstance(search, Halving), sample_lengths(prepared.config)

    def by_length(losses_of_batch: Counter[int]) -> dict[int, int]:
        forwards: Counter[int] = Counter()
        for batch, count in losses_of_batch.items():
            first = batch if is_halving else losses.batches[batch].start
            # The last token of a needle sample, its EOS, is never read.
            num_tokens = len(losses.samples[first].tokens)
            forwards[next(length for length in lengths if length >= num_tokens)] += count
        return dict(forwards)

    forwards, new = by_length(counts), by_length(num_new)
    flops = sum(shape.forward_flops(length) * count for length, count in new.items())
    fresh = confirmation.num_losses if confirmation else 0
    every = {k: forwards.get(k, 0) + fresh * (k == prepared.sample_len) for k in forwards}
    return SearchBudget(
        num_candidates=search.num_candidates,
        num_terminated=search.num_terminated,
        num_forwards=counts.total(),
        num_forwards_saved=search.num_candidates * losses.num_samples - search.num_losses,
        forward_tokens=sum(length * count for length, count in forwards.items()),
        confirm_tokens=fresh * prepared.sample_len,
        seconds=round(seconds, 1),
        device_hours=round(processes * seconds / SECONDS_PER_HOUR, 4),
        sustained_tflops=flops / seconds / processes / 1e12 if flops else None,
        projected_hours=projected_hours(prepared.config, shape, every),
    )


def _value_name(objective: Objective) -> str:
    return "needle_ppl" if objective is Objective.needle else "ppl"


def chosen_factors(
    prepared: PreparedSearch,
    found: list[Found],
    confirmation: Confirmation | None,
    shares: dict[int, float] | None,
) -> RescaleFactors:
    """The rescale factors that are written, with what they were chosen by.

    Those that did best on the fresh samples; without a comparison, on the search's own. With the
    long window's factors given, they are those of the short window.
    """
    best, search = found[0], prepared.config.search
    if confirmation is not None:
        best = next(f for f in found if f.factors is confirmation.found.factors)
    critical = "searched" if search.critical is None else "fixed"
    has_critical = best.factors.critical_index is not None
    name = _value_name(search.objective)
    provenance = {
        "objective": search.objective.value,
        **({"dims": search.dims.value} if search.algorithm is Algorithm.longrope2 else {}),
        "critical": critical if has_critical else "none",
        **({"critical_shares": shares_in_words(shares)} if shares else {}),
        name: repr(best.value),
        "model": prepared.config.model.name,
        "samples_sha256": samples_sha256(prepared.losses.samples),
        VERDICT: "not compared on fresh samples",
    }
    if confirmation is not None:
        way_out = "" if confirmation.is_confirmed else f"; {confirmation.advice()}"
        provenance[VERDICT] = f"{confirmation.verdict()}{way_out}"
        shown = next(s for s in confirmation.standings if s.contestant is confirmation.found)
        provenance[f"fresh_{name}"] = repr(math.exp(min(shown.loss, 700.0)))
    chosen = replace(best.factors, provenance=provenance)
    if prepared.long_factors is None:
        return chosen
    short = {f"short_{key}": value for key, value in provenance.items()}
    both = {**prepared.long_factors.provenance, **short}
    return replace(prepared.long_factors, short_factors=chosen.factors, provenance=both)


def shares_in_words(shares: Mapping[Any, float]) -> str:
    """``33 (71 %), 32 (29 %)``: critical indices by how often they are best in resamplings."""
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{index} ({share:.0%})".replace("%", " %") for index, share in ranked)


def critical_shares(search: Evolution | Halving, seed: int) -> dict[int, float] | None:
    """How often each critical index is best in resamplings of the search's samples.

    None where no critical index was searched.
    """
    if isinstance(search, Halving) or len(search.space.critical_indices) < 2:
        return None
    if not search.space.is_bounded:
        return None
    candidates = list(search.completed)
    losses = [[loss for _, loss in sorted(search.completed[c].items())] for c in candidates]
    indices = [candidate.critical_index for candidate in candidates]
    return critical_index_shares(losses, indices, _RESAMPLES, seed)


def search_history(
    prepared: PreparedSearch,
    search: Evolution | Halving,
    found: list[Found],
    *,
    confirmation: Confirmation | None,
    budget: SearchBudget,
) -> dict[str, Any]:
    """Everything a report needs, as plain JSON values.

    All but ``budget`` and the costs in ``rounds`` is the same however often the search was
    interrupted and for any number of workers. ``fresh`` is the comparison on fresh samples, null
    without one; ``rounds`` are the search's, ``kept`` its best candidates by its own samples;
    ``*_ppl_at_original`` come from self-test (c), null without one.
    """
    geometry, guidance, config = prepared.space.geometry, prepared.guidance, prepared.config.search
    kept = [
        {
            "value": each.value,
            "critical_index": each.factors.critical_index,
            "factors": list(each.factors.factors),
            "attention_scale": each.factors.long_attention_scale,
        }
        for each in found
    ]
    return {
        "algorithm": config.algorithm.value,
        "objective": config.objective.value,
        "value_name": _value_name(config.objective),
        "best_value": kept[0]["value"],
        "critical_index": kept[0]["critical_index"],
        "critical_index_shares": critical_shares(search, prepared.config.seed),
        "theoretical_critical_index": theoretical_critical_index(geometry),
        "ten_period_index": ten_period_index(geometry),
        "original_len": geometry.original_len,
        "target_len": prepared.space.target_len,
        "sample_len": prepared.sample_len,
        "text": str(prepared.text),
        "budget": asdict(budget),
        "fresh": as_plain(confirmation) if confirmation else None,
        "needle_ppl_at_original": guidance.needle_ppl if guidance else None,
        "control_ppl_at_original": guidance.control_ppl if guidance else None,
        "guess_ppl": prepared.control.guess_ppl if prepared.control else None,
        "rounds": [asdict(finished) for finished in search.rounds],
        "kept": kept,
    }


def _write_product(
    prepared: PreparedSearch,
    search: Evolution | Halving,
    folder: Path,
    *,
    found: list[Found],
    confirmation: Confirmation | None,
    budget: SearchBudget,
) -> None:
    """Factors, history, and the manifest that marks the search as finished."""
    config = prepared.config
    shares = critical_shares(search, config.seed)
    factors = chosen_factors(prepared, found, confirmation, shares)
    history = search_history(prepared, search, found, confirmation=confirmation, budget=budget)
    write_text(folder / FACTORS_FILE, factors.to_json())
    write_text(folder / HISTORY_FILE, json.dumps(history, indent=2) + "\n")
    files = [FACTORS_FILE, HISTORY_FILE]
    for name in prepared.needles:
        # The samples, and for readers the record of what they are made of.
        files += [name, str(Path(name).with_suffix(".json"))]
    manifest = Manifest(
        "factors",
        inputs={**prepared.inputs, "samples": {"sha256": samples_sha256(prepared.losses.samples)}},
        config=to_plain(config),
        seeds={"seed": config.seed},
        counts=asdict(budget),
        files={name: sha256_of_file(folder / name) for name in files},
        details={
            "text": asdict(prepared.text),
            "text_hashes": prepared.text_hashes,
            **model_source(config.model, given_folder(config.model, config.target_len)),
        },
    )
    write_manifest(folder, manifest)
