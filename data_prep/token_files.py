"""Tokenized units on disk, and all tokenized documents as arrays: what choosing looks at.

Three files per unit, each written under a temporary name, fsynced and renamed, the account last: a
unit with an account is complete.

    STEM.tokens       content ids end to end, no BOS and EOS, typed as in segments, native order
    STEM.index.arrow  one row per document: id, domain, where its ids stand, hashes
    STEM.json         the account: what was read, what was left out and why

The arrays take 8 bytes a document; everything else stays on disk until it is asked for.

Shape letters: D documents.
"""

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike

from longrope2.corpora.corpus import TEXT_HASH_BYTES
from longrope2.corpora.losses import Losses
from longrope2.files.artifacts import atomic_path, write_text

HASH_BYTES = TEXT_HASH_BYTES
ROWS_PER_BATCH = 16_384
ROWS_PER_BLOCK = 2**17  # of arrays over all documents, where a step needs room of its own


def _index_schema(signature_bytes: int) -> pa.Schema:
    """Columns of an index; the MinHash signature has 0 bytes where near duplicates are kept."""
    return pa.schema(
        [
            ("doc_id", pa.string()),
            ("unit", pa.int32()),  # place in the account's list of units
            ("domain", pa.string()),
            ("start", pa.int64()),  # first id in STEM.tokens
            ("num_tokens", pa.int64()),  # without BOS and EOS
            ("num_characters", pa.int64()),
            ("text_hash", pa.binary(HASH_BYTES)),  # first half of the SHA-256 of the text in UTF-8
            ("content_hash", pa.binary(HASH_BYTES)),  # by which its split is drawn
            ("order", pa.uint64()),  # hash of seed and id: documents are chosen in this order
            ("signature", pa.binary(signature_bytes)),
        ]
    )


@dataclass(frozen=True)
class IndexRow:
    """One document of a unit; fields as in ``_index_schema``."""

    doc_id: str
    unit: int
    domain: str
    num_characters: int
    text_hash: bytes
    content_hash: bytes
    order: int
    signature: bytes = b""


@dataclass
class UnitAccount:
    """What became of the records of a unit, or of several small ones."""

    units: list[str]  # names in the corpus: one, or several that are tokenized together
    source: str
    num_documents: int = 0  # tokenized
    num_tokens: int = 0  # their ids, without BOS and EOS
    num_characters: int = 0
    # Reason -> documents read but not tokenized, and their characters.
    left_out_documents: Counter[str] = field(default_factory=Counter)
    left_out_characters: Counter[str] = field(default_factory=Counter)
    # Reason -> records that the corpus could not use.
    skipped: Counter[str] = field(default_factory=Counter)
    # Unit -> reason -> both of these, records and documents.
    lost: dict[str, dict[str, int]] = field(default_factory=dict)
    # Of each damaged file: its unit, name and fault, and the records that were read of it.
    damaged: list[tuple[str, str, str, int]] = field(default_factory=list)
    longest_heldout_characters: int = 0
    part: int = 0  # number of this part of a large unit
    num_read: int = 0  # documents of it, tokenized or not
    is_last: bool = False  # whether the unit ends with it

    def leave_out(self, unit: str, reason: str, num_characters: int) -> None:
        """Count a document that is not tokenized."""
        self.left_out_documents[reason] += 1
        self.left_out_characters[reason] += num_characters
        self._lose(unit, reason, 1)

    def skip(self, unit: str, losses: Losses) -> None:
        """Count what could not be used of a unit."""
        self.skipped.update(losses)
        for reason, number in losses.items():
            self._lose(unit, reason, number)
        self.damaged += [(unit, file.file, file.fault, file.num_records) for file in losses.files]

    def _lose(self, unit: str, reason: str, number: int) -> None:
        reasons = self.lost.setdefault(unit, {})
        reasons[reason] = reasons.get(reason, 0) + number


