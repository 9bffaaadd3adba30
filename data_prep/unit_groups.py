"""What one reading covers: a unit of the corpus, or several small ones, and the classes that thin its documents."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep.corpora import Corpus, Document, Unit

__all__ = ["CharacterClasses", "UnitGroup"]


@dataclass(frozen=True)
class UnitGroup:
    """Units of one source that are read together, so that a folder of small files does not become as many work units.

    Attributes:
        units: The units, in order.
    """

    units: tuple[Unit, ...]

    @property
    def name(self) -> str:
        """Name of the first unit."""
        return self.units[0].name

    @property
    def source(self) -> str:
        """The source of all of them."""
        return self.units[0].source

    @property
    def size_bytes(self) -> int | None:
        """Stored size of all, None if one is unknown."""
        sizes = [unit.size_bytes for unit in self.units]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def read(self, corpus: Corpus, skipped: Counter[str]) -> Iterator[tuple[int, Document]]:
        """Documents of all units, each with the place of its unit."""
        for place, unit in enumerate(self.units):
            for document in corpus.read(unit, skipped):
                yield place, document


@dataclass(frozen=True)
class CharacterClasses:
    """Buckets guessed from characters, before tokens are counted.

    Attributes:
        names: Bucket names, shortest documents first.
        limits: Most characters of each class but the last.
    """

    names: tuple[str, ...]
    limits: tuple[float, ...]

    def of(self, num_characters: int) -> str:
        """Class of a document."""
        for name, limit in zip(self.names, self.limits, strict=False):
            if num_characters <= limit:
                return name
        return self.names[-1]
