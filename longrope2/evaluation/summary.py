"""From raw measurements to the numbers people read: accuracies with intervals, perplexities,
retention.

The comparison as a terminal table of 80 columns: one row per subject.

The calibration gate: scores that the base model must reproduce before an extended model's are
reported.

A harness that does not give a base model its published scores measures something else, and no
difference to it means anything.

From answers to scores: one cell per subject, task and length, with intervals and the RoPE side of
every score.

Scores are worked out from the stored texts, so a scoring rule can change without asking a model
again.

What a suite found, as one JSON object: cells, averages, retention, paired tests, and what is
missing.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich import box
from rich.table import Table

from longrope2.evaluation.answering import NotMeasured, sample_key
from longrope2.evaluation.config import CalibrationConfig, EvaluateRoot
from longrope2.evaluation.results import Answer, AnswersLog, Measurement
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.statistics import (
    macro_interval,
    paired_test,
    score_interval,
    wilson_interval,
)
from longrope2.evaluation.subjects import Subject
from longrope2.inference.generation import window_for_length
from longrope2.search.objective import perplexity

FIRST_VIEW = 100  # the paper's sample count per RULER task: the first so many are shown beside all
EFFECTIVE_THRESHOLD = 85.6  # RULER's: Llama-2-7B at 4k
AVERAGED_SUITES = ("ruler",)
SUITE_FILE = "suite.json"


def summarize(
    subjects: Sequence[Subject], measurements: Sequence[Measurement], reference: str
) -> dict[str, Any]:
    """Content of ``evaluations.json``.

    Args:
        subjects: In the order of the tables; all for the same L0 and L.
        measurements: Of these subjects.
        reference: Subject whose perplexity inside the original window is 1 in ``retention``.
    """
    factors = subjects[0].factors
    retention = [_window_row(m) for m in measurements if m.suite == "retention"]
    reference_perplexity = next(
        row["perplexity"] for row in retention if row["subject"] == reference
    )
    for row in retention:
        row["ratio"] = row["perplexity"] / reference_perplexity
    return {
        "original_len": factors.geometry.original_len,
        "target_len": factors.target_len,
        "reference": reference,
        "subjects": [_subject_row(subject) for subject in subjects],
        "needle": [
            _needle_row(m, factors.geometry.original_len)
            for m in measurements
            if m.suite == "needle"
        ],
        "perplexity": [
            _window_row(m)
            | {"window": window_for_length(m.length, factors.geometry.original_len).value}
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
        "depths": [
            {"depth": depth, **_needle_totals(values, by_depth[depth])}
            for depth in sorted(by_depth)
        ],
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


def comparison_table(summary: dict[str, Any]) -> Table:
    """Needle accuracy by length, needle and text perplexity at the longest length, retention of the
    short window.

    Args:
        summary: Content of ``evaluations.json``.
    """
    needle = {(row["subject"], row["length"]): row for row in summary["needle"]}
    text = {(row["subject"], row["length"]): row for row in summary["perplexity"]}
    retention = {row["subject"]: row for row in summary["retention"]}
    lengths = sorted({length for _, length in needle})
    longest = lengths[-1]
    table = Table(
        title=f"Window {summary['original_len']} -> {summary['target_len']} tokens",
        caption=f"{', '.join(map(str, lengths))}: needles retrieved exactly at that many tokens, in % of "
        f"{next(iter(needle.values()))['num_samples']}; the 95 % interval is that at {longest}. Needle ppl, text ppl: "
        f"perplexity of needle values and of held-out text at {longest} tokens. Short: change of the perplexity "
        f"inside {summary['original_len']} tokens against {summary['reference']}.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for title in (*map(str, lengths), "95 %", "needle ppl", "text ppl", "short"):
        table.add_column(title, justify="right")
    for subject in summary["subjects"]:
        name = subject["name"]
        low, high = needle[name, longest]["accuracy_interval"]
        table.add_row(
            name,
            *(f"{100 * needle[name, length]['accuracy']:.0f}" for length in lengths),
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{needle[name, longest]['perplexity']:.4g}",
            f"{text[name, longest]['perplexity']:.4g}",
            f"{100 * (retention[name]['ratio'] - 1):+.1f} %",
        )
    return table


def calibration_rows(
    config: CalibrationConfig, cells: Sequence[dict[str, Any]], reference: str
) -> list[dict[str, Any]]:
    """One row per rule: ``passed``, ``broken``, ``not measured`` (started, unfinished) or ``not in
    this suite``.

    Args:
        config: The rules.
        cells: Rows of ``score_cells``, ``average_rows`` and ``short_task_rows``; averages count as
            task ``average``.
        reference: The base model's name.
    """
    scores: dict[str, float | None] = {}
    for cell in cells:
        if cell["subject"] == reference:
            name = f"{cell['suite']}/{cell.get('task', 'average')}"
            scores[f"{name}/{cell['length']}" if cell["length"] else name] = cell["score"]
    rows = []
    for rule in config.rules:
        row: dict[str, Any] = {
            "score": rule.score,
            "low": rule.low,
            "high": rule.high,
            "found": None,
        }
        if rule.score not in scores:
            state = "not in this suite"
        elif (found := scores[rule.score]) is None:
            state = "not measured"
        else:
            row["found"] = 100 * found
            state = "passed" if rule.low <= row["found"] <= rule.high else "broken"
        rows.append(row | {"state": state})
    return rows


def passed(config: CalibrationConfig, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether extended models may be reported."""
    return not config.required or all(
        row["state"] in ("passed", "not in this suite") for row in rows
    )


