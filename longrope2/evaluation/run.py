"""The run of ``launch.evaluate``: measure without generating, ask, score, sum up.

Every finished measurement is a line of ``results.jsonl`` and every answer a line of ``answers/``,
so a run that was killed goes on where it was. The base model is asked first, because extended
models are evaluated only after its calibration.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich import progress
from rich.console import Console

from longrope2.claim import claim_folder
from longrope2.config import to_plain
from longrope2.corpora.build import build_corpus, heldout_documents
from longrope2.corpora.corpus import Document, text_hashes
from longrope2.corpora.held_out import Overlap, find_overlap
from longrope2.corpora.needle_wording import choose_wording
from longrope2.corpora.needles import build_needle_set
from longrope2.corpora.run_corpus import HeldoutText, corpus_label, heldout_text, segments_of
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ConfigError, DataError
from longrope2.evaluation import answering, scoring, summary
from longrope2.evaluation.config import EvaluateRoot, evaluated_lengths, suite_lengths
from longrope2.evaluation.long_tasks.tasks import long_tasks
from longrope2.evaluation.needle_map import needle_map_tasks
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.protocol import basis_of, protocols
from longrope2.evaluation.results import RESULTS_FILE, AnswersLog, Measurement, ResultsLog, Shard
from longrope2.evaluation.ruler.tasks import ruler_tasks
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.schema import Cell, EvaluationSummary, SuiteSummary, write_summary
from longrope2.evaluation.short_tasks import measure_short_tasks, short_task_cell
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.files import artifacts
from longrope2.files.guide import write_guide
from longrope2.model.folder import model_identity, model_source
from longrope2.model.loading import device_and_dtype, load_tokenizer
from longrope2.parallel.processes import world_size_from_environment
from longrope2.segments.needle_set import NeedleSet
from longrope2.tracking.metrics import MetricsLog

_ANSWERS_FOLDER = "answers"
_SHORT_TASKS_FILE, _TASK_FILES_FOLDER = "short_tasks.jsonl", "short_task_files"
# Results are told apart by what they were measured on, so these may change from run to run.
_CHANGEABLE = "dry_run tracking evaluation corpus seed suite calibration checkpoint".split()


def check_seed(config: EvaluateRoot) -> None:
    """Refuse to evaluate on the keys and values that the run's factors were fitted to.

    Raises:
        ConfigError: the needle seed is the search's.
    """
    seed, folder = (
        config.evaluation.needle.seed,
        artifacts.product_folder(config.run.folder_with("factors"), "factors"),
    )
    is_there = (folder / artifacts.MANIFEST_NAME).is_file()
    if is_there and artifacts.read_manifest(folder, "factors").seeds.get("seed") == seed:
        fault = f"evaluation.needle.seed={seed} is the seed of the needles that the factors in "
        raise ConfigError([f"{fault}{folder} were searched on; give another one"])


def own_shard(config: EvaluateRoot) -> Shard:
    """The part of the requests that this process answers."""
    shard = Shard.parse(config.evaluation.shard)
    world_size = world_size_from_environment()
    return shard if world_size is None else shard.within(int(os.environ["RANK"]), world_size)


def describe(config: EvaluateRoot, subjects: Sequence[Subject], base_folder: Path) -> str:
    """The plan in a few lines.

    Raises:
        UserError: as ``protocols``.
    """
    model, evaluation, suite = config.model, config.evaluation, config.suite
    needle, lengths = evaluation.needle, ", ".join(map(str, suite_lengths(config)))
    lines = [f"model      {model.name}, window {model.original_len} -> {config.target_len}"]
    if suite.measures:
        num_samples = len(needle.depths) * needle.samples_per_depth
        depths = ", ".join(map(str, needle.depths))
        num_windows, num_short = evaluation.perplexity.num_windows, evaluation.retention.num_windows
        windows = f"{num_windows} windows per length, {num_short} short ones"
        wording = choose_wording(needle.wording, model.original_len).value
        where = f"depths {depths}, {wording} wording, in {needle.haystack.value}"
        if needle.needles_per_haystack > 1:
            where += f", {needle.needles_per_haystack} a haystack"
        lines += [
            f"lengths    {', '.join(map(str, evaluated_lengths(config)))}",
            f"needles    {num_samples} samples per length at {where}",
            f"text       {windows}",
        ]
    if config.reads_text:
        source = "that of the segments, which are not packed yet"
        if config.corpus is not None:
            source = corpus_label(config.corpus)
        lines.append(f"corpus     held out of {source}")
    if suite.ruler is not None:
        tasks = f"{len(suite.ruler.tasks)} tasks x {suite.ruler.num_samples} samples"
        lines.append(f"ruler      {tasks}, {suite.ruler.mode.value}, at {lengths}")
    if suite.needle_map is not None:
        depths = f"{len(suite.needle_map.depths)} depths x {suite.needle_map.repeats}"
        lines.append(f"needle map {depths}, {suite.needle_map.haystack.value}, at {lengths}")
    if suite.long_task_names:
        lines.append(f"long tasks {', '.join(suite.long_task_names)}")
    if suite.short_tasks.tasks:
        lines.append(f"short      {', '.join(task.name for task in suite.short_tasks.tasks)}")
    for subject in config.evaluation.subjects:
        is_what = "not there yet"
        if (found := next((s for s in subjects if s.name == subject.name), None)) is not None:
            is_what = f"{found.factors.method}{', trained' if found.trained else ''}"
        lines.append(f"subject    {subject.name}: {is_what}")
    asks = suite.generates or bool(suite.short_tasks.tasks)
    for protocol in protocols(config, load_tokenizer(base_folder)) if asks else ():
        lines.append(f"{protocol.part:<10} {basis_of(protocol)}")
    return "\n".join(lines)


def run_evaluation(
    config: EvaluateRoot, base_folder: Path, subjects: Sequence[Subject]
) -> tuple[bool, SuiteSummary | None]:
    """Measure and ask what is missing, and write the product.

    Returns:
        Whether the product is finished: not while other shards have requests left. And what the
        suite found, where one asks.

    Raises:
        UserError: data that cannot be used, or a base model that breaks its calibration (its
            scores are kept).
    """
    shard = own_shard(config)
    folder = artifacts.product_folder(config.run.folder, "evaluations")
    asks = config.suite.generates or bool(config.suite.short_tasks.tasks)
    texts = _Texts(config) if config.reads_text else None
    measures, needle_sets = [], []
    if config.suite.measures and shard.index == 0:
        assert texts is not None
        measures, needle_sets = _build_measures(config, base_folder, texts.documents)
    # Later shards leave the folder's configuration and the metrics to the first.
    own_folder = folder if shard.index == 0 else folder / f"shard_{shard.index + 1}"
    claim_folder(own_folder, config, changeable=_CHANGEABLE)
    write_guide(config.run.folder)
    for needle_set in needle_sets:
        needle_set.save(folder / "needles" / f"{needle_set.length}.arrow")
    models, plain = _own_models(), to_plain(config)
    measurements, suite = [], None
    with MetricsLog(
        own_folder,
        tracking=config.tracking,
        run_name=config.run.name,
        stage="evaluate",
        config=plain,
    ) as tracking:
        if measures:
            measurements = _measure(subjects, measures, models, folder=folder, tracking=tracking)
            reference, text = config.evaluation.reference, texts.text if texts else None
            found = summary.summarize(subjects, measurements, reference, text)
            write_summary(folder, found)
            Console().print(summary.comparison_table(found))
        if asks:
            tokenizer = load_tokenizer(base_folder)
            where = {"folder": folder, "shard": shard, "texts": texts}
            suite = _run_suite(config, subjects, tokenizer, models, **where)
            if suite is not None:
                tracking.log(summary.suite_metrics(suite))
    is_finished = suite is not None or bool(measures and not asks)
    if is_finished:
        counts = {"num_subjects": len(subjects), "num_measurements": len(measurements)}
        _write_manifest(folder, config, base_folder, subjects, counts=counts, texts=texts)
    return is_finished, suite


class _Texts:
    """The held-out text, read once, when something asks for it."""

    def __init__(self, config: EvaluateRoot) -> None:
        self._config = config

    @cached_property
    def documents(self) -> list[Document]:
        """All documents there are, or as many as ``corpus.heldout_characters`` allows.

        Says so where some of them are in the run's segments too.
        """
        documents = heldout_documents(self._config.text)
        if (overlap := self._overlap_of(documents)) is not None:
            print(f"warning: {overlap}", file=sys.stderr)
        return documents

    @property
    def packed_ids(self) -> list[str]:
        """Ids of the documents that are in the run's segments too."""
        overlap = self._overlap_of(self.documents)
        return [] if overlap is None else list(overlap.doc_ids)

    def _overlap_of(self, documents: Sequence[Document]) -> Overlap | None:
        return find_overlap(documents, segments_of(self._config.run.folder))

    @cached_property
    def description(self) -> dict[str, Any]:
        """For the manifest."""
        return build_corpus(self._config.text).describe()

    @property
    def text(self) -> HeldoutText:
        """Which text it is."""
        return heldout_text(self._config.text, self.description, self._config.run.folder)


