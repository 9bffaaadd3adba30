"""The paper's tables with our numbers: each with its interval, the paper's value and a verdict.

A table is plain data (``PaperTable``), shown as text here and as HTML by the report. A paper's
value is compared with a subject of the same method that was trained like the paper's; the base
model is compared with the paper's original. A verdict weighs both sides' sampling error: the
paper's RULER and LOFT cells rest on 100 samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import harmonic_mean

from longrope2.evaluation.config import LM_EVAL_SUITE
from longrope2.evaluation.schema import Cell, SuiteSubject, SuiteSummary
from longrope2.evaluation.summary import EFFECTIVE_THRESHOLD, FIRST_VIEW
from longrope2.report import paper_values as paper
from longrope2.statistics import NORMAL_95, macro_interval

_LONG_SUITES = ("longbench", "infinitebench")


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

    The paper's standard error is that of a share over its samples; for a mean of ``num_tasks`` it
    is the one at 50 %, which no mean exceeds. Scores run from 0 to 100; ``low`` and ``high`` are
    the ends of our 95 % interval; ``paper_samples`` are those of one task, of unequal tasks the
    harmonic mean, exact for a mean.
    """
    share = 0.5
    if num_tasks == 1:
        share = min(max(paper_value / 100, 0.5 / paper_samples), 1 - 0.5 / paper_samples)
    paper_error = 100 * math.sqrt(share * (1 - share) / (paper_samples * num_tasks))
    our_error = (high - ours if paper_value > ours else ours - low) / NORMAL_95
    if abs(ours - paper_value) <= NORMAL_95 * math.hypot(our_error, paper_error):
        return "agrees"
    return "above" if ours > paper_value else "below"


def mean_cell(cells: Sequence[Cell], paper_value: float | None, paper_samples: float) -> TableCell:
    """The plain mean of finished cells; without a number when one is missing."""
    scores = [cell.score for cell in cells if cell.score is not None]
    if len(scores) < len(cells) or not cells:
        reasons = [cell.reason for cell in cells if cell.score is None]
        return TableCell(paper=paper_value, note=reasons[0] if reasons else "not in this suite")
    ours = 100 * sum(scores) / len(scores)
    bounds = macro_interval([cell.scores for cell in cells])
    low, high = (100 * bound for bound in bounds)
    judged, paper_is = "", {"paper_samples": paper_samples, "num_tasks": len(cells)}
    if paper_value is not None:
        judged = verdict(ours, low, high, paper_value=paper_value, **paper_is)
    return TableCell(ours, low, high, paper=paper_value, verdict=judged)


def paper_tables(summary: SuiteSummary) -> list[PaperTable]:
    """The tables that the suite has something for."""
    tables = [make(summary) for make in (_needle_map, _ruler_averages, _long_tasks, _short_tasks)]
    tables += [_ruler_by_task(summary, subject) for subject in summary.subjects]
    return [table for table in tables if table is not None]


def paper_text(summary: SuiteSummary) -> str:
    """All tables, effective lengths, retention, scores by RoPE side and what is missing."""
    parts = [] if summary.text is None else [str(summary.text)]
    for table in paper_tables(summary):
        width = max(len(label) for label, _ in table.rows)
        lines = [table.title]
        for label, cells in table.rows:
            shown = [f"{name} {cell.text}" for name, cell in zip(table.columns, cells, strict=True)]
            lines.append(f"  {label:<{width}}  " + "; ".join(shown))
        parts.append("\n".join(lines))
    lines = []
    for name, length in summary.effective_length.items():
        if any(row.subject == name for row in summary.averages):
            reached = f"{length:,} tokens" if length else "below the shortest length"
            title = f"effective length of {name} (RULER average above {EFFECTIVE_THRESHOLD})"
            lines.append(f"{title}: {reached}")
    for row in summary.retention:
        if row.subject != summary.reference:
            place = f"{row.suite} inside {summary.original_len:,} tokens"
            kept = f"{row.subject} keeps {100 * row.ratio:.1f} % of {summary.reference}"
            count = f"{row.num_tasks} score{'' if row.num_tasks == 1 else 's'}"
            lines.append(f"{place}: {kept} over {count}")
    parts += ["\n".join(lines)] if lines else []
    return "\n\n".join(parts + _by_side(summary) + _missing(summary))


