"""The paper's tables with our numbers: each cell with its interval, the paper's value and a
verdict.

A table is plain data (``PaperTable``), shown as text here and as HTML by the report. A paper's
value is compared with a subject of the same method that was trained like the paper's; the base
model is compared with the paper's original. A verdict weighs both sides' sampling error: the
paper's RULER and LOFT cells rest on 100 samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

from longrope2.evaluation.statistics import NORMAL_95, macro_interval
from longrope2.evaluation.summary import EFFECTIVE_THRESHOLD, FIRST_VIEW
from longrope2.report import paper_values as paper

LONG_SUITES = ("longbench", "infinitebench")


@dataclass(frozen=True)
class TableCell:
    """One number of ours beside the paper's, all 0 to 100."""

    ours: float | None = None
    low: float = 0.0
    high: float = 0.0
    paper: float | None = None
    verdict: str = ""
    """``agrees``, ``above`` or ``below`` the paper; empty where there is nothing to compare."""
    note: str = ""
    """Why there is no number, or what to know about it."""

    @property
    def text(self) -> str:
        """On one line."""
        if self.ours is None:
            return "-" if self.paper is None else f"- (paper {self.paper:g})"
        compared = f" (paper {self.paper:g}, {self.verdict})" if self.paper is not None else ""
        return f"{self.ours:.1f} [{self.low:.1f}-{self.high:.1f}]{compared}"


