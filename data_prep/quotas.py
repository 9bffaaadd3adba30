"""Which documents are packed: candidates first, then a choice until every cell has its tokens.

Candidates are what is left once duplicates and over-long documents are dealt with. They are taken
in an order that depends on the seed and their ids only, so the choice does not depend on how the
corpus is read. A document is used in one bucket: short pieces of a text never reappear in the long
segments. Whatever is left out is counted, in tokens and documents, by source and reason.

Shape letters: D documents, P parts (a document, or one of the parts that an over-long document is
cut into).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.config import DocumentsConfig, Overlong, ShortOverlong
from data_prep.duplicates import clusters_of, near_duplicates
from data_prep.token_files import DocumentTable, LengthBuckets
from longrope2.corpora.corpus import stable_fraction

WHOLE = -1  # number of a part that is the whole document
MOST_WINDOWS = 1_000_000  # of one part; keeps the numbers of windows apart


@dataclass
class Account:
    """What happened to documents on the way to the segments."""

    # (source, reason) -> tokens left out, and documents of which something was left out.
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    # By source: BOS and EOS that cutting added, documents above the longest bucket that were cut
    # into parts, documents cut into short windows.
    added_boundaries: Counter[str] = field(default_factory=Counter)
    num_split: Counter[str] = field(default_factory=Counter)
    num_windowed: Counter[str] = field(default_factory=Counter)

    def leave_out(self, source: str, reason: str, tokens: int, documents: int) -> None:
        """Count something that is left out, unless it is nothing."""
        if documents:
            self.left_out[source, reason] += tokens
            self.num_left_out[source, reason] += documents


@dataclass(frozen=True, eq=False)
class Candidates:
    """Parts of documents, in the order in which they are chosen."""

    document_P: np.ndarray  # document of each part
    start_P: np.ndarray  # first content token of the part in its document
    content_P: np.ndarray  # content tokens of the part, without BOS and EOS
    number_P: np.ndarray  # number of the part in its document, or ``WHOLE``
    num_boundary_tokens: int

    def __len__(self) -> int:
        return len(self.document_P)

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """The four arrays, in the order of the fields."""
        return self.document_P, self.start_P, self.content_P, self.number_P

    @property
    def tokens_P(self) -> np.ndarray:
        """Tokens with BOS and EOS."""
        return self.content_P + self.num_boundary_tokens

    def take(self, where: np.ndarray) -> "Candidates":
        """Some of them."""
        columns = (column[where] for column in self.columns)
        return Candidates(*columns, num_boundary_tokens=self.num_boundary_tokens)


def find_candidates(
    table: DocumentTable,
    lengths: LengthBuckets,
    documents: DocumentsConfig,
    held_out: Sequence[bytes] = (),
) -> tuple[Candidates, Account]:
    """Drop duplicates and bring every document within the longest bucket.

    Of documents with the same text (or similar ones, if the table has signatures) only the first in
    order stays, whatever its source; of those that similar ones connect with a ``held_out``
    signature none.
    """
    account = Account()
    stays_D = _without_duplicates(table, documents, held_out, account)
    candidates = _within(
        lengths.longest, table=table, stays_D=stays_D, overlong=documents.overlong, account=account
    )
    keys = (candidates.number_P, candidates.document_P, table.order_D[candidates.document_P])
    return candidates.take(np.lexsort(keys)), account


def measure_supply(
    table: DocumentTable,
    candidates: Candidates,
    lengths: LengthBuckets,
    weight_D: np.ndarray | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Source -> domain -> bucket -> tokens of all candidates.

    ``weight_D``: how many documents of the corpus each tokenized one stands for; None: one.
    """
    num_domains, num_buckets = len(table.domains), len(lengths.names)
    bucket_P = lengths.codes(candidates.tokens_P)
    cell_P = table.domain_D[candidates.document_P] * num_buckets + bucket_P
    tokens_P = candidates.tokens_P
    if weight_D is not None:
        tokens_P = tokens_P * weight_D[candidates.document_P]
    sums = np.bincount(cell_P, tokens_P, minlength=num_domains * num_buckets)
    supply: dict[str, dict[str, dict[str, float]]] = {}
    rows = sums.reshape(num_domains, num_buckets).tolist()
    for (source, domain), cells in zip(table.domains, rows, strict=True):
        supply.setdefault(source, {})[domain] = dict(zip(lengths.names, cells, strict=True))
    return supply


