"""The pack stage: each shuffle unit becomes shards of its own, in any order and on any machine.

Memory of a worker: the parts of one shuffle unit as Python objects (about 0.4 kB each; about 0.1 GiB for the default
2**28 tokens) and one record batch of segments; ids are read from the memory-mapped token files when they are written.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpora import stable_fraction
from data_prep.document_table import NUM_BOUNDARY_TOKENS
from data_prep.pack_plan import PackPlan
from data_prep.packing import DraftSegment, Piece, pack_long, pack_short
from data_prep.token_files import TokenizedUnit
from data_prep.writing import write_shards
from longrope2.artifacts import sha256_of_file, write_text
from longrope2.segments import SegmentRules

__all__ = ["PackJob", "PackedUnit", "StoredDocument", "nested"]


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
            if all(_is_whole(self.folder / name, expected) for name, expected in packed.files.items()):
                return packed
        documents = self._documents(number)
        window_len, seed = self.rules.target_len, self.seed + number
        short = pack_short(
            [d for d in documents if d.bucket == self.bucket_names[0]], target_len=window_len,
            alignment=self.rules.alignment, seed=seed,
        )  # fmt: skip
        long = pack_long([d for d in documents if d.bucket != self.bucket_names[0]], target_len=window_len, seed=seed)
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
        rows = self.plan.parts(number).select(["doc_id", "source", "bucket", "stem", "start", "num_tokens"])
        columns = (column.to_pylist() for column in rows.columns)
        documents = [
            StoredDocument(
                doc_id, source, self.bucket_names[bucket], TokenizedUnit(self.tokenized, stem), start, num, self.rules
            )
            for doc_id, source, bucket, stem, start, num in zip(*columns, strict=True)
        ]
        return sorted(documents, key=lambda d: (stable_fraction("mix", self.seed, d.doc_id), d.doc_id))


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
        tokens=nested(tokens), num_documents=nested(documents), rest_tokens=dict(sorted(rest.items())),
        padding_tokens=padding,
    )  # fmt: skip


def _cell(document: Any) -> tuple[str, str]:
    return document.source, document.bucket
