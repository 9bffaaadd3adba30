"""The generation tasks of a suite, and who is asked which.

The part of ``launch.evaluate`` that measures without generating: needles, text by length,
short-window retention.

The part of ``launch.evaluate`` that asks questions: build the tasks, answer, score, write
``suite.json``.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from longrope2.corpora.build import heldout_documents
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.needles import build_needle_set
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError
from longrope2.evaluation.answering import (
    NotMeasured,
    Question,
    answer_questions,
    make_decoder,
    plan_questions,
    shard_questions,
)
from longrope2.evaluation.config import EvaluateRoot, SuiteConfig, evaluated_lengths, suite_lengths
from longrope2.evaluation.long_tasks.tasks import long_tasks
from longrope2.evaluation.needle_map import needle_map_tasks
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.results import RESULTS_FILE, AnswersLog, Measurement, ResultsLog, Shard
from longrope2.evaluation.ruler.tasks import ruler_tasks
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.scoring import (
    Task,
    context_windows,
    measure_all,
    needle_task,
    perplexity_task,
    retention_task,
    short_windows,
)
from longrope2.evaluation.short_tasks import measure_short_tasks, short_task_rows
from longrope2.evaluation.subjects import Subject
from longrope2.evaluation.summary import (
    SUITE_FILE,
    average_rows,
    calibration_rows,
    metric_values,
    passed,
    score_cells,
    suite_metrics,
    summarize_suite,
)
from longrope2.files.artifacts import write_text
from longrope2.model.loading import device_and_dtype, load_tokenizer, load_windowed_model
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.processes import world_size_from_environment
from longrope2.segments.needle_set import NeedleSet
from longrope2.tracking.metrics import MetricsLog

ANSWERS_FOLDER = "answers"
SHORT_TASKS_FILE = "short_tasks.jsonl"


def suite_tasks(
    suite: SuiteConfig,
    tokenizer: Any,
    haystacks: Sequence[str],
    lengths: Sequence[int],
    target_len: int,
    *,
    cache_folder: Path,
    workers: int = 0,
    progress: Callable[[str, int], None] | None = None,
) -> list[GenerationTask]:
    """RULER, the needle map and the long tasks of a suite.

    Args:
        suite: What is run.
        tokenizer: Of the base model, and so of all subjects.
        haystacks: Texts to hide needles in.
        lengths: Of RULER and the needle map, in tokens.
        target_len: L, the length of the long tasks.
        cache_folder: Where generated samples are kept.
        workers: Processes that generate samples; changes no sample.
        progress: Called with a task's name and a number of samples as they are made.

    Raises:
        UserError: settings, texts, data or prompts that cannot be used.
    """
    options: dict[str, Any] = {
        "cache_folder": cache_folder,
        "workers": workers,
        "progress": progress,
    }
    tasks: list[GenerationTask] = []
    if suite.needle_map is not None:
        tasks += needle_map_tasks(suite.needle_map, tokenizer, haystacks, lengths, **options)
    if suite.ruler is not None:
        tasks += ruler_tasks(suite.ruler, tokenizer, haystacks, lengths, **options)
    return tasks + long_tasks(suite.long_tasks, PromptEncoder(tokenizer), target_len)


def asked_of(
    subject: Subject, tasks: Sequence[GenerationTask], suite: SuiteConfig, reference: str
) -> list[GenerationTask]:
    """The tasks put to a subject: all, or for the base model perhaps only those inside its window."""
    if subject.name != reference or suite.base_beyond_window:
        return list(tasks)
    return [task for task in tasks if task.length <= subject.factors.geometry.original_len]


@dataclass
class EvaluateCommand(EvaluateRoot):
    """Configuration of the command: the evaluation and the corpus its held-out text comes from."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)


