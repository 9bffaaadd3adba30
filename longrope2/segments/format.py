"""Segments on disk: what the packer writes and the trainer reads.

Arrow IPC stream shards, one row per segment, memory-mapped: a rank can read its slice of a 131,072-token segment
without touching the rest. ``datasets.load_dataset("arrow", data_files=...)`` opens the same files.

    tokens               fixed-size list of L ids, uint16 or uint32 by vocabulary
    doc_ends             int32, cumulative ends of the documents, the last one is L
    window               "short" | "long"
    source, doc_id       strings, one per document (empty for padding)
    is_padding           bool, one per document: padding is a document of its own, never trained on
    starts_mid_document  the first document continues from another segment and has no BOS
    num_padding          padding tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from longrope2.artifacts import Manifest, read_manifest, sha256_of_file
from longrope2.errors import ArtifactError
from longrope2.rope import Window

__all__ = ["Segment", "SegmentStore", "segment_schema", "token_type"]

REQUIRED_DETAILS = ("target_len", "original_len", "alignment", "vocab_size", "bos_id", "eos_id", "model_name")


@dataclass(frozen=True, eq=False)
class Segment:
    """One row: exactly L tokens and the documents they belong to.

    Attributes:
        index: Position in the store.
        window: Which rotary table and which attention it is for.
        tokens: Ids, shape [L], read-only, uint16 or uint32.
        doc_ends: Cumulative document ends, shape [num_documents], int32; the last is L.
        sources: Source of every document.
        doc_ids: Corpus id of every document.
        doc_is_padding: Whether a document is padding, whose labels the trainer ignores.
        starts_mid_document: The first document continues from another segment.
        num_padding: Padding tokens.
    """

    index: int
    window: Window
    tokens: np.ndarray
    doc_ends: np.ndarray
    sources: tuple[str, ...]
    doc_ids: tuple[str, ...]
    doc_is_padding: tuple[bool, ...]
    starts_mid_document: bool
    num_padding: int


def token_type(vocab_size: int) -> pa.DataType:
    """Smallest stored type for ids below ``vocab_size``."""
    return pa.uint16() if vocab_size <= 2**16 else pa.uint32()


def segment_schema(target_len: int, vocab_size: int) -> pa.Schema:
    """Columns of a shard for segments of ``target_len`` tokens."""
    return pa.schema([
        ("tokens", pa.list_(token_type(vocab_size), target_len)),
        ("doc_ends", pa.list_(pa.int32())),
        ("window", pa.string()),
        ("source", pa.list_(pa.string())),
        ("doc_id", pa.list_(pa.string())),
        ("is_padding", pa.list_(pa.bool_())),
        ("starts_mid_document", pa.bool_()),
        ("num_padding", pa.int32()),
    ])  # fmt: skip


class SegmentStore:
    """The segments of one finished ``1_segments`` folder, read in place.

    Raises:
        ArtifactError: no finished segments there, a manifest field or a shard is missing, or a shard does not have the
            columns or the number of rows that the manifest promises; names which. Hashes are checked by ``verify``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, "segments")
        missing = [name for name in REQUIRED_DETAILS if name not in self.manifest.details]
        if missing:
            raise ArtifactError(f"{self.folder}/manifest.json: details lack {', '.join(missing)}; pack again")
        details = self.manifest.details
        self.target_len: int = details["target_len"]
        self.original_len: int = details["original_len"]
        self.alignment: int = details["alignment"]
        self.vocab_size: int = details["vocab_size"]
        self.bos_id: int = details["bos_id"]
        self.eos_id: int = details["eos_id"]
        self._schema = segment_schema(self.target_len, self.vocab_size)
        self._batches = [batch for name in self.manifest.files for batch in self._open_shard(name)]
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        # One flat view per batch into the mapped file: slicing it copies nothing.
        self._flat_tokens = [np.asarray(batch.column(0).flatten()) for batch in self._batches]
        self._check_counts()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def short_ids(self) -> list[int]:
        """Segments tagged short."""
        return self._ids(Window.SHORT)

    @property
    def long_ids(self) -> list[int]:
        """Segments tagged long."""
        return self._ids(Window.LONG)

    def segment(self, index: int) -> Segment:
        """Segment ``index``; its tokens are a view into the mapped shard."""
        batch_index, row = self._locate(index)
        batch = self._batches[batch_index].slice(row, 1)
        values = {name: batch.column(name)[0].as_py() for name in self._schema.names[1:]}
        return Segment(
            index=index, window=Window(values["window"]), tokens=self.segment_slice(index, 0, self.target_len),
            doc_ends=np.asarray(values["doc_ends"], dtype=np.int32), sources=tuple(values["source"]),
            doc_ids=tuple(values["doc_id"]), doc_is_padding=tuple(values["is_padding"]),
            starts_mid_document=values["starts_mid_document"], num_padding=values["num_padding"],
        )  # fmt: skip

    def segment_slice(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a segment, a read-only view."""
        if not 0 <= start <= stop <= self.target_len:
            raise IndexError(f"slice [{start}, {stop}) of a segment of {self.target_len} tokens")
        batch_index, row = self._locate(index)
        offset = row * self.target_len
        return self._flat_tokens[batch_index][offset + start : offset + stop]

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the manifest.

        Raises:
            ArtifactError: a shard was changed; names it.
        """
        for name, expected in self.manifest.files.items():
            if sha256_of_file(self.folder / name) != expected:
                raise ArtifactError(f"{self.folder / name}: SHA-256 differs from the manifest; pack again")

    @cached_property
    def _windows(self) -> list[str]:
        return [window for batch in self._batches for window in batch.column("window").to_pylist()]

    def _ids(self, window: Window) -> list[int]:
        return [index for index, value in enumerate(self._windows) if value == window.value]

    def _locate(self, index: int) -> tuple[int, int]:
        """Batch and row of a segment."""
        if not 0 <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        batch = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return batch, index - int(self._first_rows[batch])

    def _open_shard(self, name: str) -> Sequence[pa.RecordBatch]:
        path = self.folder / name
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            schema, batches = reader.schema, list(reader)
        except (OSError, pa.ArrowInvalid) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); the manifest lists it, pack again") from None
        if not schema.equals(self._schema):
            different = [f.name for f in self._schema if f.name not in schema.names or schema.field(f.name) != f]
            named = ", ".join(different) or "order"
            raise ArtifactError(f"{path}: column {named} does not fit the manifest; pack again")
        return [batch for batch in batches if batch.num_rows]

    def _check_counts(self) -> None:
        """Rows per window as promised."""
        for key, ids in (("num_short_segments", self.short_ids), ("num_long_segments", self.long_ids)):
            if self.manifest.counts.get(key) != len(ids):
                raise ArtifactError(
                    f"{self.folder}/manifest.json: counts.{key} is {self.manifest.counts.get(key)}, "
                    f"the shards hold {len(ids)}; pack again"
                )
