"""Tokenized units on disk: what the tokenize stage hands to planning and packing.

Three files per unit, each written under a temporary name, fsynced and renamed, the account last: a
unit with an account is complete.

    STEM.tokens        content ids of all documents end to end, without BOS and EOS, uint16 or
    uint32, native order STEM.index.arrow   one row per document: id, domain, where its ids stand,
    hashes STEM.json          the account: what was read, what was left out and why

All tokenized documents as arrays: what planning looks at instead of the text.

About 60 bytes a document; ids stay on disk until a document is chosen.

Shape letters: D documents.
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from longrope2.files.artifacts import atomic_path, write_text

HASH_BYTES = 16
ROWS_PER_BATCH = 16_384
NUM_BOUNDARY_TOKENS = 2  # BOS and EOS
COLUMNS = ("domain", "start", "num_tokens", "num_characters", "text_hash", "order")


def index_schema(signature_bytes: int) -> pa.Schema:
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
            ("order", pa.uint64()),  # hash of seed and id: documents are chosen in this order
            ("signature", pa.binary(signature_bytes)),
        ]
    )


@dataclass(frozen=True)
class IndexRow:
    """One document of a unit; fields as in ``index_schema``."""

    doc_id: str
    unit: int
    domain: str
    num_characters: int
    text_hash: bytes
    order: int
    signature: bytes = b""


@dataclass
class UnitAccount:
    """What became of the records of a unit, or of several small ones.

    Attributes:
        units: Names in the corpus: one, or several small ones that are tokenized together.
        source: Their source.
        num_documents: Documents tokenized.
        num_tokens: Their ids, without BOS and EOS.
        num_characters: Their characters.
        left_out_documents: Reason -> documents read but not tokenized.
        left_out_characters: Reason -> their characters.
        skipped: Reason -> records that the corpus could not use.
    """

    units: list[str]
    source: str
    num_documents: int = 0
    num_tokens: int = 0
    num_characters: int = 0
    left_out_documents: Counter[str] = field(default_factory=Counter)
    left_out_characters: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def leave_out(self, reason: str, num_characters: int) -> None:
        """Count a document that is not tokenized."""
        self.left_out_documents[reason] += 1
        self.left_out_characters[reason] += num_characters


class UnitWriter:
    """Writes one unit; nothing has its final name until the ``with`` block ends without an error."""

    def __init__(
        self, folder: Path, stem: str, dtype: type[np.unsignedinteger], *, signature_bytes: int = 0
    ) -> None:
        self._folder, self._stem, self._dtype = folder, stem, dtype
        self._schema = index_schema(signature_bytes)
        self._rows: list[tuple[IndexRow, int, int]] = []
        self._position = 0
        self._stack = ExitStack()

    def __enter__(self) -> "UnitWriter":
        tokens_path = self._stack.enter_context(atomic_path(self._folder / f"{self._stem}.tokens"))
        index_path = self._stack.enter_context(
            atomic_path(self._folder / f"{self._stem}.index.arrow")
        )
        self._tokens = self._stack.enter_context(tokens_path.open("wb"))
        sink = self._stack.enter_context(pa.OSFile(str(index_path), "wb"))
        self._index = self._stack.enter_context(pa.ipc.new_stream(sink, self._schema))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush_rows()
        self._stack.__exit__(kind, error, trace)

    def add(self, row: IndexRow, ids: np.ndarray) -> None:
        """Append a document."""
        self._tokens.write(ids.astype(self._dtype, copy=False).tobytes())
        self._rows.append((row, self._position, len(ids)))
        self._position += len(ids)
        if len(self._rows) >= ROWS_PER_BATCH:
            self._flush_rows()

    def _flush_rows(self) -> None:
        """Write collected rows as one batch."""
        facts = [row for row, _, _ in self._rows]
        columns = [
            [row.doc_id for row in facts],
            [row.unit for row in facts],
            [row.domain for row in facts],
            [start for _, start, _ in self._rows],
            [length for _, _, length in self._rows],
            [row.num_characters for row in facts],
            [row.text_hash for row in facts],
            [row.order for row in facts],
            [row.signature for row in facts],
        ]
        arrays = [pa.array(column, f.type) for column, f in zip(columns, self._schema, strict=True)]
        self._index.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = []


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
        account = UnitAccount(**json.loads(self._account_path.read_text(encoding="utf-8")))
        account.left_out_documents = Counter(account.left_out_documents)
        account.left_out_characters = Counter(account.left_out_characters)
        account.skipped = Counter(account.skipped)
        return account

    def index(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The index, memory-mapped."""
        with pa.memory_map(str(self.folder / f"{self.stem}.index.arrow")) as source:
            table = pa.ipc.open_stream(source).read_all()
        return table.select(list(columns)) if columns else table

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
    """Length classes of documents.

    Attributes:
        names: Shortest first; the first serves short windows, all others long ones.
        limits: Most tokens of each, BOS and EOS included.
    """

    names: tuple[str, ...]
    limits: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Longest document of all."""
        return self.limits[-1]

    def codes(self, num_tokens: np.ndarray) -> np.ndarray:
        """Index of the bucket of each length; ``len(names)`` above the last limit."""
        return np.searchsorted(np.asarray(self.limits), num_tokens, side="left")


@dataclass(frozen=True, eq=False)
class DocumentTable:
    """Documents of all units, in the order of the units and their rows.

    Attributes:
        units: The units.
        accounts: Their accounts.
        sources: Names of the sources; ``source_D`` counts them.
        domains: (source, domain) pairs; ``domain_D`` counts them.
        unit_D: Unit of each document, int32.
        row_D: Row in the unit's index, int32.
        source_D: Source, int16.
        domain_D: Domain, int32.
        start_D: First id in the unit's token file, int64.
        tokens_D: Tokens with BOS and EOS, int64.
        characters_D: Characters of the text, int64.
        order_D: Order of choice, uint64.
        text_hash_D2: Hash of the text as two uint64.
    """

    units: tuple[TokenizedUnit, ...]
    accounts: tuple[UnitAccount, ...]
    sources: tuple[str, ...]
    domains: tuple[tuple[str, str], ...]
    unit_D: np.ndarray
    row_D: np.ndarray
    source_D: np.ndarray
    domain_D: np.ndarray
    start_D: np.ndarray
    tokens_D: np.ndarray
    characters_D: np.ndarray
    order_D: np.ndarray
    text_hash_D2: np.ndarray

    def __len__(self) -> int:
        return len(self.unit_D)

    def values(self, column: str, documents: np.ndarray) -> list[Any]:
        """Values of a column that is left on disk, for some documents, in their order."""
        values = np.empty(len(documents), dtype=object)
        units = self.unit_D[documents]
        for unit in np.unique(units):
            here = np.flatnonzero(units == unit)
            rows = pa.array(self.row_D[documents[here]], pa.int64())
            values[here] = self.units[unit].index([column]).column(0).take(rows).to_pylist()
        return values.tolist()


def load_documents(units: Sequence[TokenizedUnit]) -> DocumentTable:
    """Read the indices of complete units."""
    accounts = [unit.account() for unit in units]
    sources = tuple(sorted({account.source for account in accounts}))
    domain_codes: dict[tuple[str, str], int] = {}
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("unit", "row", "source", "domain", *COLUMNS[1:])
    }
    for number, (unit, account) in enumerate(zip(units, accounts, strict=True)):
        index = unit.index(COLUMNS).combine_chunks()
        count = index.num_rows
        columns["unit"].append(np.full(count, number, np.int32))
        columns["row"].append(np.arange(count, dtype=np.int32))
        columns["source"].append(np.full(count, sources.index(account.source), np.int16))
        columns["domain"].append(
            _domain_codes(index.column("domain"), account.source, domain_codes)
        )
        for name in ("start", "num_tokens", "num_characters", "order"):
            columns[name].append(index.column(name).to_numpy())
        hashes = index.column("text_hash").to_pylist()
        columns["text_hash"].append(np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2))
    dtypes = {
        "unit": np.int32,
        "row": np.int32,
        "source": np.int16,
        "domain": np.int32,
        "order": np.uint64,
    }
    joined = {name: _joined(parts, dtypes.get(name, np.int64)) for name, parts in columns.items()}
    return DocumentTable(
        units=tuple(units),
        accounts=tuple(accounts),
        sources=sources,
        domains=tuple(domain_codes),
        unit_D=joined["unit"],
        row_D=joined["row"],
        source_D=joined["source"],
        domain_D=joined["domain"],
        start_D=joined["start"],
        tokens_D=joined["num_tokens"] + NUM_BOUNDARY_TOKENS,
        characters_D=joined["num_characters"],
        order_D=joined["order"],
        text_hash_D2=np.concatenate([np.zeros((0, 2), np.uint64), *columns["text_hash"]]),
    )


def _domain_codes(
    domains: pa.ChunkedArray, source: str, codes: dict[tuple[str, str], int]
) -> np.ndarray:
    """Domains of one unit as codes of (source, domain); new ones are added."""
    encoded = pa.chunked_array(domains).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    names = encoded.dictionary.to_pylist()
    lookup = np.asarray([codes.setdefault((source, name), len(codes)) for name in names], np.int32)
    return (
        lookup[encoded.indices.to_numpy(zero_copy_only=False)]
        if len(names)
        else np.zeros(0, np.int32)
    )


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenation that also works for nothing."""
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
