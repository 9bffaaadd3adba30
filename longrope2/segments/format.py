"""Segments on disk: what the packer writes and the trainer reads.

Arrow IPC stream shards, one row per segment, memory-mapped: a rank can read its slice of a
131,072-token segment without touching the rest. ``datasets.load_dataset("arrow", data_files=...)``
opens the same files.

    tokens               fixed-size list of L ids, uint16 or uint32 by vocabulary
    doc_ends             int32, cumulative ends of the documents, the last one is L
    window               "short" | "long"
    source, doc_id       strings, one per document (empty for padding)
    is_padding           bool, one per document: padding is a document of its own, never trained on
    starts_mid_document  the first document continues from another segment and has no BOS
    num_padding          padding tokens

The packer checks every segment by the rules below, a training run some at its start, and
``data_prep.verify`` all of them again, with hashes and the source texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from longrope2.errors import ArtifactError, DataError
from longrope2.files.artifacts import Manifest, read_manifest, sha256_of_file
from longrope2.files.unchanged import require_unchanged
from longrope2.rope.window import Window


@dataclass(frozen=True, eq=False)
class Segment:
    """One row: exactly L tokens and the documents they belong to; the columns above, and its place.

    ``tokens`` is a read-only view; arrays have the shapes [L] and [num_documents].
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


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Smallest type for ids below ``vocab_size``: what segments and token files store."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def segment_schema(target_len: int, vocab_size: int) -> pa.Schema:
    """Columns of a shard for segments of ``target_len`` tokens."""
    return pa.schema(
        [
            ("tokens", pa.list_(pa.from_numpy_dtype(token_dtype(vocab_size)), target_len)),
            ("doc_ends", pa.list_(pa.int32())),
            ("window", pa.string()),
            ("source", pa.list_(pa.string())),
            ("doc_id", pa.list_(pa.string())),
            ("is_padding", pa.list_(pa.bool_())),
            ("starts_mid_document", pa.bool_()),
            ("num_padding", pa.int32()),
        ]
    )


