"""The account of a run: what was read and packed, and what became of everything else.

It goes into the manifest, to the terminal and into ``report.html`` (from the manifest alone).
``documents.parquet`` lists every chosen document (or part of one) with its source and length, so
that an audit can go back from segments to texts.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.candidates import Account
from data_prep.config import BUCKETS, PackConfig
from data_prep.quotas import Demand, Selection
from data_prep.shards import LIST_SCHEMA, PackedUnit, PackList, nested
from data_prep.token_files import DocumentTable, blocks
from data_prep.tokenizing import NOT_NEEDED
from longrope2.corpora.held_out import DOCUMENTS_FILE
from longrope2.corpora.losses import MOST_NAMED, DamagedFile
from longrope2.files.artifacts import Manifest, atomic_path, sha256_of_file, write_text

# num_tokens counts BOS and EOS here; offset is the first id in those of the whole text.
COLUMNS = ("doc_id", "source", "domain", "unit", "num_tokens", "offset")
COLUMNS += ("text_hash", "content_hash")
SCHEMA = pa.schema([LIST_SCHEMA.field(name) for name in COLUMNS])
LOSSES_FILE = "losses.parquet"
# ``file`` and ``records_read`` are those of a damaged file, else null.
LOSSES_SCHEMA = pa.schema(
    [
        ("unit", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("num_records", pa.int64()),
        ("file", pa.string()),
        ("records_read", pa.int64()),
    ]
)
NOT_CHOSEN = "tokenized, not chosen"  # why is counted by source: ``num_documents_left_out``
MOST_DAMAGED = 100  # files named in the manifest and on the page
MOST_PADDING = 0.005  # of the tokens in short segments; more is reported
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.5em 0 1.5em; } td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
.bars { display: flex; align-items: flex-end; height: 90px; gap: 3px; margin: 0.3em 0 0.2em; }
.bars div { flex: 1; background: #c9d7e8; position: relative; } .bars i { position: absolute; bottom: 0; left: 0; right: 0;
background: #2f6db3; display: block; } .axis { display: flex; gap: 3px; font-size: 11px; color: #666; }
.axis span { flex: 1; text-align: left; overflow: hidden; }
"""  # noqa: E501


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen for one run."""

    table: DocumentTable  # all tokenized documents
    selection: Selection  # what is packed
    account: Account  # what is not, and why
    demand: Demand  # what was wanted
    shortfalls: list[str]  # what stays below what was wanted, in words

    def counts(self) -> dict[str, Any]:
        """What is known before packing; ``segment_counts`` adds what packing counts.

        Tokens include BOS and EOS. For every source, tokenized + added_boundary_tokens = chosen +
        left_out_tokens, and chosen = packed + left_over_tokens.
        """
        table, account = self.table, self.account
        tokenized = np.zeros(len(table.sources))
        for block in blocks(len(table)):
            of = table.sources_of(block)
            tokenized += np.bincount(of, table.tokens_D[block], minlength=len(tokenized))
        wanted = {cell: tokens for cell, tokens in self.demand.cells.items() if tokens}
        return {
            "wanted_tokens": nested(Counter(wanted)),
            "tokenized_tokens": dict(zip(table.sources, map(int, tokenized), strict=True)),
            "chosen_tokens": nested(self.selection.tokens),
            "left_out_tokens": nested(account.left_out),
            "num_documents_left_out": nested(account.num_left_out),
            "added_boundary_tokens": dict(sorted(account.added_boundaries.items())),
            "num_documents_split": dict(sorted(account.num_split.items())),
            "num_documents_split_for_short": dict(sorted(account.num_windowed.items())),
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
            source, first_unit = account.source, f"{account.part} {account.units[0]}"
            units.setdefault(source, set()).update(account.units)
            documents[source] += account.num_documents
            characters[source] += account.num_characters
            skipped.update({(source, reason): n for reason, n in account.skipped.items()})
            untokenized.pop((source, first_unit, NOT_NEEDED), None)
            for reason, count in account.left_out_documents.items():
                size = account.left_out_characters[reason]
                untokenized[source, first_unit, reason] = (count, size)
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

    def losses(self) -> pa.Table:
        """What of each unit was not packed: ``LOSSES_SCHEMA``, sorted.

        Documents that were read, plus the records of damaged files that nobody saw, are these (but
        for reasons that end in "(kept)") and the documents of ``documents.parquet``.
        """
        rows: Counter[tuple[str, str, str]] = Counter()
        latest: dict[tuple[str, str, str, int], int] = {}
        damaged = []
        for account in self.table.accounts:
            for unit, reasons in account.lost.items():
                for reason, number in reasons.items():
                    latest[unit, account.source, reason, account.part] = number
            for unit, file, fault, num_records in account.damaged:
                damaged.append((unit, account.source, fault, 1, file, num_records))
                rows[unit, account.source, fault] -= 1
        for (unit, source, reason, _), number in latest.items():
            rows[unit, source, reason] += number
        rows.update(self._not_chosen())
        plain = [(*key, number, None, None) for key, number in rows.items() if number]
        ordered = sorted([*plain, *damaged], key=lambda row: (row[0], row[2], row[4] or ""))
        return pa.Table.from_pylist(
            [dict(zip(LOSSES_SCHEMA.names, row, strict=True)) for row in ordered], LOSSES_SCHEMA
        )

    def _not_chosen(self) -> Counter[tuple[str, str, str]]:
        """Tokenized documents of each unit that are in no segment."""
        table = self.table
        chosen_D = np.zeros(len(table), dtype=bool)
        chosen_D[self.selection.parts.document_P] = True
        counts: Counter[tuple[str, str, str]] = Counter()
        bounds = pairwise(table.first_U.tolist())
        for tokenized, account, (first, last) in zip(
            table.units, table.accounts, bounds, strict=True
        ):
            place_D = tokenized.index(["unit"]).column(0).to_numpy()
            left = np.bincount(place_D[~chosen_D[first:last]], minlength=len(account.units))
            for unit, number in zip(account.units, left.tolist(), strict=True):
                counts[unit, account.source, NOT_CHOSEN] += number
        return counts

    def damaged_files(self) -> list[str]:
        """Files that could not be read to their end, a line each."""
        found = (entry for account in self.table.accounts for entry in account.damaged)
        return sorted({str(DamagedFile(file, fault, n)) for _, file, fault, n in found})


def segment_counts(chosen: dict[str, Any], packed: Sequence[PackedUnit]) -> dict[str, Any]:
    """The complete account: ``Choice.counts`` and the sums over all shuffle units."""
    tokens: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    rest: Counter[str] = Counter()
    for unit in packed:
        for total, trees in ((tokens, unit.tokens), (documents, unit.num_documents)):
            for source, cells in trees.items():
                total.update({(source, bucket): number for bucket, number in cells.items()})
        rest.update(unit.rest_tokens)
    return {
        "num_short_segments": sum(unit.num_segments["short"] for unit in packed),
        "num_long_segments": sum(unit.num_segments["long"] for unit in packed),
        "num_shuffle_units": len(packed),
        "tokens": nested(tokens),
        "num_documents": nested(documents),
        "padding_tokens": sum(unit.padding_tokens for unit in packed),
        "left_over_tokens": sum(rest.values()),
        "rest_tokens": dict(sorted(rest.items())),
        "num_cut_documents": sum(unit.num_cut_documents for unit in packed),
        **chosen,
    }


def histogram(choice: Choice) -> dict[str, Any]:
    """Documents by length in powers of two, per source: tokenized ones, and chosen parts."""
    table, parts = choice.table, choice.selection.parts
    longest = int(table.tokens_D.max(initial=table.num_boundary_tokens))
    edges = [0] + [2**power for power in range(4, longest.bit_length() + 1)]
    tokenized, chosen = np.zeros((2, len(table.sources), len(edges) - 1), np.int64)
    for block in blocks(len(table)):
        _count_lengths(tokenized, table.sources_of(block), table.tokens_D[block], edges)
    for block in blocks(len(parts)):
        own = parts.take(block)
        _count_lengths(chosen, table.sources_of(own.document_P), own.tokens_P, edges)
    rows = {
        source: {"tokenized": tokenized[code].tolist(), "chosen": chosen[code].tolist()}
        for code, source in enumerate(table.sources)
    }
    return {"edges_tokens": edges, "num_documents": rows}


def _count_lengths(
    counts: np.ndarray, sources: np.ndarray, lengths: np.ndarray, edges: Sequence[int]
) -> None:
    """Add documents by source and length to ``counts``, shape [sources, classes]."""
    for code in np.unique(sources):
        counts[code] += np.histogram(lengths[sources == code], edges)[0]


def write_document_list(folder: Path, pack_list: PackList) -> dict[str, Any]:
    """Write the list, shuffle unit by shuffle unit; returns its name, hash and number of rows."""
    path, rows, rules = folder / DOCUMENTS_FILE, 0, pack_list.rules()
    compressed = partial(pq.ParquetWriter, schema=SCHEMA, compression="zstd")
    with atomic_path(path) as temporary, compressed(temporary) as writer:
        for unit in range(pack_list.summary()["num_units"]):
            parts = pack_list.parts(unit)
            columns = {name: parts.column(name) for name in SCHEMA.names}
            with_boundaries = columns["num_tokens"].to_numpy() + len(rules.boundary_ids)
            columns["num_tokens"] = pa.array(with_boundaries)
            writer.write_table(pa.table(list(columns.values()), schema=SCHEMA))
            rows += parts.num_rows
    return {"file": path.name, "sha256": sha256_of_file(path), "num_rows": rows}


def write_losses(path: Path, choice: Choice) -> None:
    """Write what of each unit was not packed."""
    with atomic_path(path) as temporary:
        pq.write_table(choice.losses(), temporary, compression="zstd")


def copy_losses(made: Path, folder: Path) -> dict[str, Any]:
    """Put the list of losses beside the shards; returns its name, hash and number of rows."""
    path = folder / LOSSES_FILE
    with atomic_path(path) as temporary:
        shutil.copyfile(made, temporary)
    num_rows = pq.read_metadata(path).num_rows
    return {"file": path.name, "sha256": sha256_of_file(path), "num_rows": num_rows}


def print_wanted(config: PackConfig, folder: Path) -> None:
    """What is asked for."""
    print(
        f"pack {config.corpus.name} for {config.model.name}: segments of {config.target_len} "
        f"tokens, short window {config.model.original_len}, alignment {config.align} -> {folder}"
    )
    if config.mixture.is_given:
        _print_mixture(config)
        return
    print(f"  {'source':<20}{'short tokens':>16}{'long tokens':>16}")
    known: list[int] = []
    for source, quota in sorted(config.quotas.items()):
        tokens = (quota.short, quota.long)
        known += [number for number in tokens if number is not None]
        cells = ["all" if number is None else f"{number:,}" for number in tokens]
        print(f"  {source:<20}{cells[0]:>16}{cells[1]:>16}")
    more = " and all of the sources marked so" if len(known) < 2 * len(config.quotas) else ""
    num_segments = sum(known) // config.target_len
    print(f"  about {num_segments:,} segments{more}; 2 bytes a token up to 65,536 ids, else 4")


def _print_mixture(config: PackConfig) -> None:
    mixture = config.mixture
    sources = ", ".join(f"{name} {tokens:,}" for name, tokens in sorted(mixture.sources.items()))
    print(f"  tokens by source: {sources}")
    lengths = ", ".join(f"{bucket} {getattr(mixture.buckets, bucket):,}" for bucket in BUCKETS)
    if not mixture.fixes_lengths:
        lengths = f"all longer documents and {mixture.short_survival:.0%} of the short ones"
    print(f"  tokens by length: {lengths}")
    if mixture.total_tokens is not None:
        print(f"  scaled to {mixture.total_tokens:,} tokens in all")


def print_result(
    counts: dict[str, Any], details: dict[str, Any], folder: Path, seconds: float
) -> None:
    """What was packed, what was left out and why, what is missing, and what to know of it."""
    tokens = sum(sum(buckets.values()) for buckets in counts["tokens"].values())
    padding = counts["padding_tokens"]
    print(
        f"packed {tokens:,} tokens in {seconds:.1f} s: {counts['num_short_segments']} short and "
        f"{counts['num_long_segments']} long segments, {padding:,} padding tokens, "
        f"{counts['left_over_tokens']:,} tokens at the end that filled no segment -> {folder}"
    )
    in_short = padding + sum(buckets.get("short", 0) for buckets in counts["tokens"].values())
    if padding > MOST_PADDING * in_short:
        print(
            f"  padding is {padding / in_short:.2%} of the short segments, above "
            f"{MOST_PADDING:.2%}: too few short documents to fill them"
        )
    for title, key, unit in (
        ("left out", "left_out_tokens", "tokens"),
        ("not tokenized", "num_documents_untokenized", "documents"),
        ("skipped", "num_records_skipped", "records"),
    ):
        by_reason: Counter[str] = Counter()
        for reasons in counts[key].values():
            by_reason.update(reasons)
        for reason, number in sorted(by_reason.items()):
            print(f"  {title}: {number:,} {unit}, {reason}")
    damaged = details["damaged_files"]
    for line in damaged[:MOST_NAMED]:
        print(f"  damaged: {line}")
    if len(damaged) > MOST_NAMED:
        print(f"  damaged: {len(damaged) - MOST_NAMED:,} more files, see {folder / LOSSES_FILE}")
    for reason, number in counts["num_files_not_read"].items():
        print(f"  not read: {number:,} files, {reason}")
    for shortfall in counts["shortfalls"]:
        print(f"  shortfall: {shortfall}")
    print_notices(details["notices"])


def print_notices(notices: Sequence[str]) -> None:
    """What to know of the segments before going on, the last lines of a run."""
    for notice in notices:
        print(f"note: {notice}")


def write_report(path: Path, manifest: Manifest) -> None:
    """Write the account as a page without scripts or outside resources."""
    counts, details = manifest.counts, manifest.details
    untokenized, shortfalls = counts["num_documents_untokenized"], counts["shortfalls"] or ["none"]
    parts = [
        _table("Segments", ["what", "number"], _summary(manifest)),
        _cells("Tokens by source and length", counts, list(details["length_buckets"])),
        _reasons("Tokens left out", "tokens", counts["left_out_tokens"]),
        _reasons("Documents read but not tokenized", "documents", untokenized),
        _reasons("Records that could not be read", "records", counts["num_records_skipped"]),
        _damaged_files(details["damaged_files"]),
        _reasons("Files that were not read", "files", {"folder": counts["num_files_not_read"]}),
        *(f"<p><b>Note:</b> {escape(notice)}</p>" for notice in details["notices"]),
        "<h2>Shortfalls</h2><ul>",
        *(f"<li>{escape(shortfall)}</li>" for shortfall in shortfalls),
        "</ul>",
        _histograms(details["length_histogram"]),
    ]
    title = escape(f"Segments of {details['target_len']:,} tokens for {details['model_name']}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{''.join(parts)}</html>\n"
    )
    write_text(path, page)


def _summary(manifest: Manifest) -> list[tuple[str, int | str]]:
    counts, details = manifest.counts, manifest.details
    in_short = counts["num_short_segments"] * details["target_len"]
    padding = counts["padding_tokens"] / in_short if in_short else 0.0
    num_split = sum(counts["num_documents_split"].values())
    return [
        ("short segments", counts["num_short_segments"]),
        ("long segments", counts["num_long_segments"]),
        ("alignment", details["alignment"]),
        ("padding tokens", counts["padding_tokens"]),
        ("padding, share of the short segments", f"{padding:.3%}"),
        ("tokens at the end of a shuffle unit that filled no segment", counts["left_over_tokens"]),
        ("documents of at most L tokens cut between segments", counts["num_cut_documents"]),
        ("documents longer than the longest bucket, split", num_split),
        ("BOS and EOS tokens that cutting added", sum(counts["added_boundary_tokens"].values())),
        ("shards", len(manifest.files)),
    ]


def _cells(title: str, counts: dict[str, Any], buckets: Sequence[str]) -> str:
    header, rows = ["source"], []
    for bucket in buckets:
        header += [f"{bucket}: wanted", f"{bucket}: packed"]
    for source in sorted(counts["tokenized_tokens"].keys() | counts["wanted_tokens"].keys()):
        row: list[int | str] = [source]
        for bucket in buckets:
            row.append(counts["wanted_tokens"].get(source, {}).get(bucket, "all or none"))
            row.append(counts["tokens"].get(source, {}).get(bucket, 0))
        rows.append((*row, counts["tokenized_tokens"].get(source, 0)))
    return _table(title, [*header, "tokenized"], rows)


def _reasons(title: str, unit: str, by_source: dict[str, dict[str, int]]) -> str:
    rows = [(source, *item) for source, reasons in by_source.items() for item in reasons.items()]
    return _table(title, ["source", "reason", unit], rows or [("none", "", 0)])


def _damaged_files(lines: Sequence[str]) -> str:
    rows = [(line,) for line in lines[:MOST_DAMAGED]]
    title = f"Damaged files ({len(lines):,})"
    return _table(title, [f"file, fault, what was read; all in {LOSSES_FILE}"], rows or [("none",)])


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[int | str]]) -> str:
    head, body = "".join(f"<th>{escape(name)}</th>" for name in header), ""
    for row in rows:
        shown = (f"{value:,}" if isinstance(value, int) else escape(value) for value in row)
        body += "<tr>" + "".join(f"<td>{text}</td>" for text in shown) + "</tr>"
    return f"<h2>{escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _histograms(histogram: dict[str, Any]) -> str:
    """Documents by length: light all that were tokenized, dark those chosen; square-root scale."""
    note = "<p>light: tokenized, dark: chosen; heights are square roots</p>"
    page = f"<h2>Documents by length in tokens</h2>{note}"
    axis = "".join(f"<span>{edge:,}</span>" for edge in histogram["edges_tokens"][:-1])
    for source, rows in histogram["num_documents"].items():
        most = max([*rows["tokenized"], *rows["chosen"], 1])
        pairs = zip(rows["tokenized"], rows["chosen"], strict=True)
        bars = "".join(_bar(tokenized, chosen, most) for tokenized, chosen in pairs)
        page += f'<h3>{escape(source)}</h3><div class="bars">{bars}</div>'
        page += f'<div class="axis">{axis}</div>'
    return page


def _bar(tokenized: int, chosen: int, most: int) -> str:
    """One bar; cutting can make more chosen parts than there were documents."""
    higher = max(tokenized, chosen)
    height, inner = 100 * (higher / most) ** 0.5, 100 * (chosen / max(higher, 1)) ** 0.5
    bar = f'<div style="height:{height:.1f}%" title="{tokenized:,} tokenized, {chosen:,} chosen">'
    return f'{bar}<i style="height:{inner:.1f}%"></i></div>'
