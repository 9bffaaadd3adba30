"""The part of ``launch.evaluate`` that asks questions: build the tasks, answer, score, write ``suite.json``."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from launch.evaluate_measures import EvaluateCommand
from longrope2.artifacts import write_text
from longrope2.errors import DataError
from longrope2.evaluation import ResultsLog, Subject, device_and_dtype, suite_lengths
from longrope2.evaluation.answers import AnswersLog, Shard
from longrope2.evaluation.calibration import calibration_rows, passed
from longrope2.evaluation.generation_run import (
    NotMeasured,
    Question,
    answer_questions,
    make_decoder,
    plan_questions,
    shard_questions,
)
from longrope2.evaluation.generation_summary import average_rows, score_cells
from longrope2.evaluation.paper_report import paper_text
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.short_tasks import measure_short_tasks, short_task_rows
from longrope2.evaluation.suite_summary import SUITE_FILE, suite_metrics, summarize_suite
from longrope2.evaluation.suite_tasks import asked_of, suite_tasks
from longrope2.model import WindowedModel, load_windowed_model
from longrope2.parallel import world_size_from_environment
from longrope2.tracking import MetricsLog

ANSWERS_FOLDER = "answers"
SHORT_TASKS_FILE = "short_tasks.jsonl"


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
) -> bool:
    """Answer this shard's questions and, when no shard has any left, sum up.

    Returns:
        Whether everything asked for is done or was given up here.

    Raises:
        UserError: data that cannot be used, or a base model that breaks its calibration (its scores are kept).
    """
    device, dtype = device_and_dtype()
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    reference = config.evaluation.reference
    ordered = sorted(subjects, key=lambda subject: subject.name != reference)  # the base model first: the gate is on it
    tasks = _tasks(config, tokenizer, texts) if config.suite.generates else []
    options = {"dtype": dtype, "stop_ids": {tokenizer.eos_token_id}}
    shard, given_up = own_shard(config), []
    with AnswersLog(folder / ANSWERS_FOLDER, shard) as log:

        def cells_of(subject: Subject) -> list[dict[str, Any]]:
            return score_cells([subject], asked_of(subject, tasks, config.suite, reference), log, given_up, **options)

        short_rows: list[dict[str, Any]] = []
        for subject in ordered:
            questions = plan_questions([subject], asked_of(subject, tasks, config.suite, reference), **options)
            given_up += _answer(config, shard_questions(questions, shard), log, tokenizer, device, options)
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
        lacking = f"{missing} answers of other shards are" if missing else "the short tasks, which shard 1 asks, may be"
        print(f"shard {shard.index + 1}/{shard.count} is done; {lacking} still missing. "
              "The same command without evaluation.shard sums up when they have ended")  # fmt: skip
        return False
    summary = summarize_suite(config, subjects, cells + short_rows)
    write_text(folder / SUITE_FILE, json.dumps(summary, indent=1) + "\n")
    tracking.log(suite_metrics(summary))
    Console(width=160).print(paper_text(summary), markup=False, highlight=False)
    return True


def _tasks(config: EvaluateCommand, tokenizer: Any, texts: Sequence[str]) -> list[GenerationTask]:
    """Generation tasks, with a line of progress while samples are made."""
    with Progress(TextColumn("samples"), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
        bar, made = progress.add_task("", total=None), 0

        def advance(name: str, count: int) -> None:
            nonlocal made
            made += count
            progress.update(bar, description=f"{made} made, {name}")

        return suite_tasks(
            config.suite, tokenizer, texts, suite_lengths(config), config.target_len,
            cache_folder=Path(config.evaluation.sample_cache), workers=config.evaluation.workers, progress=advance,
        )  # fmt: skip


def _answer(
    config: EvaluateCommand,
    questions: Sequence[Question],
    log: AnswersLog,
    tokenizer: Any,
    device: torch.device,
    options: dict[str, Any],
) -> list[NotMeasured]:
    """Answer questions with a bar weighted by tokens; what was given up is printed and returned."""
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens, {task.description}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    evaluation, given_up = config.evaluation, []
    decoder = make_decoder(evaluation.decode_rows, evaluation.prefill_chunk)
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=sum(question.num_tokens for question in questions))
        for done in answer_questions(
            questions, log, tokenizer, device=device, batch_tokens=evaluation.batch_tokens, generate=decoder, **options
        ):
            if isinstance(done, NotMeasured):
                given_up.append(done)
                progress.console.print(str(done), markup=False)
                continue
            place = f"{done.subject.name} {done.task.suite}/{done.task.name} {done.task.length}"
            progress.update(bar, advance=done.num_tokens, description=place)
    return given_up


def _short(
    config: EvaluateCommand, subject: Subject, folder: Path, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Short tasks of one subject."""
    if not config.suite.short_tasks.tasks:
        return []
    results = ResultsLog(folder / SHORT_TASKS_FILE)
    load = _loader(device, dtype)
    return short_task_rows(
        list(measure_short_tasks(config.suite.short_tasks, [subject], results, tokenizer, load, dtype))
    )


def _loader(device: torch.device, dtype: torch.dtype) -> Callable[[Subject], WindowedModel]:
    """Loads a subject's model when it is first needed."""
    loaded: list[WindowedModel] = []

    def load(subject: Subject) -> WindowedModel:
        if not loaded:
            loaded.append(load_windowed_model(subject.folder, subject.factors, device=device, dtype=dtype).eval())
        return loaded[0]

    return load


def _gate(config: EvaluateCommand, cells: list[dict[str, Any]]) -> None:
    """Stop before extended models when the base model breaks a rule."""
    rows = calibration_rows(config.calibration, [*cells, *average_rows(cells)], config.evaluation.reference)
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
