"""Quotas: which candidates are packed, until each bucket of each source has its tokens.

Documents are taken in an order that depends on the seed and their ids only, so the choice does not depend on how the
corpus is read. A document is used in one bucket: short pieces of a text never reappear in the long segments.

Shape letters: P parts (see ``candidates.py``).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from data_prep.candidates import WHOLE, Account, Candidates
from data_prep.corpora import ShortOverlong, stable_fraction
from data_prep.document_table import NUM_BOUNDARY_TOKENS, DocumentTable, LengthBuckets

__all__ = ["Demand", "Selection", "TokenizedDocument", "select_documents"]

MOST_WINDOWS = 1_000_000  # of one part; keeps the numbers of windows apart


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as ids, BOS and EOS included."""

    doc_id: str
    source: str
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Demand:
    """Tokens wanted, BOS and EOS included.

    Attributes:
        cells: (source, bucket) -> tokens, None for all there is; cells that are missing want nothing.
        domains: (source, domain) -> bucket -> tokens: how the cells of a source are divided; domains without an entry
            are taken as they come.
    """

    cells: Mapping[tuple[str, str], int | None]
    domains: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)

    def of(self, source: str, bucket: str) -> int | None:
        """Tokens wanted of one cell."""
        return self.cells.get((source, bucket), 0)


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen parts.

    Attributes:
        parts: The parts, source by source.
        bucket_P: Bucket of each.
        tokens: (source, bucket) -> tokens chosen.
    """

    parts: Candidates
    bucket_P: np.ndarray
    tokens: Counter[tuple[str, str]]


def select_documents(
    table: DocumentTable, candidates: Candidates, demand: Demand, lengths: LengthBuckets,
    short_overlong: Mapping[str, ShortOverlong], account: Account, *, seed: int,
) -> Selection:  # fmt: skip
    """Choose candidates until every cell of ``demand`` has its tokens.

    The document that meets a quota still counts, so a cell gets at most one document more than it wants.

    Args:
        table: All documents.
        candidates: Parts that may be chosen, in order.
        demand: Tokens wanted.
        lengths: The buckets.
        short_overlong: Source -> whether documents longer than L0 may be cut into windows for the short bucket.
        account: Gets what is left out.
        seed: Seed of the choice between cutting a document into windows and packing it whole.
    """
    tokens: Counter[tuple[str, str]] = Counter()
    chosen: list[tuple[Candidates, np.ndarray]] = []
    for code, source in enumerate(table.sources):
        own = candidates.take(table.source_D[candidates.document_P] == code)
        chooser = _Chooser(table, own, source, demand, lengths, account, tokens)
        windows = short_overlong.get(source) is ShortOverlong.split and demand.of(source, "short") != 0
        chosen.append(chooser.choose_with_windows(seed) if windows else chooser.choose())
    empty = np.zeros(0, np.int64)
    names = ("document_P", "start_P", "content_P", "number_P")
    columns = [np.concatenate([empty, *(getattr(parts, name) for parts, _ in chosen)]) for name in names]
    return Selection(Candidates(*columns), np.concatenate([empty, *(bucket_P for _, bucket_P in chosen)]), tokens)


@dataclass(frozen=True, eq=False)
class _Chooser:
    """Chooses from one source."""

    table: DocumentTable
    own: Candidates
    source: str
    demand: Demand
    lengths: LengthBuckets
    account: Account
    tokens: Counter[tuple[str, str]]

    def choose(self) -> tuple[Candidates, np.ndarray]:
        """Whole parts by bucket."""
        bucket_P = self.lengths.codes(self.own.tokens_P)
        taken_P = np.zeros(len(bucket_P), dtype=bool)
        for code, bucket in enumerate(self.lengths.names):
            there = np.flatnonzero(bucket_P == code)
            wanted = self.demand.of(self.source, bucket)
            taken_P[self._until_met(there, bucket, wanted)] = True
            taken, left = there[taken_P[there]], there[~taken_P[there]]
            self.tokens[self.source, bucket] += int(self.own.tokens_P[taken].sum())
            reason = f"{bucket} quota met" if wanted else f"no quota for {bucket} documents"
            num_documents = len(np.unique(self.own.document_P[left]))
            self.account.leave_out(self.source, reason, int(self.own.tokens_P[left].sum()), num_documents)
        return self.own.take(taken_P), bucket_P[taken_P]

    def _until_met(self, there: np.ndarray, bucket: str, wanted: int | None) -> np.ndarray:
        """Indices of the parts taken from ``there``: each domain up to its share, then any until the quota is met."""
        if wanted is None:
            return there
        tokens = self.own.tokens_P[there]
        domain = self.table.domain_D[self.own.document_P[there]]
        taken = np.zeros(len(there), dtype=bool)
        for code in np.unique(domain):
            share = self.demand.domains.get(self.table.domains[code], {}).get(bucket)
            if share is not None:
                mine = np.flatnonzero(domain == code)
                taken[mine] = np.cumsum(tokens[mine]) <= share
        room = wanted - int(tokens[taken].sum())
        others = np.flatnonzero(~taken)
        taken[others[(np.cumsum(tokens[others]) - tokens[others]) < room]] = True
        return there[taken]

    def choose_with_windows(self, seed: int) -> tuple[Candidates, np.ndarray]:
        """As ``choose``, but parts longer than L0 may be cut into short windows (for miniatures: a plain loop)."""
        room = {bucket: self.demand.of(self.source, bucket) for bucket in self.lengths.names}
        long_quota = _sum_or_none([room[bucket] for bucket in self.lengths.names[1:]])
        doc_ids = self.table.values("doc_id", self.own.document_P)
        codes = self.lengths.codes(self.own.tokens_P).tolist()
        rows = zip(self.own.document_P.tolist(), self.own.start_P.tolist(), self.own.content_P.tolist(),
                   self.own.number_P.tolist(), strict=True)  # fmt: skip
        kept: list[tuple[int, ...]] = []
        for doc_id, code, row in zip(doc_ids, codes, rows, strict=True):
            if code == 0 or _serves_long(doc_id, self.demand.of(self.source, "short"), long_quota, seed):
                pieces = [row]
            else:
                pieces, code = self._windows(*row), 0
            kept += [(*piece, code) for piece in pieces if self._fits(piece[2], self.lengths.names[code], room)]
        columns = np.asarray(kept, dtype=np.int64).reshape(-1, 5).T
        return Candidates(*columns[:4]), columns[4]

    def _windows(self, document: int, start: int, content: int, number: int) -> list[tuple[int, int, int, int]]:
        """Consecutive windows of at most L0 tokens, each with BOS and EOS of its own."""
        step = self.lengths.limits[0] - NUM_BOUNDARY_TOKENS
        firsts = range(0, content, step)
        self.account.num_windowed[self.source] += 1
        self.account.added_boundaries[self.source] += NUM_BOUNDARY_TOKENS * (len(firsts) - 1)
        base = 0 if number == WHOLE else (number + 1) * MOST_WINDOWS
        return [(document, start + f, min(step, content - f), base + i) for i, f in enumerate(firsts)]

    def _fits(self, content: int, bucket: str, room: dict[str, int | None]) -> bool:
        """Take a piece while its bucket has room; the piece that meets the quota still counts."""
        left, tokens = room[bucket], content + NUM_BOUNDARY_TOKENS
        if left == 0:
            reason = (
                f"{bucket} quota met" if self.demand.of(self.source, bucket) else f"no quota for {bucket} documents"
            )
            self.account.leave_out(self.source, reason, tokens, 1)
            return False
        if left is not None:
            room[bucket] = max(0, left - tokens)
        self.tokens[self.source, bucket] += tokens
        return True


def _serves_long(doc_id: str, short: int | None, long: int | None, seed: int) -> bool:
    """Whether a document that is longer than the short window serves a long bucket; ``short`` is not 0."""
    if long == 0:
        return False
    share = long / (short + long) if short is not None and long is not None else 0.5
    return stable_fraction("bucket", seed, doc_id) < share


def _sum_or_none(quotas: list[int | None]) -> int | None:
    """Sum of quotas; None if one of them asks for all there is."""
    known = [quota for quota in quotas if quota is not None]
    return sum(known) if len(known) == len(quotas) else None
