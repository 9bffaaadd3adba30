"""The paper's tables with our numbers: each with its interval, the paper's value and a verdict.

A table is plain data (``PaperTable``), shown as text here and as HTML by the report. A paper's
value stands beside a subject of the same method that was trained like the paper's; the base model
is set beside the paper's original. There is a verdict only where both were asked alike
(``Protocol``), on the same items and on at least 20 of them. It weighs both sides' sampling error
(the paper's RULER and LOFT cells rest on 100 samples) by intervals that are never too narrow, so it
is false in at most 5 % of all cases: ``tests/unit/test_verdicts.py`` counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import harmonic_mean

from longrope2.evaluation.config import LM_EVAL_SUITE
from longrope2.evaluation.protocol import LONG_SUITES, basis_of
from longrope2.evaluation.schema import Cell, EffectiveLength, Protocol, SuiteSubject, SuiteSummary
from longrope2.evaluation.summary import EFFECTIVE_THRESHOLD, FIRST_VIEW
from longrope2.report import paper_values as paper
from longrope2.statistics import difference_interval, exact_interval, macro_interval

FEWEST_SAMPLES = 20
_SHORTEST_BIN = 4096
TOO_FEW, NOT_COMPARABLE, NOT_TOLD_APART = "too few samples", "not comparable", "not told apart"

# Part of a suite -> its suites, and the paper's tasks of it.
_PARTS: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "ruler": (("ruler",), paper.RULER_COLUMNS),
    "needle_map": (("needle_map",), ("needle_map",)),
    "loft": (("loft",), paper.LOFT_COLUMNS),
    "long": (LONG_SUITES, paper.LONG_COLUMNS),
    "short": ((LM_EVAL_SUITE,), paper.SHORT_COLUMNS),
}


@dataclass(frozen=True)
class TableCell:
    """One number of ours beside the paper's, all 0 to 100."""

    ours: float | None = None
    low: float = 0.0
    high: float = 0.0
    paper: float | None = None
    verdict: str = ""
    """``above`` or ``below`` the paper, or ``not told apart`` with what would have been; or why
    there is no verdict: ``not comparable``, ``too few samples``."""
    note: str = ""
    """Why there is no number, or what to know about it."""

    @property
    def text(self) -> str:
        """On one line."""
        if self.ours is None:
            return "-" if self.paper is None else f"- (paper {self.paper:g})"
        paper = [] if self.paper is None else [f"paper {self.paper:g}"]
        said = ", ".join([*paper, *filter(None, [self.verdict])])
        return f"{self.ours:.1f} [{self.low:.1f}-{self.high:.1f}]" + (f" ({said})" if said else "")


