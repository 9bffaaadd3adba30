"""The report's section on suites: the paper's tables, needle maps, retention, sides, pairs."""

import html

from longrope2.evaluation.schema import Cell, SuiteSummary
from longrope2.evaluation.summary import EFFECTIVE_THRESHOLD
from longrope2.report.html import blind_note, heat_map, interval, table
from longrope2.report.paper import TableCell, paper_tables, reached_text, scores_by_length
from longrope2.statistics import score_interval

_VERDICT_COLORS = {"above": "#3056a0", "below": "#a23b2a"}


def suite_html(summary: SuiteSummary) -> str:
    """All that a suite found."""
    parts = [_needle_maps(summary)]
    for found in paper_tables(summary):
        rows = [[html.escape(label), *map(_cell, cells)] for label, cells in found.rows]
        shown = table(["", *map(html.escape, found.columns)], rows)
        basis = "<br>".join(map(html.escape, found.basis))
        parts.append(f"<h3>{html.escape(found.title)}</h3><p class=note>{basis}</p>{shown}")
    parts += [
        _kept(summary),
        _sides(summary),
        _lengths(summary),
        _pairs(summary),
        _calibration(summary),
    ]
    note = (
        "Scores in %, 95 % intervals in brackets. The paper's value stands below ours where the "
        "method and the training are the paper's; a verdict is given only where the paper asked "
        "the same, on 20 samples at least. It weighs the sampling error of both and is false in "
        "at most 5 % of the cases. Not told apart is not equal: the difference that would have "
        "been seen stands beside it."
    )
    return f"<p class=note>{note}</p>" + "".join(parts)


def _cell(cell: TableCell) -> str:
    ours = "-" if cell.ours is None else f"{cell.ours:.1f}"
    shown = f"<span title='{html.escape(cell.note, quote=True)}'>{ours}</span>"
    if cell.ours is not None:
        shown += f"<br><small>[{cell.low:.0f}-{cell.high:.0f}]</small>"
    paper = "" if cell.paper is None else f"paper {cell.paper:g}"
    if said := " ".join(filter(None, [paper, cell.verdict])):
        color = _VERDICT_COLORS.get(cell.verdict, "#666")
        shown += f"<br><small style='color:{color}'>{html.escape(said)}</small>"
    return shown


def _needle_maps(summary: SuiteSummary) -> str:
    maps, blind = [], dict[str, list[int]]()
    for subject in summary.subjects:
        own = (c for c in summary.cells if (c.subject, c.suite) == (subject.name, "needle_map"))
        finished = sorted((c for c in own if c.score is not None), key=lambda cell: cell.length)
        if finished:
            if not any(cell.score for cell in finished):
                blind[subject.name] = [cell.length for cell in finished]
            depths = {facts["requested_depth"] for cell in finished for facts in cell.facts}
            lines = {}
            for depth in sorted(depths):
                lines[depth] = [_heat(cell, depth) for cell in finished]
            maps.append(heat_map(subject.name, [cell.length for cell in finished], lines))
    if not maps:
        return ""
    axes = "Across: tokens. Down: depth of the needle, 0 % is the start."
    note = f"<p class=note>Needle map, answered by generation, in %. {axes}</p>"
    said = blind_note(blind, summary.original_len)
    return f"<h3>Needle map</h3>{said}<div class=maps>{''.join(maps)}</div>{note}"


def _heat(cell: Cell, depth: float) -> tuple[float, str]:
    """Share retrieved at one place of the map, and its tooltip."""
    pairs = zip(cell.scores, cell.facts, strict=True)
    own = [(score, facts) for score, facts in pairs if facts["requested_depth"] == depth]
    scores = [score for score, _ in own]
    realised = ", ".join(f"{100 * facts['depth']:.1f}" for _, facts in own[:3])
    found = f"{len(own)} samples, 95 % interval {interval(*score_interval(scores))}"
    return sum(scores) / len(own), f"{found}; realised depths {realised} %"


