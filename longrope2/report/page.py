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

from longrope2.evaluation.schema import EvaluationSummary
from longrope2.evaluation.summary import comparison_lines
from longrope2.files.artifacts import PRODUCT_FOLDERS, UNTRAINED_FOLDER, Manifest, write_text
from longrope2.report.data import RunRecord, StageState, load_run
from longrope2.report.html import (
    blind_note,
    bullets,
    change,
    fill_page,
    heat_map,
    image,
    interval,
    percent,
    table,
)
from longrope2.report.plots import (
    factors_figure,
    fresh_figure,
    lengths_figure,
    search_figure,
    turns_figure,
)
from longrope2.report.suite import suite_html
from longrope2.report.text import evaluated_text
from longrope2.report.training import limits, mix_html, training_html
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.turns import Turns, turns_of
from longrope2.tracking.metrics import METRICS_FILE

REPORT_FILE = "report.html"
_UNTRAINED_TITLE = f"{PRODUCT_FOLDERS['exports']}/{UNTRAINED_FOLDER}"
COMMANDS = {
    "segments": "python -m data_prep.pack",
    "factors": "python -m launch.search",
    "checkpoints": "python -m launch.train",
    "evaluations": "python -m launch.evaluate",
    "exports": "python -m launch.export",
}


def write_report(run_folder: Path, reload_seconds: int | None = None) -> Path:
    """Write ``report.html`` into the run folder; the path of it.

    With ``reload_seconds`` the page asks its browser to load it again after so many seconds.

    Raises:
        ArtifactError: the folder is no run folder, or one of its files is damaged.
    """
    path = run_folder / REPORT_FILE
    write_text(path, _render_report(load_run(run_folder), reload_seconds))
    return path


