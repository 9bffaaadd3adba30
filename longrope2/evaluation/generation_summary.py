"""From answers to scores: one cell per subject, task and length, with intervals and the RoPE side of every score.

Scores are worked out from the stored texts, so a scoring rule can change without asking a model again.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch

from longrope2.evaluation.answers import Answer, AnswersLog
from longrope2.evaluation.generation_run import NotMeasured, sample_key
from longrope2.evaluation.samples import GenerationTask
from longrope2.evaluation.statistics import macro_interval, paired_test, score_interval
from longrope2.evaluation.subjects import Subject

__all__ = ["EFFECTIVE_THRESHOLD", "FIRST_VIEW", "average_rows", "effective_length", "paired_rows", "score_cells"]

FIRST_VIEW = 100  # the paper's sample count per RULER task: the first so many are shown beside all
EFFECTIVE_THRESHOLD = 85.6  # RULER's: Llama-2-7B at 4k
AVERAGED_SUITES = ("ruler",)


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

    ``score`` and ``interval`` run from 0 to 1. ``sides`` splits the score by the RoPE side(s) the answers were made
    with. ``scores`` and ``samples`` hold every sample, for paired tests across runs.
    """
    reasons = {(row.suite, row.task, row.length): row.reason for row in given_up}
    rows = []
    for subject in subjects:
        for task in tasks:
            keys = [sample_key(subject, sample, dtype=dtype, stop_ids=stop_ids) for sample in task.samples]
            answers = [log.find(key) for key in keys]
            head = {"subject": subject.name, "suite": task.suite, "task": task.name, "length": task.length,
                    "num_samples": len(task.samples)}  # fmt: skip
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
    scores = [task.score(sample, answer.text) for sample, answer in zip(task.samples, answers, strict=True)]
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
    survived = [sample.facts["needle_survived"] for sample in task.samples if "needle_survived" in sample.facts]
    if survived:
        row["needle_survived"] = sum(survived) / len(survived)
    return row


def _by_side(scores: Sequence[float], sides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Score of the answers made with each RoPE side."""
    rows = {}
    for side in ("short", "both", "long"):
        own = [score for score, found in zip(scores, sides, strict=True) if found == side]
        if own:
            rows[side] = {"num_samples": len(own), "score": sum(own) / len(own), "interval": list(score_interval(own))}
    return rows


def average_rows(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain mean over the tasks of an averaged suite (RULER) by subject and length; None where a task is missing."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["suite"] in AVERAGED_SUITES:
            groups.setdefault((cell["subject"], cell["suite"], cell["length"]), []).append(cell)
    rows = []
    for (subject, suite, length), members in groups.items():
        row = {"subject": subject, "suite": suite, "length": length, "num_tasks": len(members), "score": None}
        if all(member["score"] is not None for member in members):
            row |= {
                "score": sum(member["score"] for member in members) / len(members),
                "first_100": sum(member["first_100"] for member in members) / len(members),
                "interval": list(macro_interval([member["scores"] for member in members])),
            }
        rows.append(row)
    return rows


def effective_length(averages: Sequence[dict[str, Any]], subject: str, suite: str = "ruler") -> int | None:
    """Largest length up to which every average lies above RULER's threshold; None when the shortest does not.

    A length that was not measured ends the count.
    """
    longest = None
    own = [row for row in averages if row["subject"] == subject and row["suite"] == suite]
    for row in sorted(own, key=lambda row: row["length"]):
        if row["score"] is None or 100 * row["score"] <= EFFECTIVE_THRESHOLD:
            break
        longest = row["length"]
    return longest


def paired_rows(cells: Sequence[dict[str, Any]], reference: str | None = None) -> list[dict[str, Any]]:
    """Paired test of every subject against ``reference`` in every finished cell, of every pair where that has no score.

    Beyond its window the base model may not have been asked, and the extended ones are then compared with each other.
    Cells are paired only where both hold the same samples in the same order.
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