@dataclass(frozen=True)
class PaperTable:
    """Rows of cells under column names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[TableCell, ...]], ...]
    basis: tuple[str, ...] = field(default=())
    """Comparable or not, and how it was asked: a line for each part of the table."""


@dataclass(frozen=True)
class PaperValue:
    """What a mean of ours is set beside."""

    value: float | None
    """Score in percent; None where the paper has none."""
    num_samples: float
    """Samples of one task, of unequal tasks the harmonic mean."""
    is_comparable: bool = False
    """Whether it was asked as ours."""


def verdict(
    ours: float,
    low: float,
    high: float,
    paper_value: float,
    paper_samples: float,
    num_tasks: int = 1,
) -> str:
    """Whether a score of ours and the paper's differ by more than chance (5 %).

    The paper's interval is the exact one of right and wrong answers, which graded ones do not
    exceed; for a mean of ``num_tasks`` it has the width of the one at 50 %, which no mean exceeds.
    Scores run from 0 to 100; ``low`` and ``high`` are the ends of our 95 % interval;
    ``paper_samples`` are those of one task, of unequal tasks the harmonic mean, exact for a mean.
    """
    whole = int(paper_samples * num_tasks)
    if num_tasks == 1:
        papers = exact_interval(paper_value / 100 * whole, whole)
        paper_low, paper_high = (100 * end for end in papers)
    else:
        half_width = 50 - 100 * exact_interval(whole // 2, whole)[0]
        paper_low, paper_high = paper_value - half_width, paper_value + half_width
    interval = difference_interval(ours, (low, high), paper_value, (paper_low, paper_high))
    if interval[0] <= 0 <= interval[1]:
        difference = ours - paper_value
        reach = max(difference - interval[0], interval[1] - difference)
        return f"{NOT_TOLD_APART} at this size (would see a difference of {reach:.1f})"
    return "above" if ours > paper_value else "below"


def _judged(cell: TableCell, paper_is: PaperValue, num_samples: int, num_tasks: int = 1) -> str:
    """The verdict on a cell with a number, or why there is none."""
    assert cell.ours is not None
    if num_samples < FEWEST_SAMPLES:
        return TOO_FEW
    if paper_is.value is None:
        return ""
    if not paper_is.is_comparable:
        return NOT_COMPARABLE
    numbers = cell.ours, cell.low, cell.high, paper_is.value
    return verdict(*numbers, paper_samples=paper_is.num_samples, num_tasks=num_tasks)


def mean_cell(cells: Sequence[Cell], paper_is: PaperValue) -> TableCell:
    """The plain mean of finished cells; without a number when one is missing."""
    scores = [cell.score for cell in cells if cell.score is not None]
    if len(scores) < len(cells) or not cells:
        reasons = [cell.reason for cell in cells if cell.score is None]
        return TableCell(paper=paper_is.value, note=reasons[0] if reasons else "not in this suite")
    bounds = macro_interval([cell.scores for cell in cells])
    low, high = (100 * bound for bound in bounds)
    found = TableCell(100 * sum(scores) / len(scores), low, high, paper=paper_is.value)
    fewest = min(cell.num_samples for cell in cells)
    return replace(found, verdict=_judged(found, paper_is, fewest, len(cells)))


def _protocol(summary: SuiteSummary, part: str) -> Protocol:
    """How a part was asked, by its settings and by the tasks and items that its cells have.

    That of older results is not known.
    """
    known = {protocol.part: protocol for protocol in summary.protocols}
    unknown = ("how it was asked is not recorded",)
    protocol, differs = known.get(part, Protocol(part, (), unknown)), []
    suites, papers_tasks = _PARTS[part]
    cells = [cell for cell in summary.cells if cell.suite in suites]
    measured = {cell.task for cell in cells}.intersection(papers_tasks)
    left_out = f"{len(measured)} of {len(papers_tasks)} tasks"
    if cells and len(measured) < len(papers_tasks) and not protocol.differs:
        differs.append(left_out)
    if part != "ruler":
        differs += _other_items(cells)
    return replace(protocol, differs=(*protocol.differs, *differs))


def _other_items(cells: Sequence[Cell]) -> list[str]:
    """Tasks that had other items than the paper's, by their number."""
    found = {cell.task: cell.num_samples for cell in cells if cell.score is not None}
    return [
        f"{task} of {count:,} items instead of {paper.NUM_SAMPLES[task]:,}"
        for task, count in found.items()
        if task in paper.NUM_SAMPLES and count != paper.NUM_SAMPLES[task]
    ]


def _basis(protocol: Protocol) -> str:
    return f"{protocol.part}: {basis_of(protocol)}".rstrip(": ")


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
        lines = [table.title, *(f"  {line}" for line in table.basis)]
        for label, cells in table.rows:
            shown = [f"{name} {cell.text}" for name, cell in zip(table.columns, cells, strict=True)]
            lines.append(f"  {label:<{width}}  " + "; ".join(shown))
        parts.append("\n".join(lines))
    lines = [effective_line(summary, row) for row in summary.effective_lengths]
    for row in summary.retention:
        if row.subject != summary.reference:
            place = f"{row.suite} inside {summary.original_len:,} tokens"
            kept = f"{row.subject} keeps {100 * row.ratio:.1f} % of {summary.reference}"
            count = f"{row.num_tasks} score{'' if row.num_tasks == 1 else 's'}"
            lines.append(f"{place}: {kept} over {count}")
    parts += ["\n".join(lines)] if lines else []
    return "\n\n".join(parts + _by_side(summary) + _by_length(summary) + _missing(summary))


def effective_line(summary: SuiteSummary, row: EffectiveLength) -> str:
    """How far a subject's window works, as far as its samples tell."""
    whose = "" if not _protocol(summary, "ruler").differs else ", not asked as RULER does"
    title = f"effective length of {row.subject} (RULER average above {EFFECTIVE_THRESHOLD}{whose})"
    return f"{title}: {reached_text(row)}"


def reached_text(row: EffectiveLength) -> str:
    """The length that is sure, and the one that the samples do not exclude."""
    if row.reason:
        return f"not said, {row.reason}"
    if row.perhaps is None:
        return "below the shortest length"
    if row.surely == row.perhaps:
        return f"{row.surely:,} tokens"
    sure = "not told at the shortest length" if row.surely is None else f"{row.surely:,} tokens"
    return f"{sure}, perhaps {row.perhaps:,}: more samples would tell"


