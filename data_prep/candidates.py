"""What may be chosen: documents without duplicates, cut to the longest bucket, in order of choice.

The order depends on the seed and the ids only, so a choice does not depend on how the corpus is
read. Whatever is left out is counted, in tokens and documents, by source and reason.

Runs over all documents of a corpus, so what it holds is counted in bytes a document: 48 at most,
while equal texts are looked for, and 17 for the candidates. Steps that need more go in blocks.

Shape letters: D documents, P parts (a document, or one of the parts that an over-long document is
cut into).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.config import DocumentsConfig, Overlong
from data_prep.duplicates import clusters_of, near_duplicates
from data_prep.token_files import ROWS_PER_BLOCK, DocumentTable, LengthBuckets, blocks

WHOLE = -1  # number of a part that is the whole document
HASH = np.dtype([("first", "<u8"), ("second", "<u8")])


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
    """Parts of documents, in the order in which they are chosen; those of one document together."""

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

    def take(self, where: np.ndarray | slice) -> "Candidates":
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
    by_order = _by_order(table)
    repeated_D = _repeated_ids(table, by_order)
    _leave_out(table, repeated_D, "id of another document", account)
    stays_D = ~repeated_D
    if documents.exact_duplicates:
        stays_D = _first_of_equal_texts(table, repeated_D)
        _leave_out(table, ~stays_D & ~repeated_D, "exact duplicate", account)
    del repeated_D
    if documents.near_duplicates:
        stays_D &= ~_similar(table, by_order[stays_D[by_order]], held_out, account)
    ordered = by_order[stays_D[by_order]]
    del by_order, stays_D
    return _within(lengths.longest, table, ordered, documents.overlong, account), account


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
    sums = np.zeros(num_domains * num_buckets)
    for block in blocks(len(candidates)):
        own = candidates.take(block)
        cell_P = table.domain_D[own.document_P] * num_buckets + lengths.codes(own.tokens_P)
        tokens_P = own.tokens_P if weight_D is None else own.tokens_P * weight_D[own.document_P]
        sums += np.bincount(cell_P, tokens_P, minlength=len(sums))
    supply: dict[str, dict[str, dict[str, float]]] = {}
    rows = sums.reshape(num_domains, num_buckets).tolist()
    for (source, domain), cells in zip(table.domains, rows, strict=True):
        supply.setdefault(source, {})[domain] = dict(zip(lengths.names, cells, strict=True))
    return supply


def _by_order(table: DocumentTable) -> np.ndarray:
    """All documents in the order of choice; those with the same place as they stand."""
    in_order = np.argsort(table.column("order", np.uint64), kind="stable")
    return in_order.astype(_index_type(len(table)))


def _index_type(number: int) -> type[np.signedinteger]:
    """Type of indices below ``number``."""
    return np.int32 if number <= np.iinfo(np.int32).max else np.int64


def _repeated_ids(table: DocumentTable, by_order: np.ndarray) -> np.ndarray:
    """Which documents have the id of one before them, bool [D]; the order is a hash of the id.

    Ids differ inside a unit. Of two in different units the first one stays, or no audit could tell
    which text is meant.
    """
    order_D, repeated_D = table.column("order", np.uint64), np.zeros(len(table), dtype=bool)
    for block in blocks(len(by_order)):
        own = by_order[max(block.start - 1, 0) : block.stop]
        repeated_D[own[1:][order_D[own[1:]] == order_D[own[:-1]]]] = True
    return repeated_D


def _first_of_equal_texts(table: DocumentTable, repeated_D: np.ndarray) -> np.ndarray:
    """Which documents are the first of their text in the order of choice, bool [D].

    Those of ``repeated_D`` are none of them.
    """
    hash_D, order_D = table.column("text_hash", HASH), table.column("order", np.uint64)
    by_hash = np.argsort(hash_D["first"])
    stays_D = ~repeated_D
    for here in _runs_of_equals(hash_D["first"], by_hash):
        here = here[~repeated_D[here]]
        keys = (here, order_D[here], hash_D["second"][here], hash_D["first"][here])
        here = here[np.lexsort(keys)]
        stays_D[here[1:][hash_D[here[1:]] == hash_D[here[:-1]]]] = False
    return stays_D


def _runs_of_equals(key_D: np.ndarray, by_key: np.ndarray) -> Iterator[np.ndarray]:
    """Documents whose key another one has too, a block of keys at a time."""
    first = 0
    while first < len(by_key):
        last = min(len(by_key), first + ROWS_PER_BLOCK)
        while last < len(by_key) and key_D[by_key[last]] == key_D[by_key[last - 1]]:
            last += 1
        own = by_key[first:last]
        same = key_D[own[1:]] == key_D[own[:-1]]
        yield own[np.append(same, False) | np.append(False, same)]
        first = last


def _similar(
    table: DocumentTable, ordered: np.ndarray, held_out: Sequence[bytes], account: Account
) -> np.ndarray:
    """Which documents are similar to held-out text or to one before them in order, bool [D]."""
    signatures = table.values("signature", ordered)
    near_held_out = clusters_of(held_out, signatures)
    reserved_D, similar_D = np.zeros((2, len(table)), dtype=bool)
    reserved_D[ordered[near_held_out]] = True
    _leave_out(table, reserved_D, "near duplicate of held-out text", account)
    remaining = ordered[~near_held_out]
    signatures = [s for s, out in zip(signatures, near_held_out, strict=True) if not out]
    similar_D[remaining[near_duplicates(signatures)]] = True
    _leave_out(table, similar_D, "near duplicate", account)
    return reserved_D | similar_D


def _within(
    longest: int, table: DocumentTable, ordered: np.ndarray, overlong: Overlong, account: Account
) -> Candidates:
    """The documents ``ordered`` as parts of at most ``longest`` tokens."""
    boundary, most = table.num_boundary_tokens, longest - table.num_boundary_tokens
    content = table.tokens_D[ordered] - boundary
    is_over = content > most
    for source, own in _by_source(table, ordered[is_over]):
        over = table.tokens_D[own] - boundary
        if overlong is Overlong.drop:
            tokens = int(table.tokens_D[own].sum())
            account.leave_out(source, f"longer than {longest} tokens", tokens, len(own))
        elif overlong is Overlong.cap:
            beyond = int((over - most).sum())
            account.leave_out(source, f"beyond the first {longest} tokens", beyond, len(own))
        else:
            account.num_split[source] += len(own)
            account.added_boundaries[source] += boundary * int((-(-over // most) - 1).sum())
    if overlong is Overlong.drop:
        ordered, content = ordered[~is_over], content[~is_over]
    if overlong is Overlong.split and is_over.any():
        return _cut_evenly(ordered, content, -(-content // most), boundary)
    content = np.minimum(content, most, out=content)
    number_P = np.full(len(ordered), WHOLE, np.int32)
    return Candidates(ordered, np.zeros_like(number_P), content, number_P, boundary)


def _cut_evenly(
    ordered: np.ndarray, content: np.ndarray, num_pieces: np.ndarray, num_boundary_tokens: int
) -> Candidates:
    """Every document in pieces of nearly equal length: none is a short remainder."""
    pieces = np.maximum(num_pieces, 1)  # an empty text is a document too
    number = int(pieces.sum())
    document_P = np.empty(number, ordered.dtype)
    start_P, content_P, number_P = (np.empty(number, np.int32) for _ in range(3))
    first = 0
    for block in blocks(len(ordered)):
        count, whole = pieces[block], content[block]
        place = np.repeat(np.arange(len(count)), count)
        part = np.arange(len(place)) - (np.cumsum(count) - count)[place]
        share, longer = whole[place] // count[place], whole[place] % count[place]
        own = slice(first, first + len(place))
        document_P[own] = ordered[block][place]
        start_P[own] = part * share + np.minimum(part, longer)
        content_P[own] = share + (part < longer)
        number_P[own] = np.where(count[place] == 1, WHOLE, part)
        first += len(place)
    return Candidates(document_P, start_P, content_P, number_P, num_boundary_tokens)


def _leave_out(table: DocumentTable, where_D: np.ndarray, reason: str, account: Account) -> None:
    for source, own in _by_source(table, np.flatnonzero(where_D)):
        account.leave_out(source, reason, int(table.tokens_D[own].sum()), len(own))


def _by_source(table: DocumentTable, documents: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """``documents`` divided by source; sources without any are left out."""
    of = table.sources_of(documents)
    divided = [(source, documents[of == code]) for code, source in enumerate(table.sources)]
    return [(source, own) for source, own in divided if len(own)]
