"""The pack stage: chosen documents become shards, shuffle unit by shuffle unit.

The pack list says which part of which tokenized document goes to which shuffle unit: one Arrow file
per unit, declared complete by ``list.json``, which comes last. A document's shuffle unit follows
from its order of choice alone, so it does not depend on how the corpus was read.

Each shuffle unit then becomes shards of its own, in any order and on any machine: the same bytes
every time, under their final name only when complete. Memory of a worker: the parts of one shuffle
unit as Python objects (about 0.4 kB each; about 0.1 GiB for the default 2**28 tokens) and one
record batch of segments; ids are read from the memory-mapped token files when they are written.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.candidates import WHOLE, Candidates
from data_prep.packing import DraftSegment, Piece, pack_long, pack_short
from data_prep.quotas import Selection
from data_prep.token_files import ROWS_PER_BATCH, DocumentTable, TokenizedUnit
from longrope2.corpora.corpus import RETRIEVAL_SOURCE, stable_fraction
from longrope2.corpora.held_out import HeldOutTexts
from longrope2.errors import DataError
from longrope2.files.artifacts import atomic_path, sha256_of_file, write_text
from longrope2.segments.format import Segment, SegmentRules, check_segment, segment_schema

LIST_SCHEMA = pa.schema(
    [
        # Of the part: "#NUMBER" behind the id of the document it was cut from.
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("domain", pa.string()),
        ("unit", pa.string()),  # name in the corpus
        ("stem", pa.string()),  # name of its token file
        ("start", pa.int64()),  # first id in the token file
        ("num_tokens", pa.int64()),  # without BOS and EOS
        ("offset", pa.int64()),  # first id in the document's own text
        ("bucket", pa.int8()),
        ("text_hash", pa.binary(16)),
        ("content_hash", pa.binary(16)),  # by which the split is drawn
    ]
)
ON_DISK = ("doc_id", "unit", "start", "text_hash", "content_hash", "order")  # until it is listed
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64
TOKENS_PER_BATCH = 2**20


@dataclass(frozen=True)
class PackList:
    """What is packed, on disk."""

    folder: Path

    @property
    def _summary_path(self) -> Path:
        return self.folder / "list.json"

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return self._summary_path.is_file()

    def summary(self) -> dict[str, Any]:
        """What was counted; the number of shuffle units is ``num_units``."""
        return json.loads(self._summary_path.read_text(encoding="utf-8"))

    def rules(self) -> SegmentRules:
        """What the segments have to keep."""
        fields = self.summary()["rules"]
        return SegmentRules(**{**fields, "control_ids": tuple(fields["control_ids"])})

    def parts(self, unit: int) -> pa.Table:
        """Parts of one shuffle unit."""
        with pa.memory_map(str(self._path(unit))) as source:
            return pa.ipc.open_stream(source).read_all()

    def write(
        self,
        table: DocumentTable,
        selection: Selection,
        *,
        held_out: HeldOutTexts,
        tokens_per_unit: int,
        summary: dict,
    ) -> None:
        """Divide the chosen parts among shuffle units of about ``tokens_per_unit`` tokens.

        ``summary``, plain JSON values, is kept with the list.

        Raises:
            DataError: a chosen text is held out (a fault of the packer; nothing is packed).
        """
        num_units = max(1, round(int(selection.parts.tokens_P.sum()) / tokens_per_unit))
        with ExitStack() as stack:
            writers = []
            for unit in range(num_units):
                path = stack.enter_context(atomic_path(self._path(unit)))
                sink = stack.enter_context(pa.OSFile(str(path), "wb"))
                writers.append(stack.enter_context(pa.ipc.new_stream(sink, LIST_SCHEMA)))
            for number, own in _by_unit(table, selection.parts):
                rows, order = _rows(table, selection, own, number)
                _require_train(rows, held_out)
                shuffle_unit = _mixed(order) % np.uint64(num_units)
                for unit in np.unique(shuffle_unit):
                    here = pa.array(np.flatnonzero(shuffle_unit == unit))
                    writers[int(unit)].write_batch(rows.take(here))
        kept = {**summary, "num_units": num_units}
        write_text(self._summary_path, json.dumps(kept, indent=1, sort_keys=True))

    def _path(self, unit: int) -> Path:
        return self.folder / f"list-{unit:05d}.arrow"


def _by_unit(table: DocumentTable, parts: Candidates) -> Iterator[tuple[int, np.ndarray]]:
    """Parts by tokenized unit, in the order of its rows, no more than a batch at a time."""
    by_document = np.argsort(parts.document_P, kind="stable")
    ends = np.searchsorted(parts.document_P, table.first_U, sorter=by_document)
    for number, (first, last) in enumerate(pairwise(ends)):
        for start in range(first, last, ROWS_PER_BATCH):
            yield number, by_document[start : min(last, start + ROWS_PER_BATCH)]


def _rows(
    table: DocumentTable, selection: Selection, own: np.ndarray, number: int
) -> tuple[pa.RecordBatch, np.ndarray]:
    """Rows of the parts ``own``, all from the tokenized unit ``number``, and their orders."""
    parts, names = selection.parts.take(own), table.accounts[number].units
    rows = pa.array(parts.document_P - table.first_U[number], pa.int64())
    kept = table.units[number].index(ON_DISK).take(rows)
    part_ids = zip(kept.column("doc_id").to_pylist(), parts.number_P.tolist(), strict=True)
    pairs = [table.domains[code] for code in table.domain_D[parts.document_P].tolist()]
    columns = [
        [doc_id if part == WHOLE else f"{doc_id}#{part}" for doc_id, part in part_ids],
        [source for source, _ in pairs],
        [domain for _, domain in pairs],
        [names[place] for place in kept.column("unit").to_pylist()],
        [table.units[number].stem] * len(own),
        kept.column("start").to_numpy() + parts.start_P,
        parts.content_P,
        parts.start_P,
        selection.bucket_P[own],
        kept.column("text_hash").to_pylist(),
        kept.column("content_hash").to_pylist(),
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, LIST_SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=LIST_SCHEMA), kept.column("order").to_numpy()


def _require_train(rows: pa.RecordBatch, held_out: HeldOutTexts) -> None:
    """Nothing that is held out is packed, whatever went before."""
    columns = (rows.column(name).to_pylist() for name in ("doc_id", "source", "content_hash"))
    for doc_id, source, content in zip(*columns, strict=True):
        if source != RETRIEVAL_SOURCE and held_out.holds(content):
            raise DataError(f"the text of {doc_id} is held out and was chosen all the same")


def _mixed(order: np.ndarray) -> np.ndarray:
    """Another hash of the order: documents chosen at the same time go to different units."""
    value = (order ^ (order >> np.uint64(30))) * MIX[0]
    value = (value ^ (value >> np.uint64(27))) * MIX[1]
    return value ^ (value >> np.uint64(31))


def write_shards(
    folder: Path,
    drafts: Sequence[DraftSegment],
    rules: SegmentRules,
    *,
    tokens_per_shard: int,
    unit: int = 0,
) -> dict[str, str]:
    """Check and write all segments of shuffle unit ``unit``; returns shard name -> SHA-256.

    Raises:
        DataError: a segment breaks the rules of the format (a fault of the packer; nothing is
            written under the final name of that shard).
    """
    rows = max(1, tokens_per_shard // rules.target_len)
    schema = segment_schema(rules.target_len, rules.vocab_size)
    hashes = {}
    for shard, first in enumerate(range(0, len(drafts), rows)):
        path = folder / f"segments-{unit:05d}-{shard:05d}.arrow"
        with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
            with pa.ipc.new_stream(sink, schema) as writer:
                for batch in _batches(drafts[first : first + rows], first, rules):
                    writer.write_batch(_record_batch(batch, schema))
        hashes[path.name] = sha256_of_file(path)
    return hashes


def remove_strays(folder: Path, files: Collection[str]) -> None:
    """Remove what interrupted runs left: temporary files and all shards but ``files``."""
    strays = [path for path in folder.glob("segments-*.arrow") if path.name not in files]
    for path in [*strays, *folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def segment_from_draft(draft: DraftSegment, index: int, rules: SegmentRules) -> Segment:
    """Put the tokens of a draft together; padding is filled with the EOS id."""
    documents = [piece.document for piece in draft.pieces]
    padding = tuple(document is None for document in documents)
    lengths = [len(piece) for piece in draft.pieces]
    parts = [
        np.full(len(piece), rules.eos_id, dtype=rules.dtype)
        if piece.document is None
        else piece.document.tokens[piece.start : piece.stop].astype(rules.dtype, copy=False)
        for piece in draft.pieces
    ]
    return Segment(
        index=index,
        window=draft.window,
        tokens=np.concatenate(parts),
        doc_ends=np.cumsum(lengths).astype(np.int32),
        sources=tuple(document.source if document else "" for document in documents),
        doc_ids=tuple(document.doc_id if document else "" for document in documents),
        doc_is_padding=padding,
        starts_mid_document=draft.pieces[0].start > 0,
        num_padding=sum(n for n, is_padding in zip(lengths, padding, strict=True) if is_padding),
    )


def _batches(
    drafts: Sequence[DraftSegment], first_index: int, rules: SegmentRules
) -> Iterator[list[Segment]]:
    """Checked segments in groups of about a million tokens."""
    rows = max(1, TOKENS_PER_BATCH // rules.target_len)
    for first in range(0, len(drafts), rows):
        numbered = enumerate(drafts[first : first + rows], first_index + first)
        segments = [segment_from_draft(draft, number, rules) for number, draft in numbered]
        for segment in segments:
            check_segment(segment, rules)
        yield segments


def _record_batch(segments: list[Segment], schema: pa.Schema) -> pa.RecordBatch:
    target_len = schema.field("tokens").type.list_size
    flat = pa.array(np.concatenate([segment.tokens for segment in segments]))
    columns = [
        pa.FixedSizeListArray.from_arrays(flat, target_len),
        pa.array([segment.doc_ends for segment in segments], schema.field("doc_ends").type),
        pa.array([segment.window.value for segment in segments]),
        pa.array([segment.sources for segment in segments], schema.field("source").type),
        pa.array([segment.doc_ids for segment in segments], schema.field("doc_id").type),
        pa.array([segment.doc_is_padding for segment in segments], schema.field("is_padding").type),
        pa.array([segment.starts_mid_document for segment in segments]),
        pa.array([segment.num_padding for segment in segments], pa.int32()),
    ]
    cast = [column.cast(f.type) for column, f in zip(columns, schema, strict=True)]
    return pa.record_batch(cast, schema=schema)


@dataclass(frozen=True, eq=False, slots=True)
class StoredDocument:
    """A part of a tokenized document; its ids are read when asked for."""

    doc_id: str  # of the part
    source: str
    bucket: str
    unit: TokenizedUnit  # where its ids are
    start: int  # first id there
    num_content: int  # ids there; BOS and EOS are added
    rules: SegmentRules  # give BOS, EOS and the type

    def __len__(self) -> int:
        return self.num_content + len(self.rules.boundary_ids)

    @property
    def tokens(self) -> np.ndarray:
        """BOS where there is one, content, EOS."""
        dtype = self.rules.dtype
        tokens = np.empty(len(self), dtype)
        *starts, tokens[-1] = self.rules.boundary_ids
        tokens[: len(starts)] = starts
        content = _mapped(self.unit, dtype)[self.start : self.start + self.num_content]
        tokens[len(starts) : -1] = content
        return tokens


@lru_cache(maxsize=256)
def _mapped(unit: TokenizedUnit, dtype: type[np.unsignedinteger]) -> np.ndarray:
    return unit.tokens(dtype)


@dataclass
class PackedUnit:
    """What became of a shuffle unit."""

    files: dict[str, str] = field(default_factory=dict)  # shard -> SHA-256
    num_segments: dict[str, int] = field(default_factory=dict)  # window -> segments
    # Source -> bucket -> tokens packed, and parts begun.
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    num_documents: dict[str, dict[str, int]] = field(default_factory=dict)
    # Source -> tokens at the end that filled no segment.
    rest_tokens: dict[str, int] = field(default_factory=dict)
    padding_tokens: int = 0
    # Documents of at most L tokens that stand in more than one piece.
    num_cut_documents: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens packed."""
        return sum(sum(cells.values()) for cells in self.tokens.values())