def score_cells(
    subjects: Sequence[Subject],
    tasks: Sequence[GenerationTask],
    log: AnswersLog,
    given_up: Sequence[NotMeasured],
    *,
    dtype: torch.dtype,
    stop_ids: Collection[int],
) -> list[dict[str, Any]]:
    """One row per subject and task: the score with its interval, or why there is none.

    ``score`` and ``interval`` run from 0 to 1. ``sides`` splits the score by the RoPE side(s) the
    answers were made with. ``scores`` and ``samples`` hold every sample, for paired tests across
    runs.
    """
    reasons = {(row.suite, row.task, row.length): row.reason for row in given_up}
    rows = []
    for subject in subjects:
        for task in tasks:
            keys = [
                sample_key(subject, sample, dtype=dtype, stop_ids=stop_ids)
                for sample in task.samples
            ]
            answers = [log.find(key) for key in keys]
            head = {
                "subject": subject.name,
                "suite": task.suite,
                "task": task.name,
                "length": task.length,
                "num_samples": len(task.samples),
            }
            found = [answer for answer in answers if answer is not None]
            if len(found) < len(answers) or not found:
                missing = len(answers) - len(found)
                reason = reasons.get((task.suite, task.name, task.length), "not answered yet")
                rows.append({**head, "score": None, "num_missing": missing, "reason": reason})
            else:
                rows.append(head | _scored(task, found))
    return rows


def _scored(task: GenerationTask, answers: list[Answer]) -> dict[str, Any]:
    """Numbers of a finished cell."""
    scores = [
        task.score(sample, answer.text)
        for sample, answer in zip(task.samples, answers, strict=True)
    ]
    first = scores[:FIRST_VIEW]
    row: dict[str, Any] = {
        "score": sum(scores) / len(scores),
        "interval": list(score_interval(scores)),
        "first_100": sum(first) / len(first),
        "sides": _by_side(scores, [answer.side for answer in answers]),
        "scores": scores,
        "samples": [sample.sha256[:16] for sample in task.samples],
        "facts": [sample.facts for sample in task.samples],
    }
    survived = [
        sample.facts["needle_survived"]
        for sample in task.samples
        if "needle_survived" in sample.facts
    ]
    if survived:
        row["needle_survived"] = sum(survived) / len(survived)
    return row


