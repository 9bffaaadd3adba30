"""The audit of a finished folder: is every segment what it says, and is every token accounted for?

Nothing here trusts the packer: hashes are computed again, every segment is held against the rules
of the format, tokens are added up against the list of documents and the account of the manifest,
and a sample of documents is read from the corpus and tokenized again.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from longrope2.corpora.corpus import (
    RETRIEVAL_SOURCE,
    Corpus,
    Document,
    Unit,
    content_hash,
    place_of_content,
    stable_fraction,
    text_hash,
)
from longrope2.corpora.held_out import DOCUMENTS_FILE
from longrope2.corpora.losses import Losses
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import ArtifactError, DataError
from longrope2.files.artifacts import sha256_of_file
from longrope2.segments.format import SegmentStore, check_segment

QUOTA_TOLERANCE = 0.01


@dataclass
class Audit:
    """What an audit looked at."""

    num_segments: int = 0  # all of them checked
    num_shards: int = 0  # all hashed
    num_tokens: int = 0  # in segments, padding included
    num_documents: int = 0  # documents (or parts) in the list
    num_compared: int = 0  # documents compared with their source
    # Of these, documents whose runs of ids all decode to a passage of the source text.
    num_decoded: int = 0
    # Document id -> its runs of ids in the segments; only of the documents to compare.
    pieces: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    # Hash of the ids of a document that stands in one piece -> its id; only where a sample is asked
    # for.
    whole: dict[bytes, str] = field(default_factory=dict)
    num_held_out: int = 0  # held-out texts that no packed text equals


@dataclass(frozen=True)
class _Listed:
    doc_id: str
    source: str
    unit: str
    num_tokens: int
    offset: int
    text_hash: bytes
    content_hash: bytes


def audit_folder(folder: Path, *, sample: int = 0, seed: int = 0) -> Audit:
    """Check hashes, every segment, the list of documents, quotas and the account of tokens.

    Args:
        folder: A ``1_segments`` folder.
        sample: Documents whose ids are kept for ``compare_with_source``.
        seed: Which documents.

    Raises:
        ArtifactError: the folder is unfinished, or the first thing that does not hold.
    """
    store = SegmentStore(folder)
    store.verify()
    listed = _read_list(store)
    num_shards, num_tokens = len(store.manifest.files), len(store) * store.target_len
    audit = Audit(len(store), num_shards, num_tokens, num_documents=len(listed))
    # Generated documents have no source to compare with.
    candidates = [row for row in listed.values() if row.source != RETRIEVAL_SOURCE]
    candidates.sort(key=lambda row: stable_fraction("verify", seed, row.doc_id))
    found = _check_segments(store, audit, {row.doc_id for row in candidates[:sample]}, sample > 0)
    if listed:
        _check_split(store, listed)
        _check_documents(store, listed, found)
        _check_account(store)
        _check_losses(store)
        _check_quotas(store)
    return audit


def compare_with_source(
    folder: Path, audit: Audit, corpus: Corpus, encoder: DocumentTokenizer
) -> None:
    """Read the sampled documents again and compare text hash and ids; counts into ``audit``.

    Raises:
        ArtifactError: a document is not in its unit any more, its text differs, or its ids do.
        DataError: a unit cannot be read.
    """
    listed = _read_list(SegmentStore(folder))
    by_unit: dict[str, list[_Listed]] = defaultdict(list)
    for doc_id in audit.pieces:
        by_unit[listed[doc_id].unit].append(listed[doc_id])
    units = {unit.name: unit for unit in corpus.units()}
    for name, rows in sorted(by_unit.items()):
        if name not in units:
            gone = f"unit {name} is not in the corpus any more; was it changed or moved?"
            raise _wrong(folder, gone)
        for row, text in _texts(corpus, units[name], rows, folder):
            _compare(row, text=text, audit=audit, encoder=encoder, folder=folder)


def compare_held_out(
    folder: Path, audit: Audit, documents: Iterable[Document], encoder: DocumentTokenizer
) -> None:
    """Hold held-out documents against the list and the ids of ``folder``; counts into ``audit``.

    A text is found by its content in the list, and by its ids where a packed document has the same
    and stands in one piece, whatever the list says of it.

    Raises:
        ArtifactError: one of them was packed; names both.
    """
    listed = {row.content_hash: row.doc_id for row in _read_list(SegmentStore(folder)).values()}
    for document in documents:
        packed = listed.get(content_hash(document.text))
        if packed is None:
            (ids,) = encoder.encode_documents([document.text])
            packed = audit.whole.get(_ids_hash(ids, encoder.dtype))
        if packed is not None:
            leak = f"{packed} has the text of {document.doc_id}, which is held out"
            raise _wrong(folder, f"{leak}; pack again")
        audit.num_held_out += 1


def _ids_hash(ids: np.ndarray, dtype: type[np.unsignedinteger]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(ids, dtype).tobytes()).digest()[:16]


def _check_split(store: SegmentStore, listed: dict[str, _Listed]) -> None:
    """No listed text is one that its corpus holds out by content."""
    share = store.manifest.details["heldout_fraction"]
    for row in listed.values():
        if row.source != RETRIEVAL_SOURCE and place_of_content(row.content_hash) < share:
            kept = f"the text of {row.doc_id} is held out (corpus.heldout_fraction={share:g})"
            raise _wrong(store.folder, f"{kept} and was packed all the same; pack again")


def _read_list(store: SegmentStore) -> dict[str, _Listed]:
    """Rows of ``documents.parquet`` by id; none in folders that have no list."""
    entry = store.manifest.details.get("documents")
    if entry is None:
        return {}
    path = store.folder / DOCUMENTS_FILE
    if not path.is_file() or sha256_of_file(path) != entry["sha256"]:
        raise _wrong(path, "missing, or its SHA-256 differs from the manifest; pack again")
    names = [f.name for f in fields(_Listed)]
    if missing := sorted(set(names) - set(pq.read_schema(path).names)):
        earlier = f"no column {missing[0]}: packed by an earlier version, which split by name"
        raise _wrong(path, f"{earlier}; pack again")
    columns = (column.to_pylist() for column in pq.read_table(path, columns=names).columns)
    rows = {row[0]: _Listed(*row) for row in zip(*columns, strict=True)}
    if len(rows) != entry["num_rows"]:
        ids = f"{entry['num_rows']} rows with {len(rows)} different ids"
        raise _wrong(path, f"{ids}; an id stands there twice")
    return rows


def _check_segments(
    store: SegmentStore, audit: Audit, keep: set[str], keep_whole: bool
) -> dict[str, int]:
    """Hold every segment and their sums against the rules; returns document id -> tokens."""
    rules, found, padding = store.rules, Counter[str](), 0
    cells: Counter[str] = Counter()
    for segment in map(store.segment, range(len(store))):
        try:
            check_segment(segment, rules)
        except DataError as error:
            raise _wrong(store.folder, f"{error}") from None
        padding += segment.num_padding
        start = 0
        documents = zip(segment.doc_ids, segment.sources, segment.doc_is_padding, strict=True)
        for end, document in zip(segment.doc_ends.tolist(), documents, strict=True):
            doc_id, source, is_padding = document
            if not is_padding:
                found[doc_id] += end - start
                cells[source] += end - start
                if keep_whole and source != RETRIEVAL_SOURCE:
                    run = segment.tokens[start:end]
                    audit.whole[_ids_hash(run, rules.dtype)] = doc_id
                if doc_id in keep:
                    audit.pieces[doc_id].append(segment.tokens[start:end])
            start = end
    counts = store.manifest.counts
    _require_equal(store, "padding_tokens", padding, counts.get("padding_tokens", padding))
    for source, tokens in counts.get("tokens", {}).items():
        _require_equal(store, f"tokens.{source}", cells[source], sum(tokens.values()))
    return found


def _check_documents(
    store: SegmentStore, listed: dict[str, _Listed], found: dict[str, int]
) -> None:
    """Every listed document is in the segments with all its tokens, but for the counted rest."""
    folder, expected = store.folder, store.manifest.counts["rest_tokens"]
    unknown = next((doc_id for doc_id in found if doc_id not in listed), None)
    if unknown is not None:
        raise _wrong(folder, f"document {unknown} is in the segments but not in {DOCUMENTS_FILE}")
    rest: Counter[str] = Counter()
    for row in listed.values():
        left = row.num_tokens - found.get(row.doc_id, 0)
        if left < 0:
            has = f"document {row.doc_id} has {row.num_tokens} tokens"
            raise _wrong(folder, f"{has}, the segments hold more")
        rest[row.source] += left
    for source in {*rest, *expected}:
        _require_equal(store, f"rest_tokens.{source}", rest[source], expected.get(source, 0))


def _check_account(store: SegmentStore) -> None:
    """For every source: tokenized + added boundaries = packed + rest + left out."""
    counts = store.manifest.counts
    for source, tokenized in counts["tokenized_tokens"].items():
        there = tokenized + counts["added_boundary_tokens"].get(source, 0)
        packed = sum(counts["tokens"].get(source, {}).values())
        left_out = sum(counts["left_out_tokens"].get(source, {}).values())
        rest = counts["rest_tokens"].get(source, 0)
        if there != packed + rest + left_out:
            known = f"{packed} are packed, {rest} are the rest and {left_out} are left out"
            unknown = f"{there - packed - rest - left_out} are unaccounted for"
            raise _wrong(store.folder, f"of {there} tokens of {source}, {known}: {unknown}")


def _check_losses(store: SegmentStore) -> None:
    """What is told of each unit as lost adds up to what the manifest tells of its source.

    Folders of earlier versions have no such list.
    """
    entry, counts = store.manifest.details.get("losses"), store.manifest.counts
    if entry is None:
        return
    path = store.folder / entry["file"]
    if not path.is_file() or sha256_of_file(path) != entry["sha256"]:
        raise _wrong(path, "missing, or its SHA-256 differs from the manifest; pack again")
    told: Counter[str] = Counter()
    for row in pq.read_table(path, columns=["source", "num_records"]).to_pylist():
        told[row["source"]] += row["num_records"]
    reasons = ("num_records_skipped", "num_documents_untokenized")
    for source in {*told, *counts["tokenized_tokens"]}:
        expected = sum(sum(counts[key].get(source, {}).values()) for key in reasons)
        if told[source] < expected:
            raise _wrong(path, f"{told[source]} losses of {source}, {expected} in the manifest")


def _check_quotas(store: SegmentStore) -> None:
    """Every wanted cell has its tokens, or a shortfall is reported; none has much more."""
    counts, limits = store.manifest.counts, store.manifest.details["length_buckets"]
    reported = " ".join(counts["shortfalls"])
    for source, cells in counts["wanted_tokens"].items():
        for bucket, wanted in cells.items():
            cell = f"{source}/{bucket}"
            got = counts["chosen_tokens"].get(source, {}).get(bucket, 0)
            if got > wanted * (1 + QUOTA_TOLERANCE) + limits[bucket]:
                raise _wrong(store.folder, f"{cell} has {got} tokens chosen, {wanted} were wanted")
            if got < wanted and cell not in reported:
                fault = f"{cell} has {got} of {wanted} tokens, no shortfall reported"
                raise _wrong(store.folder, fault)


def _texts(
    corpus: Corpus, unit: Unit, rows: list[_Listed], folder: Path
) -> Iterable[tuple[_Listed, str]]:
    wanted: dict[str, list[_Listed]] = defaultdict(list)
    for row in rows:
        # A part's id is the document's with "#NUMBER" behind it; ids themselves may hold "#".
        for name in (row.doc_id, row.doc_id.rpartition("#")[0]):
            wanted[name].append(row)
    missing = {row.doc_id for row in rows}
    for document in corpus.read(unit, Losses()):
        for row in wanted.get(document.doc_id, ()):
            missing.discard(row.doc_id)
            yield row, document.text
        if not missing:
            return
    gone = f"document {min(missing)} is not in {unit.name} any more"
    raise _wrong(folder, f"{gone}; was the corpus changed?")


def _compare(
    row: _Listed, text: str, audit: Audit, encoder: DocumentTokenizer, folder: Path
) -> None:
    if text_hash(text) != row.text_hash or content_hash(text) != row.content_hash:
        other = f"the text of {row.doc_id} is not the one that was packed"
        raise _wrong(folder, f"{other}; was the corpus changed?")
    end = row.offset + row.num_tokens - encoder.num_boundary_tokens
    content = encoder.encode_contents([text])[0][row.offset : end]
    parts = [encoder.start_ids, content, [encoder.eos_id]]
    expected = np.concatenate(parts).astype(encoder.dtype)
    pieces = audit.pieces[row.doc_id]
    if any(not _holds(expected, piece) for piece in pieces):
        raise _wrong(folder, f"ids of {row.doc_id} in the segments are not those of its text")
    audit.num_compared += 1
    # Ids that stand for parts of a character, where a document was cut there, have no text of their
    # own.
    audit.num_decoded += all(encoder.decode(_without(piece, encoder)) in text for piece in pieces)


def _without(piece: np.ndarray, encoder: DocumentTokenizer) -> np.ndarray:
    """A run of ids without the BOS and EOS at its ends."""
    first = int(len(piece) > 0 and [piece[0]] == encoder.start_ids)
    last = len(piece) - int(len(piece) > 1 and piece[-1] == encoder.eos_id)
    return piece[first:last]


def _holds(ids: np.ndarray, piece: np.ndarray) -> bool:
    """Whether ``piece`` is a run of ``ids``."""
    whole, width = ids.tobytes(), ids.dtype.itemsize
    part = np.ascontiguousarray(piece).astype(ids.dtype).tobytes()
    place = whole.find(part)
    while place >= 0 and place % width:
        place = whole.find(part, place + 1)
    return place >= 0


def _require_equal(store: SegmentStore, name: str, found: int, expected: int) -> None:
    if found != expected:
        promised = f"counts.{name} is {expected} in the manifest"
        raise _wrong(store.folder, f"{promised}, the segments give {found}")


def _wrong(place: Path, fault: str) -> ArtifactError:
    return ArtifactError(f"{place}: {fault}")
