"""What a suite found, as one JSON object: cells, averages, retention, paired tests, and what is missing."""

from collections.abc import Sequence
from typing import Any

from longrope2.evaluation.calibration import calibration_rows, passed
from longrope2.evaluation.config import EvaluateRoot
from longrope2.evaluation.generation_summary import average_rows, effective_length, paired_rows
from longrope2.evaluation.subjects import Subject

__all__ = ["SUITE_FILE", "suite_metrics", "summarize_suite"]

SUITE_FILE = "suite.json"


def summarize_suite(
    config: EvaluateRoot, subjects: Sequence[Subject], cells: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Content of ``suite.json``.

    When the base model breaks a calibration rule, the scores of all other subjects are withheld: their cells say so.

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
            {"name": s.name, "trained": s.trained, "method": s.factors.method, "source": s.source} for s in subjects
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
    return kept | {"score": None, "num_missing": 0, "reason": "withheld: the base model breaks its calibration"}


def _retention(cells: Sequence[dict[str, Any]], reference: str, original_len: int) -> list[dict[str, Any]]:
    """Mean score of each subject inside the original window over the base model's, on the tasks that both finished."""
    inside: dict[str, dict[tuple[str, str, int], float]] = {}
    for cell in cells:
        if cell["score"] is not None and (cell["suite"] == "lm_eval" or 0 < cell["length"] <= original_len):
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
                rows.append({"subject": subject, "suite": suite, "num_tasks": len(common), "ratio": ratio})
    return rows