def _by_side(scores: Sequence[float], sides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Score of the answers made with each RoPE side."""
    rows = {}
    for side in ("short", "both", "long"):
        own = [score for score, found in zip(scores, sides, strict=True) if found == side]
        if own:
            rows[side] = {
                "num_samples": len(own),
                "score": sum(own) / len(own),
                "interval": list(score_interval(own)),
            }
    return rows


def average_rows(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain mean over the tasks of an averaged suite (RULER) by subject and length; None where a task is missing."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["suite"] in AVERAGED_SUITES:
            groups.setdefault((cell["subject"], cell["suite"], cell["length"]), []).append(cell)
    rows = []
    for (subject, suite, length), members in groups.items():
        row = {
            "subject": subject,
            "suite": suite,
            "length": length,
            "num_tasks": len(members),
            "score": None,
        }
        if all(member["score"] is not None for member in members):
            row |= {
                "score": sum(member["score"] for member in members) / len(members),
                "first_100": sum(member["first_100"] for member in members) / len(members),
                "interval": list(macro_interval([member["scores"] for member in members])),
            }
        rows.append(row)
    return rows


def effective_length(
    averages: Sequence[dict[str, Any]], subject: str, suite: str = "ruler"
) -> int | None:
    """Largest length up to which every average lies above RULER's threshold; None when the shortest
    does not.

    A length that was not measured ends the count.
    """
    longest = None
    own = [row for row in averages if row["subject"] == subject and row["suite"] == suite]
    for row in sorted(own, key=lambda row: row["length"]):
        if row["score"] is None or 100 * row["score"] <= EFFECTIVE_THRESHOLD:
            break
        longest = row["length"]
    return longest


def paired_rows(
    cells: Sequence[dict[str, Any]], reference: str | None = None
) -> list[dict[str, Any]]:
    """Paired test of every subject against ``reference`` in every finished cell, of every pair
    where that has no score.

    Beyond its window the base model may not have been asked, and the extended ones are then
    compared with each other. Cells are paired only where both hold the same samples in the same
    order.
    """
    rows = []
    by_place: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["score"] is not None:
            by_place.setdefault((cell["suite"], cell["task"], cell["length"]), []).append(cell)
    for (suite, task, length), members in by_place.items():
        all_pairs = reference not in [member["subject"] for member in members]
        for index, second in enumerate(members):
            for first in members[index + 1 :]:
                asked = all_pairs or reference in (first["subject"], second["subject"])
                if not asked or first["samples"] != second["samples"]:
                    continue
                names = {"first": first["subject"], "second": second["subject"]}
                place = {"suite": suite, "task": task, "length": length}
                rows.append(place | names | asdict(paired_test(first["scores"], second["scores"])))
    return rows


def summarize_suite(
    config: EvaluateRoot, subjects: Sequence[Subject], cells: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Content of ``suite.json``.

    When the base model breaks a calibration rule, the scores of all other subjects are withheld:
    their cells say so.

    Args:
        config: The evaluation.
        subjects: In the order of the tables.
        cells: Rows of ``score_cells`` and ``short_task_rows``.
    """
    reference = config.evaluation.reference
    averages = average_rows(cells)
    calibration = calibration_rows(config.calibration, [*cells, *averages], reference)
    reported = list(cells)
    if not passed(config.calibration, calibration):
        reported = [cell if cell["subject"] == reference else _withheld(cell) for cell in cells]
        averages = average_rows(reported)
    return {
        "model": config.model.name,
        "original_len": config.model.original_len,
        "target_len": config.target_len,
        "reference": reference,
        "subjects": [
            {"name": s.name, "trained": s.trained, "method": s.factors.method, "source": s.source}
            for s in subjects
        ],
        "calibration": {"passed": passed(config.calibration, calibration), "rules": calibration},
        "cells": reported,
        "averages": averages,
        "effective_length": {s.name: effective_length(averages, s.name) for s in subjects},
        "retention": _retention(reported, reference, config.model.original_len),
        "paired": paired_rows(reported, reference),
    }


def suite_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """Finished scores under their tracking names, in percent."""
    rows = [(f"{c['suite']}/{c['task']}", c) for c in summary["cells"]]
    rows += [(f"{row['suite']}/average", row) for row in summary["averages"]]
    return {
        f"eval/{name}/{row['subject']}/{row['length']}": 100 * row["score"]
        for name, row in rows
        if row["score"] is not None
    }


def _withheld(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell without its score."""
    kept = {key: cell[key] for key in ("subject", "suite", "task", "length", "num_samples")}
    return kept | {
        "score": None,
        "num_missing": 0,
        "reason": "withheld: the base model breaks its calibration",
    }


def _retention(
    cells: Sequence[dict[str, Any]], reference: str, original_len: int
) -> list[dict[str, Any]]:
    """Mean score of each subject inside the original window over the base model's, on the tasks that both finished."""
    inside: dict[str, dict[tuple[str, str, int], float]] = {}
    for cell in cells:
        if cell["score"] is not None and (
            cell["suite"] == "lm_eval" or 0 < cell["length"] <= original_len
        ):
            place = (cell["suite"], cell["task"], cell["length"])
            inside.setdefault(cell["subject"], {})[place] = cell["score"]
    rows = []
    base = inside.get(reference, {})
    for subject, scores in inside.items():
        for suite in sorted({place[0] for place in scores}):
            common = [place for place in scores if place[0] == suite and place in base]
            total = sum(base[place] for place in common)
            if common and total > 0:
                ratio = sum(scores[place] for place in common) / total
                rows.append(
                    {"subject": subject, "suite": suite, "num_tasks": len(common), "ratio": ratio}
                )
    return rows
