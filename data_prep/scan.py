"""A look at a corpus before reading it: how much text of which length each source has, from a few units.

Used to decide how many units are read and which share of their documents is tokenized (``reading.py``), and by
``--dry-run``. Lengths are guessed from characters with the ratio measured on a small piece of each source. The guess
decides only how much is read first; what is packed is decided by counted tokens.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from data_prep.corpora import Corpus, Document, Unit, stable_fraction
from data_prep.document_table import LengthBuckets
from data_prep.tokenization import DocumentTokenizer
from data_prep.unit_groups import CharacterClasses, UnitGroup

__all__ = ["SourceScan", "UnitGroup", "in_reading_order", "scan_corpus", "scan_from_plain", "scan_to_plain"]

UNITS_PER_SOURCE = 4
GROUP_BYTES = 2**20  # small units are read together up to this size
CHARACTERS_PER_UNIT = 4_000_000
CHARACTERS_ENCODED = 200_000
CHARACTERS_OF_ONE_DOCUMENT = 20_000
# Characters per stored byte, roughly; only where a unit was not read to its end.
EXPANSION = {".gz": 3.0, ".zst": 3.5, ".zstd": 3.5, ".parquet": 2.5}


@dataclass(frozen=True)
class SourceScan:
    """What a few units of a source told.

    Attributes:
        num_units: Units of the source.
        num_scanned: Units looked at.
        num_documents: Documents looked at.
        characters_per_token: Measured on some of their text.
        tokens_per_unit: Domain -> bucket -> tokens an average unit has, estimated; None where units were not read to
            their end and their size is unknown.
        is_exact: All units were read to their end (lengths are still guessed from characters).
    """

    num_units: int
    num_scanned: int
    num_documents: int
    characters_per_token: float
    tokens_per_unit: dict[str, dict[str, float]] | None
    is_exact: bool

    def classes(self, lengths: LengthBuckets) -> CharacterClasses:
        """The buckets in characters."""
        return CharacterClasses(
            lengths.names, tuple(limit * self.characters_per_token for limit in lengths.limits[:-1])
        )

    def supply(self) -> dict[str, dict[str, float]] | None:
        """Domain -> bucket -> tokens of the whole source, estimated."""
        if self.tokens_per_unit is None:
            return None
        return {d: {b: n * self.num_units for b, n in cells.items()} for d, cells in self.tokens_per_unit.items()}


def in_reading_order(units: Sequence[Unit], source: str, seed: int) -> list[UnitGroup]:
    """Units of a source in the order in which they are read, drawn from the seed; small ones are put together."""
    own = [unit for unit in units if unit.source == source]
    groups: list[list[Unit]] = []
    size = 0
    for unit in sorted(own, key=lambda unit: (stable_fraction("unit", seed, unit.name), unit.name)):
        room = GROUP_BYTES if unit.size_bytes is None else GROUP_BYTES - unit.size_bytes
        if groups and unit.size_bytes is not None and 0 < size <= room:
            groups[-1].append(unit)
            size += unit.size_bytes
        else:
            groups.append([unit])
            size = unit.size_bytes or 0
    return [UnitGroup(tuple(group)) for group in groups]


def scan_corpus(
    corpus: Corpus, units: Mapping[str, Sequence[UnitGroup]], encoder: DocumentTokenizer, lengths: LengthBuckets
) -> dict[str, SourceScan]:
    """Look at the first units of each source.

    Args:
        corpus: The corpus.
        units: Source -> its units in reading order.
        encoder: Tokenizer of the model.
        lengths: The buckets.

    Raises:
        DataError: a unit cannot be read.
    """
    return {source: _scan_source(corpus, own, encoder, lengths) for source, own in units.items()}


def scan_to_plain(scans: Mapping[str, SourceScan]) -> dict[str, dict]:
    """For JSON."""
    return {source: asdict(scan) for source, scan in scans.items()}


def scan_from_plain(plain: Mapping[str, dict]) -> dict[str, SourceScan]:
    """From JSON."""
    return {source: SourceScan(**fields) for source, fields in plain.items()}


def _scan_source(
    corpus: Corpus, units: Sequence[UnitGroup], encoder: DocumentTokenizer, lengths: LengthBuckets
) -> SourceScan:
    sample = units[:UNITS_PER_SOURCE]
    sizes: list[tuple[str, int]] = []
    texts: list[str] = []
    unit_characters: list[float | None] = []
    exact = len(sample) == len(units)
    for unit in sample:
        read, at_end = 0, True
        for _, document in unit.read(corpus, Counter()):
            sizes.append((document.domain, len(document.text)))
            read += len(document.text)
            _keep_some_text(texts, document)
            if read >= CHARACTERS_PER_UNIT:
                at_end = False
                break
        unit_characters.append(read if at_end else _characters_of(unit))
        exact = exact and at_end
    ratio = _characters_per_token(encoder, texts)
    known = [size for size in unit_characters if size is not None]
    per_unit = None
    if len(known) == len(sample) and sample:
        seen = max(1, sum(size for _, size in sizes))
        scale = sum(known) / len(known) / seen
        per_unit = _tokens_by_cell(sizes, ratio, scale, lengths)
    return SourceScan(len(units), len(sample), len(sizes), ratio, per_unit, exact)


def _keep_some_text(texts: list[str], document: Document) -> None:
    """Keep the beginnings of the first documents, enough to measure characters per token."""
    if sum(map(len, texts)) < CHARACTERS_ENCODED:
        texts.append(document.text[:CHARACTERS_OF_ONE_DOCUMENT])


def _characters_of(unit: UnitGroup) -> float | None:
    """Characters of a unit by its stored size, roughly; None if that is unknown."""
    if unit.size_bytes is None:
        return None
    suffix = "." + unit.name.rpartition(".")[2]
    return unit.size_bytes * EXPANSION.get(suffix, 1.0)


def _characters_per_token(encoder: DocumentTokenizer, texts: list[str]) -> float:
    """Measured; 4 where there is no text."""
    tokens = sum(encoder.count_tokens(texts))
    return sum(map(len, texts)) / tokens if tokens else 4.0


def _tokens_by_cell(
    sizes: Sequence[tuple[str, int]], ratio: float, scale: float, lengths: LengthBuckets
) -> dict[str, dict[str, float]]:
    """Domain -> bucket -> tokens, scaled."""
    classes = CharacterClasses(lengths.names, tuple(limit * ratio for limit in lengths.limits[:-1]))
    cells: dict[str, dict[str, float]] = {}
    for domain, size in sizes:
        cell = cells.setdefault(domain, dict.fromkeys(lengths.names, 0.0))
        cell[classes.of(size)] += size / ratio * scale
    return cells