@contextmanager
def write_unit(
    folder: Path, stem: str, dtype: type[np.unsignedinteger], *, signature_bytes: int = 0
) -> Iterator[Callable[[IndexRow, np.ndarray], None]]:
    """Write one unit; yields the function that appends a document.

    The files get their final names when the ``with`` block ends without an error.
    """
    schema = _index_schema(signature_bytes)
    rows: list[dict[str, Any]] = []
    position = 0
    with (
        atomic_path(folder / f"{stem}.tokens") as tokens_path,
        atomic_path(folder / f"{stem}.index.arrow") as index_path,
        tokens_path.open("wb") as tokens,
        pa.OSFile(str(index_path), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as index,
    ):

        def flush() -> None:
            arrays = [pa.array([row[f.name] for row in rows], f.type) for f in schema]
            index.write_batch(pa.record_batch(arrays, schema=schema))
            rows.clear()

        def add(row: IndexRow, ids: np.ndarray) -> None:
            nonlocal position
            tokens.write(ids.astype(dtype, copy=False).tobytes())
            rows.append({**vars(row), "start": position, "num_tokens": len(ids)})
            position += len(ids)
            if len(rows) >= ROWS_PER_BATCH:
                flush()

        yield add
        flush()


@dataclass(frozen=True)
class TokenizedUnit:
    """A unit on disk."""

    folder: Path
    stem: str

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there."""
        return self._account_path.is_file()

    def write_account(self, account: UnitAccount) -> None:
        """Declare the unit complete."""
        write_text(self._account_path, json.dumps(vars(account), indent=1, sort_keys=True))

    def account(self) -> UnitAccount:
        """The account of a complete unit."""
        fields = json.loads(self._account_path.read_text(encoding="utf-8"))
        for name in ("left_out_documents", "left_out_characters", "skipped"):
            fields[name] = Counter(fields[name])
        return UnitAccount(**fields)

    def index(self, columns: Sequence[str]) -> pa.Table:
        """Columns of the index, memory-mapped."""
        with pa.memory_map(str(self.folder / f"{self.stem}.index.arrow")) as source:
            return pa.ipc.open_stream(source).read_all().select(list(columns))

    def tokens(self, dtype: type[np.unsignedinteger]) -> np.ndarray:
        """All content ids, memory-mapped, shape [num_tokens]."""
        path = self.folder / f"{self.stem}.tokens"
        if path.stat().st_size == 0:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype, mode="r")

    @property
    def _account_path(self) -> Path:
        return self.folder / f"{self.stem}.json"


@dataclass(frozen=True)
class LengthBuckets:
    """Length classes of documents."""

    names: tuple[str, ...]  # shortest first; the first serves short windows, all others long ones
    limits: tuple[float, ...]  # most tokens of each, BOS and EOS included

    @property
    def longest(self) -> int:
        """Longest document of all."""
        return int(self.limits[-1])

    def codes(self, lengths: np.ndarray) -> np.ndarray:
        """Index of the bucket of each length; ``len(names)`` above the last limit."""
        return np.searchsorted(np.asarray(self.limits), lengths, side="left")

    def of(self, length: float) -> str:
        """Name of the bucket of a length, which is not above the last limit."""
        return self.names[bisect_left(self.limits, length)]

    def in_characters(self, per_token: float) -> "LengthBuckets":
        """The buckets guessed before tokens are counted; the last takes whatever is longer."""
        limits = (limit * per_token for limit in self.limits[:-1])
        return LengthBuckets(self.names, (*limits, math.inf))


@dataclass(frozen=True, eq=False)
class DocumentTable:
    """Documents of all units, in the order of the units and their rows."""

    units: tuple[TokenizedUnit, ...]
    accounts: tuple[UnitAccount, ...]
    sources: tuple[str, ...]
    domains: tuple[tuple[str, str], ...]  # (source, domain)
    first_U: np.ndarray  # int64 [units + 1], first document of each unit, and their number
    domain_D: np.ndarray  # int32, counts ``domains``
    tokens_D: np.ndarray  # int32, tokens with BOS and EOS
    num_boundary_tokens: int  # of a document: BOS where there is one, and EOS

    def __len__(self) -> int:
        return len(self.tokens_D)

    @cached_property
    def _source_of_domain(self) -> np.ndarray:
        return np.array([self.sources.index(source) for source, _ in self.domains], np.int16)

    def sources_of(self, documents: np.ndarray | slice) -> np.ndarray:
        """Place in ``sources`` of some documents, int16."""
        return self._source_of_domain[self.domain_D[documents]]

    def column(self, name: str, dtype: DTypeLike) -> np.ndarray:
        """A column of all documents that is left on disk, shape [D]; one of whole bytes each."""
        column_D = np.empty(len(self), dtype)
        for unit, (first, last) in zip(self.units, pairwise(self.first_U), strict=True):
            _fill(column_D[first:last], unit.index([name]).column(0))
        return column_D

    def values(self, column: str, documents: np.ndarray) -> list[Any]:
        """Values of a column that is left on disk, for some documents, in their order."""
        values = np.empty(len(documents), dtype=object)
        in_order = np.argsort(documents, kind="stable")
        ends = np.searchsorted(documents[in_order], self.first_U)
        for unit in np.flatnonzero(np.diff(ends)):
            here = in_order[ends[unit] : ends[unit + 1]]
            rows = pa.array(documents[here] - self.first_U[unit], pa.int64())
            values[here] = self.units[unit].index([column]).column(0).take(rows).to_pylist()
        return values.tolist()


def blocks(number: int) -> Iterator[slice]:
    """The whole of an array of this length, in runs of ``ROWS_PER_BLOCK``."""
    for first in range(0, number, ROWS_PER_BLOCK):
        yield slice(first, min(number, first + ROWS_PER_BLOCK))


def load_documents(units: Sequence[TokenizedUnit], num_boundary_tokens: int) -> DocumentTable:
    """Read the indices of complete units."""
    accounts = [unit.account() for unit in units]
    first_U = np.cumsum([0, *(unit.index(["start"]).num_rows for unit in units)], dtype=np.int64)
    domain_D, tokens_D = np.empty((2, first_U[-1]), np.int32)
    codes: dict[tuple[str, str], int] = {}
    for unit, account, (first, last) in zip(units, accounts, pairwise(first_U), strict=True):
        index = unit.index(["domain", "num_tokens"])
        domain_D[first:last] = _domain_codes(index.column("domain"), account.source, codes)
        _fill(tokens_D[first:last], index.column("num_tokens"))
    tokens_D += num_boundary_tokens
    return DocumentTable(
        units=tuple(units),
        accounts=tuple(accounts),
        sources=tuple(sorted({account.source for account in accounts})),
        domains=tuple(codes),
        first_U=first_U,
        domain_D=domain_D,
        tokens_D=tokens_D,
        num_boundary_tokens=num_boundary_tokens,
    )


def _fill(target: np.ndarray, column: pa.ChunkedArray) -> None:
    """Copy a column, batch by batch."""
    position = 0
    for chunk in column.chunks:
        if not len(chunk):
            continue  # may have no memory at all
        _, data = chunk.buffers()
        if pa.types.is_fixed_size_binary(chunk.type):
            dtype = target.dtype
        else:
            dtype = chunk.type.to_pandas_dtype()
        values = np.frombuffer(data, dtype)[chunk.offset : chunk.offset + len(chunk)]
        target[position : position + len(chunk)] = values
        position += len(chunk)
    assert position == len(target)


def _domain_codes(
    domains: pa.ChunkedArray, source: str, codes: dict[tuple[str, str], int]
) -> np.ndarray:
    """Domains of one unit as codes of (source, domain); new ones are added."""
    encoded = domains.dictionary_encode().combine_chunks()
    names = encoded.dictionary.to_pylist()
    lookup = np.asarray([codes.setdefault((source, name), len(codes)) for name in names], np.int32)
    return lookup[encoded.indices.to_numpy(zero_copy_only=False)]
