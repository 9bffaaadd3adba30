"""Needle retrieval, perplexity and short-window retention of several models side by side, and the report of a run."""

from longrope2.evaluation.config import EvaluateRoot, check, evaluated_lengths, suite_lengths, use_checkpoint
from longrope2.evaluation.results import RESULTS_FILE, Measurement, ResultsLog
from longrope2.evaluation.subjects import Subject, check_same_model, read_checkpoint_factors, resolve_subjects
from longrope2.evaluation.summary import metric_values, summarize
from longrope2.evaluation.table import comparison_table
from longrope2.evaluation.tasks import Task, device_and_dtype, measure_all, needle_task, perplexity_task, retention_task
from longrope2.evaluation.texts import context_windows, short_windows

__all__ = [
    "RESULTS_FILE",
    "EvaluateRoot",
    "Measurement",
    "ResultsLog",
    "Subject",
    "Task",
    "check",
    "check_same_model",
    "comparison_table",
    "context_windows",
    "device_and_dtype",
    "evaluated_lengths",
    "measure_all",
    "metric_values",
    "needle_task",
    "perplexity_task",
    "read_checkpoint_factors",
    "resolve_subjects",
    "retention_task",
    "short_windows",
    "suite_lengths",
    "summarize",
    "use_checkpoint",
]
