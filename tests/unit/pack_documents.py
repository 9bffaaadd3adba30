"""Tokenized units with made-up ids, for tests of choosing and packing that need no text."""

import hashlib
from dataclasses import dataclass

import numpy as np

from data_prep.token_files import IndexRow, TokenizedUnit, UnitAccount, load_documents, write_unit
from data_prep.tokenizing import order_of


@dataclass(frozen=True)
class Made:
    """A document to make: its id, tokens with BOS and EOS, and whatever else matters to a test."""

    doc_id: str
    num_tokens: int
    source: str = "s"
    domain: str = "d"
    text: str = ""


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as ids, BOS and EOS included."""

    doc_id: str
    source: str
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def table_of(folder, documents, *, documents_per_unit=7, seed=0):
    """Write documents as units of one source each and load them."""
    units = []
    for source in sorted({document.source for document in documents}):
        own = [document for document in documents if document.source == source]
        for first in range(0, len(own), documents_per_unit):
            unit = TokenizedUnit(folder, f"{source}-{first:03d}")
            account = UnitAccount([f"{source}/{first}"], source)
            with write_unit(folder, unit.stem, np.uint32) as add:
                for document in own[first : first + documents_per_unit]:
                    text_hash = hashlib.sha256(
                        (document.text or document.doc_id).encode()
                    ).digest()[:16]
                    order = order_of(seed, document.doc_id)
                    row = IndexRow(
                        document.doc_id,
                        0,
                        document.domain,
                        4 * document.num_tokens,
                        text_hash,
                        text_hash,
                        order,
                    )
                    add(row, np.arange(3, 1 + document.num_tokens, dtype=np.uint32))
                    account.num_documents += 1
                    account.num_tokens += document.num_tokens - 2
            unit.write_account(account)
            units.append(unit)
    return load_documents(units, num_boundary_tokens=2)