@dataclass(frozen=True)
class PaperTable:
    """Rows of cells under column names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[TableCell, ...]], ...]


def verdict(
    ours: float,
    low: float,
    high: float,
    paper_value: float,
    paper_samples: float,
    num_tasks: int = 1,
) -> str:
    """Whether a score of ours and the paper's differ by more than chance (5 %).

    The paper's standard error is that of a share over its samples; for a mean of tasks it is the
    one at 50 %, which no mean exceeds.

    Args:
        ours: Our score, 0 to 100.
        low: Lower end of its 95 % interval.
        high: Upper end.
        paper_value: The paper's score, 0 to 100.
        paper_samples: Its samples per task; their harmonic mean where tasks differ, which gives the
            mean's own error.
        num_tasks: Tasks that both are means of.
    """
    share = (
        0.5
        if num_tasks > 1
        else min(max(paper_value / 100, 0.5 / paper_samples), 1 - 0.5 / paper_samples)
    )
    paper_error = 100 * math.sqrt(share * (1 - share) / (paper_samples * num_tasks))
    our_error = (high - ours if paper_value > ours else ours - low) / NORMAL_95
    if abs(ours - paper_value) <= NORMAL_95 * math.hypot(our_error, paper_error):
        return "agrees"
    return "above" if ours > paper_value else "below"


def mean_cell(
    cells: Sequence[dict[str, Any]], paper_value: float | None, paper_samples: float
) -> TableCell:
    """The plain mean of finished cells; without a number when one is missing."""
    missing = [cell for cell in cells if cell["score"] is None]
    if missing or not cells:
        return TableCell(
            paper=paper_value, note=missing[0]["reason"] if missing else "not in this suite"
        )
    ours = 100 * sum(cell["score"] for cell in cells) / len(cells)
    low, high = (100 * end for end in macro_interval([cell["scores"] for cell in cells]))
    judged = (
        ""
        if paper_value is None
        else verdict(ours, low, high, paper_value, paper_samples, len(cells))
    )
    return TableCell(ours, low, high, paper_value, judged)


def paper_tables(summary: dict[str, Any]) -> list[PaperTable]:
    """The tables that the suite has something for.

    Args:
        summary: Content of ``suite.json``.
    """
    tables = [
        _needle_map(summary),
        _ruler_averages(summary),
        _long_tasks(summary),
        _short_tasks(summary),
    ]
    tables += [_ruler_by_task(summary, subject) for subject in summary["subjects"]]
    return [table for table in tables if table is not None]


def paper_text(summary: dict[str, Any]) -> str:
    """All tables, retention, effective lengths and scores by RoPE side, as text."""
    parts = []
    for table in paper_tables(summary):
        width = max(len(label) for label, _ in table.rows)
        lines = [table.title]
        for label, cells in table.rows:
            shown = [f"{name} {cell.text}" for name, cell in zip(table.columns, cells, strict=True)]
            lines.append(f"  {label:<{width}}  " + "; ".join(shown))
        parts.append("\n".join(lines))
    lines = []
    for name, length in summary["effective_length"].items():
        if any(row["subject"] == name for row in summary["averages"]):
            reached = f"{length:,} tokens" if length else "below the shortest length"
            lines.append(
                f"effective length of {name} (RULER average above {EFFECTIVE_THRESHOLD}): {reached}"
            )
    lines += [
        f"{row['suite']} inside {summary['original_len']:,} tokens: {row['subject']} keeps {100 * row['ratio']:.1f} % of "
        f"{summary['reference']} over {row['num_tasks']} score{'' if row['num_tasks'] == 1 else 's'}"
        for row in summary["retention"]
        if row["subject"] != summary["reference"]
    ]
    parts += ["\n".join(lines)] if lines else []
    parts += _by_side(summary) + _missing(summary)
    return "\n\n".join(parts)


def _by_side(summary: dict[str, Any]) -> list[str]:
    """Scores whose questions were read on more than one RoPE side."""
    lines = []
    for cell in summary["cells"]:
        if len(cell.get("sides", {})) > 1:
            parts = [
                f"{side} {100 * row['score']:.1f} ({row['num_samples']})"
                for side, row in cell["sides"].items()
            ]
            lines.append(f"  {cell['subject']} {cell['suite']}/{cell['task']}: {', '.join(parts)}")
    return ["by RoPE side of the answer, score (samples)\n" + "\n".join(lines)] if lines else []


def _missing(summary: dict[str, Any]) -> list[str]:
    """Cells without a score, rules of the gate that were broken or could not be tried."""
    lines = [
        f"  {c['subject']} {c['suite']}/{c['task']} {c['length'] or ''}: {c['reason']}"
        for c in summary["cells"]
        if c["score"] is None
    ]
    rules = summary["calibration"]["rules"]
    parts = ["not measured\n" + "\n".join(lines)] if lines else []
    if not rules:
        return [*parts, "the base model was not calibrated: no rules were given (calibration=...)"]
    shown = [
        f"  {r['score']}: {r['state']} ({r['low']:g} to {r['high']:g}, found {r['found']})"
        for r in rules
    ]
    return [*parts, "calibration of the base model\n" + "\n".join(shown)]


def _needle_map(summary: dict[str, Any]) -> PaperTable | None:
    """Figure 6 without its depths, which the report draws; the paper prints no numbers."""
    own = {(c["subject"], c["length"]): c for c in summary["cells"] if c["suite"] == "needle_map"}
    if not own:
        return None
    lengths = sorted({length for _, length in own})
    rows = [
        (
            subject["name"],
            tuple(_cell(own.get((subject["name"], length)), None, 0) for length in lengths),
        )
        for subject in summary["subjects"]
    ]
    return PaperTable(
        "Figure 6: needles retrieved, all depths", tuple(f"{n:,}" for n in lengths), tuple(rows)
    )


def _ruler_averages(summary: dict[str, Any]) -> PaperTable | None:
    """Table 2."""
    lengths = sorted({row["length"] for row in summary["averages"] if row["suite"] == "ruler"})
    if not lengths:
        return None
    rows = []
    for subject in summary["subjects"]:
        values = paper.RULER_AVERAGES.get(summary["model"], {}).get(
            _paper_method(summary, subject), ()
        )
        by_length = dict(zip(paper.RULER_LENGTHS, values, strict=False))
        cells = []
        for length in lengths:
            own = [
                c
                for c in summary["cells"]
                if _place(c) == (subject["name"], "ruler") and c["length"] == length
            ]
            complete = {c["task"] for c in own} == set(paper.RULER_COLUMNS)
            cells.append(mean_cell(own, by_length.get(length) if complete else None, 100))
        rows.append((subject["name"], tuple(cells)))
    num_tasks = len({c["task"] for c in summary["cells"] if c["suite"] == "ruler"})
    title = f"Table 2: RULER, mean of {num_tasks} task{'s' if num_tasks > 1 else ''} by length"
    return PaperTable(title, tuple(f"{length:,}" for length in lengths), tuple(rows))


def _ruler_by_task(summary: dict[str, Any], subject: dict[str, Any]) -> PaperTable | None:
    """Tables 8 and 9: one subject, tasks across, lengths down."""
    own = [cell for cell in summary["cells"] if _place(cell) == (subject["name"], "ruler")]
    if not own:
        return None
    tasks = [task for task in paper.RULER_COLUMNS if any(cell["task"] == task for cell in own)]
    is_papers = _paper_method(summary, subject) == "longrope2"
    by_length = paper.RULER_TASK_VALUES.get(summary["model"], {}) if is_papers else {}
    rows = []
    for length in sorted({cell["length"] for cell in own}):
        columns: tuple[str, ...] = (*paper.RULER_COLUMNS, "mean")
        values: dict[str, float] = dict(zip(columns, by_length.get(length, ()), strict=False))
        at_length = {cell["task"]: cell for cell in own if cell["length"] == length}
        cells = [_cell(at_length.get(task), values.get(task), 100) for task in tasks]
        complete = len(tasks) == len(paper.RULER_COLUMNS)
        cells.append(
            mean_cell(list(at_length.values()), values.get("mean") if complete else None, 100)
        )
        rows.append((f"{length:,}", tuple(cells)))
    return PaperTable(
        f"Tables 8 and 9: RULER by task, {subject['name']}", (*tasks, "mean"), tuple(rows)
    )


def _long_tasks(summary: dict[str, Any]) -> PaperTable | None:
    """Table 3."""

    def values(method: str) -> dict[str, float]:
        loft, others = paper.LONG_TASK_VALUES.get(summary["model"], {}).get(method, ((), ()))
        return dict(
            zip(
                ("loft", *paper.LOFT_COLUMNS, "long", *paper.LONG_COLUMNS),
                (*loft, *others),
                strict=False,
            )
        )

    groups = (("loft", ("loft",), paper.LOFT_COLUMNS), ("long", LONG_SUITES, paper.LONG_COLUMNS))
    return _grouped("Table 3: long tasks", summary, groups, values)


def _short_tasks(summary: dict[str, Any]) -> PaperTable | None:
    """Table 4."""

    def values(method: str) -> dict[str, float]:
        found = paper.SHORT_TASK_VALUES.get(summary["model"], {}).get(method, ())
        return dict(zip(("short", *paper.SHORT_COLUMNS), found, strict=False))

    return _grouped(
        "Table 4: short tasks", summary, (("short", ("lm_eval",), paper.SHORT_COLUMNS),), values
    )


def _grouped(
    title: str,
    summary: dict[str, Any],
    groups: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    values: Callable[[str], dict[str, float]],
) -> PaperTable | None:
    """A row per subject; per group its mean and its tasks, those of the paper first, then others."""
    rows, columns = [], []
    for subject in summary["subjects"]:
        known, cells, columns = values(_paper_method(summary, subject)), [], []
        for name, suites, order in groups:
            suite_cells = [c for c in summary["cells"] if c["suite"] in suites]
            measured = {c["task"] for c in suite_cells}
            tasks = [t for t in order if t in measured] + sorted(measured - set(order))
            if not tasks:
                continue
            own = {c["task"]: c for c in suite_cells if c["subject"] == subject["name"]}
            complete = set(tasks) == set(order)
            columns += [f"{name} mean", *tasks]
            paper_samples = harmonic_mean([paper.NUM_SAMPLES[task] for task in order])
            cells.append(
                mean_cell(list(own.values()), known.get(name) if complete else None, paper_samples)
            )
            cells += [
                _cell(own.get(task), known.get(task), paper.NUM_SAMPLES.get(task, 100))
                for task in tasks
            ]
        rows.append((subject["name"], tuple(cells)))
    return PaperTable(title, tuple(columns), tuple(rows)) if columns else None


def _cell(cell: dict[str, Any] | None, paper_value: float | None, paper_samples: int) -> TableCell:
    """One measured score."""
    if cell is None or cell["score"] is None:
        return TableCell(paper=paper_value, note="not asked" if cell is None else cell["reason"])
    ours, low, high = (100 * value for value in (cell["score"], *cell["interval"]))
    judged = "" if paper_value is None else verdict(ours, low, high, paper_value, paper_samples)
    survived = cell.get("needle_survived")
    notes = (
        []
        if survived is None
        else [f"needle survived truncation in {100 * survived:.0f} % of the prompts"]
    )
    if cell["num_samples"] > FIRST_VIEW and "first_100" in cell:
        notes.append(f"first {FIRST_VIEW} samples: {100 * cell['first_100']:.1f}")
    return TableCell(ours, low, high, paper_value, judged, "; ".join(notes))


def _paper_method(summary: dict[str, Any], subject: dict[str, Any]) -> str:
    """The row of the paper that a subject is compared with; empty where there is none."""
    if subject["name"] == summary["reference"]:
        return paper.ORIGINAL
    return subject["method"] if subject["trained"] else ""


def _place(cell: dict[str, Any]) -> tuple[str, str]:
    """Whose cell of which suite."""
    return cell["subject"], cell["suite"]
