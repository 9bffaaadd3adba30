"""The report of a run: one HTML file that needs no network, from whatever stages have run.

Figures are inline SVG, numbers are HTML tables and grids, so they can be read, searched and copied,
at 1280 as at 390 pixels. A stage that has not run is said to be missing, with the command that runs
it.
"""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longrope2.files.artifacts import PRODUCT_FOLDERS, write_text
from longrope2.report.data import RunRecord, StageState, load_run
from longrope2.report.html import PAGE, bullet_list, change, image, interval, percent, table
from longrope2.report.plots import factors_figure, lengths_figure, search_figure
from longrope2.report.suite import suite_html
from longrope2.report.training import limits, mix_images, training_images

REPORT_FILE = "report.html"
COMMANDS = {
    "segments": "python -m data_prep.pack",
    "factors": "python -m launch.search",
    "checkpoints": "python -m launch.train",
    "evaluations": "python -m launch.evaluate",
    "exports": "python -m launch.export",
}


def write_report(run_folder: Path, reload_seconds: int | None = None) -> Path:
    """Write ``report.html`` into the run folder.

    Args:
        run_folder: The run.
        reload_seconds: The page asks its browser to load it again after so many seconds; None for a
            page that rests.

    Returns:
        Path of the report.

    Raises:
        ArtifactError: the folder is no run folder, or one of its files is damaged.
    """
    path = run_folder / REPORT_FILE
    write_text(path, render_report(load_run(run_folder), reload_seconds))
    return path


