"""Short tasks through lm-evaluation-harness, our model in it, with every question's RoPE side."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
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
from longrope2.evaluation.short_task_files import data_identity, write_task_files
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.evaluation.summary import scores_by_side
from longrope2.rope.factors import Window
from longrope2.statistics import score_interval

_HUB_HOST, _HUB_SECONDS = "huggingface.co", 3.0


def measure_short_tasks(
    config: ShortTasksConfig,
    subjects: Sequence[Subject],
    results: ResultsLog,
    tokenizer: Any,
    models: SubjectModels,
    folder: Path,
    document_start: DocumentStart = DocumentStart.auto,
) -> Iterator[Measurement]:
    """Measure every task of every subject; what ``results`` holds already is not measured again.

    ``folder`` is for the task files that name the data.

    Raises:
        DataError: a task or its data cannot be had, a metric that the task has not, or a question
            beyond the window.
    """
    starts = start_ids(tokenizer, document_start)
    manager = cache(partial(_task_manager, config, folder))
    for subject in subjects:
        for task in config.tasks:
            fingerprint = _fingerprint(config, task, subject, str(models.dtype), starts)
            make = partial(_measure, config, task, subject, models=models, tokenizer=tokenizer)
            make = partial(make, document_start=document_start, manager_of=manager)
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
    manager_of: Callable[[], Any],
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from longrope2.evaluation.lm_eval_model import LongRope2LM

    lm_class: Any = LongRope2LM  # the harness's decorators hide the types of what they decorate
    run_tasks: Any = simple_evaluate
    lm = lm_class.around(models.of(subject), tokenizer, document_start=document_start)
    options = {"num_fewshot": task.num_fewshot, "limit": config.limit, "bootstrap_iters": 0}
    try:
        asked = {"tasks": [task.task], "task_manager": manager_of(), **options}
        found = run_tasks(lm, log_samples=True, **asked)
    except (OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"suite.short_tasks: lm-eval cannot run {task.task} ({type(error).__name__}: {reason});"
            " is the name right (`lm_eval ls tasks`), and can its data set be had (hub access, "
            "HF_HOME with HF_HUB_OFFLINE=1, or the benchmark's files as suite.short_tasks.data)?"
        ) from None
    assert found is not None
    return _values(task, found, lm.sides)


def _task_manager(config: ShortTasksConfig, folder: Path) -> Any:
    """lm-eval's, with our files for the tasks that are asked."""
    from lm_eval.tasks import TaskManager

    data = None if config.data is None else Path(config.data)
    if data is None:
        give_up_at_once_offline()
    manager = TaskManager(include_path=config.include_path)
    index = manager.task_index
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for task in config.tasks:
        written = write_task_files(task.task, index, folder, data, task.num_fewshot)
        # Reading all of lm-eval's files again, with this folder, would take as long again.
        for name, path in written.items():
            index[name] = replace(index[name], yaml_path=path)
    return manager


def give_up_at_once_offline() -> None:
    """Where the hub cannot be reached, take what is cached without trying for half a minute.

    Nothing is tried behind a proxy or at a hub of one's own: there an address says nothing.
    """
    from datasets import config as datasets_config
    from huggingface_hub import constants

    set_names = {name.upper() for name, value in os.environ.items() if value}
    if set_names & {"HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "HF_ENDPOINT", "HF_HUB_OFFLINE"}:
        return
    try:
        socket.create_connection((_HUB_HOST, 443), timeout=_HUB_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        datasets_config.HF_HUB_OFFLINE = True


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
    """Hash of everything a measurement depends on."""
    tables = [subject.table_identity(window) for window in Window]
    data = data_identity(None if config.data is None else Path(config.data))
    shared = {"limit": config.limit, "include_path": config.include_path, "data": data}
    settings = {**asdict(task), **shared, "lm_eval": lm_eval_version()}
    original_len = subject.factors.geometry.original_len
    parts = [subject.weights_sha256, tables, original_len, dtype, settings]
    parts += [] if starts else ["no BOS"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
