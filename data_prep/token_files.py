"""Tokenized units on disk: what the tokenize stage hands to planning and packing.

Three files per unit, each written under a temporary name, fsynced and renamed, the account last: a unit with an account is
complete.

    STEM.tokens        content ids of all documents end to end, without BOS and EOS, uint16 or uint32, native order
    STEM.index.arrow   one row per document: id, domain, where its ids stand, hashes
    STEM.json          the account: what was read, what was left out and why
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from longrope2.artifacts import atomic_path, write_text

__all__ = ["IndexRow", "TokenizedUnit", "UnitAccount", "UnitWriter"]

HASH_BYTES = 16
ROWS_PER_BATCH = 16_384


def index_schema(signature_bytes: int) -> pa.Schema:
    """Columns of an index; the MinHash signature has 0 bytes where near duplicates are kept."""
    return pa.schema([
        ("doc_id", pa.string()),
        ("unit", pa.int32()),  # place in the account's list of units
        ("domain", pa.string()),
        ("start", pa.int64()),  # first id in STEM.tokens
        ("num_tokens", pa.int64()),  # without BOS and EOS
        ("num_characters", pa.int64()),
        ("text_hash", pa.binary(HASH_BYTES)),  # first half of the SHA-256 of the text in UTF-8
        ("order", pa.uint64()),  # hash of seed and id: documents are chosen in this order
        ("signature", pa.binary(signature_bytes)),
    ])  # fmt: skip


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

    def __init__(self, folder: Path, stem: str, dtype: type[np.unsignedinteger], *, signature_bytes: int = 0) -> None:
        self._folder, self._stem, self._dtype = folder, stem, dtype
        self._schema = index_schema(signature_bytes)
        self._rows: list[tuple[IndexRow, int, int]] = []
        self._position = 0
        self._stack = ExitStack()

    def __enter__(self) -> "UnitWriter":
        tokens_path = self._stack.enter_context(atomic_path(self._folder / f"{self._stem}.tokens"))
        index_path = self._stack.enter_context(atomic_path(self._folder / f"{self._stem}.index.arrow"))
        self._tokens = self._stack.enter_context(tokens_path.open("wb"))
        sink = self._stack.enter_context(pa.OSFile(str(index_path), "wb"))
        self._index = self._stack.enter_context(pa.ipc.new_stream(sink, self._schema))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
            [row.doc_id for row in facts], [row.unit for row in facts], [row.domain for row in facts],
            [start for _, start, _ in self._rows], [length for _, _, length in self._rows],
            [row.num_characters for row in facts], [row.text_hash for row in facts], [row.order for row in facts],
            [row.signature for row in facts],
        ]  # fmt: skip
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