def _own_models() -> SubjectModels:
    """Holder of the model on the GPU of this rank, where there is one."""
    device, dtype = device_and_dtype()
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return SubjectModels(device, dtype)


def _build_measures(
    config: EvaluateRoot, base_folder: Path, books: Sequence[Document]
) -> tuple[list[scoring.Measure], list[NeedleSet]]:
    """Measures on needles and text windows, and the needle samples themselves."""
    evaluation, original_len = config.evaluation, config.model.original_len
    tokenizer = load_tokenizer(base_folder)
    encoder = DocumentTokenizer(tokenizer, config.model.document_start)
    documents = encoder.encode_documents([book.text for book in books])
    lengths, fitting = evaluated_lengths(config), (original_len, evaluation.batch_tokens)
    needle, num_short = evaluation.needle, evaluation.retention.num_windows
    num_samples = len(needle.depths) * needle.samples_per_depth
    drawn: dict[str, Any] = {"depths": needle.depths, "seed": needle.seed}
    drawn |= {"haystack": needle.haystack, "needles_per_haystack": needle.needles_per_haystack}
    drawn["wording"] = choose_wording(needle.wording, original_len)
    start = config.model.document_start
    hide = partial(build_needle_set, tokenizer, books, document_start=start, **drawn)
    needle_sets = [hide(length=length, num_samples=num_samples) for length in lengths]
    num_windows, scored = evaluation.perplexity.num_windows, evaluation.perplexity.scored_tokens
    drawn = {"seed": config.seed, "num_start": len(encoder.start_ids)}
    asked = {"num_windows": num_windows, "num_scored": scored, **drawn}
    windows = scoring.context_windows(documents, lengths, **asked)
    short = scoring.short_windows(documents, original_len, num_windows=num_short, **drawn)
    measures: list[scoring.Measure] = []
    for needle_set in needle_sets:
        measures += scoring.needle_measures(needle_set, *fitting)
    for length in lengths:
        measures += scoring.perplexity_measures(windows[length], scored, *fitting)
    return [*measures, scoring.retention_measure(short, *fitting)], needle_sets