@dataclass(frozen=True)
class PackJob:
    """Packs shuffle units; a unit of work is one shuffle unit."""

    pack_list: PackList
    tokenized: Path
    folder: Path
    rules: SegmentRules
    bucket_names: tuple[str, ...]
    tokens_per_shard: int
    seed: int

    def run(self, number: int) -> PackedUnit:
        """Pack one shuffle unit unless that is done."""
        marker = self.pack_list.folder / f"packed-{number:05d}.json"
        if marker.is_file():
            packed = PackedUnit(**json.loads(marker.read_text(encoding="utf-8")))
            paths = {self.folder / name: sha256 for name, sha256 in packed.files.items()}
            if all(path.is_file() and sha256_of_file(path) == paths[path] for path in paths):
                return packed
        documents, seed = self._documents(number), self.seed + number
        for_short = [d for d in documents if d.bucket == self.bucket_names[0]]
        for_long = [d for d in documents if d.bucket != self.bucket_names[0]]
        target_len, alignment = self.rules.target_len, self.rules.alignment
        short = pack_short(for_short, target_len=target_len, alignment=alignment, seed=seed)
        long = pack_long(for_long, target_len=target_len, seed=seed)
        drafts = [*short.segments, *long.segments]
        packed = _count_pieces(drafts, [*short.rest, *long.rest])
        packed.num_cut_documents = long.num_cut_documents
        packed.num_segments = {"short": len(short.segments), "long": len(long.segments)}
        most = self.tokens_per_shard
        packed.files = write_shards(
            self.folder, drafts, self.rules, tokens_per_shard=most, unit=number
        )
        write_text(marker, json.dumps(vars(packed), indent=1, sort_keys=True))
        return packed

    def _documents(self, number: int) -> list[StoredDocument]:
        """Parts of a shuffle unit in an order that mixes the sources."""
        names = ["doc_id", "source", "bucket", "stem", "start", "num_tokens"]
        columns = (column.to_pylist() for column in self.pack_list.parts(number).select(names))
        placed = []
        for doc_id, source, code, stem, start, size in zip(*columns, strict=True):
            bucket, unit = self.bucket_names[code], TokenizedUnit(self.tokenized, stem)
            document = StoredDocument(
                doc_id, source, bucket, unit, start=start, num_content=size, rules=self.rules
            )
            placed.append((stable_fraction("mix", self.seed, doc_id), doc_id, document))
        return [document for *_, document in sorted(placed, key=itemgetter(0, 1))]


def nested(counter: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """(a, b) -> n as a -> {b -> n}, sorted."""
    tree: dict[str, dict[str, int]] = {}
    for (first, second), number in sorted(counter.items()):
        tree.setdefault(first, {})[second] = int(number)
    return tree


def _count_pieces(drafts: list[DraftSegment], left_over: list[Piece]) -> PackedUnit:
    """Tokens by source and bucket, and everything that was not packed."""
    tokens: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    rest: Counter[str] = Counter()
    padding = 0
    for piece in (piece for draft in drafts for piece in draft.pieces):
        if piece.document is None:
            padding += len(piece)
            continue
        assert isinstance(piece.document, StoredDocument)
        cell = (piece.document.source, piece.document.bucket)
        tokens[cell] += len(piece)
        documents[cell] += piece.start == 0
    for piece in left_over:
        assert piece.document is not None
        rest[piece.document.source] += len(piece)
    return PackedUnit(
        tokens=nested(tokens),
        num_documents=nested(documents),
        rest_tokens=dict(sorted(rest.items())),
        padding_tokens=padding,
    )
