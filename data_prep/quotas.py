"""Which candidates are packed: until every cell of the demand has its tokens.

They are taken in their order, block by block, so beside them there is room for two bytes a
candidate. A document is used in one bucket: short pieces of a text never reappear in the long
segments. Whatever is left out is counted, in tokens and documents, by source and reason.

Shape letters: D documents, P parts (a document, or one of the parts that an over-long document is
cut into).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.candidates import WHOLE, Account, Candidates
from data_prep.config import ShortOverlong
from data_prep.token_files import DocumentTable, LengthBuckets, blocks
from longrope2.corpora.corpus import stable_fraction

MOST_WINDOWS = 1_000_000  # of one part; keeps the numbers of windows apart


@dataclass(frozen=True)
class Demand:
    """Tokens wanted, BOS and EOS included."""

    # (source, bucket) -> tokens, None for all there is; cells that are missing want nothing.
    cells: Mapping[tuple[str, str], int | None]
    # (source, domain) -> bucket -> tokens: how the cells of a source are divided; domains without
    # an entry are taken as they come.
    domains: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)

    def of(self, source: str, bucket: str) -> int | None:
        """Tokens wanted of one cell."""
        return self.cells.get((source, bucket), 0)


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen parts."""

    parts: Candidates
    bucket_P: np.ndarray  # bucket of each
    tokens: Counter[tuple[str, str]]  # (source, bucket) -> tokens chosen


def select_documents(
    table: DocumentTable,
    candidates: Candidates,
    *,
    demand: Demand,
    lengths: LengthBuckets,
    short_overlong: Mapping[str, ShortOverlong],
    account: Account,
    seed: int,
) -> Selection:
    """Choose candidates, in their order, until every cell of ``demand`` has its tokens.

    The document that meets a quota still counts, so a cell gets at most one document more than it
    wants. ``account`` gets what is left out; ``seed`` decides which documents are cut into windows
    where ``short_overlong``, by source, allows both.
    """
    tokens: Counter[tuple[str, str]] = Counter()
    chooser = _Chooser(
        table, candidates=candidates, demand=demand, lengths=lengths, account=account, tokens=tokens
    )
    cut = [
        source
        for source in table.sources
        if short_overlong.get(source) is ShortOverlong.split and demand.of(source, "short") != 0
    ]
    whole, bucket_P = chooser.choose([source for source in table.sources if source not in cut])
    chosen = [(whole, bucket_P), *(chooser.choose_with_windows(source, seed) for source in cut)]
    if not cut:
        return Selection(whole, bucket_P, tokens)
    columns = zip(*(parts.columns for parts, _ in chosen), strict=True)
    boundary = table.num_boundary_tokens
    parts = Candidates(*map(np.concatenate, columns), num_boundary_tokens=boundary)
    return Selection(parts, np.concatenate([bucket_P for _, bucket_P in chosen]), tokens)