@dataclass(frozen=True)
class SegmentRules:
    """What every segment of a folder has to keep.

    It has ``target_len`` tokens with ids below ``vocab_size``; its documents begin with ``bos_id``
    (None: with their text) and end with ``eos_id``. In a short segment none is longer than
    ``original_len``, BOS and EOS included, or crosses a multiple of ``target_len / alignment``.
    ``control_ids`` stand nowhere inside a document; BOS and EOS always belong to them.
    """

    target_len: int
    original_len: int
    alignment: int
    vocab_size: int
    bos_id: int | None
    eos_id: int
    control_ids: tuple[int, ...] = ()

    @property
    def boundary_ids(self) -> tuple[int, ...]:
        """What a document has beyond its content: BOS where there is one, and EOS."""
        return (self.eos_id,) if self.bos_id is None else (self.bos_id, self.eos_id)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Type of stored ids."""
        return token_dtype(self.vocab_size)


RULE_DETAILS = ("target_len", "original_len", "alignment", "vocab_size", "bos_id", "eos_id")


class SegmentStore:
    """The segments of one finished ``1_segments`` folder, read in place.

    Raises:
        ArtifactError: no finished segments there, or a manifest field, a shard's size, columns,
            offsets or rows are not as the manifest promises; names which. Tokens are not read:
            ``require_unchanged`` compares the hashes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(self.folder, "segments")
        details = self.manifest.details
        missing = [name for name in (*RULE_DETAILS, "model_name") if name not in details]
        if missing:
            fault = f"{self.folder}/manifest.json: details lack {', '.join(missing)}; pack again"
            raise ArtifactError(fault)
        self.rules = SegmentRules(
            **{name: details[name] for name in RULE_DETAILS},
            control_ids=tuple(details.get("control_ids", ())),
        )
        self.target_len, self.original_len = self.rules.target_len, self.rules.original_len
        self._schema = segment_schema(self.target_len, self.rules.vocab_size)
        self._batches = [batch for name in self.manifest.files for batch in self._open_shard(name)]
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        # One flat view per batch into the mapped file: slicing it copies nothing.
        self._flat_tokens = [np.asarray(batch.column(0).flatten()) for batch in self._batches]
        promised = self.manifest.counts
        found = {"num_short_segments": self.short_ids, "num_long_segments": self.long_ids}
        for key, ids in found.items():
            if promised.get(key) != len(ids):
                fault = f"{self.folder}/manifest.json: counts.{key} is {promised.get(key)}"
                raise ArtifactError(f"{fault}, the shards hold {len(ids)}; pack again")

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    @property
    def short_ids(self) -> list[int]:
        """Segments tagged short."""
        return [index for index, value in enumerate(self._windows) if value == Window.SHORT]

    @property
    def long_ids(self) -> list[int]:
        """Segments tagged long."""
        return [index for index, value in enumerate(self._windows) if value == Window.LONG]

    def segment(self, index: int) -> Segment:
        """Segment ``index``; its tokens are a view into the mapped shard."""
        batch_index, row = self._locate(index)
        batch = self._batches[batch_index].slice(row, 1)
        values = {name: batch.column(name)[0].as_py() for name in self._schema.names[1:]}
        return Segment(
            index=index,
            window=Window(values["window"]),
            tokens=self.segment_slice(index, 0, self.target_len),
            doc_ends=np.asarray(values["doc_ends"], dtype=np.int32),
            sources=tuple(values["source"]),
            doc_ids=tuple(values["doc_id"]),
            doc_is_padding=tuple(values["is_padding"]),
            starts_mid_document=values["starts_mid_document"],
            num_padding=values["num_padding"],
        )

    def segment_slice(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a segment, a read-only view."""
        if not 0 <= start <= stop <= self.target_len:
            raise IndexError(f"slice [{start}, {stop}) of a segment of {self.target_len} tokens")
        batch_index, row = self._locate(index)
        offset = row * self.target_len
        return self._flat_tokens[batch_index][offset + start : offset + stop]

    def require_unchanged(self) -> None:
        """Raise DamagedError, naming the shard, if one has changed since it was last hashed."""
        require_unchanged(self.folder, self.manifest.files, "pack again")

    def verify(self) -> None:
        """Raise ArtifactError, naming the shard, unless every SHA-256 is the manifest's; anew."""
        for name, expected in self.manifest.files.items():
            if sha256_of_file(self.folder / name) != expected:
                fault = f"{self.folder / name}: SHA-256 differs from the manifest; pack again"
                raise ArtifactError(fault)

    @cached_property
    def _windows(self) -> list[str]:
        return [window for batch in self._batches for window in batch.column("window").to_pylist()]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"segment {index} of {len(self)}")
        batch = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        return batch, index - int(self._first_rows[batch])

    def _check_size(self, path: Path) -> None:
        """Refuse a shard that is missing, or not as large as it was written, before it is parsed.

        Raises:
            ArtifactError: names it.
        """
        if not path.is_file():
            fault = f"{path} cannot be read (it is missing)"
            raise ArtifactError(f"{fault}; the manifest lists it, pack again")
        expected, found = self.manifest.details.get("file_bytes", {}), path.stat().st_size
        if found != expected.get(path.name, found):
            fault = f"{path} has {found} bytes, the manifest says {expected[path.name]}"
            raise ArtifactError(f"{fault}; pack again")

    def _open_shard(self, name: str) -> Sequence[pa.RecordBatch]:
        path = self.folder / name
        self._check_size(path)
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(path)))
            schema, batches = reader.schema, list(reader)
            for batch in batches:  # offsets that point elsewhere would end the interpreter
                batch.validate(full=True)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            fault = f"{path} cannot be read ({error}); the manifest lists it, pack again"
            raise ArtifactError(fault) from None
        if not schema.equals(self._schema):
            names = {field.name: field for field in schema}
            different = [field.name for field in self._schema if names.get(field.name) != field]
            named = ", ".join(different) or "order"
            raise ArtifactError(f"{path}: column {named} does not fit the manifest; pack again")
        return [batch for batch in batches if batch.num_rows]


def check_at_start(store: SegmentStore, num_segments: int = 64) -> None:
    """The cheap part of an audit: totals, and segments spread over all.

    Takes well under a second a million tokens; ``python -m data_prep.verify FOLDER`` checks all.

    Raises:
        ArtifactError: a total does not add up, or a segment breaks a rule.
    """
    counts = store.manifest.counts
    if "tokens" in counts and "padding_tokens" in counts:
        packed = sum(sum(buckets.values()) for buckets in counts["tokens"].values())
        padding = counts["padding_tokens"]
        if packed + padding != len(store) * store.target_len:
            raise ArtifactError(
                f"{store.folder}/manifest.json: counts.tokens ({packed}) and padding_tokens "
                f"({padding}) do not make up {len(store)} segments of {store.target_len}; "
                "pack again"
            )
    checked = np.linspace(0, len(store) - 1, num=min(num_segments, len(store)), dtype=np.int64)
    for index in np.unique(checked):
        try:
            check_segment(store.segment(int(index)), store.rules)
        except DataError as error:
            raise ArtifactError(f"{store.folder}: {error}; pack again") from None


