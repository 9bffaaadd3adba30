"""The report's section on suites: the paper's tables, the needle map, retention, and scores by RoPE side."""

import html
from collections.abc import Sequence
from typing import Any

from longrope2.evaluation.statistics import score_interval
from longrope2.report.html import table
from longrope2.report.paper import TableCell, paper_tables

VERDICT_COLORS = {"agrees": "#0b6e69", "above": "#3056a0", "below": "#a23b2a"}


def suite_html(summary: dict[str, Any]) -> str:
    """All that a suite found.

    Args:
        summary: Content of ``suite.json``.
    """
    parts = [_needle_maps(summary)]
    for found in paper_tables(summary):
        rows = [[html.escape(label), *map(_cell, cells)] for label, cells in found.rows]
        parts.append(
            f"<h3>{html.escape(found.title)}</h3>{table(['', *map(html.escape, found.columns)], rows)}"
        )
    parts += [_kept(summary), _sides(summary), _pairs(summary), _calibration(summary)]
    note = (
        "Scores in %, 95 % intervals in brackets. The paper's value stands below ours where the method and the training "
        "are the paper's; the verdict weighs the sampling error of both."
    )
    return f"<p class=note>{note}</p>" + "".join(parts)


def _cell(cell: TableCell) -> str:
    """A score, its interval, the paper's value and the verdict."""
    if cell.ours is None:
        shown = f"<span title='{html.escape(cell.note, quote=True)}'>-</span>"
    else:
        shown = f"<span title='{html.escape(cell.note, quote=True)}'>{cell.ours:.1f}</span>"
        shown += f"<br><small>[{cell.low:.0f}-{cell.high:.0f}]</small>"
    if cell.paper is None:
        return shown
    color = VERDICT_COLORS.get(cell.verdict, "#666")
    return f"{shown}<br><small style='color:{color}'>paper {cell.paper:g} {cell.verdict}</small>"


def _needle_maps(summary: dict[str, Any]) -> str:
    """One heat map per subject, by requested depth and length."""
    maps = []
    for subject in summary["subjects"]:
        cells = [
            c
            for c in summary["cells"]
            if c["subject"] == subject["name"] and c["suite"] == "needle_map"
        ]
        finished = sorted((c for c in cells if c["score"] is not None), key=lambda c: c["length"])
        if not finished:
            continue
        depths = sorted({facts["requested_depth"] for c in finished for facts in c["facts"]})
        head = "".join(f"<th>{c['length']:,}</th>" for c in finished)
        lines = "".join(
            f"<tr><th>{100 * depth:.0f} %</th>{''.join(_heat(c, depth) for c in finished)}</tr>"
            for depth in depths
        )
        name = html.escape(subject["name"])
        maps.append(
            f"<figure class=map><figcaption>{name}</figcaption><table><tr><th></th>{head}</tr>{lines}</table></figure>"
        )
    if not maps:
        return ""
    note = "Needle map, answered by generation, in %. Across: tokens. Down: depth of the needle, 0 % is the start."
    return f"<h3>Needle map</h3><div class=maps>{''.join(maps)}</div><p class=note>{note}</p>"


def _heat(cell: dict[str, Any], depth: float) -> str:
    """One place of the map."""
    own = [
        (s, f)
        for s, f in zip(cell["scores"], cell["facts"], strict=True)
        if f["requested_depth"] == depth
    ]
    share = sum(score for score, _ in own) / len(own)
    low, high = score_interval([score for score, _ in own])
    realised = ", ".join(f"{100 * facts['depth']:.1f}" for _, facts in own[:3])
    shade = f"background:color-mix(in srgb,#0b6e69 {100 * share:.0f}%,#f4f1ea);color:{'#fff' if share > 0.55 else '#222'}"
    title = f"{len(own)} samples, 95 % interval {100 * low:.0f}-{100 * high:.0f} %; realised depths {realised} %"
    return f"<td style='{shade}' title='{title}'>{100 * share:.0f}</td>"


def _kept(summary: dict[str, Any]) -> str:
    """Retention inside the original window and effective lengths."""
    rows = [
        [
            html.escape(row["subject"]),
            row["suite"],
            str(row["num_tasks"]),
            f"{100 * row['ratio']:.1f} %",
        ]
        for row in summary["retention"]
        if row["subject"] != summary["reference"]
    ]
    head = [
        "model",
        "suite",
        "scores",
        f"of {html.escape(summary['reference'])} inside {summary['original_len']:,}",
    ]
    kept = f"<h3>Short window kept</h3>{table(head, rows)}" if rows else ""
    measured = {row["subject"] for row in summary["averages"]}
    lengths = [
        [html.escape(name), f"{length:,}" if length else "below the shortest"]
        for name, length in summary["effective_length"].items()
        if name in measured
    ]
    title = "<h3>Effective length (RULER average above 85.6)</h3>"
    return kept + (title + table(["model", "tokens"], lengths) if lengths else "")


def _sides(summary: dict[str, Any]) -> str:
    """Score by the RoPE side of the answer."""
    rows = [
        [
            html.escape(c["subject"]),
            html.escape(f"{c['suite']}/{c['task']}"),
            f"{c['length'] or '':}",
            *_side_cells(c["sides"]),
        ]
        for c in summary["cells"]
        if c["score"] is not None
    ]
    head = ["model", "task", "length", "original RoPE", "both", "rescaled RoPE"]
    return (
        f"<details><summary>scores by RoPE side</summary>{table(head, rows)}</details>"
        if rows
        else ""
    )


def _side_cells(sides: dict[str, Any]) -> list[str]:
    """Short, both, long."""
    return [
        f"{100 * sides[side]['score']:.1f} ({sides[side]['num_samples']})" if side in sides else ""
        for side in ("short", "both", "long")
    ]


def _pairs(summary: dict[str, Any]) -> str:
    """Paired tests on identical samples."""
    rows = [
        [
            html.escape(f"{p['first']} - {p['second']}"),
            html.escape(f"{p['suite']}/{p['task']}"),
            f"{p['length'] or '':}",
            f"{100 * p['difference']:+.1f} [{100 * p['interval'][0]:+.1f}, {100 * p['interval'][1]:+.1f}]",
            f"{p['p_value']:.3g}",
            f"{p['num_better']} / {p['num_worse']} of {p['num_samples']}",
        ]
        for p in summary["paired"]
    ]
    head = ["models", "task", "length", "difference", "p", "better / worse"]
    title = "paired tests on identical samples (McNemar exact for right and wrong, sign flips for graded scores)"
    return f"<details><summary>{title}</summary>{table(head, rows)}</details>" if rows else ""


def _calibration(summary: dict[str, Any]) -> str:
    """The gate, and what was not measured."""
    missing: Sequence[str] = [
        html.escape(f"{c['subject']}, {c['suite']}/{c['task']} {c['length'] or ''}: {c['reason']}")
        for c in summary["cells"]
        if c["score"] is None
    ]
    lines = (
        f"<h3>Not measured</h3><ul>{''.join(f'<li>{line}</li>' for line in missing)}</ul>"
        if missing
        else ""
    )
    rules = summary["calibration"]["rules"]
    if not rules:
        return lines + "<p class=note>The base model was not calibrated: no rules were given.</p>"
    rows = [
        [
            html.escape(r["score"]),
            f"{r['low']:g} to {r['high']:g}",
            "" if r["found"] is None else f"{r['found']:.2f}",
            r["state"],
        ]
        for r in rules
    ]
    head = ["score of the base model", "allowed", "found", ""]
    return f"{lines}<h3>Calibration</h3>{table(head, rows)}"