def render_report(record: RunRecord, reload_seconds: int | None = None) -> str:
    """The whole page."""
    suite = [] if record.suite is None else [("Benchmarks", suite_html(record.suite))]
    sections = [
        *suite,
        ("Comparison", _comparison(record)),
        ("Needles by depth and length", _needle_maps(record)),
        ("Short window kept", _retention(record)),
        ("Rescale factors", _factors(record)),
        ("Search", _search(record)),
        ("Training", _training(record)),
        ("Mix", _mix(record)),
        ("Limits of these figures", bullet_list(limits(record))),
        (
            "What was run",
            "".join(_stage(stage, record.folder.name) for stage in record.stages.values()),
        ),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    name = html.escape(record.folder.name)
    reload = (
        "" if reload_seconds is None else f"<meta http-equiv='refresh' content='{reload_seconds}'>"
    )
    return (
        PAGE.replace("%HEAD%", reload)
        .replace("%TITLE%", f"LongRoPE2: {name}")
        .replace("%BODY%", f"<h1>{name}</h1>{_headline(record)}{body}")
    )


def _headline(record: RunRecord) -> str:
    """What happened, in two sentences."""
    if record.evaluation is None:
        return (
            "" if record.suite is not None else "<p class=lead>Nothing has been evaluated yet.</p>"
        )
    summary = record.evaluation
    longest = max(row["length"] for row in summary["needle"])
    at_longest = {row["subject"]: row for row in summary["needle"] if row["length"] == longest}
    best = max(at_longest.values(), key=lambda row: (row["accuracy"], -row["perplexity"]))
    reference = at_longest[summary["reference"]]
    ratio = next(row["ratio"] for row in summary["retention"] if row["subject"] == best["subject"])
    return (
        f"<p class=lead>Window {summary['original_len']:,} to {summary['target_len']:,} tokens. At {longest:,} tokens "
        f"<b>{html.escape(best['subject'])}</b> retrieves {percent(best['accuracy'])} of the needles "
        f"({interval(best)}), {html.escape(reference['subject'])} {percent(reference['accuracy'])} "
        f"({interval(reference)}). Inside the original window its perplexity changes by {change(ratio)}.</p>"
    )


def _comparison(record: RunRecord) -> str:
    """Accuracy by length, perplexities, retention: a table and two figures."""
    if record.evaluation is None:
        return _missing(record, "evaluations")
    summary = record.evaluation
    needle = {(row["subject"], row["length"]): row for row in summary["needle"]}
    text = {(row["subject"], row["length"]): row for row in summary["perplexity"]}
    retention = {row["subject"]: row for row in summary["retention"]}
    lengths = sorted({length for _, length in needle})
    longest = lengths[-1]
    rows = [
        [
            html.escape(name),
            *(f"{100 * needle[name, length]['accuracy']:.0f}" for length in lengths),
            interval(needle[name, longest]),
            f"{needle[name, longest]['perplexity']:.4g}",
            f"{text[name, longest]['perplexity']:.4g}",
            change(retention[name]["ratio"]),
        ]
        for name in (subject["name"] for subject in summary["subjects"])
    ]
    head = [
        "model",
        *(f"{length:,}" for length in lengths),
        f"95 % interval at {longest:,}",
        "needle ppl",
        "text ppl",
        "short window",
    ]
    num_samples = needle[rows[0][0], longest]["num_samples"]
    note = (
        f"Numbers on top: needles whose value is retrieved exactly at that many tokens, in % of {num_samples}. Needle "
        f"ppl and text ppl: perplexity of the needles' values and of held-out text at {longest:,} tokens. Short "
        f"window: change of the perplexity of held-out text inside {summary['original_len']:,} tokens against "
        f"{html.escape(summary['reference'])}. Up to {summary['original_len']:,} tokens every model runs on its "
        "short-window RoPE, beyond on its long-window RoPE."
    )
    names = [subject["name"] for subject in summary["subjects"]]
    figures = [
        image(
            lengths_figure(summary["needle"], names, "accuracy", "needles retrieved"),
            "Share of needles retrieved by length, one line per model",
        ),
        image(
            lengths_figure(summary["needle"], names, "perplexity", "needle perplexity"),
            "Needle perplexity by length, one line per model",
        ),
        image(
            lengths_figure(summary["perplexity"], names, "perplexity", "text perplexity"),
            "Perplexity of the same held-out tokens by length of their context, one line per model",
        ),
    ]
    return (
        table(head, rows) + f"<p class=note>{note}</p><div class=figures>{''.join(figures)}</div>"
    )


def _needle_maps(record: RunRecord) -> str:
    """One small heat map per subject: depth down, length across."""
    if record.evaluation is None:
        return _missing(record, "evaluations")
    summary = record.evaluation
    maps = []
    for subject in summary["subjects"]:
        rows = sorted(
            (r for r in summary["needle"] if r["subject"] == subject["name"]),
            key=lambda r: r["length"],
        )
        depths = [cell["depth"] for cell in rows[0]["depths"]]
        lines = "".join(
            f"<tr><th>{100 * depth:.0f} %</th>{''.join(_heat_cell(row['depths'][i]) for row in rows)}</tr>"
            for i, depth in enumerate(depths)
        )
        head = "".join(f"<th>{row['length']:,}</th>" for row in rows)
        maps.append(
            f"<figure class=map><figcaption>{html.escape(subject['name'])}</figcaption>"
            f"<table><tr><th></th>{head}</tr>{lines}</table></figure>"
        )
    num_samples = summary["needle"][0]["depths"][0]["num_samples"]
    note = (
        f"Needles retrieved exactly, in %, {num_samples} per cell. Across: length in tokens. Down: depth of the "
        "needle; 0 % is the start of the text."
    )
    return f"<div class=maps>{''.join(maps)}</div><p class=note>{note}</p>"


def _retention(record: RunRecord) -> str:
    """Perplexity inside the original window, absolute and relative."""
    if record.evaluation is None:
        return _missing(record, "evaluations")
    rows = [
        [
            html.escape(row["subject"]),
            f"{row['perplexity']:.4f}",
            f"{row['ratio']:.4f}",
            change(row["ratio"]),
        ]
        for row in record.evaluation["retention"]
    ]
    first = record.evaluation["retention"][0]
    note = (
        f"{first['num_windows']} windows of held-out text, closing token included at most {first['length']:,} tokens, "
        f"{first['num_tokens']:,} tokens scored, read with each model's short-window RoPE."
    )
    head = [
        "model",
        "perplexity",
        f"against {html.escape(record.evaluation['reference'])}",
        "change",
    ]
    return table(head, rows) + f"<p class=note>{note}</p>"


def _factors(record: RunRecord) -> str:
    """Factors by dimension against the closed forms and the bound."""
    if record.factors is None:
        return _missing(record, "factors")
    factors = record.factors
    values = ", ".join(f"{value:.4g}" for value in factors.factors)
    note = (
        f"How much each RoPE frequency is slowed in the long window ({html.escape(factors.method)}); s = "
        f"{factors.scale:g}. From the critical dimension up no factor may lie below s, or angles appear that "
        f"pre-training never saw. Values by cosine index: {values}."
    )
    figure = image(
        factors_figure(factors), "Rescale factors by dimension: ours, NTK, YaRN, PI, and the bound"
    )
    return f"<div class=figures>{figure}</div><p class=note>{note}</p>"


def _search(record: RunRecord) -> str:
    """Progress of the search, and the closed forms on the same samples."""
    history = record.search_history
    if history is None:
        return _missing(record, "factors")
    if "sample_len" not in history:
        return "<p class=missing>This search was run by an earlier version, whose history lacks the sample length.</p>"
    figure = image(search_figure(history), "Best objective of the search by candidates evaluated")
    rows = [[html.escape(name), f"{value:.4g}"] for name, value in history["baselines"].items()]
    rows.append(
        [
            f"best of {history['rounds'][-1]['num_candidates']} candidates",
            f"{history['best_value']:.4g}",
        ]
    )
    found = history["critical_index"]
    critical = "No critical dimension" if found is None else f"Found critical dimension {found}"
    note = (
        f"Lower is better, measured on untrained weights at {history['sample_len']:,} tokens. {critical}; theory says "
        f"{history['theoretical_critical_index']}. Levels far above the curve are in the table only."
    )
    baselines = table(["factors", history["value_name"].replace("_", " ")], rows)
    return f"<div class=figures>{figure}<div>{baselines}</div></div><p class=note>{note}</p>"


def _training(record: RunRecord) -> str:
    """Loss of each window."""
    if not record.training_metrics:
        return _missing(record, "checkpoints")
    last = record.training_metrics[-1]
    state = "" if record.stages["checkpoints"].manifest else " The training is not finished."
    note = f"{len(record.training_metrics)} records, {last['train/tokens']:,} tokens.{state}"
    return f"<div class=figures>{training_images(record)}</div><p class=note>{note}</p>"


def _mix(record: RunRecord) -> str:
    """Tokens of the segments by source and window."""
    images = mix_images(record)
    return f"<div class=figures>{images}</div>" if images else _missing(record, "segments")


def _stage(stage: StageState, run_name: str) -> str:
    """Commit, seeds, counts and configuration of one stage."""
    title = PRODUCT_FOLDERS[stage.product]
    manifest = stage.manifest
    if manifest is None:
        state = "unfinished" if stage.started else "missing"
        return f"<h3>{title}: {state}</h3><p class=note><code>{_command(stage.product, run_name)}</code></p>"
    facts = {
        "code commit": manifest.commit,
        "seeds": _flat(manifest.seeds),
        "counts": _flat(manifest.counts),
        "libraries": _flat(manifest.versions),
    }
    rows = [[name, html.escape(value)] for name, value in facts.items() if value]
    config = html.escape(
        json.dumps({"config": manifest.config, "inputs": manifest.inputs}, indent=2)
    )
    details = f"<details><summary>configuration and inputs</summary><pre>{config}</pre></details>"
    return f"<h3>{title}</h3>{table([], rows, css_class='facts')}{details}"


def _flat(values: dict[str, Any], prefix: str = "") -> str:
    """Nested numbers on one line."""
    return ", ".join(_flat_items(values, prefix))


def _flat_items(values: dict[str, Any], prefix: str) -> Iterator[str]:
    """``name value`` of every leaf, with dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat_items(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} {value}"


def _missing(record: RunRecord, product: str) -> str:
    """That a stage has not run, and how to run it."""
    stage = record.stages[product]
    if product == "evaluations" and record.suite is not None:
        return "<p class=missing>Not measured: the suite that was run has <code>suite.measures=false</code>.</p>"
    state = "is not finished" if stage.started else "has not been run"
    command = _command(product, record.folder.name)
    return f"<p class=missing>This stage {state}: <code>{command}</code></p>"


def _command(product: str, run_name: str) -> str:
    """The command that makes a product."""
    return html.escape(f"{COMMANDS[product]} run.name={run_name}")


def _heat_cell(cell: dict[str, Any]) -> str:
    """A table cell whose colour is its accuracy."""
    accuracy = cell["accuracy"]
    text_color = "#fff" if accuracy > 0.55 else "#222"
    title = f"{cell['num_correct']} of {cell['num_samples']}, perplexity {cell['perplexity']:.3g}"
    shade = f"background:color-mix(in srgb,#0b6e69 {100 * accuracy:.0f}%,#f4f1ea)"
    return f"<td style='{shade};color:{text_color}' title='{title}'>{100 * accuracy:.0f}</td>"
