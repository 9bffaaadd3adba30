"""``report.html``: the account of a pack run as a page, from its manifest alone."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from longrope2.artifacts import Manifest, write_text

__all__ = ["report_page", "write_report"]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; } td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
.bars { display: flex; align-items: flex-end; height: 90px; gap: 3px; margin: 0.3em 0 0.2em; }
.bars div { flex: 1; background: #c9d7e8; position: relative; } .bars i { position: absolute; bottom: 0; left: 0; right: 0;
background: #2f6db3; display: block; } .axis { display: flex; gap: 3px; font-size: 11px; color: #666; }
.axis span { flex: 1; text-align: left; overflow: hidden; }
"""


def write_report(path: Path, manifest: Manifest) -> None:
    """Write the page."""
    write_text(path, report_page(manifest))


def report_page(manifest: Manifest) -> str:
    """The page as HTML, without scripts or outside resources."""
    counts, details = manifest.counts, manifest.details
    parts = [
        _table("Segments", ["what", "number"], _summary(manifest)),
        _cells("Tokens by source and length", counts, list(details["length_buckets"])),
        _reasons("Tokens left out", "tokens", counts["left_out_tokens"]),
        _reasons("Documents read but not tokenized", "documents", counts["num_documents_untokenized"]),
        _reasons("Records that could not be read", "records", counts["num_records_skipped"]),
        "<h2>Shortfalls</h2><ul>"
        + "".join(f"<li>{escape(s)}</li>" for s in counts["shortfalls"] or ["none"])
        + "</ul>",
        _histograms(details["length_histogram"]),
    ]
    title = f"Segments of {details['target_len']:,} tokens for {details['model_name']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def _summary(manifest: Manifest) -> list[tuple[str, int | str]]:
    """Totals."""
    counts, details = manifest.counts, manifest.details
    in_short = counts["num_short_segments"] * details["target_len"]
    padding = counts["padding_tokens"] / in_short if in_short else 0.0
    return [
        ("short segments", counts["num_short_segments"]),
        ("long segments", counts["num_long_segments"]),
        ("alignment", details["alignment"]),
        ("padding tokens", counts["padding_tokens"]),
        ("padding, share of the short segments", f"{padding:.3%}"),
        ("tokens at the end of a shuffle unit that filled no segment", counts["left_over_tokens"]),
        ("documents of at most L tokens cut between segments", counts["num_cut_documents"]),
        ("documents longer than the longest bucket, split", sum(counts["num_documents_split"].values())),
        ("BOS and EOS tokens that cutting added", sum(counts["added_boundary_tokens"].values())),
        ("shards", len(manifest.files)),
    ]


def _cells(title: str, counts: dict[str, Any], buckets: Sequence[str]) -> str:
    """Wanted and packed tokens of every source and bucket."""
    sources = sorted(counts["tokenized_tokens"].keys() | counts["wanted_tokens"].keys())
    header = ["source", *(f"{bucket}: {what}" for bucket in buckets for what in ("wanted", "packed")), "tokenized"]
    rows = []
    for source in sources:
        row: list[int | str] = [source]
        for bucket in buckets:
            wanted = counts["wanted_tokens"].get(source, {}).get(bucket)
            row += ["all or none" if wanted is None else wanted, counts["tokens"].get(source, {}).get(bucket, 0)]
        rows.append((*row, counts["tokenized_tokens"].get(source, 0)))
    return _table(title, header, rows)


def _reasons(title: str, unit: str, by_source: dict[str, dict[str, int]]) -> str:
    """What was left out, by source and reason."""
    rows = [(source, reason, number) for source, reasons in by_source.items() for reason, number in reasons.items()]
    return _table(title, ["source", "reason", unit], rows or [("none", "", 0)])


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[int | str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_shown(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _shown(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(value)


def _histograms(histogram: dict[str, Any]) -> str:
    """Documents by length: light all that were tokenized, dark those chosen; square-root scale."""
    page = ["<h2>Documents by length in tokens</h2><p>light: tokenized, dark: chosen; heights are square roots</p>"]
    edges = histogram["edges_tokens"]
    axis = "".join(f"<span>{edge:,}</span>" for edge in edges[:-1])
    for source, rows in histogram["num_documents"].items():
        most = max([*rows["tokenized"], *rows["chosen"], 1])
        bars = "".join(_bar(all_, chosen, most) for all_, chosen in zip(rows["tokenized"], rows["chosen"], strict=True))
        page.append(f'<h3>{escape(source)}</h3><div class="bars">{bars}</div><div class="axis">{axis}</div>')
    return "".join(page)


def _bar(tokenized: int, chosen: int, most: int) -> str:
    """One bar; cutting can make more chosen parts than there were documents."""
    height, inner = 100 * (max(tokenized, chosen) / most) ** 0.5, 100 * (chosen / max(tokenized, chosen, 1)) ** 0.5
    tip = f"{tokenized:,} tokenized, {chosen:,} chosen"
    return f'<div style="height:{height:.1f}%" title="{tip}"><i style="height:{inner:.1f}%"></i></div>'
