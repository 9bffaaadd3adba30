"""How much of a corpus is read: rounds of readings until the quotas are met or the corpus ends.

A corpus of a trillion tokens is not read for a few billion. The first round reads as many units of
each source as its scarcest wanted bucket needs, by the scan, with a margin, and tokenizes of each
bucket only the share that the quota needs (documents are taken by their order, so the rest of them
can be read later). If counted tokens then fall short, a further round widens the shares or adds
units. What is read follows from configuration and corpus alone, never from the number of workers or
from interruptions.

A look at a corpus before reading it: how much text of which length each source has, from a few
units.

Used to decide how many units are read and which share of their documents is tokenized
(``reading.py``), and by ``--dry-run``. Lengths are guessed from characters with the ratio measured
on a small piece of each source. The guess decides only how much is read first; what is packed is
decided by counted tokens.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from data_prep.quotas import Demand
from data_prep.token_files import LengthBuckets
from data_prep.tokenizing import CharacterClasses, UnitGroup, UnitTask
from longrope2.corpora.config import ShortOverlong
from longrope2.corpora.corpus import Corpus, Document, Unit, stable_fraction
from longrope2.corpora.tokenizer import DocumentTokenizer

UNITS_PER_SOURCE = 4
GROUP_BYTES = 2**20  # small units are read together up to this size
CHARACTERS_PER_UNIT = 4_000_000
CHARACTERS_ENCODED = 200_000
CHARACTERS_OF_ONE_DOCUMENT = 20_000
# Characters per stored byte, roughly; only where a unit was not read to its end.
EXPANSION = {".gz": 3.0, ".zst": 3.5, ".zstd": 3.5, ".parquet": 2.5}
MARGIN = 2.0  # read this many times what the scan says is needed
FEWEST_UNITS = 32  # read from at least so many units of a source, where it has them
FIRST_SHARE = 0.01  # of a bucket that the scan found nothing to want of
MOST_GROWTH = 8.0  # of a share or of the number of units, from one round to the next


@dataclass(frozen=True)
class SourceScan:
    """What a few units of a source told.

    Attributes:
        num_units: Units of the source.
        num_scanned: Units looked at.
        num_documents: Documents looked at.
        characters_per_token: Measured on some of their text.
        tokens_per_unit: Domain -> bucket -> tokens an average unit has, estimated; None where units
            were not read to their end and their size is unknown.
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
        return {
            d: {b: n * self.num_units for b, n in cells.items()}
            for d, cells in self.tokens_per_unit.items()
        }


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
    corpus: Corpus,
    units: Mapping[str, Sequence[UnitGroup]],
    encoder: DocumentTokenizer,
    lengths: LengthBuckets,
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


@dataclass
class SourceReading:
    """How much of one source is read.

    Attributes:
        num_units: Units, from the front of the reading order.
        shares: Bucket -> share of its documents that is tokenized, 0 to 1.
        done: (unit, bucket) -> share that earlier rounds have tokenized.
    """

    num_units: int
    shares: dict[str, float]
    done: dict[tuple[str, str], float] = field(default_factory=dict)


