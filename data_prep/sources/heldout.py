"""Documents of a split of a corpus too large to look through for its held-out documents."""

from collections import Counter
from collections.abc import Iterator

from data_prep.corpora import Corpus, Document, Split, split_documents, split_of, stable_fraction

__all__ = ["source_documents"]

# Held-out text taken from one unit before the next one is opened, so that a few megabytes come from many files.
HELDOUT_CHARACTERS_PER_UNIT = 2_000_000


def source_documents(corpus: Corpus, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Documents of one split.

    The train split is everything, unit by unit. The held-out split visits the units in an order drawn by name and takes a
    part of each: a reader that stops after some megabytes (``corpus.heldout_characters``) gets a mixture.
    """
    skipped = Counter() if skipped is None else skipped
    if split is Split.train:
        yield from split_documents(corpus, split, skipped)
        return
    for unit in sorted(corpus.units(), key=lambda unit: (stable_fraction("heldout", unit.name), unit.name)):
        room = HELDOUT_CHARACTERS_PER_UNIT
        for document in corpus.read(unit, skipped):
            if split_of(document.doc_id, corpus.heldout_fraction) is split:
                yield document
                room -= len(document.text)
                if room <= 0:
                    break
