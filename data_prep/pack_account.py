"""The account of a run for its manifest: what was read, what was packed, and what became of everything else."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.candidates import Account
from data_prep.document_table import NUM_BOUNDARY_TOKENS, DocumentTable, LengthBuckets
from data_prep.pack_units import PackedUnit, nested
from data_prep.quotas import Demand, Selection
from data_prep.tokenizing import NOT_NEEDED

__all__ = ["Planned", "histogram", "segment_counts"]


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

        Tokens include BOS and EOS. For every source, tokenized + added_boundary_tokens = chosen + left_out_tokens, and
        chosen = packed + left_over_tokens.
        """
        tokenized = np.bincount(self.table.source_D, self.table.tokens_D, minlength=len(self.table.sources))
        wanted = {cell: tokens for cell, tokens in self.demand.cells.items() if tokens}
        return {
            "wanted_tokens": nested(Counter(wanted)),
            "tokenized_tokens": dict(zip(self.table.sources, map(int, tokenized.tolist()), strict=True)),
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

        A unit that was read more than once reports what was not needed each time; the last reading is the one that counts.
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
            skipped.update({(account.source, reason): count for reason, count in account.skipped.items()})
            untokenized.pop((account.source, account.units[0], NOT_NEEDED), None)
            for reason, count in account.left_out_documents.items():
                untokenized[account.source, account.units[0], reason] = (count, account.left_out_characters[reason])
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
        documents.update({(s, b): n for s, cells in unit.num_documents.items() for b, n in cells.items()})
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