class ReadingPlan:
    """The readings of one run, round by round.

    Args:
        units: Source -> its units in reading order.
        scans: Source -> what the scan told.
        lengths: The buckets.
        short_overlong: What short quotas do with long documents: with ``split`` all documents serve
            all buckets.
        max_units: Most units of a source that are read; None: all, if it comes to that.
    """

    def __init__(
        self,
        units: Mapping[str, Sequence[UnitGroup]],
        scans: Mapping[str, SourceScan],
        lengths: LengthBuckets,
        short_overlong: ShortOverlong,
        *,
        max_units: int | None,
    ) -> None:
        self._units, self._scans, self._lengths = units, scans, lengths
        self._max_units = max_units
        self._pooled = short_overlong is ShortOverlong.split
        self.sources: dict[str, SourceReading] = {}
        self.num_rounds = 0

    def start(self, demand: Demand) -> None:
        """Decide the first round."""
        for source in self._units:
            self.sources[source] = self._first_reading(source, self._most_units(source), demand)

    def extend(self, source: str, missing: Mapping[str, float]) -> bool:
        """Read more of a source that gave too little; False if it has no more.

        Args:
            source: The source.
            missing: Bucket -> tokens wanted over tokens there, above 1.
        """
        reading = self.sources[source]
        buckets = set(reading.shares) if self._pooled else set(missing)
        growth = min(MOST_GROWTH, 1.5 * max(missing.values()))
        if any(reading.shares[bucket] < 1.0 for bucket in buckets):
            wider = {
                bucket: min(1.0, max(FIRST_SHARE, reading.shares[bucket]) * growth)
                for bucket in buckets
            }
            reading.shares = reading.shares | wider
            return True
        most = self._most_units(source)
        more = min(most, math.ceil(max(1, reading.num_units) * growth))
        grows, reading.num_units = more > reading.num_units, more
        return grows

    def tasks(self) -> list[UnitTask]:
        """Readings of the next round: what the shares cover and no earlier round has read."""
        tasks = []
        for number, (source, reading) in enumerate(self.sources.items()):
            for place, unit in enumerate(self._units[source][: reading.num_units]):
                bands = {
                    b: (reading.done.get((unit.name, b), 0.0), share)
                    for b, share in reading.shares.items()
                }
                is_first = not any((unit.name, bucket) in reading.done for bucket in bands)
                if is_first or any(first < last for first, last in bands.values()):
                    stem = f"{number:02d}-{place:06d}-{self.num_rounds:02d}"
                    tasks.append(
                        UnitTask(
                            unit, stem, self._scans[source].classes(self._lengths), bands, is_first
                        )
                    )
                reading.done |= {
                    (unit.name, bucket): share for bucket, share in reading.shares.items()
                }
        self.num_rounds += 1
        return tasks

    def natural_weights(self, source: str, num_characters: np.ndarray) -> np.ndarray:
        """How many documents of the source each tokenized document of these sizes stands for."""
        classes, shares = self._scans[source].classes(self._lengths), self.sources[source].shares
        each = np.array([1.0 / shares[name] if shares[name] else 0.0 for name in classes.names])
        return each[np.searchsorted(np.asarray(classes.limits), num_characters, side="left")]

    def _first_reading(self, source: str, available: int, demand: Demand) -> SourceReading:
        """Units and shares by the scan."""
        wanted = {bucket: demand.of(source, bucket) for bucket in self._lengths.names}
        if all(tokens == 0 for tokens in wanted.values()):
            return SourceReading(0, dict.fromkeys(wanted, 0.0))
        per_unit = self._tokens_per_unit(source)
        if per_unit is None or any(tokens is None for tokens in wanted.values()):
            return SourceReading(available, dict.fromkeys(wanted, 1.0))
        needed = {bucket: MARGIN * (tokens or 0) for bucket, tokens in wanted.items()}
        if self._pooled:
            needed = {"all": sum(needed.values())}
            per_unit = {"all": sum(per_unit.values())}
        counts = [needed[bucket] / per_unit[bucket] for bucket in needed if per_unit[bucket]]
        num_units = min(available, max(FEWEST_UNITS, math.ceil(max(counts, default=0.0))))
        shares = {b: _share(needed[b], per_unit[b] * num_units) for b in needed}
        return SourceReading(
            num_units, dict.fromkeys(wanted, shares["all"]) if self._pooled else shares
        )

    def _most_units(self, source: str) -> int:
        """Groups of units of a source that may be read: at least one, and no more units than allowed."""
        sizes = np.cumsum([len(group.units) for group in self._units[source]])
        if self._max_units is None:
            return len(sizes)
        return max(min(1, len(sizes)), int(np.searchsorted(sizes, self._max_units, side="right")))

    def _tokens_per_unit(self, source: str) -> dict[str, float] | None:
        cells = self._scans[source].tokens_per_unit
        if cells is None:
            return None
        return {
            bucket: sum(domain[bucket] for domain in cells.values())
            for bucket in self._lengths.names
        }


def _share(needed: float, there: float) -> float:
    """Share of ``there`` that covers ``needed``."""
    return 0.0 if not needed else min(1.0, needed / there) if there else 1.0
