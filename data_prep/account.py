"""The account of a run for its manifest: what was read, what was packed, and what became of
everything else.

``documents.parquet``: every document (or part of one) that was chosen, where it came from and how
long it is.

It is what lets an audit go back from segments to source texts, and a reader see what the model was
trained on.

What the pack stage prints: the plan before, the result after.

``report.html``: the account of a pack run as a page, from its manifest alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.config import PackConfig
from data_prep.quotas import Account, Demand, Selection
from data_prep.shards import PackedUnit, PackPlan, nested
from data_prep.token_files import NUM_BOUNDARY_TOKENS, DocumentTable, LengthBuckets
from data_prep.tokenizing import NOT_NEEDED
from longrope2.corpora.config import BUCKETS
from longrope2.files.artifacts import Manifest, atomic_path, sha256_of_file, write_text

DOCUMENTS_FILE = "documents.parquet"
SCHEMA = pa.schema(
    [
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("unit", pa.string()),
        ("num_tokens", pa.int64()),  # BOS and EOS included
        ("offset", pa.int64()),  # first id in the ids of the whole document's text
        ("text_hash", pa.binary(16)),  # first half of the SHA-256 of the whole document's text
    ]
)
MOST_PADDING = 0.005  # of the tokens in short segments; more is reported
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; } td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
.bars { display: flex; align-items: flex-end; height: 90px; gap: 3px; margin: 0.3em 0 0.2em; }
.bars div { flex: 1; background: #c9d7e8; position: relative; } .bars i { position: absolute; bottom: 0; left: 0; right: 0;
background: #2f6db3; display: block; } .axis { display: flex; gap: 3px; font-size: 11px; color: #666; }
.axis span { flex: 1; text-align: left; overflow: hidden; }
"""


@dataclass(frozen=True, eq=False)
class Planned:
    """The choice for one run.

    Attributes:
        table: All tokenized documents.
        selection: What is packed.
        account: What is not, and why.
        demand: What was wanted.
        missing: Source -> bucket -> tokens wanted over tokens there, where reading more may help.
        shortfalls: What stays below what was wanted, in words.
        lengths: The buckets.
    """

    table: DocumentTable
    selection: Selection
    account: Account
    demand: Demand
    missing: dict[str, dict[str, float]]
    shortfalls: list[str]
    lengths: LengthBuckets

    def counts(self) -> dict[str, Any]:
        """What planning knows; ``segment_counts`` adds what packing counts.

        Tokens include BOS and EOS. For every source, tokenized + added_boundary_tokens = chosen +
        left_out_tokens, and chosen = packed + left_over_tokens.
        """
        tokenized = np.bincount(
            self.table.source_D, self.table.tokens_D, minlength=len(self.table.sources)
        )
        wanted = {cell: tokens for cell, tokens in self.demand.cells.items() if tokens}
        return {
            "wanted_tokens": nested(Counter(wanted)),
            "tokenized_tokens": dict(
                zip(self.table.sources, map(int, tokenized.tolist()), strict=True)
            ),
            "chosen_tokens": nested(self.selection.tokens),
            "left_out_tokens": nested(self.account.left_out),
            "num_documents_left_out": nested(self.account.num_left_out),
            "added_boundary_tokens": dict(sorted(self.account.added_boundaries.items())),
            "num_documents_split": dict(sorted(self.account.num_split.items())),
            "num_documents_split_for_short": dict(sorted(self.account.num_windowed.items())),
            "shortfalls": self.shortfalls,
            **self._reading_counts(),
        }

    def _reading_counts(self) -> dict[str, Any]:
        """What the tokenize stage counted, over all readings of all units.

        A unit that was read more than once reports what was not needed each time; the last reading
        is the one that counts.
        """
        units: dict[str, set[str]] = {}
        documents: Counter[str] = Counter()
        characters: Counter[str] = Counter()
        skipped: Counter[tuple[str, str]] = Counter()
        untokenized: dict[tuple[str, str, str], tuple[int, int]] = {}
        for account in self.table.accounts:
            units.setdefault(account.source, set()).update(account.units)
            documents[account.source] += account.num_documents
            characters[account.source] += account.num_characters
            skipped.update(
                {(account.source, reason): count for reason, count in account.skipped.items()}
            )
            untokenized.pop((account.source, account.units[0], NOT_NEEDED), None)
            for reason, count in account.left_out_documents.items():
                untokenized[account.source, account.units[0], reason] = (
                    count,
                    account.left_out_characters[reason],
                )
        num_untokenized: Counter[tuple[str, str]] = Counter()
        characters_untokenized: Counter[tuple[str, str]] = Counter()
        for (source, _, reason), (count, size) in untokenized.items():
            num_untokenized[source, reason] += count
            characters_untokenized[source, reason] += size
        return {
            "num_units_read": {source: len(names) for source, names in sorted(units.items())},
            "num_documents_tokenized": dict(sorted(documents.items())),
            "num_characters_tokenized": dict(sorted(characters.items())),
            "num_documents_untokenized": nested(num_untokenized),
            "num_characters_untokenized": nested(characters_untokenized),
            "num_records_skipped": nested(skipped),
        }