def _render_report(record: RunRecord, reload_seconds: int | None) -> str:
    name = html.escape(record.folder.name)
    stages = "".join(_stage(stage, record.folder.name) for stage in record.stages.values())
    if record.untrained_exports is not None:
        stages += _finished(_UNTRAINED_TITLE, record.untrained_exports)
    corpus, mix = _evaluated_corpus(record), mix_html(record)
    suite = []
    if record.suite is not None:
        suite = [("Benchmarks", f"{suite_html(record.suite)}<p class=note>{corpus}</p>")]
    unknown, summary = _missing(record, "evaluations"), record.evaluation
    sections = [
        *suite,
        ("Comparison", _comparison(summary, corpus) if summary else unknown),
        ("Needles by depth and length", _needle_maps(summary, corpus) if summary else unknown),
        ("Short window kept", _retention(summary, corpus) if summary else unknown),
        ("Rescale factors", _factors(record)),
        ("Search", _search(record)),
        ("Training", _training(record)),
        ("Mix", mix or _missing(record, "segments")),
        ("Limits of these figures", bullets(limits(record))),
        ("What was run", stages),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    reload = f"<meta http-equiv='refresh' content='{reload_seconds}'>"
    return fill_page(
        head="" if reload_seconds is None else reload,
        title=f"LongRoPE2: {name}",
        body=f"<h1>{name}</h1>{_headline(record)}{body}",
    )


def _headline(record: RunRecord) -> str:
    summary = record.evaluation
    if summary is None:
        nothing = "<p class=lead>Nothing has been evaluated yet.</p>"
        return nothing if record.suite is None else ""
    longest = max(row.length for row in summary.needle)
    at_longest = {row.subject: row for row in summary.needle if row.length == longest}
    best = max(at_longest.values(), key=lambda row: (row.accuracy, -row.perplexity))
    reference = at_longest[summary.reference]
    ratio = next(row.ratio for row in summary.retention if row.subject == best.subject)
    return (
        f"<p class=lead>Window {summary.original_len:,} to {summary.target_len:,} tokens. At "
        f"{longest:,} tokens <b>{html.escape(best.subject)}</b> retrieves {percent(best.accuracy)} "
        f"of the needles ({interval(*best.accuracy_interval)}), {html.escape(reference.subject)} "
        f"{percent(reference.accuracy)} ({interval(*reference.accuracy_interval)}). Inside the "
        f"original window its perplexity changes by {change(ratio)}.</p>"
    )


def _evaluated_corpus(record: RunRecord) -> str:
    """Where the text of what was evaluated comes from, HTML."""
    if said := evaluated_text(record):
        return html.escape(said)
    corpus = record.corpus_of("evaluations")  # of an earlier version's evaluation
    return "" if corpus is None else f"Text: held out of corpus {html.escape(corpus)}."


def _comparison(summary: EvaluationSummary, corpus: str) -> str:
    lengths, lines = comparison_lines(summary)
    longest, original = f"{lengths[-1]:,}", f"{summary.original_len:,}"
    rows = [list(map(html.escape, line)) for line in lines]
    for row in rows:
        row[1 + len(lengths)] += " %"
    titles = [*(f"{length:,}" for length in lengths), f"95 % interval at {longest}"]
    head = ["model", *titles, "needle ppl", "text ppl", "short window"]
    note = (
        "Numbers on top: needles whose value is retrieved exactly at that many tokens, in % of "
        f"{summary.needle[0].num_samples}. Needle ppl and text ppl: perplexity of the needles' "
        f"values and of held-out text at {longest} tokens. Short window: change of the perplexity "
        f"of held-out text inside {original} tokens against {html.escape(summary.reference)}. "
        f"Up to {original} tokens every model runs on its short-window RoPE, beyond on its "
        f"long-window RoPE. {corpus}"
    )
    return f"{table(head, rows)}<p class=note>{note}</p>{_length_figures(summary)}"


def _length_figures(summary: EvaluationSummary) -> str:
    text_title = "Perplexity of the same held-out tokens by length of their context"
    images = ""
    for rows, field, label, alternative in (
        (summary.needle, "accuracy", "needles retrieved", "Share of needles retrieved by length"),
        (summary.needle, "perplexity", "needle perplexity", "Needle perplexity by length"),
        (summary.perplexity, "perplexity", "text perplexity", text_title),
    ):
        points: dict[str, dict[int, float]] = {subject.name: {} for subject in summary.subjects}
        for row in rows:
            points[row.subject][row.length] = getattr(row, field)
        figure = lengths_figure(points, label, is_share=field == "accuracy")
        images += image(figure, f"{alternative}, one line per model")
    return f"<div class=figures>{images}</div>"


def _needle_maps(summary: EvaluationSummary, corpus: str) -> str:
    maps = []
    for name in (subject.name for subject in summary.subjects):
        own = (row for row in summary.needle if row.subject == name)
        rows = sorted(own, key=lambda row: row.length)
        lines: dict[float, list[tuple[float, str]]] = {}
        for place in (place for row in rows for place in row.depths):
            found = f"{place.num_correct} of {place.num_samples}"
            title = f"{found}, perplexity {place.perplexity:.3g}"
            lines.setdefault(place.depth, []).append((place.accuracy, title))
        maps.append(heat_map(name, [row.length for row in rows], lines))
    note = (
        f"Needles retrieved exactly, in %, {summary.needle[0].depths[0].num_samples} per cell. "
        "Across: length in tokens. Down: depth of the needle; 0 % is the start of the text. "
        f"{corpus}"
    )
    blind = blind_note(_lengths_without_needle(summary), summary.original_len)
    return f"{blind}<div class=maps>{''.join(maps)}</div><p class=note>{note}</p>"


def _lengths_without_needle(summary: EvaluationSummary) -> dict[str, list[int]]:
    """Models that retrieved no needle at any length -> the lengths."""
    found: dict[str, list[int]] = {}
    for subject in summary.subjects:
        rows = [row for row in summary.needle if row.subject == subject.name]
        if not any(row.accuracy for row in rows):
            found[subject.name] = [row.length for row in rows]
    return found


def _retention(summary: EvaluationSummary, corpus: str) -> str:
    rows, first = [], summary.retention[0]
    for row in summary.retention:
        numbers = f"{row.perplexity:.4f}", f"{row.ratio:.4f}", change(row.ratio)
        rows.append([html.escape(row.subject), *numbers])
    note = (
        f"{first.num_windows} windows of held-out text, closing token included at most "
        f"{first.length:,} tokens, {first.num_tokens:,} tokens scored, read with each model's "
        f"short-window RoPE. {corpus}"
    )
    head = ["model", "perplexity", f"against {html.escape(summary.reference)}", "change"]
    return table(head, rows) + f"<p class=note>{note}</p>"


def _factors(record: RunRecord) -> str:
    if (factors := record.factors) is None:
        return _missing(record, "factors")
    values = ", ".join(f"{value:.4g}" for value in factors.factors)
    note = (
        "How much each RoPE frequency is slowed in the long window "
        f"({html.escape(factors.method)}); s = {factors.scale:g}. From the critical dimension up "
        "no factor may lie below s, or angles appear that pre-training never saw. Values by cosine "
        f"index: {values}."
    )
    alternative = "Rescale factors by dimension: ours, NTK, YaRN, PI, and the bound"
    figures = image(factors_figure(factors), alternative)
    if record.short_documents:
        turns = turns_of(record.short_documents, factors.geometry)
        alternative = "How often each part of a turn was met, by dimension, and the factors"
        figures += image(turns_figure(turns, factors), alternative)
        note += f" {html.escape(turns_text(turns, factors))}"
    return f"<div class=figures>{figures}</div><p class=note>{note}</p>"


def turns_text(turns: Turns, factors: RescaleFactors) -> str:
    """What the figure of turns shows, and where what was found lies beside it."""
    text = (
        f"The second figure counts {turns.num_documents:,} documents of the short segments: blue "
        "is met more often than in an even turn, red less often, the darkest a hundredth or never."
    )
    uneven, unseen = turns.first_uneven, turns.first_with_unseen
    if uneven is None:
        return f"{text} Every dimension met every part of its turn."
    never = "" if unseen is None else f", and from {unseen} up never"
    where = (
        f" From index {uneven} up some part of the turn was met under a tenth as often as in an "
        f"even turn{never}: it is the low frequencies, the high indices, whose angles are new."
    )
    if (critical := factors.critical_index) is None:
        return text + where
    side = "below" if critical < uneven else "above" if critical > uneven else "at"
    return f"{text}{where} The critical dimension that was found, {critical}, lies {side} {uneven}."


def _search(record: RunRecord) -> str:
    if (history := record.search_history) is None:
        return _missing(record, "factors")
    if "fresh" not in history:
        lacking = (
            "This search was run by an earlier version, which compared nothing on fresh samples"
        )
        return f"<p class=missing>{lacking}.</p>"
    image_of_search = image(search_figure(history), "Best objective by candidates evaluated")
    found, num_candidates = history["critical_index"], history["rounds"][-1]["num_candidates"]
    critical = "No critical dimension" if found is None else f"Found critical dimension {found}"
    note = html.escape(
        f"Lower is better, measured on untrained weights. On the search's own samples the best of "
        f"{num_candidates} candidates has {history['best_value']:.4g}. {critical}; theory says "
        f"{history['theoretical_critical_index']}."
    )
    if corpus := record.corpus_of("factors"):
        note += f" Text: held out of corpus {html.escape(corpus)}."
    return f"{_fresh(history)}<div class=figures>{image_of_search}</div><p class=note>{note}</p>"


def _fresh(history: dict[str, Any]) -> str:
    """What was found against the closed forms, on samples that nobody chose by."""
    if (fresh := history["fresh"]) is None:
        text = "The result was not compared on fresh samples (search.fresh_samples=0)"
        return f"<p class=missing>{text}.</p>"
    rows = []
    for contestant in fresh["contestants"]:
        num, low_high = contestant["num_reported"], contestant["interval"]
        stopped = f"stopped after {contestant['num_choosing']}"
        interval = "{:.4g} to {:.4g}".format(*low_high)
        scale = f"{contestant['attention_scale']:.3g}"
        row = [contestant["name"], scale, f"{contestant['value']:.4g}", interval]
        rows.append(list(map(html.escape, [*row, str(num) if num else stopped])))
    value_name = html.escape(history["value_name"].replace("_", " "))
    headings = ["factors", "attention scale", value_name]
    listed = table([*headings, "95 %", "samples"], rows)
    figure = image(fresh_figure(history), "Found factors and closed forms on fresh samples")
    verdict = html.escape(fresh["verdict"])
    return (
        f"<p>{verdict}</p><div class=figures>{figure}<div>{listed}</div></div>"
        f"<p class=note>Fresh samples of {history['sample_len']:,} tokens, other texts and keys: "
        "the winner was chosen on one half of them, and what is shown is its value on the other. "
        "Those that were hopelessly behind were stopped early.</p>"
    )


def _training(record: RunRecord) -> str:
    if not record.training_metrics:
        if record.stages["checkpoints"].manifest is None:
            return _missing(record, "checkpoints")
        lost = f"{PRODUCT_FOLDERS['checkpoints']}/{METRICS_FILE} is missing or holds no records"
        return f"<p class=missing>The training is finished, but {lost}: nothing to show.</p>"
    return training_html(record)


def _stage(stage: StageState, run_name: str) -> str:
    title, manifest = PRODUCT_FOLDERS[stage.product], stage.manifest
    if manifest is None:
        state = "unfinished" if stage.started else "missing"
        command = f"<code>{_command(stage.product, run_name)}</code>"
        return f"<h3>{title}: {state}</h3><p class=note>{command}</p>"
    return _finished(title, manifest)


def _finished(title: str, manifest: Manifest) -> str:
    """What stands in the manifest of a product."""
    facts = {"code commit": manifest.commit, "seeds": _flat(manifest.seeds)}
    facts |= {"counts": _flat(manifest.counts), "libraries": _flat(manifest.versions)}
    facts |= {"exported": _exported(manifest)}
    rows = [[name, html.escape(value)] for name, value in facts.items() if value]
    plain = json.dumps({"config": manifest.config, "inputs": manifest.inputs}, indent=2)
    config = f"<pre>{html.escape(plain)}</pre>"
    details = f"<details><summary>configuration and inputs</summary>{config}</details>"
    return f"<h3>{title}</h3>{table([], rows, css_class='facts')}{details}"


def _exported(manifest: Manifest) -> str:
    """Folders of an export, its factors and whether they were trained; empty for others."""
    if "trained" not in manifest.details:
        return ""
    folders = dict.fromkeys(name.split("/")[0] for name in manifest.files)
    weights = "trained" if manifest.details["trained"] else "untrained (the base model's)"
    factors = manifest.details["factors"]["method"]
    return f"{', '.join(folders)}; weights {weights}, factors {factors}"


def _flat(values: dict[str, Any]) -> str:
    """``name value`` of every leaf on one line, with dotted names."""
    return ", ".join(f"{name} {value}" for name, value in _leaves(values, ""))


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _missing(record: RunRecord, product: str) -> str:
    stage = record.stages[product]
    if product == "evaluations" and record.suite is not None:
        setting = "<code>suite.measures=false</code>"
        return f"<p class=missing>Not measured: the suite that was run has {setting}.</p>"
    state = "is not finished" if stage.started else "has not been run"
    command = _command(product, record.folder.name)
    return f"<p class=missing>This stage {state}: <code>{command}</code></p>"


def _command(product: str, run_name: str) -> str:
    return html.escape(f"{COMMANDS[product]} run.name={run_name}")
