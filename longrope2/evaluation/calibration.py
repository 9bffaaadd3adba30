"""The calibration gate: scores that the base model must reproduce before an extended model's are reported.

A harness that does not give a base model its published scores measures something else, and no difference to it means
anything.
"""

from collections.abc import Sequence
from typing import Any

from longrope2.evaluation.suite import CalibrationConfig

__all__ = ["calibration_rows", "passed"]


def calibration_rows(
    config: CalibrationConfig, cells: Sequence[dict[str, Any]], reference: str
) -> list[dict[str, Any]]:
    """One row per rule: ``passed``, ``broken``, ``not measured`` (started, unfinished) or ``not in this suite``.

    Args:
        config: The rules.
        cells: Rows of ``score_cells``, ``average_rows`` and ``short_task_rows``; averages count as task ``average``.
        reference: The base model's name.
    """
    scores: dict[str, float | None] = {}
    for cell in cells:
        if cell["subject"] == reference:
            name = f"{cell['suite']}/{cell.get('task', 'average')}"
            scores[f"{name}/{cell['length']}" if cell["length"] else name] = cell["score"]
    rows = []
    for rule in config.rules:
        row: dict[str, Any] = {"score": rule.score, "low": rule.low, "high": rule.high, "found": None}
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
    return not config.required or all(row["state"] in ("passed", "not in this suite") for row in rows)