def segment_counts(planned: dict[str, Any], packed: Sequence[PackedUnit]) -> dict[str, Any]:
    """The complete account: what planning counted and the sums over all shuffle units."""
    tokens: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    rest: Counter[str] = Counter()
    for unit in packed:
        tokens.update({(s, b): n for s, cells in unit.tokens.items() for b, n in cells.items()})
        documents.update(
            {(s, b): n for s, cells in unit.num_documents.items() for b, n in cells.items()}
        )
        rest.update(unit.rest_tokens)
    num_short = sum(unit.num_segments["short"] for unit in packed)
    return {
        "num_short_segments": num_short,
        "num_long_segments": sum(unit.num_segments["long"] for unit in packed),
        "num_shuffle_units": len(packed),
        "tokens": nested(tokens),
        "num_documents": nested(documents),
        "padding_tokens": sum(unit.padding_tokens for unit in packed),
        "left_over_tokens": sum(rest.values()),
        "rest_tokens": dict(sorted(rest.items())),
        "num_cut_documents": sum(unit.num_cut_documents for unit in packed),
        **planned,
    }


def histogram(planned: Planned) -> dict[str, Any]:
    """Documents by length, powers of two: all that were tokenized and the parts that were chosen, per source."""
    table, parts = planned.table, planned.selection.parts
    longest = int(table.tokens_D.max(initial=NUM_BOUNDARY_TOKENS))
    edges = [0] + [2**power for power in range(4, longest.bit_length() + 1)]
    rows: dict[str, dict[str, list[int]]] = {}
    for code, source in enumerate(table.sources):
        chosen = parts.tokens_P[table.source_D[parts.document_P] == code]
        rows[source] = {
            "tokenized": np.histogram(table.tokens_D[table.source_D == code], edges)[0].tolist(),
            "chosen": np.histogram(chosen, edges)[0].tolist(),
        }
    return {"edges_tokens": edges, "num_documents": rows}


def write_document_list(folder: Path, plan: PackPlan) -> dict[str, Any]:
    """Write the list, shuffle unit by shuffle unit; returns its name, hash and number of rows."""
    path, rows = folder / DOCUMENTS_FILE, 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer,
    ):
        for unit in range(plan.summary()["num_units"]):
            parts = plan.parts(unit)
            with_boundaries = pa.array(parts.column("num_tokens").to_numpy() + NUM_BOUNDARY_TOKENS)
            columns = [
                with_boundaries if name == "num_tokens" else parts.column(name)
                for name in SCHEMA.names
            ]
            writer.write_table(pa.table(columns, schema=SCHEMA))
            rows += parts.num_rows
    return {"file": path.name, "sha256": sha256_of_file(path), "num_rows": rows}


def print_plan(config: "PackConfig", folder: Path) -> None:
    """What is asked for."""
    print(
        f"pack {config.corpus.name} for {config.model.name}: segments of {config.target_len} tokens, short window "
        f"{config.model.original_len}, alignment {config.align} -> {folder}"
    )
    if config.corpus.plan.is_given:
        _print_margins(config)
        return
    print(f"  {'source':<20}{'short tokens':>16}{'long tokens':>16}")
    for source, quota in sorted(config.corpus.quotas.items()):
        cells = ["all" if tokens is None else f"{tokens:,}" for tokens in (quota.short, quota.long)]
        print(f"  {source:<20}{cells[0]:>16}{cells[1]:>16}")
    known = [
        t
        for quota in config.corpus.quotas.values()
        for t in (quota.short, quota.long)
        if t is not None
    ]
    more = " and all of the sources marked so" if len(known) < 2 * len(config.corpus.quotas) else ""
    print(
        f"  about {sum(known) // config.target_len:,} segments{more}; 2 bytes a token up to 65,536 ids, else 4"
    )


