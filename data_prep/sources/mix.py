"""Several corpora as one (``paper``: the four sources of the LongRoPE2 paper)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.corpora import HELDOUT_FRACTION, Corpus, Document, Split, Unit

__all__ = ["MixedCorpus"]


class MixedCorpus:
    """The units of its members, one after the other.

    Args:
        members: Name -> corpus, in the order of their units; their sources must differ.
        heldout_fraction: Share of documents held out, 0 to 1.
    """

    def __init__(self, members: Mapping[str, Corpus], *, heldout_fraction: float = HELDOUT_FRACTION) -> None:
        self.heldout_fraction = heldout_fraction
        self._members = dict(members)
        self._by_source = {source: corpus for corpus in members.values() for source in corpus.sources}

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources of all members."""
        return tuple(self._by_source)

    def units(self) -> Sequence[Unit]:
        """Units of all members."""
        return [unit for corpus in self._members.values() for unit in corpus.units()]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Documents of one unit, read by the member it belongs to."""
        return self._by_source[unit.source].read(unit, skipped)

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split, a document of every member in turn, so that a reader may stop early."""
        turns = [corpus.documents(split, skipped) for corpus in self._members.values()]
        while turns:
            for turn in list(turns):
                document = next(turn, None)
                if document is None:
                    turns.remove(turn)
                else:
                    yield document

    def describe(self) -> dict[str, Any]:
        """Description of every member."""
        return {name: corpus.describe() for name, corpus in self._members.items()}