def _kept(summary: SuiteSummary) -> str:
    """Retention inside the original window and effective lengths."""
    reference, rows = summary.reference, []
    for row in summary.retention:
        if row.subject != reference:
            numbers = str(row.num_tasks), f"{100 * row.ratio:.1f} %"
            rows.append([html.escape(row.subject), html.escape(row.suite), *numbers])
    inside = f"of {html.escape(reference)} inside {summary.original_len:,}"
    shown = table(["model", "suite", "scores", inside], rows)
    kept = f"<h3>Short window kept</h3>{shown}" if rows else ""
    lengths = [
        [html.escape(row.subject), html.escape(reached_text(row))]
        for row in summary.effective_lengths
    ]
    title = f"<h3>Effective length (RULER average above {EFFECTIVE_THRESHOLD})</h3>"
    return kept + (title + table(["model", "tokens"], lengths) if lengths else "")


def _sides(summary: SuiteSummary) -> str:
    rows = []
    for cell in summary.cells:
        if cell.sides is not None:
            place = html.escape(cell.subject), html.escape(f"{cell.suite}/{cell.task}")
            shown = {k: f"{100 * s.score:.1f} ({s.num_samples})" for k, s in cell.sides.items()}
            sides = [shown.get(side, "") for side in ("short", "both", "long")]
            rows.append([*place, str(cell.length or ""), *sides])
    head = ["model", "task", "length", "original RoPE", "both", "rescaled RoPE"]
    shown = f"<details><summary>scores by RoPE side</summary>{table(head, rows)}</details>"
    return shown if rows else ""


def _lengths(summary: SuiteSummary) -> str:
    """LongBench's scores by the tokens of the prompt."""
    rows = []
    for cell in summary.cells:
        if cell.suite == "longbench" and cell.score is not None:
            for name, (score, count) in scores_by_length(cell).items():
                rows.append([cell.subject, cell.task, name, f"{100 * score:.1f}", str(count)])
    head = ["model", "task", "tokens", "score", "samples"]
    shown = table(head, [list(map(html.escape, row)) for row in rows])
    title = "LongBench by tokens of the prompt"
    return f"<details><summary>{title}</summary>{shown}</details>" if rows else ""


def _pairs(summary: SuiteSummary) -> str:
    rows = []
    for pair in summary.paired:
        low, high = pair.interval
        names = f"{pair.first} - {pair.second}", f"{pair.suite}/{pair.task}", str(pair.length or "")
        difference = f"{100 * pair.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        counts = f"{pair.num_better} / {pair.num_worse} of {pair.num_samples}"
        rows.append([*map(html.escape, names), difference, f"{pair.p_value:.3g}", counts])
    head = ["models", "task", "length", "difference", "p", "better / worse"]
    how = "McNemar exact for right and wrong, sign flips for graded scores"
    title = f"paired tests on identical samples ({how})"
    return f"<details><summary>{title}</summary>{table(head, rows)}</details>" if rows else ""


def _calibration(summary: SuiteSummary) -> str:
    """The gate, and what was not measured."""
    lines = ""
    for cell in summary.cells:
        if cell.score is None:
            place = f"{cell.subject}, {cell.suite}/{cell.task} {cell.length or ''}"
            lines += f"<li>{html.escape(f'{place}: {cell.reason}')}</li>"
    missing = f"<h3>Not measured</h3><ul>{lines}</ul>" if lines else ""
    if not summary.calibration.rules:
        note = "The base model was not calibrated: no rules were given."
        return f"{missing}<p class=note>{note}</p>"
    rows = []
    for rule in summary.calibration.rules:
        found = "" if rule.found is None else f"{rule.found:.2f}"
        allowed = f"{rule.low:g} to {rule.high:g}"
        rows.append([html.escape(rule.score), allowed, found, html.escape(rule.state)])
    head = ["score of the base model", "allowed", "found", ""]
    return f"{missing}<h3>Calibration</h3>{table(head, rows)}"