def build_tasks(config: EvaluateCommand, base_folder: Path) -> tuple[list[Task], list[NeedleSet]]:
    """Tasks on needles and text windows, the same for every subject, and the needle samples
    themselves.

    Raises:
        DataError: the held-out text is too little for what is asked.
    """
    evaluation, original_len = config.evaluation, config.model.original_len
    books, tokenizer = heldout_documents(config.corpus), load_tokenizer(base_folder)
    documents = DocumentTokenizer(tokenizer).encode_documents([book.text for book in books])
    lengths, batch_tokens = evaluated_lengths(config), evaluation.batch_tokens
    needle, text = evaluation.needle, evaluation.perplexity
    num_samples = len(needle.depths) * needle.samples_per_depth
    needle_sets = [
        build_needle_set(
            tokenizer,
            books,
            length=length,
            depths=needle.depths,
            num_samples=num_samples,
            seed=needle.seed,
        )
        for length in lengths
    ]
    windows = context_windows(
        documents,
        lengths,
        num_windows=text.num_windows,
        num_scored=text.scored_tokens,
        seed=config.seed,
    )
    short = short_windows(
        documents, original_len, num_windows=evaluation.retention.num_windows, seed=config.seed
    )
    tasks = [needle_task(needle_set, original_len, batch_tokens) for needle_set in needle_sets]
    tasks += [
        perplexity_task(windows[length], text.scored_tokens, original_len, batch_tokens)
        for length in lengths
    ]
    return [*tasks, retention_task(short, original_len, batch_tokens)], needle_sets


