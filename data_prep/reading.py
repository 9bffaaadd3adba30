"""How much of a corpus is read: rounds of readings until the quotas are met or the corpus ends.

A corpus of a trillion tokens is not read for a few billion. The first round reads as many units of each source as its
scarcest wanted bucket needs, by the scan, with a margin, and tokenizes of each bucket only the share that the quota needs
(documents are taken by their order, so the rest of them can be read later). If counted tokens then fall short, a further
round widens the shares or adds units. What is read follows from configuration and corpus alone, never from the number of
workers or from interruptions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.corpora import ShortOverlong
from data_prep.document_table import LengthBuckets
from data_prep.quotas import Demand
from data_prep.scan import SourceScan
from data_prep.tokenizing import UnitTask
from data_prep.unit_groups import UnitGroup

__all__ = ["ReadingPlan", "SourceReading"]

MARGIN = 2.0  # read this many times what the scan says is needed
FEWEST_UNITS = 32  # read from at least so many units of a source, where it has them
FIRST_SHARE = 0.01  # of a bucket that the scan found nothing to want of
MOST_GROWTH = 8.0  # of a share or of the number of units, from one round to the next


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
        short_overlong: What short quotas do with long documents: with ``split`` all documents serve all buckets.
        max_units: Most units of a source that are read; None: all, if it comes to that.
    """

    def __init__(
        self, units: Mapping[str, Sequence[UnitGroup]], scans: Mapping[str, SourceScan], lengths: LengthBuckets,
        short_overlong: ShortOverlong, *, max_units: int | None,
    ) -> None:  # fmt: skip
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
            wider = {bucket: min(1.0, max(FIRST_SHARE, reading.shares[bucket]) * growth) for bucket in buckets}
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
                bands = {b: (reading.done.get((unit.name, b), 0.0), share) for b, share in reading.shares.items()}
                is_first = not any((unit.name, bucket) in reading.done for bucket in bands)
                if is_first or any(first < last for first, last in bands.values()):
                    stem = f"{number:02d}-{place:06d}-{self.num_rounds:02d}"
                    tasks.append(UnitTask(unit, stem, self._scans[source].classes(self._lengths), bands, is_first))
                reading.done |= {(unit.name, bucket): share for bucket, share in reading.shares.items()}
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
        return SourceReading(num_units, dict.fromkeys(wanted, shares["all"]) if self._pooled else shares)

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
        return {bucket: sum(domain[bucket] for domain in cells.values()) for bucket in self._lengths.names}


def _share(needed: float, there: float) -> float:
    """Share of ``there`` that covers ``needed``."""
    return 0.0 if not needed else min(1.0, needed / there) if there else 1.0
