"""Short tasks through lm-evaluation-harness, our model in it, with every question's RoPE side."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from longrope2.config import DocumentStart
from longrope2.corpora.tokenizer import start_ids
from longrope2.errors import DataError
from longrope2.evaluation.config import (
    LM_EVAL_SUITE,
    ShortTaskConfig,
    ShortTasksConfig,
    lm_eval_version,
)
from longrope2.evaluation.results import Measurement, ResultsLog
from longrope2.evaluation.schema import Cell
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.evaluation.summary import scores_by_side
from longrope2.rope.factors import Window
from longrope2.statistics import score_interval


def measure_short_tasks(
    config: ShortTasksConfig,
    subjects: Sequence[Subject],
    results: ResultsLog,
    tokenizer: Any,
    models: SubjectModels,
    document_start: DocumentStart = DocumentStart.auto,
) -> Iterator[Measurement]:
    """Measure every task of every subject; what ``results`` holds already is not measured again.

    Raises:
        DataError: a task or its data cannot be had, a metric that the task has not, or a question
            beyond the window.
    """
    starts = start_ids(tokenizer, document_start)
    for subject in subjects:
        for task in config.tasks:
            fingerprint = _fingerprint(config, task, subject, str(models.dtype), starts)
            make = partial(_measure, config, task, subject, models=models, tokenizer=tokenizer)
            make = partial(make, document_start=document_start)
            place = subject.name, LM_EVAL_SUITE, 0
            yield results.measured(*place, fingerprint=fingerprint, measure=make)


def short_task_cell(measurement: Measurement) -> Cell:
    """A measurement as a cell of the suite."""
    values, scores = measurement.values, measurement.values["scores"]
    place = measurement.subject, LM_EVAL_SUITE, values["name"], 0, len(scores)
    return Cell(
        *place,
        score=values["score"],
        interval=score_interval(scores),
        sides=dict(sorted(scores_by_side(scores, values["sides"]).items())),
        scores=tuple(scores),
        samples=tuple(values["questions"]),
    )


def _measure(
    config: ShortTasksConfig,
    task: ShortTaskConfig,
    subject: Subject,
    models: SubjectModels,
    tokenizer: Any,
    document_start: DocumentStart,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from longrope2.evaluation.lm_eval_model import LongRope2LM

    lm_class: Any = LongRope2LM  # the harness's decorators hide the types of what they decorate
    run_tasks: Any = simple_evaluate
    lm = lm_class.around(models.of(subject), tokenizer, document_start=document_start)
    options = {"num_fewshot": task.num_fewshot, "limit": config.limit, "bootstrap_iters": 0}
    try:
        manager = TaskManager(include_path=config.include_path)
        asked = {"tasks": [task.task], "task_manager": manager, **options}
        found = run_tasks(lm, log_samples=True, **asked)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"suite.short_tasks: lm-eval cannot run {task.task} ({type(error).__name__}: {reason});"
            " is the name right (`lm_eval ls tasks`), and can its data set be had (hub access, or "
            "HF_HOME with HF_DATASETS_OFFLINE=1)?"
        ) from None
    assert found is not None
    return _values(task, found, lm.sides)


def _values(
    task: ShortTaskConfig, found: Mapping[str, Any], sides: Mapping[tuple[str, int], set[str]]
) -> dict[str, Any]:
    """Score of the task and of each question, with its RoPE side."""
    totals = {**found.get("groups", {}), **found["results"]}.get(task.task, {})
    if task.metric not in totals:
        known = ", ".join(key for key in totals if "," in key and "stderr" not in key)
        fault = f"{task.task} has no metric {task.metric!r}; it has {known}"
        raise DataError(f"suite.short_tasks: {fault}")
    metric, chosen_filter = task.metric.split(",")
    scores, found_sides, questions = [], [], []
    for name, samples in sorted(found["samples"].items()):
        for sample in samples:
            if sample.get("filter", "none") == chosen_filter:
                scores.append(float(sample[metric]))
                used = sides[name, sample["doc_id"]]
                found_sides.append(next(iter(used)) if len(used) == 1 else "both")
                questions.append(sample["doc_hash"][:16])
    total = {"score": totals[task.metric], "scores": scores}
    return {**total, "sides": found_sides, "questions": questions, "name": task.name}


def _fingerprint(
    config: ShortTasksConfig,
    task: ShortTaskConfig,
    subject: Subject,
    dtype: str,
    starts: Sequence[int],
) -> str:
    """Hash of everything a measurement depends on, the data set's own version aside."""
    tables = [subject.table_identity(window) for window in Window]
    shared = {"limit": config.limit, "include_path": config.include_path}
    settings = {**asdict(task), **shared, "lm_eval": lm_eval_version()}
    original_len = subject.factors.geometry.original_len
    parts = [subject.weights_sha256, tables, original_len, dtype, settings]
    parts += [] if starts else ["no BOS"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