def _by_side(summary: SuiteSummary) -> list[str]:
    """Scores whose answers were made on more than one RoPE side."""
    lines = []
    for cell in summary.cells:
        if cell.sides is not None and len(cell.sides) > 1:
            sides = (f"{k} {100 * v.score:.1f} ({v.num_samples})" for k, v in cell.sides.items())
            lines.append(f"  {cell.subject} {cell.suite}/{cell.task}: {', '.join(sides)}")
    return ["by RoPE side of the answer, score (samples)\n" + "\n".join(lines)] if lines else []


def _missing(summary: SuiteSummary) -> list[str]:
    """Cells without a score, rules of the gate that were broken or could not be tried."""
    lost = (cell for cell in summary.cells if cell.score is None)
    lines = [f"  {c.subject} {c.suite}/{c.task} {c.length or ''}: {c.reason}" for c in lost]
    parts = ["not measured\n" + "\n".join(lines)] if lines else []
    rules = summary.calibration.rules
    if not rules:
        return [*parts, "the base model was not calibrated: no rules were given (calibration=...)"]
    shown = [f"  {r.score}: {r.state} ({r.low:g} to {r.high:g}, found {r.found})" for r in rules]
    return [*parts, "calibration of the base model\n" + "\n".join(shown)]


def _needle_map(summary: SuiteSummary) -> PaperTable | None:
    """Figure 6 without its depths, which the report draws; the paper prints no numbers."""
    own = {(c.subject, c.length): c for c in summary.cells if c.suite == "needle_map"}
    lengths = sorted({length for _, length in own})
    rows = []
    for subject in summary.subjects:
        cells = (_cell(own.get((subject.name, length)), None, 0) for length in lengths)
        rows.append((subject.name, tuple(cells)))
    title, columns = "Figure 6: needles retrieved, all depths", tuple(f"{n:,}" for n in lengths)
    return PaperTable(title, columns, tuple(rows)) if own else None


def _ruler_averages(summary: SuiteSummary) -> PaperTable | None:
    ruler = [cell for cell in summary.cells if cell.suite == "ruler"]
    lengths = sorted({row.length for row in summary.averages if row.suite == "ruler"})
    if not lengths:
        return None
    rows, by_method = [], paper.RULER_AVERAGES.get(summary.model, {})
    for subject in summary.subjects:
        values = by_method.get(_paper_method(summary, subject), ())
        by_length = dict(zip(paper.RULER_LENGTHS, values, strict=False))
        cells = []
        for length in lengths:
            own = [c for c in ruler if c.subject == subject.name and c.length == length]
            is_complete = {c.task for c in own} == set(paper.RULER_COLUMNS)
            cells.append(mean_cell(own, by_length.get(length) if is_complete else None, 100))
        rows.append((subject.name, tuple(cells)))
    num_tasks = len({cell.task for cell in ruler})
    title = f"Table 2: RULER, mean of {num_tasks} task{'s' if num_tasks > 1 else ''} by length"
    return PaperTable(title, tuple(f"{length:,}" for length in lengths), tuple(rows))


def _ruler_by_task(summary: SuiteSummary, subject: SuiteSubject) -> PaperTable | None:
    """Tables 8 and 9: one subject, tasks across, lengths down."""
    own = [c for c in summary.cells if c.subject == subject.name and c.suite == "ruler"]
    if not own:
        return None
    columns = (*paper.RULER_COLUMNS, "mean")
    measured = {cell.task for cell in own}
    tasks = [task for task in paper.RULER_COLUMNS if task in measured]
    is_papers = _paper_method(summary, subject) == "longrope2"
    by_length = paper.RULER_TASK_VALUES.get(summary.model, {}) if is_papers else {}
    rows = []
    for length in sorted({cell.length for cell in own}):
        values: dict[str, float] = dict(zip(columns, by_length.get(length, ()), strict=False))
        at_length = {cell.task: cell for cell in own if cell.length == length}
        cells = [_cell(at_length.get(task), values.get(task), 100) for task in tasks]
        papers_mean = values.get("mean") if len(tasks) == len(paper.RULER_COLUMNS) else None
        cells.append(mean_cell(list(at_length.values()), papers_mean, 100))
        rows.append((f"{length:,}", tuple(cells)))
    title = f"Tables 8 and 9: RULER by task, {subject.name}"
    return PaperTable(title, (*tasks, "mean"), tuple(rows))


