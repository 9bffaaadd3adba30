"""Writing: drafts into Arrow shards, the same bytes every time, under their final name only when complete."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.packing import DraftSegment
from longrope2.artifacts import atomic_path, sha256_of_file
from longrope2.segments import Segment, SegmentRules, check_segment, segment_schema

__all__ = ["remove_strays", "segment_from_draft", "write_shards"]

TOKENS_PER_BATCH = 2**20


def write_shards(
    folder: Path, drafts: Sequence[DraftSegment], rules: SegmentRules, *, tokens_per_shard: int, unit: int = 0
) -> dict[str, str]:
    """Check and write all segments of a shuffle unit; returns shard name -> SHA-256.

    Args:
        folder: Product folder.
        drafts: Segments in order.
        rules: What each of them has to keep.
        tokens_per_shard: Tokens of a shard file at most.
        unit: Number of the shuffle unit, part of the names.

    Raises:
        DataError: a segment breaks the rules of the format (a fault of the packer; nothing is written under the final
            name of that shard).
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


def _write_shard(path: Path, drafts: Sequence[DraftSegment], first_index: int, rules: SegmentRules) -> None:
    """Write one Arrow stream file."""
    schema = segment_schema(rules.target_len, rules.vocab_size)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batches(drafts, first_index, rules):
            writer.write_batch(_record_batch(batch, schema))


def _batches(drafts: Sequence[DraftSegment], first_index: int, rules: SegmentRules) -> Iterator[list[Segment]]:
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
    return pa.record_batch([c.cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