def print_result(counts: dict[str, Any], folder: Path, seconds: float) -> None:
    """What was packed, what was left out and why, and what is missing."""
    tokens = sum(sum(buckets.values()) for buckets in counts["tokens"].values())
    print(
        f"packed {tokens:,} tokens in {seconds:.1f} s: {counts['num_short_segments']} short and "
        f"{counts['num_long_segments']} long segments, {counts['padding_tokens']:,} padding tokens, "
        f"{counts['left_over_tokens']:,} tokens at the end that filled no segment -> {folder}"
    )
    in_short = counts["padding_tokens"] + sum(
        buckets.get("short", 0) for buckets in counts["tokens"].values()
    )
    if counts["padding_tokens"] > MOST_PADDING * in_short:
        share = counts["padding_tokens"] / in_short
        print(
            f"  padding is {share:.2%} of the short segments, above {MOST_PADDING:.2%}: too few short documents to fill them"
        )
    for reason, number in sorted(_by_reason(counts["left_out_tokens"]).items()):
        print(f"  left out: {number:,} tokens, {reason}")
    for reason, number in sorted(_by_reason(counts["num_documents_untokenized"]).items()):
        print(f"  not tokenized: {number:,} documents, {reason}")
    for reason, number in sorted(_by_reason(counts["num_records_skipped"]).items()):
        print(f"  skipped: {number:,} records, {reason}")
    for shortfall in counts["shortfalls"]:
        print(f"  shortfall: {shortfall}")


def _print_margins(config: "PackConfig") -> None:
    """A plan: tokens by source and by length."""
    plan = config.corpus.plan
    print(
        "  tokens by source: "
        + ", ".join(f"{source} {tokens:,}" for source, tokens in sorted(plan.sources.items()))
    )
    if not plan.fixes_lengths:
        print(
            f"  tokens by length: all longer documents and {plan.short_survival:.0%} of the short ones"
        )
    else:
        print(
            "  tokens by length: "
            + ", ".join(f"{bucket} {getattr(plan.buckets, bucket):,}" for bucket in BUCKETS)
        )
    if plan.total_tokens is not None:
        print(f"  scaled to {plan.total_tokens:,} tokens in all")


def _by_reason(left_out: dict[str, dict[str, int]]) -> dict[str, int]:
    """Numbers by reason, over all sources."""
    total: Counter[str] = Counter()
    for reasons in left_out.values():
        total.update(reasons)
    return dict(total)


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
        _reasons(
            "Documents read but not tokenized", "documents", counts["num_documents_untokenized"]
        ),
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
        (
            "documents longer than the longest bucket, split",
            sum(counts["num_documents_split"].values()),
        ),
        ("BOS and EOS tokens that cutting added", sum(counts["added_boundary_tokens"].values())),
        ("shards", len(manifest.files)),
    ]


def _cells(title: str, counts: dict[str, Any], buckets: Sequence[str]) -> str:
    """Wanted and packed tokens of every source and bucket."""
    sources = sorted(counts["tokenized_tokens"].keys() | counts["wanted_tokens"].keys())
    header = [
        "source",
        *(f"{bucket}: {what}" for bucket in buckets for what in ("wanted", "packed")),
        "tokenized",
    ]
    rows = []
    for source in sources:
        row: list[int | str] = [source]
        for bucket in buckets:
            wanted = counts["wanted_tokens"].get(source, {}).get(bucket)
            row += [
                "all or none" if wanted is None else wanted,
                counts["tokens"].get(source, {}).get(bucket, 0),
            ]
        rows.append((*row, counts["tokenized_tokens"].get(source, 0)))
    return _table(title, header, rows)


def _reasons(title: str, unit: str, by_source: dict[str, dict[str, int]]) -> str:
    """What was left out, by source and reason."""
    rows = [
        (source, reason, number)
        for source, reasons in by_source.items()
        for reason, number in reasons.items()
    ]
    return _table(title, ["source", "reason", unit], rows or [("none", "", 0)])


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[int | str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_shown(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _shown(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(value)


def _histograms(histogram: dict[str, Any]) -> str:
    """Documents by length: light all that were tokenized, dark those chosen; square-root scale."""
    page = [
        "<h2>Documents by length in tokens</h2><p>light: tokenized, dark: chosen; heights are square roots</p>"
    ]
    edges = histogram["edges_tokens"]
    axis = "".join(f"<span>{edge:,}</span>" for edge in edges[:-1])
    for source, rows in histogram["num_documents"].items():
        most = max([*rows["tokenized"], *rows["chosen"], 1])
        bars = "".join(
            _bar(all_, chosen, most)
            for all_, chosen in zip(rows["tokenized"], rows["chosen"], strict=True)
        )
        page.append(
            f'<h3>{escape(source)}</h3><div class="bars">{bars}</div><div class="axis">{axis}</div>'
        )
    return "".join(page)


def _bar(tokenized: int, chosen: int, most: int) -> str:
    """One bar; cutting can make more chosen parts than there were documents."""
    height, inner = (
        100 * (max(tokenized, chosen) / most) ** 0.5,
        100 * (chosen / max(tokenized, chosen, 1)) ** 0.5,
    )
    tip = f"{tokenized:,} tokenized, {chosen:,} chosen"
    return (
        f'<div style="height:{height:.1f}%" title="{tip}"><i style="height:{inner:.1f}%"></i></div>'
    )