def _measure(
    subjects: Sequence[Subject],
    measures: Sequence[scoring.Measure],
    models: SubjectModels,
    folder: Path,
    tracking: MetricsLog,
) -> list[Measurement]:
    measurements, results = [], ResultsLog(folder / RESULTS_FILE)
    with _progress("evaluate", "{task.description}") as shown:
        bar = shown.add_task("", total=len(subjects) * len(measures))

        def parts() -> Iterator[Measurement]:
            for part in scoring.measure_all(subjects, measures, results, models):
                done = f"{part.subject} {part.suite} {part.length}"
                shown.update(bar, advance=1, description=done)
                yield part

        for measurement in scoring.joined(parts()):
            tracking.log(summary.metric_values(measurement))
            measurements.append(measurement)
    return measurements


def _progress(name: str, state: str) -> progress.Progress:
    text, times = (
        progress.TextColumn,
        (progress.TimeElapsedColumn(), progress.TimeRemainingColumn()),
    )
    counted = text(name), progress.BarColumn(), progress.MofNCompleteColumn(), text(state)
    return progress.Progress(*counted, *times)


def _run_suite(
    config: EvaluateRoot,
    subjects: Sequence[Subject],
    tokenizer: Any,
    models: SubjectModels,
    folder: Path,
    shard: Shard,
    texts: _Texts | None,
) -> SuiteSummary | None:
    """Answer this shard's requests; sum up once everything asked for is done or given up."""
    reference = config.evaluation.reference
    tasks = _tasks(config, tokenizer, texts) if config.suite.generates else []
    asked = {subject.name: _asked_of(config, subject, tasks) for subject in subjects}
    asks_short = bool(config.suite.short_tasks.tasks)
    # Short tasks are not split: the first shard asks them all.
    own_short = asks_short and shard.index == 0
    short_results = ResultsLog(folder / _SHORT_TASKS_FILE) if own_short else None
    options: dict[str, Any] = {"dtype": models.dtype, "stop_ids": {tokenizer.eos_token_id}}
    given_up: list[answering.NotMeasured] = []
    short_cells: list[Cell] = []
    with AnswersLog(folder / _ANSWERS_FOLDER, shard) as log:

        def cells_of(subject: Subject) -> list[Cell]:
            return summary.score_cells([subject], asked[subject.name], log, given_up, **options)

        for subject in sorted(subjects, key=lambda subject: subject.name != reference):
            requests = answering.plan_requests([subject], asked[subject.name], **options)
            own = answering.shard_requests(requests, shard)
            given_up += _answer(config, own, log, tokenizer=tokenizer, models=models)
            if short_results is not None:
                chosen, start = config.suite.short_tasks, config.model.document_start
                of = {"tokenizer": tokenizer, "models": models, "document_start": start}
                of["folder"] = folder / _TASK_FILES_FOLDER
                found = measure_short_tasks(chosen, [subject], short_results, **of)
                short_cells += map(short_task_cell, found)
            if subject.name == reference and shard.count == 1:
                _gate(config, cells_of(subject) + short_cells)
        log.reread()
        cells = [cell for subject in subjects for cell in cells_of(subject)]
    if shard.count > 1 and (lacking := _lacking(cells, given_up, asks_short and shard.index > 0)):
        way_on = "The same command without evaluation.shard sums up when they have ended"
        print(f"shard {shard.index + 1}/{shard.count} is done; {lacking} still missing. {way_on}")
        return None
    text = texts.text if texts else None
    asked_how = protocols(config, tokenizer)
    found = summary.summarize_suite(config, subjects, cells + short_cells, text, asked_how)
    write_summary(folder, found)
    return found


