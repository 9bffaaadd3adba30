"""The hand-over from planning to packing: which part of which tokenized document goes to which
shuffle unit.

One Arrow file per shuffle unit, written next to each other and declared complete by ``plan.json``,
which comes last. A document's shuffle unit follows from its order of choice alone, so it does not
depend on how the corpus was read.

Writing: drafts into Arrow shards, the same bytes every time, under their final name only when
complete.

The pack stage: each shuffle unit becomes shards of its own, in any order and on any machine.

Memory of a worker: the parts of one shuffle unit as Python objects (about 0.4 kB each; about 0.1
GiB for the default 2**28 tokens) and one record batch of segments; ids are read from the
memory-mapped token files when they are written.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.packing import DraftSegment, Piece, pack_long, pack_short
from data_prep.quotas import WHOLE, Selection
from data_prep.token_files import NUM_BOUNDARY_TOKENS, DocumentTable, TokenizedUnit
from longrope2.corpora.corpus import stable_fraction
from longrope2.files.artifacts import atomic_path, sha256_of_file, write_text
from longrope2.segments.format import Segment, SegmentRules, check_segment, segment_schema

PLAN_SCHEMA = pa.schema(
    [
        (
            "doc_id",
            pa.string(),
        ),  # of the part: "#NUMBER" behind the id of the document it was cut from
        ("source", pa.string()),
        ("domain", pa.string()),
        ("unit", pa.string()),  # name in the corpus
        ("stem", pa.string()),  # name of its token file
        ("start", pa.int64()),  # first id in the token file
        ("num_tokens", pa.int64()),  # without BOS and EOS
        ("offset", pa.int64()),  # first id in the document's own text
        ("bucket", pa.int8()),
        ("text_hash", pa.binary(16)),
    ]
)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64
TOKENS_PER_BATCH = 2**20


@dataclass(frozen=True)
class PackPlan:
    """A plan on disk."""

    folder: Path

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return (self.folder / "plan.json").is_file()

    def summary(self) -> dict[str, Any]:
        """What planning counted; the number of shuffle units is ``num_units``."""
        return json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))

    def parts(self, unit: int) -> pa.Table:
        """Parts of one shuffle unit."""
        with pa.memory_map(str(self.path(unit))) as source:
            return pa.ipc.open_stream(source).read_all()

    def path(self, unit: int) -> Path:
        """File of one shuffle unit."""
        return self.folder / f"plan-{unit:05d}.arrow"


def write_pack_plan(
    folder: Path,
    table: DocumentTable,
    selection: Selection,
    *,
    tokens_per_unit: int,
    summary: dict[str, Any],
) -> PackPlan:
    """Divide the chosen parts among shuffle units of about ``tokens_per_unit`` tokens and write
    them down.

    Args:
        folder: Gets the files.
        table: All documents.
        selection: The chosen parts.
        tokens_per_unit: Tokens of a shuffle unit.
        summary: Plain JSON values to keep with the plan.
    """
    plan, parts = PackPlan(folder), selection.parts
    num_units = max(1, round(int(parts.tokens_P.sum()) / tokens_per_unit))
    shuffle_unit_P = _mixed(table.order_D[parts.document_P]) % np.uint64(num_units)
    with ExitStack() as stack:
        writers = []
        for unit in range(num_units):
            sink = stack.enter_context(
                pa.OSFile(str(stack.enter_context(atomic_path(plan.path(unit)))), "wb")
            )
            writers.append(stack.enter_context(pa.ipc.new_stream(sink, PLAN_SCHEMA)))
        for number in range(len(table.units)):
            own = np.flatnonzero(table.unit_D[parts.document_P] == number)
            if len(own):
                rows = _rows(table, selection, own, number)
                for unit in np.unique(shuffle_unit_P[own]):
                    here = pa.array(np.flatnonzero(shuffle_unit_P[own] == unit))
                    writers[int(unit)].write_batch(rows.take(here))
    write_text(
        folder / "plan.json",
        json.dumps({**summary, "num_units": num_units}, indent=1, sort_keys=True),
    )
    return plan


def _rows(
    table: DocumentTable, selection: Selection, own: np.ndarray, number: int
) -> pa.RecordBatch:
    """Rows of the parts ``own``, all from the tokenized unit ``number``."""
    parts = selection.parts.take(own)
    documents = parts.document_P
    ids = [
        doc_id if part == WHOLE else f"{doc_id}#{part}"
        for doc_id, part in zip(
            table.values("doc_id", documents), parts.number_P.tolist(), strict=True
        )
    ]
    names = table.accounts[number].units
    pairs = [table.domains[code] for code in table.domain_D[documents].tolist()]
    columns = [
        ids,
        [source for source, _ in pairs],
        [domain for _, domain in pairs],
        [names[place] for place in table.values("unit", documents)],
        [table.units[number].stem] * len(own),
        table.start_D[documents] + parts.start_P,
        parts.content_P,
        parts.start_P,
        selection.bucket_P[own].astype(np.int8),
        [row.tobytes() for row in table.text_hash_D2[documents]],
    ]
    return pa.record_batch(
        [pa.array(c, f.type) for c, f in zip(columns, PLAN_SCHEMA, strict=True)], schema=PLAN_SCHEMA
    )


def _mixed(order: np.ndarray) -> np.ndarray:
    """Another 64-bit hash of the order: documents of one shuffle unit are not those chosen at the same time."""
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
    """Check and write all segments of a shuffle unit; returns shard name -> SHA-256.

    Args:
        folder: Product folder.
        drafts: Segments in order.
        rules: What each of them has to keep.
        tokens_per_shard: Tokens of a shard file at most.
        unit: Number of the shuffle unit, part of the names.

    Raises:
        DataError: a segment breaks the rules of the format (a fault of the packer; nothing is
            written under the final name of that shard).
    """
    rows = max(1, tokens_per_shard // rules.target_len)
    num_shards = -(-len(drafts) // rows)
    hashes = {}
    for shard in range(num_shards):
        path = folder / f"segments-{unit:05d}-{shard:05d}.arrow"
        with atomic_path(path) as temporary:
            _write_shard(temporary, drafts[shard * rows : (shard + 1) * rows], shard * rows, rules)
        hashes[path.name] = sha256_of_file(path)
    return hashes


def remove_strays(folder: Path, files: Collection[str]) -> None:
    """Remove temporary files and all shards but ``files``: what interrupted runs left in a folder without a manifest."""
    strays = [path for path in folder.glob("segments-*.arrow") if path.name not in files]
    for path in [*strays, *folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


def segment_from_draft(draft: DraftSegment, index: int, rules: SegmentRules) -> Segment:
    """Put the tokens of a draft together; padding is filled with the EOS id."""
    dtype = np.uint16 if rules.vocab_size <= 2**16 else np.uint32
    parts, padding = [], []
    for piece in draft.pieces:
        padding.append(piece.document is None)
        if piece.document is None:
            parts.append(np.full(len(piece), rules.eos_id, dtype=dtype))
        else:
            parts.append(piece.document.tokens[piece.start : piece.stop].astype(dtype, copy=False))
    documents = [piece.document for piece in draft.pieces]
    return Segment(
        index=index,
        window=draft.window,
        tokens=np.concatenate(parts),
        doc_ends=np.cumsum([len(piece) for piece in draft.pieces]).astype(np.int32),
        sources=tuple(document.source if document else "" for document in documents),
        doc_ids=tuple(document.doc_id if document else "" for document in documents),
        doc_is_padding=tuple(padding),
        starts_mid_document=draft.pieces[0].start > 0,
        num_padding=sum(len(piece) for piece in draft.pieces if piece.document is None),
    )


def _write_shard(
    path: Path, drafts: Sequence[DraftSegment], first_index: int, rules: SegmentRules
) -> None:
    """Write one Arrow stream file."""
    schema = segment_schema(rules.target_len, rules.vocab_size)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(drafts, first_index, rules):
            writer.write_batch(_record_batch(batch, schema))


def _batches(
    drafts: Sequence[DraftSegment], first_index: int, rules: SegmentRules
) -> Iterator[list[Segment]]:
    """Checked segments in groups of about a million tokens."""
    rows = max(1, TOKENS_PER_BATCH // rules.target_len)
    for first in range(0, len(drafts), rows):
        segments = [
            segment_from_draft(draft, first_index + first + number, rules)
            for number, draft in enumerate(drafts[first : first + rows])
        ]
        for segment in segments:
            check_segment(segment, rules)
        yield segments


def _record_batch(segments: list[Segment], schema: pa.Schema) -> pa.RecordBatch:
    """Segments as one Arrow record batch."""
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
    return pa.record_batch(
        [c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
    )


@dataclass(frozen=True, eq=False, slots=True)
class StoredDocument:
    """A part of a tokenized document; its ids are read when asked for.

    Attributes:
        doc_id: Id of the part.
        source: Its source.
        bucket: Name of its bucket.
        unit: Where its ids are.
        start: First id there.
        num_content: Ids there; BOS and EOS are added.
        rules: Give BOS, EOS and the type.
    """

    doc_id: str
    source: str
    bucket: str
    unit: TokenizedUnit
    start: int
    num_content: int
    rules: SegmentRules

    def __len__(self) -> int:
        return self.num_content + NUM_BOUNDARY_TOKENS

    @property
    def tokens(self) -> np.ndarray:
        """BOS, content, EOS."""
        dtype = self.rules.dtype
        tokens = np.empty(len(self), dtype)
        tokens[0], tokens[-1] = self.rules.bos_id, self.rules.eos_id
        tokens[1:-1] = _mapped(self.unit, dtype)[self.start : self.start + self.num_content]
        return tokens


@dataclass
class PackedUnit:
    """What became of a shuffle unit.

    Attributes:
        files: Shard -> SHA-256.
        num_segments: Window -> segments.
        tokens: source -> bucket -> tokens packed.
        num_documents: source -> bucket -> parts begun.
        rest_tokens: source -> tokens at the end that filled no segment.
        padding_tokens: Padding.
        num_cut_documents: Documents of at most L tokens that stand in more than one piece.
    """

    files: dict[str, str] = field(default_factory=dict)
    num_segments: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    num_documents: dict[str, dict[str, int]] = field(default_factory=dict)
    rest_tokens: dict[str, int] = field(default_factory=dict)
    padding_tokens: int = 0
    num_cut_documents: int = 0


@dataclass(frozen=True)
class PackJob:
    """Packs shuffle units; a unit of work is one shuffle unit."""

    plan: PackPlan
    tokenized: Path
    folder: Path
    rules: SegmentRules
    bucket_names: tuple[str, ...]
    tokens_per_shard: int
    seed: int

    def run(self, number: int) -> PackedUnit:
        """Pack one shuffle unit unless that is done."""
        marker = self.plan.folder / f"packed-{number:05d}.json"
        if marker.is_file():
            packed = PackedUnit(**json.loads(marker.read_text(encoding="utf-8")))
            if all(
                _is_whole(self.folder / name, expected) for name, expected in packed.files.items()
            ):
                return packed
        documents = self._documents(number)
        window_len, seed = self.rules.target_len, self.seed + number
        short = pack_short(
            [d for d in documents if d.bucket == self.bucket_names[0]],
            target_len=window_len,
            alignment=self.rules.alignment,
            seed=seed,
        )
        long = pack_long(
            [d for d in documents if d.bucket != self.bucket_names[0]],
            target_len=window_len,
            seed=seed,
        )
        drafts = [*short.segments, *long.segments]
        packed = _account(drafts, [*short.rest, *long.rest])
        packed.num_cut_documents = long.num_cut_documents
        packed.num_segments = {"short": len(short.segments), "long": len(long.segments)}
        packed.files = write_shards(
            self.folder, drafts, self.rules, tokens_per_shard=self.tokens_per_shard, unit=number
        )
        write_text(marker, json.dumps(vars(packed), indent=1, sort_keys=True))
        return packed

    def _documents(self, number: int) -> list[StoredDocument]:
        """Parts of a shuffle unit in an order that mixes the sources."""
        rows = self.plan.parts(number).select(
            ["doc_id", "source", "bucket", "stem", "start", "num_tokens"]
        )
        columns = (column.to_pylist() for column in rows.columns)
        documents = [
            StoredDocument(
                doc_id,
                source,
                self.bucket_names[bucket],
                TokenizedUnit(self.tokenized, stem),
                start,
                num,
                self.rules,
            )
            for doc_id, source, bucket, stem, start, num in zip(*columns, strict=True)
        ]
        return sorted(
            documents, key=lambda d: (stable_fraction("mix", self.seed, d.doc_id), d.doc_id)
        )


def nested(counter: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """(a, b) -> n as a -> {b -> n}, sorted."""
    tree: dict[str, dict[str, int]] = {}
    for (first, second), number in sorted(counter.items()):
        tree.setdefault(first, {})[second] = int(number)
    return tree


@lru_cache(maxsize=256)
def _mapped(unit: TokenizedUnit, dtype: type[np.unsignedinteger]) -> np.ndarray:
    return unit.tokens(dtype)


def _is_whole(path: Path, expected: str) -> bool:
    return path.is_file() and sha256_of_file(path) == expected


def _account(drafts: list[DraftSegment], left_over: list[Piece]) -> PackedUnit:
    """Tokens by source and bucket, and everything that was not packed."""
    tokens: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    rest: Counter[str] = Counter()
    padding = 0
    for draft in drafts:
        for piece in draft.pieces:
            if piece.document is None:
                padding += len(piece)
            else:
                cell = _cell(piece.document)
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


def _cell(document: Any) -> tuple[str, str]:
    return document.source, document.bucket
