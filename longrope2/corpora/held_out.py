"""Which texts may not be packed, and which held-out texts were packed all the same.

A text is held out by its content (``corpus.split_of``), or because the corpus itself reserves it:
PG19's validation books, the sample corpus' names. Packing asks ``HeldOutTexts`` of every document
it reads, from whatever source; the audit asks it again of every document in the list of a finished
folder; search, training and evaluation compare the texts they read with that list
(``find_overlap``), because segments may be of another corpus or of an earlier version, which split
by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from longrope2.corpora.corpus import (
    Corpus,
    Document,
    Split,
    content_hash,
    place_of_content,
    split_of_content,
    text_hash,
)
from longrope2.files.artifacts import MANIFEST_NAME, read_manifest
from longrope2.files.unchanged import require_unchanged

DOCUMENTS_FILE = "documents.parquet"
MOST_NAMED = 5  # ids in a message


@dataclass(frozen=True)
class HeldOutTexts:
    """What decides whether a text is held out."""

    fraction: float
    """Share of all texts that is held out by content."""
    reserved: frozenset[bytes]
    """``content_hash`` of the texts that the corpus itself holds out."""

    @classmethod
    def of(cls, corpus: Corpus) -> "HeldOutTexts":
        """Those of a corpus; reads the documents that it reserves."""
        reserved = frozenset(content_hash(document.text) for document in corpus.reserved())
        return cls(corpus.heldout_fraction, reserved)

    def holds(self, content: bytes) -> bool:
        """Whether the text with this ``content_hash`` is held out."""
        return content in self.reserved or place_of_content(content) < self.fraction

    def split_of(self, document: Document, content: bytes) -> Split:
        """Split of a document with this ``content_hash``."""
        if content in self.reserved:
            return Split.heldout
        return split_of_content(content, document.group, self.fraction)


@dataclass(frozen=True)
class Overlap:
    """Texts that were read as held out and stand in segments too."""

    segments: Path
    doc_ids: tuple[str, ...]
    """Ids of these documents where they were read, sorted."""
    num_texts: int
    """Texts that were read."""

    def __str__(self) -> str:
        """One line that says what it means and names the documents, or some of them."""
        named = ", ".join(self.doc_ids[:MOST_NAMED])
        more = len(self.doc_ids) - MOST_NAMED
        named += f" and {more:,} more" if more > 0 else ""
        return (
            f"{len(self.doc_ids):,} of the {self.num_texts:,} held-out texts are also in the "
            f"segments {self.segments}, so a model trained on them has seen them: {named}"
        )


def find_overlap(documents: Sequence[Document], segments: Path | None) -> Overlap | None:
    """Held-out documents whose text was packed into ``segments``; None without any.

    Compares by content where the segments note it, by the exact text where an earlier version made
    them. Segments that list no documents cannot be compared.
    """
    path = None if segments is None else documents_file(segments)
    if segments is None or path is None:
        return None
    by_content = "content_hash" in pq.read_schema(path).names
    packed = _column(path, "content_hash" if by_content else "text_hash")
    hash_of = content_hash if by_content else text_hash
    found = sorted({d.doc_id for d in documents if hash_of(d.text) in packed})
    return Overlap(segments, tuple(found), len(documents)) if found else None


def documents_file(segments: Path) -> Path | None:
    """The list of what was packed into finished segments; None where an earlier version has none.

    Raises:
        DamagedError: it is not as it was written.
    """
    if not (segments / MANIFEST_NAME).is_file():
        path = segments / DOCUMENTS_FILE
        return path if path.is_file() else None
    listed = read_manifest(segments, "segments").details.get("documents")
    if listed is None:
        return None
    way_out = "bring it back, or pack again"
    require_unchanged(segments, {listed["file"]: listed["sha256"]}, way_out)
    return segments / listed["file"]


def _column(path: Path, name: str) -> set[bytes]:
    return set(pq.read_table(path, columns=[name]).column(name).to_pylist())
