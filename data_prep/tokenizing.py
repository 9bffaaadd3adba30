"""The tokenize stage: one pass over the text of each unit, in bounded memory, ids and an index to disk.

Memory of a worker, whatever the corpus: the tokenizer and libraries (about 0.5 GiB), one record batch of the corpus, and
the batch being encoded: at most ``BATCH_CHARACTERS`` characters or one document, whichever is more, at about 200 bytes
a token while it is encoded. A book of 2 million characters needs about 0.1 GiB for a moment.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.corpora import RETRIEVAL_SOURCE, Corpus, Document, Split, split_of
from data_prep.exclusions import Exclusions
from data_prep.near_duplicates import SIGNATURE_BYTES, signature_of
from data_prep.retrieval_unit import RetrievalPlan, retrieval_documents
from data_prep.token_files import HASH_BYTES, IndexRow, TokenizedUnit, UnitAccount, UnitWriter
from data_prep.tokenization import BATCH_CHARACTERS, DocumentTokenizer, prepared_tokenizer
from data_prep.unit_groups import CharacterClasses, UnitGroup

__all__ = ["NOT_NEEDED", "TokenizeJob", "UnitTask", "order_of"]

NOT_NEEDED = "beyond what the quota needs"
HELD_OUT = "held out for search and evaluation"
EXCLUDED = "on the exclusion list"
ALREADY_READ = "tokenized by an earlier reading"
FULL_BAND = (0.0, 1.0)


@dataclass(frozen=True)
class UnitTask:
    """One reading of one unit.

    Attributes:
        unit: What to read.
        stem: Name of its files.
        classes: How to guess a document's bucket.
        bands: Class -> (from, to): documents whose order, as a fraction, lies in the band are tokenized. A plan that needs
            a tenth of the short documents tokenizes a tenth.
        is_first: No earlier reading; later ones account only for what the earlier did not.
    """

    unit: UnitGroup
    stem: str
    classes: CharacterClasses
    bands: Mapping[str, tuple[float, float]]
    is_first: bool = True


@dataclass(frozen=True)
class TokenizeJob:
    """All readings of a round; a unit of work is one reading."""

    corpus: Corpus
    tasks: tuple[UnitTask, ...]
    tokenizer_file: Path
    folder: Path
    seed: int
    exclusions: Exclusions
    with_signatures: bool
    retrieval: RetrievalPlan | None

    def run(self, number: int) -> UnitAccount:
        """Tokenize one unit unless that is done."""
        task = self.tasks[number]
        finished = TokenizedUnit(self.folder, task.stem)
        if finished.is_complete:
            return finished.account()
        encoder = prepared_tokenizer(self.tokenizer_file)
        account = UnitAccount([unit.name for unit in task.unit.units], task.unit.source)
        signature_bytes = SIGNATURE_BYTES if self.with_signatures else 0
        with UnitWriter(self.folder, task.stem, encoder.dtype, signature_bytes=signature_bytes) as writer:
            for batch in _batches(self._wanted(task, encoder, account)):
                ids_of_batch = encoder.encode_contents([document.text for document, _ in batch])
                for (document, row), ids in zip(batch, ids_of_batch, strict=True):
                    writer.add(row, ids)
                    account.num_documents += 1
                    account.num_tokens += len(ids)
                    account.num_characters += len(document.text)
        finished.write_account(account)
        return account

    def _wanted(
        self, task: UnitTask, encoder: DocumentTokenizer, account: UnitAccount
    ) -> Iterator[tuple[Document, IndexRow]]:
        """Documents to tokenize, with their index rows; all others are counted."""
        if task.unit.source == RETRIEVAL_SOURCE:
            assert self.retrieval is not None
            documents = ((0, document) for document in retrieval_documents(self.corpus, self.retrieval, encoder))
        else:
            documents = task.unit.read(self.corpus, account.skipped)
        for place, document in documents:
            order = order_of(self.seed, document.doc_id)
            reason = self._reason_against(task, document, order / 2**64)
            text_hash = b""
            if reason is None:
                text_hash = hashlib.sha256(document.text.encode()).digest()[:HASH_BYTES]
                reason = EXCLUDED if self.exclusions.match(document.doc_id, text_hash) else None
            if reason is None:
                signature = signature_of(document.text) if self.with_signatures else b""
                num_characters = len(document.text)
                row = IndexRow(document.doc_id, place, document.domain, num_characters, text_hash, order, signature)
                yield document, row
            elif task.is_first or reason == NOT_NEEDED:
                account.leave_out(reason, len(document.text))
        if not task.is_first:
            account.skipped.clear()

    def _reason_against(self, task: UnitTask, document: Document, order: float) -> str | None:
        """Why a document is not tokenized in this reading, or None."""
        if task.unit.source == RETRIEVAL_SOURCE:
            return None
        if split_of(document.doc_id, self.corpus.heldout_fraction) is Split.heldout:
            return HELD_OUT
        first, last = task.bands[task.classes.of(len(document.text))]
        if order >= last:
            return NOT_NEEDED
        return ALREADY_READ if order < first else None


def order_of(seed: int, doc_id: str) -> int:
    """64-bit number by which documents are chosen, smallest first; depends on seed and id alone."""
    return int.from_bytes(hashlib.blake2b(f"order\0{seed}\0{doc_id}".encode(), digest_size=8).digest(), "big")


def _batches(
    documents: Iterator[tuple[Document, IndexRow]],
) -> Iterator[list[tuple[Document, IndexRow]]]:
    """Consecutive documents of about ``BATCH_CHARACTERS`` characters, never held for longer than one batch."""
    batch: list[tuple[Document, IndexRow]] = []
    size = 0
    for document, row in documents:
        if batch and size + len(document.text) > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append((document, row))
        size += len(document.text)
    if batch:
        yield batch