@dataclass(frozen=True, eq=False)
class _Chooser:
    table: DocumentTable
    candidates: Candidates
    demand: Demand
    lengths: LengthBuckets
    account: Account
    tokens: Counter[tuple[str, str]]

    def choose(self, sources: Sequence[str]) -> tuple[Candidates, np.ndarray]:
        """Whole parts by bucket, of some sources."""
        bucket_P, taken_P = self._buckets(), np.zeros(len(self.candidates), dtype=bool)
        for source in sources:
            for bucket in self.lengths.names:
                self._take_shares(source, bucket, bucket_P, taken_P)
                self._take_others(source, bucket, bucket_P, taken_P)
                self._account_for(source, bucket, bucket_P, taken_P)
        return self.candidates.take(taken_P), bucket_P[taken_P]

    def _buckets(self) -> np.ndarray:
        """Code of the bucket of every candidate, int8 [P]."""
        bucket_P = np.empty(len(self.candidates), np.int8)
        for block in blocks(len(bucket_P)):
            own = self.candidates.content_P[block] + self.candidates.num_boundary_tokens
            bucket_P[block] = self.lengths.codes(own)
        return bucket_P

    def _cell(self, source: str, bucket: str, bucket_P: np.ndarray) -> Iterator[np.ndarray]:
        """Candidates of one cell, block by block."""
        of_source = self.table.sources.index(source)
        of_bucket = self.lengths.names.index(bucket)
        for block in blocks(len(bucket_P)):
            there = np.flatnonzero(bucket_P[block] == of_bucket) + block.start
            sources = self.table.sources_of(self.candidates.document_P[there])
            yield there[sources == of_source]

    def _tokens_of(self, there: np.ndarray) -> np.ndarray:
        own = self.candidates.content_P[there].astype(np.int64)
        return own + self.candidates.num_boundary_tokens

    def _take_shares(
        self, source: str, bucket: str, bucket_P: np.ndarray, taken_P: np.ndarray
    ) -> None:
        """Of every domain with a share the first of its candidates, as many as it holds."""
        shares: dict[int, float] = {}
        for code, name in enumerate(self.table.domains):
            share = self.demand.domains.get(name, {}).get(bucket)
            if name[0] == source and share is not None:
                shares[code] = share
        if not shares or self.demand.of(source, bucket) is None:
            return
        passed = dict.fromkeys(shares, 0)  # tokens of the candidates of earlier blocks
        for there in self._cell(source, bucket, bucket_P):
            domain = self.table.domain_D[self.candidates.document_P[there]]
            for code in np.unique(domain).tolist():
                if code in shares and passed[code] < shares[code]:
                    mine = there[domain == code]
                    total = passed[code] + np.cumsum(self._tokens_of(mine))
                    taken_P[mine] = total <= shares[code]
                    passed[code] = int(total[-1])

    def _take_others(
        self, source: str, bucket: str, bucket_P: np.ndarray, taken_P: np.ndarray
    ) -> None:
        """Whatever comes first, until the quota is met; all where all are wanted."""
        wanted = self.demand.of(source, bucket)
        room: float = np.inf
        if wanted is not None:
            room = wanted - sum(
                int(self._tokens_of(there[taken_P[there]]).sum())
                for there in self._cell(source, bucket, bucket_P)
            )
        for there in self._cell(source, bucket, bucket_P):
            if room <= 0:
                return
            others = there[~taken_P[there]]
            tokens = self._tokens_of(others)
            before = np.cumsum(tokens) - tokens
            taken_P[others] = before < room
            room -= float(tokens.sum())

    def _account_for(
        self, source: str, bucket: str, bucket_P: np.ndarray, taken_P: np.ndarray
    ) -> None:
        left, num_left, last = 0, 0, -1
        for there in self._cell(source, bucket, bucket_P):
            is_taken = taken_P[there]
            self.tokens[source, bucket] += int(self._tokens_of(there[is_taken]).sum())
            rest = there[~is_taken]
            left += int(self._tokens_of(rest).sum())
            documents = self.candidates.document_P[rest]
            if len(rest):  # parts of a document stand together
                num_left += int(np.count_nonzero(np.diff(documents, prepend=last)))
                last = int(documents[-1])
        self._leave_out(source, bucket, left, num_left)

    def _leave_out(self, source: str, bucket: str, tokens: int, num_documents: int) -> None:
        met = bool(self.demand.of(source, bucket))
        reason = f"{bucket} quota met" if met else f"no quota for {bucket} documents"
        self.account.leave_out(source, reason, tokens, num_documents)

    def choose_with_windows(self, source: str, seed: int) -> tuple[Candidates, np.ndarray]:
        """As ``choose``, but parts above L0 may be cut into short windows; for miniatures."""
        of_source = self.table.sources_of(self.candidates.document_P)
        own = self.candidates.take(of_source == self.table.sources.index(source))
        room = {bucket: self.demand.of(source, bucket) for bucket in self.lengths.names}
        short_quota, *long_quotas = room.values()
        long_quota = None if None in long_quotas else sum(quota or 0 for quota in long_quotas)
        doc_ids = self.table.values("doc_id", own.document_P)
        codes = self.lengths.codes(own.tokens_P).tolist()
        rows = zip(*(column.tolist() for column in own.columns), strict=True)
        kept: list[tuple[int, ...]] = []
        for doc_id, code, row in zip(doc_ids, codes, rows, strict=True):
            pieces = [row]
            if code != 0 and not _serves_long(doc_id, short_quota, long_quota, seed):
                pieces, code = self._windows(source, *row), 0
            bucket = self.lengths.names[code]
            kept += [(*piece, code) for piece in pieces if self._fits(source, piece, bucket, room)]
        columns = np.asarray(kept, dtype=np.int64).reshape(-1, 5).T
        boundary = self.table.num_boundary_tokens
        return Candidates(*columns[:4], num_boundary_tokens=boundary), columns[4]

    def _windows(
        self, source: str, document: int, start: int, content: int, number: int
    ) -> list[tuple[int, int, int, int]]:
        """Consecutive windows of at most L0 tokens, each with BOS and EOS of its own."""
        boundary = self.table.num_boundary_tokens
        step = int(self.lengths.limits[0]) - boundary
        firsts = range(0, content, step)
        self.account.num_windowed[source] += 1
        self.account.added_boundaries[source] += boundary * (len(firsts) - 1)
        base = 0 if number == WHOLE else (number + 1) * MOST_WINDOWS
        numbered = enumerate(firsts, base)
        return [(document, start + f, min(step, content - f), n) for n, f in numbered]

    def _fits(
        self, source: str, piece: tuple[int, ...], bucket: str, room: dict[str, int | None]
    ) -> bool:
        """Take a piece while its bucket has room; the piece that meets the quota still counts."""
        left, tokens = room[bucket], piece[2] + self.table.num_boundary_tokens
        if left == 0:
            self._leave_out(source, bucket, tokens, 1)
            return False
        if left is not None:
            room[bucket] = max(0, left - tokens)
        self.tokens[source, bucket] += tokens
        return True


def _serves_long(doc_id: str, short: int | None, long: int | None, seed: int) -> bool:
    """Whether a document longer than L0 serves a long bucket; ``short`` is not 0."""
    if long == 0:
        return False
    share = long / (short + long) if short is not None and long is not None else 0.5
    return stable_fraction("bucket", seed, doc_id) < share