def _by_side(summary: SuiteSummary) -> list[str]:
    """Scores whose answers were made on more than one RoPE side."""
    lines = []
    for cell in summary.cells:
        if cell.sides is not None and len(cell.sides) > 1:
            sides = (f"{k} {100 * v.score:.1f} ({v.num_samples})" for k, v in cell.sides.items())
            lines.append(f"  {cell.subject} {cell.suite}/{cell.task}: {', '.join(sides)}")
    return ["by RoPE side of the answer, score (samples)\n" + "\n".join(lines)] if lines else []


def scores_by_length(cell: Cell) -> dict[str, tuple[float, int]]:
    """Score and samples of a cell by the tokens of its prompts, in powers of two from 4,096 on.

    LongBench's prompts have lengths of their own, most of them inside the original window: one
    score of them all says little of a long one.
    """
    found: dict[int, list[float]] = {}
    for score, facts in zip(cell.scores, cell.facts, strict=False):
        border = _SHORTEST_BIN
        while facts["prompt_tokens"] > border:
            border *= 2
        found.setdefault(border, []).append(score)
    return {
        f"up to {border:,}": (sum(found[border]) / len(found[border]), len(found[border]))
        for border in sorted(found)
    }


def _by_length(summary: SuiteSummary) -> list[str]:
    """LongBench's scores by the lengths of its prompts."""
    lines = []
    for cell in summary.cells:
        if cell.suite == "longbench" and cell.score is not None:
            bins = scores_by_length(cell).items()
            shown = ", ".join(
                f"{name} {100 * score:.1f} ({count})" for name, (score, count) in bins
            )
            lines.append(f"  {cell.subject} {cell.suite}/{cell.task}: {shown}")
    return ["by tokens of the prompt, score (samples)\n" + "\n".join(lines)] if lines else []


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
        none = PaperValue(None, 0)
        cells = (_cell(own.get((subject.name, length)), none) for length in lengths)
        rows.append((subject.name, tuple(cells)))
    protocol = _protocol(summary, "needle_map")
    title = f"{'' if protocol.differs else 'Figure 6: '}needles retrieved, all depths"
    columns, basis = tuple(f"{n:,}" for n in lengths), (_basis(protocol),)
    return PaperTable(title, columns, tuple(rows), basis) if own else None


def _ruler_averages(summary: SuiteSummary) -> PaperTable | None:
    ruler = [cell for cell in summary.cells if cell.suite == "ruler"]
    lengths = sorted({row.length for row in summary.averages if row.suite == "ruler"})
    if not lengths:
        return None
    protocol = _protocol(summary, "ruler")
    rows, by_method = [], paper.RULER_AVERAGES.get(summary.model, {})
    for subject in summary.subjects:
        values = by_method.get(_paper_method(summary, subject), ())
        by_length = dict(zip(paper.RULER_LENGTHS, values, strict=False))
        cells = []
        for length in lengths:
            own = [c for c in ruler if c.subject == subject.name and c.length == length]
            is_complete = {c.task for c in own} == set(paper.RULER_COLUMNS)
            value = by_length.get(length) if is_complete else None
            cells.append(mean_cell(own, PaperValue(value, 100, not protocol.differs)))
        rows.append((subject.name, tuple(cells)))
    num_tasks = len({cell.task for cell in ruler})
    name = "" if protocol.differs else "Table 2: "
    title = f"{name}RULER, mean of {num_tasks} task{'s' if num_tasks > 1 else ''} by length"
    columns = tuple(f"{length:,}" for length in lengths)
    return PaperTable(title, columns, tuple(rows), (_basis(protocol),))


def _ruler_by_task(summary: SuiteSummary, subject: SuiteSubject) -> PaperTable | None:
    """Tables 8 and 9: one subject, tasks across, lengths down."""
    own = [c for c in summary.cells if c.subject == subject.name and c.suite == "ruler"]
    if not own:
        return None
    columns = (*paper.RULER_COLUMNS, "mean")
    measured = {cell.task for cell in own}
    tasks = [task for task in paper.RULER_COLUMNS if task in measured]
    protocol = _protocol(summary, "ruler")
    is_papers = _paper_method(summary, subject) == "longrope2"
    by_length = paper.RULER_TASK_VALUES.get(summary.model, {}) if is_papers else {}
    rows = []
    for length in sorted({cell.length for cell in own}):
        values: dict[str, float] = dict(zip(columns, by_length.get(length, ()), strict=False))
        at_length = {cell.task: cell for cell in own if cell.length == length}
        papers = partial(PaperValue, num_samples=100, is_comparable=not protocol.differs)
        cells = [_cell(at_length.get(task), papers(values.get(task))) for task in tasks]
        papers_mean = values.get("mean") if len(tasks) == len(paper.RULER_COLUMNS) else None
        cells.append(mean_cell(list(at_length.values()), papers(papers_mean)))
        rows.append((f"{length:,}", tuple(cells)))
    title = f"{'' if protocol.differs else 'Tables 8 and 9: '}RULER by task, {subject.name}"
    return PaperTable(title, (*tasks, "mean"), tuple(rows), (_basis(protocol),))


