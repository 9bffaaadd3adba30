"""All tokenized documents as arrays: what planning looks at instead of the text.

About 60 bytes a document; ids stay on disk until a document is chosen.

Shape letters: D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.token_files import TokenizedUnit, UnitAccount

__all__ = ["NUM_BOUNDARY_TOKENS", "DocumentTable", "LengthBuckets", "load_documents"]

NUM_BOUNDARY_TOKENS = 2  # BOS and EOS
COLUMNS = ("domain", "start", "num_tokens", "num_characters", "text_hash", "order")


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
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("unit", "row", "source", "domain", *COLUMNS[1:])}
    for number, (unit, account) in enumerate(zip(units, accounts, strict=True)):
        index = unit.index(COLUMNS).combine_chunks()
        count = index.num_rows
        columns["unit"].append(np.full(count, number, np.int32))
        columns["row"].append(np.arange(count, dtype=np.int32))
        columns["source"].append(np.full(count, sources.index(account.source), np.int16))
        columns["domain"].append(_domain_codes(index.column("domain"), account.source, domain_codes))
        for name in ("start", "num_tokens", "num_characters", "order"):
            columns[name].append(index.column(name).to_numpy())
        hashes = index.column("text_hash").to_pylist()
        columns["text_hash"].append(np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2))
    dtypes = {"unit": np.int32, "row": np.int32, "source": np.int16, "domain": np.int32, "order": np.uint64}
    joined = {name: _joined(parts, dtypes.get(name, np.int64)) for name, parts in columns.items()}
    return DocumentTable(
        units=tuple(units), accounts=tuple(accounts), sources=sources, domains=tuple(domain_codes),
        unit_D=joined["unit"], row_D=joined["row"], source_D=joined["source"], domain_D=joined["domain"],
        start_D=joined["start"], tokens_D=joined["num_tokens"] + NUM_BOUNDARY_TOKENS,
        characters_D=joined["num_characters"], order_D=joined["order"],
        text_hash_D2=np.concatenate([np.zeros((0, 2), np.uint64), *columns["text_hash"]]),
    )  # fmt: skip


def _domain_codes(domains: pa.ChunkedArray, source: str, codes: dict[tuple[str, str], int]) -> np.ndarray:
    """Domains of one unit as codes of (source, domain); new ones are added."""
    encoded = pa.chunked_array(domains).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    names = encoded.dictionary.to_pylist()
    lookup = np.asarray([codes.setdefault((source, name), len(codes)) for name in names], np.int32)
    return lookup[encoded.indices.to_numpy(zero_copy_only=False)] if len(names) else np.zeros(0, np.int32)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    """Concatenation that also works for nothing."""
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
