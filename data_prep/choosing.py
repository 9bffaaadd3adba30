"""From tokenized documents to the documents of a run: candidates, demand for this supply, choice."""

from typing import TYPE_CHECKING

import numpy as np

from data_prep.candidates import find_candidates, measure_supply
from data_prep.corpora import RETRIEVAL_SOURCE, ShortOverlong
from data_prep.demand import demand_of, length_buckets
from data_prep.document_table import DocumentTable
from data_prep.pack_account import Planned
from data_prep.quotas import Selection, select_documents
from data_prep.reading import ReadingPlan

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["choose"]


def choose(config: "PackConfig", table: DocumentTable, reading: ReadingPlan) -> Planned:
    """Choose from what has been tokenized so far; the result tells where reading more may help."""
    lengths, documents = length_buckets(config), config.documents
    candidates, account = find_candidates(
        table, lengths, documents.overlong, drop_exact=documents.exact_duplicates, drop_near=documents.near_duplicates
    )
    supply = measure_supply(table, candidates, lengths)
    fitted = demand_of(config.corpus, supply, _natural_supply(table, reading))
    overlong = {source: config.corpus.short_overlong for source in table.sources}
    overlong[RETRIEVAL_SOURCE] = ShortOverlong.drop  # generated to the length of their bucket, never cut
    selection = select_documents(table, candidates, fitted.demand, lengths, overlong, account, seed=config.seed)
    missing, shortfalls = fitted.missing, list(fitted.shortfalls)
    if not config.corpus.plan.is_given:
        missing, shortfalls = _missing_quotas(config, selection)
    missing = {source: cells for source, cells in missing.items() if source in reading.sources}
    return Planned(table, selection, account, fitted.demand, missing, shortfalls, lengths)


def _natural_supply(table: DocumentTable, reading: ReadingPlan) -> dict[str, dict[str, dict[str, float]]]:
    """Source -> domain -> tokens as the corpus has them: each document weighted by how many were left unread for it."""
    natural: dict[str, dict[str, dict[str, float]]] = {}
    for code, (source, domain) in enumerate(table.domains):
        if source in reading.sources:
            own = np.flatnonzero(table.domain_D == code)
            weights = reading.natural_weights(source, table.characters_D[own])
            natural.setdefault(source, {})[domain] = {"all": float((table.tokens_D[own] * weights).sum())}
    return natural


def _missing_quotas(config: "PackConfig", selection: Selection) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Cells below their quota: how far, and in words."""
    missing: dict[str, dict[str, float]] = {}
    shortfalls = []
    for source, quota in sorted(config.corpus.quotas.items()):
        for bucket in length_buckets(config).names:
            wanted, got = getattr(quota, bucket), selection.tokens[source, bucket]
            if wanted is not None and got < wanted:
                missing.setdefault(source, {})[bucket] = wanted / max(1, got)
                shortfalls.append(f"{source}/{bucket}: {got:,} of {wanted:,} tokens")
    return missing, shortfalls
