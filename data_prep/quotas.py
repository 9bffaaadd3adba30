"""Quotas: which documents of a source go to which bucket, until each bucket has its tokens.

Documents are taken in an order that depends on the seed and their ids only, so the choice does not depend on how the
corpus is read. A document is used in one bucket: short pieces of a text never reappear in the long segments.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.corpora import BucketQuota, Document, ShortOverlong, stable_fraction
from data_prep.tokenization import DocumentTokenizer, batches_by_characters

__all__ = ["BUCKETS", "Selection", "TokenizedDocument", "select_documents", "split_into_windows"]

BUCKETS = ("short", "long")
NUM_BOUNDARY_TOKENS = 2  # BOS and EOS


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as ids, BOS and EOS included."""

    doc_id: str
    source: str
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Selection:
    """Chosen documents and the account of all others.

    Attributes:
        short: Documents of at most ``original_len`` tokens.
        long: Documents of more.
        tokens: (source, bucket) -> tokens chosen.
        left_out: (source, reason) -> tokens left out; documents that were never read have no token count and are
            counted in ``unread``.
        unread: Source -> documents not read because every quota of the source was met.
        split_documents: Source -> documents cut into short windows.
    """

    short: list[TokenizedDocument] = field(default_factory=list)
    long: list[TokenizedDocument] = field(default_factory=list)
    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    split_documents: Counter[str] = field(default_factory=Counter)


def select_documents(
    documents: Sequence[Document],
    quota: BucketQuota,
    encoder: DocumentTokenizer,
    selection: Selection,
    *,
    original_len: int,
    short_overlong: ShortOverlong,
    seed: int,
) -> None:
    """Tokenize documents of one source and add them to ``selection`` until the quota is met.

    Args:
        documents: All documents of one source.
        quota: Tokens wanted per bucket.
        encoder: Tokenizer of the model.
        selection: Gets the documents and the counts.
        original_len: L0 in tokens; the limit of the short bucket, BOS and EOS included.
        short_overlong: ``split`` cuts documents longer than L0 into windows for the short bucket; ``drop`` does not.
        seed: Seed of the order and of the choice of bucket.
    """
    ordered = sorted(documents, key=lambda document: (stable_fraction("order", seed, document.doc_id), document.doc_id))
    texts = [document.text for document in ordered]
    room = {"short": quota.short, "long": quota.long}
    for batch in batches_by_characters(texts):
        if all(left == 0 for left in room.values()):
            selection.unread[documents[0].source] += len(texts) - batch.start
            return
        for document, ids in zip(ordered[batch], encoder.encode_documents(texts[batch]), strict=True):
            tokenized = TokenizedDocument(document.doc_id, document.source, ids)
            _place(tokenized, quota, room, selection, original_len, short_overlong, seed)


def split_into_windows(document: TokenizedDocument, window_len: int) -> Iterator[TokenizedDocument]:
    """Cut a document into consecutive windows of at most ``window_len`` tokens, each with BOS and EOS of its own."""
    bos, eos, content = document.tokens[:1], document.tokens[-1:], document.tokens[1:-1]
    step = window_len - NUM_BOUNDARY_TOKENS
    for number, start in enumerate(range(0, len(content), step)):
        tokens = np.concatenate([bos, content[start : start + step], eos])
        yield TokenizedDocument(f"{document.doc_id}#{number}", document.source, tokens)


def _place(
    document: TokenizedDocument,
    quota: BucketQuota,
    room: dict[str, int | None],
    selection: Selection,
    original_len: int,
    short_overlong: ShortOverlong,
    seed: int,
) -> None:
    """Put one document, or its windows, into its bucket."""
    if len(document) <= original_len:
        _add("short", [document], room, selection)
    elif _belongs_to_long(document.doc_id, quota, short_overlong, seed):
        _add("long", [document], room, selection)
    elif short_overlong is ShortOverlong.split and quota.short != 0:
        selection.split_documents[document.source] += 1
        _add("short", split_into_windows(document, original_len), room, selection)
    else:
        selection.left_out[document.source, "longer than the short window"] += len(document)


def _belongs_to_long(doc_id: str, quota: BucketQuota, short_overlong: ShortOverlong, seed: int) -> bool:
    """Whether a document that is longer than the short window serves the long bucket."""
    if quota.long == 0:
        return False
    if short_overlong is ShortOverlong.drop or quota.short == 0:
        return True
    both_known = quota.short is not None and quota.long is not None
    share = quota.long / (quota.short + quota.long) if both_known else 0.5  # type: ignore[operator]
    return stable_fraction("bucket", seed, doc_id) < share


def _add(bucket: str, pieces: Iterable[TokenizedDocument], room: dict[str, int | None], selection: Selection) -> None:
    """Add pieces while the bucket has room; the piece that meets the quota still counts."""
    for piece in pieces:
        left = room[bucket]
        if left == 0:
            selection.left_out[piece.source, f"{bucket} quota met"] += len(piece)
            continue
        if left is not None:
            room[bucket] = max(0, left - len(piece))
        (selection.short if bucket == "short" else selection.long).append(piece)
        selection.tokens[piece.source, bucket] += len(piece)
