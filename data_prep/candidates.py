"""Candidates: documents that may be packed, after duplicates and over-long documents are dealt with.

Whatever is left out is counted, in tokens and documents, by source and reason.

Shape letters: D documents, P parts (a document, or one of the parts that an over-long document is cut into).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data_prep.document_table import NUM_BOUNDARY_TOKENS, DocumentTable, LengthBuckets
from data_prep.documents_config import Overlong
from data_prep.near_duplicates import near_duplicates

__all__ = ["WHOLE", "Account", "Candidates", "find_candidates", "measure_supply"]

WHOLE = -1  # number of a part that is the whole document


@dataclass
class Account:
    """What happened to documents on the way to the segments.

    Attributes:
        left_out: (source, reason) -> tokens left out.
        num_left_out: (source, reason) -> documents of which something was left out for that reason.
        added_boundaries: Source -> BOS and EOS tokens that cutting added.
        num_split: Source -> documents longer than the longest bucket that were cut into parts.
        num_windowed: Source -> documents cut into short windows.
    """

    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
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
    """Parts of documents, in the order in which they are chosen.

    Attributes:
        document_P: Document of each part.
        start_P: First content token of the part in its document.
        content_P: Content tokens of the part; with BOS and EOS it is two longer.
        number_P: Number of the part in its document, or ``WHOLE``.
    """

    document_P: np.ndarray
    start_P: np.ndarray
    content_P: np.ndarray
    number_P: np.ndarray

    def __len__(self) -> int:
        return len(self.document_P)

    @property
    def tokens_P(self) -> np.ndarray:
        """Tokens with BOS and EOS."""
        return self.content_P + NUM_BOUNDARY_TOKENS

    def take(self, where: np.ndarray) -> "Candidates":
        """Some of them."""
        return Candidates(*(a[where] for a in (self.document_P, self.start_P, self.content_P, self.number_P)))


def find_candidates(
    table: DocumentTable, lengths: LengthBuckets, overlong: Overlong, *, drop_exact: bool, drop_near: bool
) -> tuple[Candidates, Account]:
    """Drop duplicates and bring every document within the longest bucket.

    Args:
        table: All tokenized documents.
        lengths: The buckets.
        overlong: What happens to documents longer than the longest of them.
        drop_exact: Of documents with the same text only the first in order stays, whatever its source.
        drop_near: The same for similar texts (needs signatures in the table).
    """
    account = Account()
    stays_D = _without_duplicates(table, drop_exact, drop_near, account)
    candidates = _within(lengths.longest, table, stays_D, overlong, account)
    keys = (candidates.number_P, candidates.document_P, table.order_D[candidates.document_P])
    return candidates.take(np.lexsort(keys)), account


def measure_supply(
    table: DocumentTable, candidates: Candidates, lengths: LengthBuckets
) -> dict[str, dict[str, dict[str, float]]]:
    """Source -> domain -> bucket -> tokens of all candidates."""
    bucket_P = lengths.codes(candidates.tokens_P)
    cell_P = table.domain_D[candidates.document_P] * len(lengths.names) + bucket_P
    sums = np.bincount(cell_P, candidates.tokens_P, minlength=len(table.domains) * len(lengths.names))
    supply: dict[str, dict[str, dict[str, float]]] = {}
    for code, (source, domain) in enumerate(table.domains):
        cells = sums[code * len(lengths.names) : (code + 1) * len(lengths.names)].tolist()
        supply.setdefault(source, {})[domain] = dict(zip(lengths.names, cells, strict=True))
    return supply


def _without_duplicates(table: DocumentTable, drop_exact: bool, drop_near: bool, account: Account) -> np.ndarray:
    """Which documents stay, bool [D]: of equal (or similar) texts the first in order."""
    stays_D = np.ones(len(table), dtype=bool)
    by_order = np.lexsort((np.arange(len(table)), table.order_D))
    if drop_exact and len(table):
        _, first = np.unique(table.text_hash_D2[by_order], axis=0, return_index=True)
        stays_D[:] = False
        stays_D[by_order[first]] = True
        _leave_out(table, ~stays_D, "exact duplicate", account)
    if drop_near:
        remaining = by_order[stays_D[by_order]]
        similar_D = np.zeros(len(table), dtype=bool)
        similar_D[remaining[near_duplicates(table.values("signature", remaining))]] = True
        stays_D &= ~similar_D
        _leave_out(table, similar_D, "near duplicate", account)
    return stays_D


def _within(
    longest: int, table: DocumentTable, stays_D: np.ndarray, overlong: Overlong, account: Account
) -> Candidates:
    """Documents as parts of at most ``longest`` tokens."""
    over_D = stays_D & (table.tokens_D > longest)
    content_D = table.tokens_D - NUM_BOUNDARY_TOKENS
    most = longest - NUM_BOUNDARY_TOKENS
    pieces_D = stays_D.astype(np.int64)
    if overlong is Overlong.drop:
        pieces_D[over_D] = 0
        _leave_out(table, over_D, f"longer than {longest} tokens", account)
    elif overlong is Overlong.cap:
        for source, own_D in _by_source(table, over_D):
            beyond = int((content_D[own_D] - most).sum())
            account.leave_out(source, f"beyond the first {longest} tokens", beyond, int(own_D.sum()))
        content_D = np.minimum(content_D, most)
    else:
        pieces_D[over_D] = -(-content_D[over_D] // most)
        for source, own_D in _by_source(table, over_D):
            account.num_split[source] += int(own_D.sum())
            account.added_boundaries[source] += NUM_BOUNDARY_TOKENS * int((pieces_D[own_D] - 1).sum())
    return _cut_evenly(content_D, pieces_D)


def _cut_evenly(content_D: np.ndarray, pieces_D: np.ndarray) -> Candidates:
    """Every document in ``pieces_D`` parts of nearly equal length, so that none of them is a short remainder."""
    document_P = np.repeat(np.arange(len(pieces_D)), pieces_D)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(pieces_D) - pieces_D, pieces_D)
    count_P = pieces_D[document_P]
    share_P, longer_P = content_D[document_P] // count_P, content_D[document_P] % count_P
    return Candidates(
        document_P=document_P,
        start_P=number_P * share_P + np.minimum(number_P, longer_P),
        content_P=share_P + (number_P < longer_P),
        number_P=np.where(count_P == 1, WHOLE, number_P),
    )


def _leave_out(table: DocumentTable, where_D: np.ndarray, reason: str, account: Account) -> None:
    """Count whole documents that are left out."""
    for source, own_D in _by_source(table, where_D):
        account.leave_out(source, reason, int(table.tokens_D[own_D].sum()), int(own_D.sum()))


def _by_source(table: DocumentTable, where_D: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """``where_D`` divided by source; sources without any are left out."""
    divided = ((source, where_D & (table.source_D == code)) for code, source in enumerate(table.sources))
    return [(source, own_D) for source, own_D in divided if own_D.any()]
