"""How much of a corpus is read: a look at a few units, then rounds until the demand is met.

A corpus of a trillion tokens is not read for a few billion. By a scan (``scan.py``) the plan
(``reading_plan.py``) says how much of each stratum is needed; the first round reads less than that
where the stratum is large, because guesses from a few units are off by a half and what was read
cannot be unread. What the round counted makes the plan of the next one. Of each bucket only the
share that will be packed is tokenized, with a margin. What is read follows from configuration and
corpus alone, never from workers or interruptions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from data_prep.config import ShortOverlong
from data_prep.demand import Cells
from data_prep.reading_plan import Needed
from data_prep.scan import Stratum, StratumScan, StratumUnits
from data_prep.token_files import LengthBuckets
from data_prep.tokenizing import UnitTask

FIRST_ROUND = 0.6  # of what the scan says is needed, where that is more than
SMALL_BYTES = 2**28
FEWEST_BYTES = 2**26  # read of a stratum, where it has them
FEWEST_UNITS = 32  # of a stratum whose size is unknown
LAST_ROUND = 0.85  # of what is needed: when more than that is read, the rest follows at once
READ_MARGIN = 1.02  # of what has been measured
TOKENIZED_MARGIN = 1.25  # of what is needed of a bucket
FIRST_SHARE = 0.01  # of a bucket that nothing was wanted of
MOST_GROWTH = 8.0  # of a share or of what is read, from one round to the next


@dataclass
class StratumReading:
    """How much of one stratum is read."""

    num_units: int  # groups from the front of the reading order
    # Bucket -> share of its documents that is tokenized, 0 to 1, at least: units of earlier rounds
    # may have more, because less was read then.
    shares: dict[str, float]
    # (unit, bucket) -> share that earlier rounds have tokenized.
    done: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def tokenized(self) -> set[str]:
        """Buckets of which anything has been tokenized."""
        return {bucket for (_, bucket), share in self.done.items() if share}


class Readings:
    """The readings of one run, round by round.

    With ``short_overlong`` ``split`` all documents serve all buckets. ``max_units``: most units of
    a source that are read; None: all, if it comes to that.
    """

    def __init__(
        self,
        units: Mapping[Stratum, StratumUnits],
        scans: Mapping[Stratum, StratumScan],
        lengths: LengthBuckets,
        short_overlong: ShortOverlong,
        *,
        max_units: int | None,
    ) -> None:
        self._units, self._scans, self._lengths = units, scans, lengths
        self._most = _most_groups(units, max_units)
        self._pooled = short_overlong is ShortOverlong.split
        self.strata: dict[Stratum, StratumReading] = {}
        self.num_rounds = 0

    @property
    def sources(self) -> set[str]:
        """Sources that are read."""
        return {source for source, _ in self._units}

    def stratum_of(self, source: str, domain: str) -> Stratum:
        """The stratum of a document."""
        return (source, domain) if (source, domain) in self._units else (source, None)

    def done(self) -> dict[Stratum, float]:
        """Share of each stratum that is read, of its tokens as far as its units' sizes tell."""
        return {s: self._units[s].fraction(r.num_units) for s, r in self.strata.items()}

    def divided_sources(self) -> set[str]:
        """Sources of several strata that are read or tokenized in part."""
        parts = {s for s, f in self.done().items() if f < 1.0}
        parts |= {s for s, r in self.strata.items() if min(r.shares.values()) < 1.0}
        return {source for source, domain in parts if domain is not None}

    def start(self, needed: Mapping[Stratum, Needed]) -> None:
        """Decide the first round."""
        for stratum, units in self._units.items():
            need = needed[stratum]
            if not need.fraction:
                self.strata[stratum] = StratumReading(0, dict.fromkeys(self._lengths.names, 0.0))
                continue
            num_units = self._first_units(units, need.fraction)
            num_units = min(self._most[stratum], num_units)
            tokens = self._scans[stratum].tokens
            shares = self._shares(need, tokens, units.fraction(num_units))
            self.strata[stratum] = StratumReading(num_units, shares)

    def _first_units(self, units: StratumUnits, fraction: float) -> int:
        """Groups of the first round."""
        if fraction >= 1.0:
            return len(units.groups)
        if units.size_bytes is None and units.published_tokens is None:
            return max(FEWEST_UNITS, units.groups_for(fraction / FIRST_ROUND))
        size, least = units.size_bytes, 0.0
        if size:
            least = min(1.0, FEWEST_BYTES / size)
        is_small = size is not None and fraction * size <= SMALL_BYTES
        return max(1, units.groups_for(max(least, fraction * (1.0 if is_small else FIRST_ROUND))))

    def extend(
        self,
        needed: Mapping[Stratum, Needed],
        estimate: Mapping[Stratum, Cells | None],
        supply: Mapping[Stratum, Cells],
    ) -> bool:
        """Read as much as is ``needed``; False if that is there already.

        ``estimate``: tokens of whole strata. ``supply``: those that are tokenized.
        """
        grows = False
        for stratum, need in needed.items():
            reading, units = self.strata[stratum], self._units[stratum]
            if not need.fraction:
                continue
            read = units.fraction(reading.num_units)
            more = self._more_units(stratum, need.fraction, read)
            have = self._by_bucket(supply.get(stratum, {}))
            planned = self._shares(need, estimate[stratum], units.fraction(more))
            is_more, shares = more > reading.num_units, dict(reading.shares)
            for bucket, share in reading.shares.items():
                short = self._missing(need.wanted, have, bucket)
                if is_more:  # of all that is read a smaller share may do
                    shares[bucket] = planned[bucket]
                elif share < 1.0 and short > 1.0 + 1e-9:
                    least = max(FIRST_SHARE, share) * min(MOST_GROWTH, TOKENIZED_MARGIN * short)
                    shares[bucket] = max(planned[bucket], min(1.0, least))
            grows = grows or is_more or shares != reading.shares
            reading.num_units, reading.shares = more, shares
        return grows

    def _more_units(self, stratum: Stratum, fraction: float, read: float) -> int:
        """Groups to have read after the next round: some of what is missing, or the last of it."""
        units, have = self._units[stratum], self.strata[stratum].num_units
        if fraction <= read * (1 + 1e-6):
            return have
        target = fraction * READ_MARGIN
        if read < LAST_ROUND * fraction:
            target = read + FIRST_ROUND * (fraction - read)
        target = min(target, 1.0, MOST_GROWTH * read if read else 1.0)
        return max(have, min(self._most[stratum], max(have + 1, units.groups_for(target))))

    def _missing(
        self, wanted: Mapping[str, float], have: Mapping[str, float], bucket: str
    ) -> float:
        """Tokens of a bucket that are wanted over those that are there; of all where pooled."""
        asked, there = wanted[bucket], have[bucket]
        if self._pooled:
            asked, there = sum(wanted.values()), sum(have.values())
        return asked / max(1.0, there)

    def _by_bucket(self, cells: Cells) -> dict[str, float]:
        return {b: sum(row.get(b, 0.0) for row in cells.values()) for b in self._lengths.names}

    def grow(self, source: str, missing: Mapping[str, float]) -> bool:
        """Read more of a source whose quotas got too little; False if it has no more.

        ``missing``: bucket -> tokens wanted over tokens there, above 1.
        """
        growth = min(MOST_GROWTH, TOKENIZED_MARGIN * max(missing.values()))
        own = [stratum for stratum in self.strata if stratum[0] == source]
        buckets = self._lengths.names if self._pooled else tuple(missing)
        thinned = [s for s in own if any(self.strata[s].shares[b] < 1.0 for b in buckets)]
        for stratum in thinned:
            shares = self.strata[stratum].shares
            wider = {b: min(1.0, max(FIRST_SHARE, shares[b]) * growth) for b in buckets}
            self.strata[stratum].shares = shares | wider
        grows = bool(thinned)
        growth = min(MOST_GROWTH, READ_MARGIN * max(missing.values()))
        for stratum in [] if thinned else own:
            units, reading = self._units[stratum], self.strata[stratum]
            read = max(units.fraction(reading.num_units), 1e-9)
            wanted = max(reading.num_units + 1, units.groups_for(min(1.0, read * growth)))
            more = min(self._most[stratum], wanted)
            grows, reading.num_units = grows or more > reading.num_units, more
        return grows

    def tasks(self) -> list[UnitTask]:
        """Readings of the next round: what the shares cover and no earlier round has read."""
        tasks = []
        for number, (stratum, reading) in enumerate(self.strata.items()):
            classes = self._classes(stratum)
            for place, unit in enumerate(self._units[stratum].groups[: reading.num_units]):
                keys = {bucket: (unit.name, bucket) for bucket in reading.shares}
                bands = {
                    b: (reading.done.get(keys[b], 0.0), max(s, reading.done.get(keys[b], 0.0)))
                    for b, s in reading.shares.items()
                }
                is_first = not any(key in reading.done for key in keys.values())
                if is_first or any(first < last for first, last in bands.values()):
                    stem = f"{number:02d}-{place:06d}-{self.num_rounds:02d}"
                    tasks.append(
                        UnitTask(unit, stem=stem, classes=classes, bands=bands, is_first=is_first)
                    )
                reading.done |= {keys[bucket]: last for bucket, (_, last) in bands.items()}
        self.num_rounds += 1
        return tasks

    def natural_weights(
        self, stratum: Stratum, unit: str, num_characters: np.ndarray
    ) -> np.ndarray:
        """How many documents of a unit each tokenized one of these sizes stands for."""
        done = self.strata[stratum].done
        shares = [done.get((unit, bucket), 0.0) for bucket in self._lengths.names]
        each = np.array([1.0 / share if share else 0.0 for share in shares])
        return each[self._classes(stratum).codes(num_characters)]

    def half_documents(self) -> dict[str, float]:
        """Bucket -> half the tokens of a document in its middle."""
        limits = [0.0, *map(float, self._lengths.limits)]
        return {
            b: sum(pair) / 4 for b, pair in zip(self._lengths.names, pairwise(limits), strict=True)
        }

    def estimate(self, read: Mapping[Stratum, Cells]) -> dict[Stratum, Cells | None]:
        """Tokens of whole strata, by ``read``: those of what has been read of them.

        A bucket of which nothing was tokenized keeps its estimate from the scan, as does a stratum
        of which nothing was read.
        """
        found: dict[Stratum, Cells | None] = {}
        for stratum, fraction in self.done().items():
            scanned = self._scans[stratum].tokens
            if not fraction:
                found[stratum] = scanned
                continue
            reading, measured = self.strata[stratum], read.get(stratum, {})
            tokenized = reading.tokenized
            cells: dict[str, dict[str, float]] = {}
            domains: set[str] = {*measured, *(scanned or {})}
            for domain in sorted(domains):
                guess = (scanned or {}).get(domain, {})
                row = measured.get(domain, {})
                cells[domain] = {
                    b: (row.get(b, 0.0) / fraction if b in tokenized else guess.get(b, 0.0))
                    for b in reading.shares
                }
            found[stratum] = cells
        return found

    def _classes(self, stratum: Stratum) -> LengthBuckets:
        return self._lengths.in_characters(self._scans[stratum].characters_per_token)

    def _shares(self, need: Needed, tokens: Cells | None, fraction: float) -> dict[str, float]:
        """Share of each bucket to tokenize where ``fraction`` of a stratum is read."""
        names = self._lengths.names
        if tokens is None:
            return dict.fromkeys(names, 1.0)
        there = {b: number * fraction for b, number in self._by_bucket(tokens).items()}
        if self._pooled:
            share = _share(sum(need.wanted.values()), sum(there.values()))
            return dict.fromkeys(names, share)
        return {b: _share(need.wanted[b], there[b]) for b in names}


def _share(wanted: float, there: float) -> float:
    if not wanted:
        return 0.0
    return min(1.0, TOKENIZED_MARGIN * wanted / there) if there else 1.0


def _most_groups(
    units: Mapping[Stratum, StratumUnits], max_units: int | None
) -> dict[Stratum, int]:
    """Groups of each stratum that may be read: no more units of a source than allowed.

    The units allowed are shared out by what the strata hold, at least one group of each.
    """
    if max_units is None:
        return {stratum: len(own.groups) for stratum, own in units.items()}
    most = {}
    for (source, domain), own in units.items():
        number = {
            s: sum(len(g.units) for g in u.groups) for s, u in units.items() if s[0] == source
        }
        allowed = max_units * number[source, domain] / max(1, sum(number.values()))
        sizes = np.cumsum([len(group.units) for group in own.groups])
        fits = int(np.searchsorted(sizes, math.floor(allowed), side="right"))
        most[source, domain] = max(min(1, len(sizes)), fits)
    return most