def _long_tasks(summary: SuiteSummary) -> PaperTable | None:
    by_method = paper.LONG_TASK_VALUES.get(summary.model, {})
    names = ("loft", *paper.LOFT_COLUMNS, "long", *paper.LONG_COLUMNS)

    def values(method: str) -> dict[str, float]:
        loft, others = by_method.get(method, ((), ()))
        return dict(zip(names, (*loft, *others), strict=False))

    groups = (("loft", ("loft",), paper.LOFT_COLUMNS), ("long", _LONG_SUITES, paper.LONG_COLUMNS))
    return _grouped("Table 3: long tasks", summary, groups, values)


def _short_tasks(summary: SuiteSummary) -> PaperTable | None:
    by_method = paper.SHORT_TASK_VALUES.get(summary.model, {})

    def values(method: str) -> dict[str, float]:
        return dict(zip(("short", *paper.SHORT_COLUMNS), by_method.get(method, ()), strict=False))

    groups = (("short", (LM_EVAL_SUITE,), paper.SHORT_COLUMNS),)
    return _grouped("Table 4: short tasks", summary, groups, values)


def _grouped(
    title: str,
    summary: SuiteSummary,
    groups: Sequence[tuple[str, Sequence[str], Sequence[str]]],
    values: Callable[[str], dict[str, float]],
) -> PaperTable | None:
    """A row per subject; per group its mean and its tasks, those of the paper first, then others.

    A group is a name, its suites and its tasks in the paper's order; ``values`` gives the paper's
    value by task and by group for a method.
    """
    rows, columns = [], []
    for subject in summary.subjects:
        known, cells, columns = values(_paper_method(summary, subject)), [], []
        for name, suites, order in groups:
            suite_cells = [c for c in summary.cells if c.suite in suites]
            measured = {c.task for c in suite_cells}
            tasks = [t for t in order if t in measured] + sorted(measured - set(order))
            if not tasks:
                continue
            own = {c.task: c for c in suite_cells if c.subject == subject.name}
            papers_mean = known.get(name) if set(tasks) == set(order) else None
            paper_samples = harmonic_mean([paper.NUM_SAMPLES[task] for task in order])
            columns += [f"{name} mean", *tasks]
            cells.append(mean_cell(list(own.values()), papers_mean, paper_samples))
            for task in tasks:
                num_samples = paper.NUM_SAMPLES.get(task, 100)
                cells.append(_cell(own.get(task), known.get(task), num_samples))
        rows.append((subject.name, tuple(cells)))
    return PaperTable(title, tuple(columns), tuple(rows)) if columns else None


def _cell(cell: Cell | None, paper_value: float | None, paper_samples: int) -> TableCell:
    if cell is None or cell.score is None:
        return TableCell(paper=paper_value, note="not asked" if cell is None else cell.reason)
    assert cell.interval is not None
    ours, low, high = (100 * value for value in (cell.score, *cell.interval))
    judged, notes = "", []
    if paper_value is not None:
        judged = verdict(ours, low, high, paper_value=paper_value, paper_samples=paper_samples)
    if cell.needle_survived is not None:
        share = f"{100 * cell.needle_survived:.0f} %"
        notes.append(f"needle survived truncation in {share} of the prompts")
    if cell.num_samples > FIRST_VIEW and cell.first_100 is not None:
        notes.append(f"first {FIRST_VIEW} samples: {100 * cell.first_100:.1f}")
    return TableCell(ours, low, high, paper=paper_value, verdict=judged, note="; ".join(notes))


def _paper_method(summary: SuiteSummary, subject: SuiteSubject) -> str:
    """The row of the paper that a subject is compared with; empty where there is none."""
    if subject.name == summary.reference:
        return paper.ORIGINAL
    return subject.method if subject.trained else ""