def _without_duplicates(
    table: DocumentTable, documents: DocumentsConfig, held_out: Sequence[bytes], account: Account
) -> np.ndarray:
    """Which documents stay, bool [D]: of equal ids or texts (or similar) the first in order."""
    by_order = np.lexsort((np.arange(len(table)), table.order_D))
    # The order is a hash of the id. Ids differ inside a unit; of two in different units the first
    # one stays, or no audit could tell which text is meant.
    same_id_D = np.zeros(len(table), dtype=bool)
    same_id_D[by_order[1:]] = table.order_D[by_order[1:]] == table.order_D[by_order[:-1]]
    _leave_out(table, same_id_D, "id of another document", account)
    by_order, stays_D = by_order[~same_id_D[by_order]], ~same_id_D
    if documents.exact_duplicates and len(table):
        _, first = np.unique(table.text_hash_D2[by_order], axis=0, return_index=True)
        stays_D[:] = False
        stays_D[by_order[first]] = True
        _leave_out(table, ~stays_D & ~same_id_D, "exact duplicate", account)
    if documents.near_duplicates:
        remaining = by_order[stays_D[by_order]]
        signatures = table.values("signature", remaining)
        near_held_out = clusters_of(held_out, signatures)
        reserved_D, similar_D = np.zeros((2, len(table)), dtype=bool)
        reserved_D[remaining[near_held_out]] = True
        stays_D &= ~reserved_D
        _leave_out(table, reserved_D, "near duplicate of held-out text", account)
        remaining = remaining[~near_held_out]
        signatures = [s for s, out in zip(signatures, near_held_out, strict=True) if not out]
        similar_D[remaining[near_duplicates(signatures)]] = True
        stays_D &= ~similar_D
        _leave_out(table, similar_D, "near duplicate", account)
    return stays_D


