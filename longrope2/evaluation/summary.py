"""From raw measurements to the numbers people read: accuracies with intervals, perplexities, retention."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from longrope2.evaluation.results import Measurement
from longrope2.evaluation.statistics import wilson_interval
from longrope2.evaluation.subjects import Subject
from longrope2.inference import window_for_length
from longrope2.search import perplexity

__all__ = ["metric_values", "summarize"]


def summarize(subjects: Sequence[Subject], measurements: Sequence[Measurement], reference: str) -> dict[str, Any]:
    """Content of ``evaluations.json``.

    Args:
        subjects: In the order of the tables; all for the same L0 and L.
        measurements: Of these subjects.
        reference: Subject whose perplexity inside the original window is 1 in ``retention``.
    """
    factors = subjects[0].factors
    retention = [_window_row(m) for m in measurements if m.suite == "retention"]
    reference_perplexity = next(row["perplexity"] for row in retention if row["subject"] == reference)
    for row in retention:
        row["ratio"] = row["perplexity"] / reference_perplexity
    return {
        "original_len": factors.geometry.original_len,
        "target_len": factors.target_len,
        "reference": reference,
        "subjects": [_subject_row(subject) for subject in subjects],
        "needle": [_needle_row(m, factors.geometry.original_len) for m in measurements if m.suite == "needle"],
        "perplexity": [
            _window_row(m) | {"window": window_for_length(m.length, factors.geometry.original_len).value}
            for m in measurements
            if m.suite == "perplexity"
        ],
        "retention": retention,
    }


def metric_values(measurement: Measurement) -> dict[str, float]:
    """A measurement under its tracking names, ``eval/<suite>/<task>/<length>``; the task is the subject."""
    task = f"{measurement.subject}/{measurement.length}"
    if measurement.suite == "needle":
        totals = _needle_totals(measurement.values, range(len(measurement.values["exact"])))
        return {
            f"eval/needle_accuracy/{task}": totals["accuracy"],
            f"eval/needle_perplexity/{task}": totals["perplexity"],
        }
    return {f"eval/{measurement.suite}/{task}": _window_row(measurement)["perplexity"]}


def _subject_row(subject: Subject) -> dict[str, Any]:
    """Who a subject is."""
    return {
        "name": subject.name,
        "trained": subject.trained,
        "method": subject.factors.method,
        "critical_index": subject.factors.critical_index,
        "factors": list(subject.factors.factors),
        "long_attention_scale": subject.factors.long_attention_scale,
        "source": subject.source,
    }


def _needle_row(measurement: Measurement, original_len: int) -> dict[str, Any]:
    """Accuracy and needle perplexity at one length, in all and by depth."""
    values = measurement.values
    by_depth: dict[float, list[int]] = defaultdict(list)
    for index, depth in enumerate(values["depths"]):
        by_depth[depth].append(index)
    return {
        "subject": measurement.subject,
        "length": measurement.length,
        "window": window_for_length(measurement.length, original_len).value,
        **_needle_totals(values, range(len(values["exact"]))),
        "depths": [{"depth": depth, **_needle_totals(values, by_depth[depth])} for depth in sorted(by_depth)],
    }


def _needle_totals(values: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Numbers of some samples: share of exact values with its interval, perplexity over all value tokens."""
    num_correct = sum(values["exact"][index] for index in indices)
    num_tokens = sum(values["num_tokens"][index] for index in indices)
    return {
        "num_samples": len(indices),
        "num_correct": num_correct,
        "accuracy": num_correct / len(indices),
        "accuracy_interval": list(wilson_interval(num_correct, len(indices))),
        "perplexity": perplexity(sum(values["nll"][index] for index in indices), num_tokens),
    }


def _window_row(measurement: Measurement) -> dict[str, Any]:
    """Perplexity over all scored tokens of text windows."""
    num_tokens = sum(measurement.values["num_tokens"])
    return {
        "subject": measurement.subject,
        "length": measurement.length,
        "num_windows": len(measurement.values["nll"]),
        "num_tokens": num_tokens,
        "perplexity": perplexity(sum(measurement.values["nll"]), num_tokens),
    }
