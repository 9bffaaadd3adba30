"""A look at a corpus before it is read: its strata, the order of their units, what a few hold.

A stratum is what is read by itself: the units of one domain, where adapters know a unit's domain
before they read it (RedPajama's parts, StarCoder's languages, the folders of a folder), or all
units of a source. A domain that stands in one file of three thousand is then read because it is
wanted, not when the order of files comes to it.

How much a stratum holds is known from the stored sizes of its files, or from what was published of
the corpus; how that is divided among lengths is guessed from the beginnings of a few units.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.demand import Cells
from data_prep.token_files import LengthBuckets
from data_prep.tokenizing import UnitGroup
from longrope2.corpora.corpus import Corpus, Unit, stable_fraction
from longrope2.corpora.tokenizer import DocumentTokenizer

MOST_STRATA = 128  # of a source; one with more domains is one stratum
UNITS_PER_STRATUM = 4
UNITS_PER_SOURCE = 96  # fewer of each where there are many strata, at least one
GROUP_BYTES = 2**20  # small units are read together up to this size
CHARACTERS_PER_UNIT = 4_000_000
CHARACTERS_ENCODED = 200_000
CHARACTERS_OF_ONE_DOCUMENT = 20_000
# Characters per stored byte, roughly; only where a unit was not read to its end.
EXPANSION = {".gz": 3.0, ".zst": 3.5, ".zstd": 3.5, ".parquet": 2.5}

Stratum = tuple[str, str | None]  # source, and domain; None: units with documents of any domain


@dataclass(frozen=True)
class StratumUnits:
    """The units of a stratum in reading order; small ones are put together."""

    groups: tuple[UnitGroup, ...]
    weights: tuple[float, ...]
    """How much each holds: stored bytes, published tokens, or 1 where neither is known of all."""

    def fraction(self, num_groups: int) -> float:
        """Share of the stratum that its first groups hold."""
        total = sum(self.weights)
        return sum(self.weights[:num_groups]) / total if total else 1.0

    def groups_for(self, fraction: float) -> int:
        """Fewest groups that hold a share of the stratum, up to rounding."""
        wanted, held = fraction * sum(self.weights) * (1 - 1e-9), 0.0
        for number, weight in enumerate(self.weights):
            if held >= wanted:
                return number
            held += weight
        return len(self.weights)

    @property
    def size_bytes(self) -> int | None:
        """Stored size of all, None if one is unknown."""
        sizes = [group.size_bytes for group in self.groups]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    @property
    def published_tokens(self) -> float | None:
        """Tokens of all by what was published, None if that of one is unknown."""
        sizes = [unit.published_tokens for group in self.groups for unit in group.units]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None


@dataclass(frozen=True)
class StratumScan:
    """What a few units of a stratum told."""

    characters_per_token: float  # measured on some of their text
    # Tokens of the whole stratum, estimated; None where its size is unknown.
    tokens: Cells | None


def divide_units(
    units: Sequence[Unit], sources: Sequence[str], seed: int
) -> dict[Stratum, StratumUnits]:
    """Strata of the sources, each with its units in the order drawn from the seed."""
    strata: dict[Stratum, StratumUnits] = {}
    for source in sources:
        own = [unit for unit in units if unit.source == source]
        domains = sorted({unit.domain or "" for unit in own})
        if all(unit.domain for unit in own) and len(domains) <= MOST_STRATA:
            for domain in domains:
                of_domain = [unit for unit in own if unit.domain == domain]
                strata[source, domain] = _with_weights(in_reading_order(of_domain, seed))
        else:
            strata[source, None] = _with_weights(in_reading_order(own, seed))
    return strata


def in_reading_order(units: Sequence[Unit], seed: int) -> list[UnitGroup]:
    """Units in the order drawn from the seed; small ones are put together."""
    groups: list[list[Unit]] = []
    size = 0
    drawn = sorted(units, key=lambda u: (stable_fraction("unit", seed, u.name), u.name))
    for unit in drawn:
        room = GROUP_BYTES if unit.size_bytes is None else GROUP_BYTES - unit.size_bytes
        if groups and unit.size_bytes is not None and 0 < size <= room:
            groups[-1].append(unit)
            size += unit.size_bytes
        else:
            groups.append([unit])
            size = unit.size_bytes or 0
    return [UnitGroup(tuple(group)) for group in groups]


def _with_weights(groups: Sequence[UnitGroup]) -> StratumUnits:
    found = StratumUnits(tuple(groups), ())
    weights: list[float] = [1.0] * len(groups)
    if found.size_bytes is not None:
        weights = [float(group.size_bytes or 0) for group in groups]
    elif found.published_tokens is not None:
        weights = [sum(unit.published_tokens or 0.0 for unit in g.units) for g in groups]
    return StratumUnits(found.groups, tuple(weights))


def scan_corpus(
    corpus: Corpus,
    strata: Mapping[Stratum, StratumUnits],
    encoder: DocumentTokenizer,
    lengths: LengthBuckets,
) -> dict[Stratum, StratumScan]:
    """Look at the first units of each stratum.

    Raises:
        DataError: a unit cannot be read.
    """
    number = Counter(source for source, _ in strata)
    scans = {}
    for (source, domain), units in strata.items():
        few = max(1, min(UNITS_PER_STRATUM, UNITS_PER_SOURCE // number[source]))
        scans[source, domain] = _scan(corpus, units, few, encoder, lengths)
    return scans


def _scan(
    corpus: Corpus,
    units: StratumUnits,
    num_units: int,
    encoder: DocumentTokenizer,
    lengths: LengthBuckets,
) -> StratumScan:
    sizes: list[tuple[str, int]] = []
    texts: list[str] = []  # the beginnings of the first documents
    characters: list[float | None] = []  # of each unit
    sample = units.groups[:num_units]
    for unit in sample:
        read, at_end = 0, True
        for _, document in unit.read(corpus, {}):
            sizes.append((document.domain, len(document.text)))
            read += len(document.text)
            if sum(map(len, texts)) < CHARACTERS_ENCODED:
                texts.append(document.text[:CHARACTERS_OF_ONE_DOCUMENT])
            if read >= CHARACTERS_PER_UNIT:
                at_end = False
                break
        characters.append(read if at_end else _characters_of(unit))
    num_tokens = sum(encoder.count_tokens(texts))
    ratio = sum(map(len, texts)) / num_tokens if num_tokens else 4.0
    total = _total_tokens(units, sample, characters, ratio)
    if total is None:
        return StratumScan(ratio, None)
    seen = max(1, sum(size for _, size in sizes))
    return StratumScan(ratio, _tokens_by_cell(sizes, ratio, total / seen, lengths))


def _total_tokens(
    units: StratumUnits,
    sample: Sequence[UnitGroup],
    characters: Sequence[float | None],
    ratio: float,
) -> float | None:
    """Tokens of a stratum: by stored sizes, by what was published, or by the number of units."""
    if units.size_bytes is None and units.published_tokens is not None:
        return units.published_tokens
    known = [number for number in characters if number is not None]
    if len(known) < len(sample) or not sample:
        return None
    share = units.fraction(len(sample))
    return sum(known) / ratio / share if share else 0.0


def _characters_of(unit: UnitGroup) -> float | None:
    """Characters of a unit by its stored size, roughly; None if that is unknown."""
    if unit.size_bytes is None:
        return None
    return unit.size_bytes * EXPANSION.get("." + unit.name.rpartition(".")[2], 1.0)


def _tokens_by_cell(
    sizes: Sequence[tuple[str, int]], ratio: float, scale: float, lengths: LengthBuckets
) -> Cells:
    """Characters of documents as tokens by domain and length, ``scale`` tokens a character."""
    classes = lengths.in_characters(ratio)
    cells: dict[str, dict[str, float]] = {}
    for domain, size in sizes:
        cell = cells.setdefault(domain, dict.fromkeys(lengths.names, 0.0))
        cell[classes.of(size)] += size * scale
    return cells
