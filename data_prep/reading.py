"""How much of a corpus is read: a look at a few units, then rounds until the quotas are met.

A corpus of a trillion tokens is not read for a few billion. A scan of a few units of each source
guesses lengths from characters. By it the first round reads as many units of each source as its
scarcest wanted bucket needs, with a margin, and tokenizes of each bucket only the share that the
quota needs. If counted tokens then fall short, a further round widens the shares or adds units.
What is read follows from configuration and corpus alone, never from workers or interruptions.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.config import ShortOverlong
from data_prep.quotas import Demand
from data_prep.token_files import LengthBuckets
from data_prep.tokenizing import UnitGroup, UnitTask
from longrope2.corpora.corpus import Corpus, Unit, stable_fraction
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
    """What a few units of a source told."""

    num_units: int
    characters_per_token: float  # measured on some of their text
    # Domain -> bucket -> tokens an average unit has, estimated; None where units were not read to
    # their end and their size is unknown.
    tokens_per_unit: dict[str, dict[str, float]] | None

    def supply(self) -> dict[str, dict[str, float]] | None:
        """Domain -> bucket -> tokens of the whole source, estimated."""
        if self.tokens_per_unit is None:
            return None
        return {
            domain: {bucket: tokens * self.num_units for bucket, tokens in cells.items()}
            for domain, cells in self.tokens_per_unit.items()
        }


def in_reading_order(units: Sequence[Unit], source: str, seed: int) -> list[UnitGroup]:
    """Units of a source in the order drawn from the seed; small ones are put together."""
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
    """Look at the first units of each source; ``units`` are in reading order.

    Raises:
        DataError: a unit cannot be read.
    """
    return {source: _scan_source(corpus, own, encoder, lengths) for source, own in units.items()}


def _scan_source(
    corpus: Corpus, units: Sequence[UnitGroup], encoder: DocumentTokenizer, lengths: LengthBuckets
) -> SourceScan:
    sample = units[:UNITS_PER_SOURCE]
    sizes: list[tuple[str, int]] = []
    texts: list[str] = []  # the beginnings of the first documents
    unit_characters: list[float | None] = []
    for unit in sample:
        read, at_end = 0, True
        for _, document in unit.read(corpus, Counter()):
            sizes.append((document.domain, len(document.text)))
            read += len(document.text)
            if sum(map(len, texts)) < CHARACTERS_ENCODED:
                texts.append(document.text[:CHARACTERS_OF_ONE_DOCUMENT])
            if read >= CHARACTERS_PER_UNIT:
                at_end = False
                break
        unit_characters.append(read if at_end else _characters_of(unit))
    num_tokens = sum(encoder.count_tokens(texts))
    ratio = sum(map(len, texts)) / num_tokens if num_tokens else 4.0
    known = [size for size in unit_characters if size is not None]
    per_unit = None
    if len(known) == len(sample) and sample:
        seen = max(1, sum(size for _, size in sizes))
        per_unit = _tokens_by_cell(sizes, ratio, sum(known) / len(known) / seen, lengths)
    return SourceScan(len(units), ratio, per_unit)


def _characters_of(unit: UnitGroup) -> float | None:
    """Characters of a unit by its stored size, roughly; None if that is unknown."""
    if unit.size_bytes is None:
        return None
    return unit.size_bytes * EXPANSION.get("." + unit.name.rpartition(".")[2], 1.0)


def _tokens_by_cell(
    sizes: Sequence[tuple[str, int]], ratio: float, scale: float, lengths: LengthBuckets
) -> dict[str, dict[str, float]]:
    classes = lengths.in_characters(ratio)
    cells: dict[str, dict[str, float]] = {}
    for domain, size in sizes:
        cell = cells.setdefault(domain, dict.fromkeys(lengths.names, 0.0))
        cell[classes.of(size)] += size / ratio * scale
    return cells


@dataclass
class SourceReading:
    """How much of one source is read."""

    num_units: int  # from the front of the reading order
    shares: dict[str, float]  # bucket -> share of its documents that is tokenized, 0 to 1
    # (unit, bucket) -> share that earlier rounds have tokenized.
    done: dict[tuple[str, str], float] = field(default_factory=dict)


class Readings:
    """The readings of one run, round by round; ``units`` are in reading order, by source.

    With ``short_overlong`` ``split`` all documents serve all buckets. ``max_units``: most units of
    a source that are read; None: all, if it comes to that.
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

        ``missing``: bucket -> tokens wanted over tokens there, above 1.
        """
        reading = self.sources[source]
        buckets = set(reading.shares) if self._pooled else set(missing)
        growth = min(MOST_GROWTH, 1.5 * max(missing.values()))
        if any(reading.shares[bucket] < 1.0 for bucket in buckets):
            wider = {b: min(1.0, max(FIRST_SHARE, reading.shares[b]) * growth) for b in buckets}
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
            classes = self._classes(source)
            for place, unit in enumerate(self._units[source][: reading.num_units]):
                keys = {bucket: (unit.name, bucket) for bucket in reading.shares}
                bands = {b: (reading.done.get(keys[b], 0.0), s) for b, s in reading.shares.items()}
                is_first = not any(key in reading.done for key in keys.values())
                if is_first or any(first < last for first, last in bands.values()):
                    stem = f"{number:02d}-{place:06d}-{self.num_rounds:02d}"
                    tasks.append(
                        UnitTask(unit, stem=stem, classes=classes, bands=bands, is_first=is_first)
                    )
                reading.done |= {keys[bucket]: share for bucket, share in reading.shares.items()}
        self.num_rounds += 1
        return tasks

    def natural_weights(self, source: str, num_characters: np.ndarray) -> np.ndarray:
        """How many documents of the source each tokenized document of these sizes stands for."""
        shares = self.sources[source].shares.values()
        each = np.array([1.0 / share if share else 0.0 for share in shares])
        return each[self._classes(source).codes(num_characters)]

    def _classes(self, source: str) -> LengthBuckets:
        return self._lengths.in_characters(self._scans[source].characters_per_token)

    def _first_reading(self, source: str, available: int, demand: Demand) -> SourceReading:
        wanted = {bucket: demand.of(source, bucket) for bucket in self._lengths.names}
        if all(tokens == 0 for tokens in wanted.values()):
            return SourceReading(0, dict.fromkeys(wanted, 0.0))
        cells = self._scans[source].tokens_per_unit
        if cells is None or None in wanted.values():
            return SourceReading(available, dict.fromkeys(wanted, 1.0))
        per_unit = {b: sum(domain[b] for domain in cells.values()) for b in wanted}
        needed = {bucket: MARGIN * (tokens or 0) for bucket, tokens in wanted.items()}
        if self._pooled:
            needed, per_unit = {"all": sum(needed.values())}, {"all": sum(per_unit.values())}
        counts = [needed[bucket] / per_unit[bucket] for bucket in needed if per_unit[bucket]]
        num_units = min(available, max(FEWEST_UNITS, math.ceil(max(counts, default=0.0))))
        shares = {b: _share(needed[b], per_unit[b] * num_units) for b in needed}
        if self._pooled:
            shares = dict.fromkeys(wanted, shares["all"])
        return SourceReading(num_units, shares)

    def _most_units(self, source: str) -> int:
        """Groups of a source that may be read: at least one, and no more units than allowed."""
        sizes = np.cumsum([len(group.units) for group in self._units[source]])
        if self._max_units is None:
            return len(sizes)
        return max(min(1, len(sizes)), int(np.searchsorted(sizes, self._max_units, side="right")))


def _share(needed: float, there: float) -> float:
    return 0.0 if not needed else min(1.0, needed / there if there else 1.0)