def _within(
    longest: int, table: DocumentTable, stays_D: np.ndarray, overlong: Overlong, account: Account
) -> Candidates:
    """Documents as parts of at most ``longest`` tokens."""
    over_D = stays_D & (table.tokens_D > longest)
    boundary = table.num_boundary_tokens
    content_D, most = table.tokens_D - boundary, longest - boundary
    pieces_D = stays_D.astype(np.int64)
    if overlong is Overlong.drop:
        pieces_D[over_D] = 0
        _leave_out(table, over_D, f"longer than {longest} tokens", account)
        return _cut_evenly(content_D, pieces_D, boundary)
    for source, own_D in _by_source(table, over_D):
        num_over = int(own_D.sum())
        if overlong is Overlong.cap:
            beyond = int((content_D[own_D] - most).sum())
            account.leave_out(source, f"beyond the first {longest} tokens", beyond, num_over)
        else:
            pieces_D[own_D] = -(-content_D[own_D] // most)
            num_cuts = int((pieces_D[own_D] - 1).sum())
            account.num_split[source] += num_over
            account.added_boundaries[source] += boundary * num_cuts
    if overlong is Overlong.cap:
        content_D = np.minimum(content_D, most)
    return _cut_evenly(content_D, pieces_D, boundary)


def _cut_evenly(
    content_D: np.ndarray, pieces_D: np.ndarray, num_boundary_tokens: int
) -> Candidates:
    """Every document in ``pieces_D`` parts of nearly equal length: none is a short remainder."""
    document_P = np.repeat(np.arange(len(pieces_D)), pieces_D)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    count_P = pieces_D[document_P]
    share_P, longer_P = content_D[document_P] // count_P, content_D[document_P] % count_P
    return Candidates(
        document_P=document_P,
        start_P=number_P * share_P + np.minimum(number_P, longer_P),
        content_P=share_P + (number_P < longer_P),
        number_P=np.where(count_P == 1, WHOLE, number_P),
        num_boundary_tokens=num_boundary_tokens,
    )


def _leave_out(table: DocumentTable, where_D: np.ndarray, reason: str, account: Account) -> None:
    for source, own_D in _by_source(table, where_D):
        account.leave_out(source, reason, int(table.tokens_D[own_D].sum()), int(own_D.sum()))


def _by_source(table: DocumentTable, where_D: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """``where_D`` divided by source; sources without any are left out."""
    divided = [(s, where_D & (table.source_D == code)) for code, s in enumerate(table.sources)]
    return [(source, own_D) for source, own_D in divided if own_D.any()]


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
    """Chosen parts, source by source."""

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
    nothing = np.zeros(0, np.int64)
    boundary = table.num_boundary_tokens
    chosen = [(Candidates(nothing, nothing, nothing, nothing, boundary), nothing)]
    for code, source in enumerate(table.sources):
        own = candidates.take(table.source_D[candidates.document_P] == code)
        chooser = _Chooser(
            table,
            own=own,
            source=source,
            demand=demand,
            lengths=lengths,
            account=account,
            tokens=tokens,
        )
        splits = short_overlong.get(source) is ShortOverlong.split
        if splits and demand.of(source, "short") != 0:
            chosen.append(chooser.choose_with_windows(seed))
        else:
            chosen.append(chooser.choose())
    columns = zip(*(parts.columns for parts, _ in chosen), strict=True)
    parts = Candidates(*map(np.concatenate, columns), num_boundary_tokens=boundary)
    return Selection(parts, np.concatenate([bucket_P for _, bucket_P in chosen]), tokens)


@dataclass(frozen=True, eq=False)
class _Chooser:
    table: DocumentTable
    own: Candidates
    source: str
    demand: Demand
    lengths: LengthBuckets
    account: Account
    tokens: Counter[tuple[str, str]]

    def choose(self) -> tuple[Candidates, np.ndarray]:
        """Whole parts by bucket."""
        tokens_P, bucket_P = self.own.tokens_P, self.lengths.codes(self.own.tokens_P)
        taken_P = np.zeros(len(bucket_P), dtype=bool)
        for code, bucket in enumerate(self.lengths.names):
            there = np.flatnonzero(bucket_P == code)
            taken_P[self._until_met(there, bucket)] = True
            taken, left = there[taken_P[there]], there[~taken_P[there]]
            self.tokens[self.source, bucket] += int(tokens_P[taken].sum())
            self._leave_out(bucket, int(tokens_P[left].sum()), self.own.document_P[left])
        return self.own.take(taken_P), bucket_P[taken_P]

    def _leave_out(self, bucket: str, tokens: int, documents: np.ndarray) -> None:
        met = bool(self.demand.of(self.source, bucket))
        reason = f"{bucket} quota met" if met else f"no quota for {bucket} documents"
        self.account.leave_out(self.source, reason, tokens, len(np.unique(documents)))

    def _until_met(self, there: np.ndarray, bucket: str) -> np.ndarray:
        """Those of ``there`` taken: a domain up to its share, then any until the quota is met."""
        wanted = self.demand.of(self.source, bucket)
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
        """As ``choose``, but parts above L0 may be cut into short windows; for miniatures."""
        room = {bucket: self.demand.of(self.source, bucket) for bucket in self.lengths.names}
        short_quota, *long_quotas = room.values()
        long_quota = None if None in long_quotas else sum(quota or 0 for quota in long_quotas)
        doc_ids = self.table.values("doc_id", self.own.document_P)
        codes = self.lengths.codes(self.own.tokens_P).tolist()
        rows = zip(*(column.tolist() for column in self.own.columns), strict=True)
        kept: list[tuple[int, ...]] = []
        for doc_id, code, row in zip(doc_ids, codes, rows, strict=True):
            pieces = [row]
            if code != 0 and not _serves_long(doc_id, short_quota, long_quota, seed):
                pieces, code = self._windows(*row), 0
            bucket = self.lengths.names[code]
            kept += [(*piece, code) for piece in pieces if self._fits(piece, bucket, room)]
        columns = np.asarray(kept, dtype=np.int64).reshape(-1, 5).T
        boundary = self.table.num_boundary_tokens
        return Candidates(*columns[:4], num_boundary_tokens=boundary), columns[4]

    def _windows(
        self, document: int, start: int, content: int, number: int
    ) -> list[tuple[int, int, int, int]]:
        """Consecutive windows of at most L0 tokens, each with BOS and EOS of its own."""
        boundary = self.table.num_boundary_tokens
        step = int(self.lengths.limits[0]) - boundary
        firsts = range(0, content, step)
        self.account.num_windowed[self.source] += 1
        self.account.added_boundaries[self.source] += boundary * (len(firsts) - 1)
        base = 0 if number == WHOLE else (number + 1) * MOST_WINDOWS
        numbered = enumerate(firsts, base)
        return [(document, start + f, min(step, content - f), n) for n, f in numbered]

    def _fits(self, piece: tuple[int, ...], bucket: str, room: dict[str, int | None]) -> bool:
        """Take a piece while its bucket has room; the piece that meets the quota still counts."""
        left, tokens = room[bucket], piece[2] + self.table.num_boundary_tokens
        if left == 0:
            self._leave_out(bucket, tokens, np.array(piece[:1]))
            return False
        if left is not None:
            room[bucket] = max(0, left - tokens)
        self.tokens[self.source, bucket] += tokens
        return True


def _serves_long(doc_id: str, short: int | None, long: int | None, seed: int) -> bool:
    """Whether a document longer than L0 serves a long bucket; ``short`` is not 0."""
    if long == 0:
        return False
    share = long / (short + long) if short is not None and long is not None else 0.5
    return stable_fraction("bucket", seed, doc_id) < share