def _asked_of(
    config: EvaluateRoot, subject: Subject, tasks: Sequence[GenerationTask]
) -> list[GenerationTask]:
    """All tasks, or for the base model perhaps only those inside its window."""
    if subject.name != config.evaluation.reference or config.suite.base_beyond_window:
        return list(tasks)
    return [task for task in tasks if task.length <= config.model.original_len]


def _lacking(
    cells: Sequence[Cell], given_up: Sequence[answering.NotMeasured], short_elsewhere: bool
) -> str:
    """What other shards still owe; empty when it is nothing."""
    lost = {row.place for row in given_up}
    open_cells = (c for c in cells if (c.subject, c.suite, c.task, c.length) not in lost)
    num_missing = sum(cell.num_missing or 0 for cell in open_cells)
    if num_missing:
        return f"{num_missing} answers of other shards are"
    return "the short tasks, which shard 1 asks, may be" if short_elsewhere else ""


def _tasks(config: EvaluateRoot, tokenizer: Any, read: _Texts | None) -> list[GenerationTask]:
    """RULER, the needle map and the long tasks, with a line of progress while samples are made."""
    suite, lengths = config.suite, suite_lengths(config)
    texts = [document.text for document in read.documents] if read else []
    columns = map(progress.TextColumn, ("samples", "{task.description}"))
    with progress.Progress(*columns, progress.TimeElapsedColumn()) as shown:
        bar, made = shown.add_task("", total=None), 0

        def advance(name: str, count: int) -> None:
            nonlocal made
            made += count
            shown.update(bar, description=f"{made} made, {name}")

        folder, workers = Path(config.evaluation.sample_cache), config.evaluation.workers
        options: dict[str, Any] = {"cache_folder": folder, "workers": workers, "progress": advance}
        options["document_start"] = config.model.document_start
        tasks: list[GenerationTask] = []
        if suite.needle_map is not None:
            tasks += needle_map_tasks(suite.needle_map, tokenizer, texts, lengths, **options)
        if suite.ruler is not None:
            tasks += ruler_tasks(suite.ruler, tokenizer, texts, lengths, **options)
        encoder = PromptEncoder(tokenizer, config.model.document_start)
        return tasks + long_tasks(suite.long_tasks, encoder, config.target_len)


