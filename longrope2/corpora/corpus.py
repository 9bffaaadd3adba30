"""Corpora: where documents come from, behind one interface.

Ids of documents are the same in every run and on every machine. The split a document belongs to
follows from its text, not from where it stands: two documents with the same text lie in one split,
so text used to evaluate or to search is never trained on (``held_out.py``).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from longrope2.corpora.config import HELDOUT_FRACTION
from longrope2.corpora.losses import Losses

RETRIEVAL_SOURCE = "retrieval"
TEXT_HASH_BYTES = 16
# The way out where held-out text is too small; what was packed must not be held out afterwards.
HOLD_OUT_MORE = "pack again with a larger corpus.heldout_fraction"
# Held-out text taken from one unit before the next one is opened, so that a few megabytes come from
# many files.
HELDOUT_CHARACTERS_PER_UNIT = 2_000_000


# White space and the case of ASCII letters make no other text for the split.
_WHITE_SPACE = b" \t\n\r\v\f"
_SMALL_LETTERS = bytes(range(256)).lower()


class Split(Enum):
    """``train`` documents are packed; ``heldout`` documents serve search and evaluation only.

    ``unused`` ones serve nothing: their text is held out and what they are kept together with is
    not, or the other way round.
    """

    train = "train"
    heldout = "heldout"
    unused = "unused"


@dataclass(frozen=True)
class Unit:
    """An independently readable piece of a corpus: a file, a listing entry, a group of files."""

    name: str  # unique, for example ``redpajama_v1/arxiv/arxiv_023827cd.jsonl``
    source: str  # name that quotas refer to
    size_bytes: int | None = None  # stored (compressed) size where it is known
    domain: str | None = None  # of all its documents, where that is known before they are read
    # Tokens of its documents by what was published of the corpus, where its size is not known.
    published_tokens: float | None = None


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    doc_id: str  # stable and unique: the file's name and the row, or the corpus' own id
    text: str  # never empty, always encodable as UTF-8
    source: str  # name that quotas refer to
    domain: str  # finer label inside the source; mixtures can keep the mix of domains
    group: str | None = None  # documents of one group (a repository) share a split, where given
    # What the corpus has published of it, as far as filters ask: language, quality signals.
    recorded: Mapping[str, Any] | None = None


class Corpus(Protocol):
    """What every adapter offers; can be pickled, as files are open only while they are read."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources it can yield."""
        ...

    @property
    def heldout_fraction(self) -> float:
        """Share of texts that are held out by their content; what ``split_of`` needs beside them.

        0 where the corpus names its held-out documents itself (``reserved``).
        """
        ...

    def reserved(self) -> Iterator[Document]:
        """Documents that the corpus itself holds out, whatever their content draws."""
        ...

    def units(self) -> Sequence[Unit]:
        """All units, in an order that is the same on every machine."""
        ...

    def read(self, unit: Unit, skipped: Losses) -> Iterator[Document]:
        """Documents of one unit, in a stable order, of both splits, in bounded memory.

        A faulty record never stops the reading: ``skipped`` counts it by reason ("empty text", "bad
        json", "truncated file", ...), and names damaged files. The ids of a unit's documents
        differ.

        Raises:
            DataError: a remote file stopped answering, after retries; the unit can be read again.
        """
        ...

    def documents(self, split: Split, skipped: Losses | None = None) -> Iterator[Document]:
        """Documents of one split; ``skipped`` gets what ``read`` counts."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was read, with hashes or a pinned revision, for the manifest; plain JSON values."""
        ...


def split_documents(
    corpus: Corpus, split: Split, skipped: Losses | None = None
) -> Iterator[Document]:
    """Documents of one split, unit by unit; ``skipped`` gets what ``Corpus.read`` counts."""
    skipped = Losses() if skipped is None else skipped
    for unit in corpus.units():
        for document in corpus.read(unit, skipped):
            if split_of(document, corpus.heldout_fraction) is split:
                yield document


def stable_hash(*parts: str | int) -> int:
    """Number below 2**64 that depends on ``parts`` only: the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def stable_fraction(*parts: str | int) -> float:
    """``stable_hash`` as a number in [0, 1)."""
    return stable_hash(*parts) / 2**64


def text_hash(text: str) -> bytes:
    """First half of the SHA-256 of a text in UTF-8: by it equal texts are found."""
    return hashlib.sha256(text.encode()).digest()[:TEXT_HASH_BYTES]


def content_hash(text: str) -> bytes:
    """A text by which its split is drawn: as ``text_hash``, white space and ASCII case aside.

    A copy with other line ends, indents or capitals has the same.
    """
    folded = text.encode().translate(_SMALL_LETTERS, _WHITE_SPACE)
    return hashlib.sha256(folded).digest()[:TEXT_HASH_BYTES]


def text_hashes(documents: Iterable[Document]) -> list[str]:
    """The texts of documents by their hashes, for manifests; sorted, hexadecimal."""
    return sorted({text_hash(document.text).hex() for document in documents})


def place_of_content(content: bytes) -> float:
    """Where in [0, 1) a text stands by its ``content_hash``: below the fraction it is held out."""
    return int.from_bytes(content[:8], "big") / 2**64


def split_of(document: Document, heldout_fraction: float = HELDOUT_FRACTION) -> Split:
    """Split of a document, by its text, and by its group where it has one."""
    return split_of_content(content_hash(document.text), document.group, heldout_fraction)


def split_of_content(content: bytes, group: str | None, heldout_fraction: float) -> Split:
    """Split of a text by its ``content_hash``, and by the group of its document.

    Without a group about ``heldout_fraction`` of all are held out. With one a document is held out
    where both are drawn and packed where neither is: then neither the group nor a copy of the text
    in another group is on both sides.
    """
    is_drawn = place_of_content(content) < heldout_fraction
    if group is not None and (stable_fraction("split", group) < heldout_fraction) != is_drawn:
        return Split.unused
    return Split.heldout if is_drawn else Split.train


def source_documents(
    corpus: Corpus, split: Split, skipped: Losses | None = None
) -> Iterator[Document]:
    """Documents of one split of a corpus too large to look through for its held-out documents.

    The train split is everything, unit by unit. The held-out split visits the units in an order
    drawn by name and takes a part of each: a reader that stops after some megabytes
    (``corpus.heldout_characters``) gets a mixture.
    """
    skipped = Losses() if skipped is None else skipped
    if split is Split.train:
        yield from split_documents(corpus, split, skipped)
        return
    units = sorted(corpus.units(), key=lambda u: (stable_fraction("heldout", u.name), u.name))
    for unit in units:
        room = HELDOUT_CHARACTERS_PER_UNIT
        for document in corpus.read(unit, skipped):
            if split_of(document, corpus.heldout_fraction) is split:
                yield document
                room -= len(document.text)
                if room <= 0:
                    break