def measure(
    config: EvaluateCommand,
    subjects: list[Subject],
    tasks: list[Task],
    folder: Path,
    tracking: MetricsLog,
) -> list[Measurement]:
    """All measurements, with a progress bar weighted by tokens and with metrics as they come."""
    columns = (
        TextColumn("evaluate"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    measurements = []
    results = ResultsLog(folder / RESULTS_FILE)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(subjects) * len(tasks))
        for measurement in measure_all(subjects, tasks, results):
            tracking.log(metric_values(measurement))
            measurements.append(measurement)
            done = f"{measurement.subject} {measurement.suite} {measurement.length}"
            progress.update(bar, advance=1, description=done)
    return measurements


def own_shard(config: EvaluateCommand) -> Shard:
    """The part of the questions that this process answers."""
    shard = Shard.parse(config.evaluation.shard)
    world_size = world_size_from_environment()
    return shard if world_size is None else shard.within(int(os.environ["RANK"]), world_size)


def run_suite(
    config: EvaluateCommand,
    subjects: Sequence[Subject],
    tokenizer: Any,
    texts: Sequence[str],
    folder: Path,
    tracking: MetricsLog,
) -> dict[str, Any] | None:
    """Answer this shard's questions and, when no shard has any left, sum up.

    Returns:
        Content of ``suite.json``, once everything asked for is done or given up; else None.

    Raises:
        UserError: data that cannot be used, or a base model that breaks its calibration (its scores
            are kept).
    """
    device, dtype = device_and_dtype()
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    reference = config.evaluation.reference
    ordered = sorted(
        subjects, key=lambda subject: subject.name != reference
    )  # the base model first: the gate is on it
    tasks = _tasks(config, tokenizer, texts) if config.suite.generates else []
    options = {"dtype": dtype, "stop_ids": {tokenizer.eos_token_id}}
    shard, given_up = own_shard(config), []
    with AnswersLog(folder / ANSWERS_FOLDER, shard) as log:

        def cells_of(subject: Subject) -> list[dict[str, Any]]:
            return score_cells(
                [subject],
                asked_of(subject, tasks, config.suite, reference),
                log,
                given_up,
                **options,
            )

        short_rows: list[dict[str, Any]] = []
        for subject in ordered:
            questions = plan_questions(
                [subject], asked_of(subject, tasks, config.suite, reference), **options
            )
            given_up += _answer(
                config, shard_questions(questions, shard), log, tokenizer, device, options
            )
            if shard.index == 0:
                short_rows += _short(config, subject, folder, tokenizer, device, dtype)
            if subject.name == reference and shard.count == 1:
                _gate(config, cells_of(subject) + short_rows)
        log.reread()
        cells = [row for subject in subjects for row in cells_of(subject)]
    lost = {(row.suite, row.task, row.length) for row in given_up}
    missing = sum(
        cell["num_missing"]
        for cell in cells
        if cell["score"] is None and (cell["suite"], cell["task"], cell["length"]) not in lost
    )
    if shard.count > 1 and (missing > 0 or (config.suite.short_tasks.tasks and shard.index > 0)):
        lacking = (
            f"{missing} answers of other shards are"
            if missing
            else "the short tasks, which shard 1 asks, may be"
        )
        print(
            f"shard {shard.index + 1}/{shard.count} is done; {lacking} still missing. "
            "The same command without evaluation.shard sums up when they have ended"
        )
        return None
    summary = summarize_suite(config, subjects, cells + short_rows)
    write_text(folder / SUITE_FILE, json.dumps(summary, indent=1) + "\n")
    tracking.log(suite_metrics(summary))
    return summary


def _tasks(config: EvaluateCommand, tokenizer: Any, texts: Sequence[str]) -> list[GenerationTask]:
    """Generation tasks, with a line of progress while samples are made."""
    with Progress(
        TextColumn("samples"), TextColumn("{task.description}"), TimeElapsedColumn()
    ) as progress:
        bar, made = progress.add_task("", total=None), 0

        def advance(name: str, count: int) -> None:
            nonlocal made
            made += count
            progress.update(bar, description=f"{made} made, {name}")

        return suite_tasks(
            config.suite,
            tokenizer,
            texts,
            suite_lengths(config),
            config.target_len,
            cache_folder=Path(config.evaluation.sample_cache),
            workers=config.evaluation.workers,
            progress=advance,
        )


def _answer(
    config: EvaluateCommand,
    questions: Sequence[Question],
    log: AnswersLog,
    tokenizer: Any,
    device: torch.device,
    options: dict[str, Any],
) -> list[NotMeasured]:
    """Answer questions with a bar weighted by tokens; what was given up is printed and returned."""
    columns = (
        TextColumn("answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, {task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    evaluation, given_up = config.evaluation, []
    decoder = make_decoder(evaluation.decode_rows, evaluation.prefill_chunk)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=sum(question.num_tokens for question in questions))
        for done in answer_questions(
            questions,
            log,
            tokenizer,
            device=device,
            batch_tokens=evaluation.batch_tokens,
            generate=decoder,
            **options,
        ):
            if isinstance(done, NotMeasured):
                given_up.append(done)
                progress.console.print(str(done), markup=False)
                continue
            place = f"{done.subject.name} {done.task.suite}/{done.task.name} {done.task.length}"
            progress.update(bar, advance=done.num_tokens, description=place)
    return given_up


def _short(
    config: EvaluateCommand,
    subject: Subject,
    folder: Path,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """Short tasks of one subject."""
    if not config.suite.short_tasks.tasks:
        return []
    results = ResultsLog(folder / SHORT_TASKS_FILE)
    load = _loader(device, dtype)
    return short_task_rows(
        list(
            measure_short_tasks(
                config.suite.short_tasks, [subject], results, tokenizer, load, dtype
            )
        )
    )


def _loader(device: torch.device, dtype: torch.dtype) -> Callable[[Subject], WindowedModel]:
    """Loads a subject's model when it is first needed."""
    loaded: list[WindowedModel] = []

    def load(subject: Subject) -> WindowedModel:
        if not loaded:
            loaded.append(
                load_windowed_model(
                    subject.folder, subject.factors, device=device, dtype=dtype
                ).eval()
            )
        return loaded[0]

    return load


def _gate(config: EvaluateCommand, cells: list[dict[str, Any]]) -> None:
    """Stop before extended models when the base model breaks a rule."""
    rows = calibration_rows(
        config.calibration, [*cells, *average_rows(cells)], config.evaluation.reference
    )
    if passed(config.calibration, rows):
        return
    broken = [row for row in rows if row["state"] in ("broken", "not measured")]
    faults = "; ".join(
        f"{row['score']} is {'not measured' if row['found'] is None else format(row['found'], '.2f')}, "
        f"expected {row['low']:g} to {row['high']:g}"
        for row in broken
    )
    raise DataError(
        f"calibration: the base model {config.evaluation.reference} does not reproduce its known scores: {faults}. Its "
        "answers are kept; extended models are not evaluated. Find out what differs, or set calibration.required=false"
    )