def _answer(
    config: EvaluateRoot,
    requests: Sequence[answering.Request],
    log: AnswersLog,
    tokenizer: Any,
    models: SubjectModels,
) -> list[answering.NotMeasured]:
    """Answer with a bar weighted by tokens; what was given up is printed and returned."""
    evaluation, given_up = config.evaluation, []
    options: dict[str, Any] = {
        "stop_ids": {tokenizer.eos_token_id},
        "batch_tokens": evaluation.batch_tokens,
        "generate": answering.make_decoder(evaluation.decode_rows, evaluation.prefill_chunk),
    }
    with _progress("answers", "tokens, {task.description}") as shown:
        bar = shown.add_task("", total=sum(request.num_tokens for request in requests))
        for done in answering.answer_requests(requests, log, tokenizer, models, **options):
            if isinstance(done, answering.NotMeasured):
                given_up.append(done)
                shown.console.print(str(done), markup=False)
                continue
            subject, suite, task, length = done.place
            description = f"{subject} {suite}/{task} {length}"
            shown.update(bar, advance=done.num_tokens, description=description)
    return given_up


def _gate(config: EvaluateRoot, cells: Sequence[Cell]) -> None:
    """Stop before extended models when the base model breaks a rule."""
    reference = config.evaluation.reference
    scored = [*cells, *summary.average_cells(cells)]
    limited = config.suite.limited
    rows = summary.calibration_rows(config.calibration, scored, reference, limited)
    if summary.passed(config.calibration, rows):
        return
    faults = []
    for row in rows:
        if row.state in ("broken", "not measured"):
            found = "not measured" if row.found is None else f"{row.found:.2f}"
            faults.append(f"{row.score} is {found}, expected {row.low:g} to {row.high:g}")
    raise DataError(
        f"calibration: the base model {reference} does not reproduce its known scores: "
        f"{'; '.join(faults)}. Its answers are kept; extended models are not evaluated. Find out "
        "what differs, or set calibration.required=false"
    )


def _write_manifest(
    folder: Path,
    config: EvaluateRoot,
    base: Path,
    subjects: Sequence[Subject],
    *,
    counts: dict[str, int],
    texts: _Texts | None,
) -> None:
    inputs: dict[str, Any] = {
        "model": model_identity(base),
        "subjects": {subject.name: subject.source for subject in subjects},
    }
    seeds = {"seed": config.seed, "needle": config.evaluation.needle.seed}
    facts = {"config": to_plain(config), "seeds": seeds, "counts": counts}
    summaries = [folder / kind.file_name for kind in (EvaluationSummary, SuiteSummary)]
    facts["details"] = model_source(config.model, base)
    facts["files"] = {p.name: artifacts.sha256_of_file(p) for p in summaries if p.is_file()}
    if texts is not None:
        inputs["corpus"] = {"name": config.text.name, **texts.description}
        facts["details"] |= {
            "text": asdict(texts.text),
            "text_hashes": text_hashes(texts.documents),
            "packed_ids": texts.packed_ids,
        }
    manifest = artifacts.Manifest("evaluations", inputs=inputs, **facts)
    artifacts.write_manifest(folder, manifest)