def _long_tasks(summary: SuiteSummary) -> PaperTable | None:
    by_method = paper.LONG_TASK_VALUES.get(summary.model, {})
    names = ("loft", *paper.LOFT_COLUMNS, "long", *paper.LONG_COLUMNS)

    def values(method: str) -> dict[str, float]:
        loft, others = by_method.get(method, ((), ()))
        return dict(zip(names, (*loft, *others), strict=False))

    return _grouped("Table 3", "long tasks", summary, ("loft", "long"), values)


def _short_tasks(summary: SuiteSummary) -> PaperTable | None:
    by_method = paper.SHORT_TASK_VALUES.get(summary.model, {})

    def values(method: str) -> dict[str, float]:
        return dict(zip(("short", *paper.SHORT_COLUMNS), by_method.get(method, ()), strict=False))

    return _grouped("Table 4", "short tasks", summary, ("short",), values)


def _grouped(
    papers_name: str,
    title: str,
    summary: SuiteSummary,
    groups: Sequence[str],
    values: Callable[[str], dict[str, float]],
) -> PaperTable | None:
    """A row per subject; per group its mean and its tasks, those of the paper first, then others.

    A group is a part of the suite; ``values`` gives the paper's value by task and by group for a
    method.
    """
    rows, columns, protocols = [], [], []
    for subject in summary.subjects:
        known, cells, columns, protocols = values(_paper_method(summary, subject)), [], [], []
        for name in groups:
            suites, order = _PARTS[name]
            suite_cells = [c for c in summary.cells if c.suite in suites]
            measured = {c.task for c in suite_cells}
            tasks = [t for t in order if t in measured] + sorted(measured - set(order))
            if not tasks:
                continue
            protocols.append(_protocol(summary, name))
            own = {c.task: c for c in suite_cells if c.subject == subject.name}
            columns += [f"{name} mean", *tasks]
            cells += _group_cells(name, own, tasks, order, known, not protocols[-1].differs)
        rows.append((subject.name, tuple(cells)))
    is_papers = len(protocols) == len(groups) and not any(p.differs for p in protocols)
    shown = f"{papers_name}: {title}" if is_papers else title
    basis = tuple(map(_basis, protocols))
    return PaperTable(shown, tuple(columns), tuple(rows), basis) if columns else None


def _group_cells(
    name: str,
    own: dict[str, Cell],
    tasks: Sequence[str],
    order: Sequence[str],
    known: dict[str, float],
    is_comparable: bool,
) -> list[TableCell]:
    """The mean of a group of one subject, and its tasks."""
    papers_mean = known.get(name) if set(tasks) == set(order) else None
    paper_samples = harmonic_mean([paper.NUM_SAMPLES[task] for task in order])
    papers = PaperValue(papers_mean, paper_samples, is_comparable)
    cells = [mean_cell(list(own.values()), papers)]
    for task in tasks:
        num_samples = paper.NUM_SAMPLES.get(task, 100)
        cells.append(_cell(own.get(task), PaperValue(known.get(task), num_samples, is_comparable)))
    return cells


def _cell(cell: Cell | None, paper_is: PaperValue) -> TableCell:
    if cell is None or cell.score is None:
        return TableCell(paper=paper_is.value, note="not asked" if cell is None else cell.reason)
    assert cell.interval is not None
    ours, low, high = (100 * value for value in (cell.score, *cell.interval))
    notes = []
    if cell.needle_survived is not None:
        share = f"{100 * cell.needle_survived:.0f} %"
        notes.append(f"needle survived truncation in {share} of the prompts")
    if cell.num_samples > FIRST_VIEW and cell.first_100 is not None:
        notes.append(f"first {FIRST_VIEW} samples: {100 * cell.first_100:.1f}")
    found = TableCell(ours, low, high, paper=paper_is.value, note="; ".join(notes))
    return replace(found, verdict=_judged(found, paper_is, cell.num_samples))


def _paper_method(summary: SuiteSummary, subject: SuiteSubject) -> str:
    """The row of the paper that a subject is compared with; empty where there is none."""
    if subject.name == summary.reference:
        return paper.ORIGINAL
    return subject.method if subject.trained else ""