def check_segment(segment: Segment, rules: SegmentRules) -> None:
    """Raise DataError with the first rule that a segment breaks, and its index."""
    if fault := _fault(segment, rules):
        raise DataError(f"segment {segment.index} ({segment.window.value}): {fault}")


def _fault(segment: Segment, rules: SegmentRules) -> str | None:
    """The first broken rule in words, or None."""
    ends = segment.doc_ends.astype(np.int64)
    if len(segment.tokens) != rules.target_len or len(ends) == 0 or ends[-1] != rules.target_len:
        found = f"{len(segment.tokens)} tokens and documents up to {ends[-1:]}"
        return f"{found}, not {rules.target_len}"
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        return "an empty document"
    if not len(ends) == len(segment.sources) == len(segment.doc_ids) == len(segment.doc_is_padding):
        return "ends, sources, ids and padding marks differ in number"
    if (largest := int(segment.tokens.max())) >= rules.vocab_size:
        return f"id {largest} is outside the vocabulary of {rules.vocab_size}"
    is_padding = np.asarray(segment.doc_is_padding)
    if (padding := int(lengths[is_padding].sum())) != segment.num_padding:
        return f"num_padding is {segment.num_padding}, padding documents hold {padding}"
    if segment.window is Window.SHORT:
        fault = _short_fault(segment, rules, lengths, is_padding)
    else:
        fault = "padding in a long segment" if is_padding.any() else None
    return fault or _boundary_fault(segment, rules, ends, is_padding)


def _short_fault(
    segment: Segment, rules: SegmentRules, lengths: np.ndarray, is_padding: np.ndarray
) -> str | None:
    longest = int(lengths[~is_padding].max(initial=0))
    if longest > rules.original_len:
        return f"a document of {longest} tokens, longer than original_len={rules.original_len}"
    if segment.starts_mid_document:
        return "starts mid-document"
    chunk = rules.target_len // rules.alignment
    ends = np.cumsum(lengths)
    if ((ends - lengths) // chunk != (ends - 1) // chunk).any():
        return f"a document crosses a multiple of {chunk} tokens (alignment {rules.alignment})"
    return None


def _boundary_fault(
    segment: Segment, rules: SegmentRules, ends: np.ndarray, is_padding: np.ndarray
) -> str | None:
    """BOS and EOS stand at the ends of documents only; a continued or a cut one may lack one."""
    starts = np.concatenate([[0], ends[:-1]])
    begun, lasts = starts[~is_padding], ends[~is_padding] - 1
    if segment.starts_mid_document:
        begun = begun[1:]
    if rules.bos_id is None:
        begun = begun[:0]
    elif not (segment.tokens[begun] == rules.bos_id).all():
        return "a document does not start with BOS"
    # A long segment cuts its last document, and a continued slice at its start may end before its
    # document does.
    is_cut = segment.window is Window.LONG and len(lasts)
    may_lack_eos = {int(lasts[0]), int(lasts[-1])} if is_cut else set()
    if set(lasts[segment.tokens[lasts] != rules.eos_id].tolist()) - may_lack_eos:
        return "a document does not end with EOS"
    inside = np.isin(segment.tokens, [*rules.boundary_ids, *rules.control_ids])
    for start, end in zip(starts[is_padding], ends[is_padding], strict=True):
        inside[start:end] = False
    # Ends are exempt only for BOS and EOS: a cut document may begin or end with any id but a
    # control id.
    boundary = np.concatenate([begun, lasts])
    is_marker = np.isin(segment.tokens[boundary], rules.boundary_ids)
    inside[boundary[is_marker]] = False
    if not inside.any():
        return None
    place = int(np.flatnonzero(inside)[0])
    fault = f"the control id {int(segment.tokens[place])} stands inside a document (BOS or EOS"
    return f"{fault}, or special), at {place}"
