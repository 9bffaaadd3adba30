"""A simulated RedPajama-Data-1T: 3,024 files of real sizes, no text, a thousandth of its tokens.

Documents are lengths drawn by a file's name, from each part's own distribution; what is read of
them, chosen and left is the product's own code from the scan to the choice.
"""

import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import linprog

from data_prep import scan
from data_prep.config import BucketQuota, BucketTokens, MixtureConfig, PackConfig
from data_prep.demand import length_buckets
from data_prep.reading import Readings
from data_prep.reading_plan import needed_reading
from data_prep.scan import StratumScan, divide_units
from data_prep.stages import _choose, _next_round
from data_prep.token_files import IndexRow, TokenizedUnit, UnitAccount, load_documents, write_unit
from longrope2.config import compose
from longrope2.corpora.corpus import Unit
from longrope2.corpora.redpajama import V1_TOKENS, _first_folder
from longrope2.corpora.remote import FileCorpus, FileSet, StoredFile, in_ranges

SOURCE = "redpajama_v1"
# Part -> files, their bytes together, median and log deviation of its documents' lengths in tokens.
PARTS = {
    "arxiv": (100, 88e9, 14_565, 0.8),
    "c4": (1024, 806e9, 315, 1.3),
    "common_crawl": (1800, 1.0e12, 1066, 1.3),
    "github": (98, 212e9, 520, 1.5),
    "stackexchange": (1, 79e9, 507, 1.0),
    "wikipedia": (1, 112e9, 409, 1.2),
}
SCALE = 1000
LIMITS = (8192, 100_000, 200_000)


def all_units() -> list[Unit]:
    files = []
    for part, (number, size, _, _) in PARTS.items():
        ending = ".jsonl.zst" if part == "common_crawl" else ".jsonl"
        names = [f"{part}/{n:04d}{ending}" for n in range(number)]
        files += [StoredFile("/mirror", name, int(size / number)) for name in names]
    assert len(files) == 3024
    found, groups = FileSet("/mirror", tuple(files)), in_ranges(files)
    corpus = FileCorpus(SOURCE, found, groups, None, 0.0, domain_of=_first_folder)  # type: ignore[arg-type]
    return list(corpus.units())


def documents_of(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the documents of a unit, and their orders."""
    assert unit.domain is not None and unit.size_bytes is not None
    generator = np.random.default_rng(zlib.crc32(unit.name.encode()))
    _, size, median, deviation = PARTS[unit.domain]
    total = unit.size_bytes / size * V1_TOKENS[unit.domain] / SCALE
    number = max(1, generator.poisson(total / (median * np.exp(deviation**2 / 2))))
    tokens = np.exp(generator.normal(np.log(median), deviation, number))
    orders = generator.integers(0, 2**63, number, dtype=np.int64).astype(np.uint64) * np.uint64(2)
    return np.clip(tokens, 20, 190_000).astype(np.int64), orders


class Simulation:
    """Rounds of reading until no more is needed."""

    def __init__(self, config: PackConfig, work: Path) -> None:
        self.config, self._work = config, work
        self.lengths = length_buckets(config)
        self.units = all_units()
        self.strata = divide_units(self.units, [SOURCE], config.seed)
        self.read: set[Unit] = set()
        self.num_rounds = 0

    def run(self) -> dict[str, int]:
        """Domain -> tokens chosen; the last choice stays."""
        scans = {stratum: self._scan(stratum) for stratum in self.strata}
        readings = Readings(
            self.strata, scans, self.lengths, self.config.short_overlong, max_units=None
        )
        estimate = {stratum: scan.tokens for stratum, scan in scans.items()}
        readings.start(needed_reading(self.config, estimate, {}))
        done: list[TokenizedUnit] = []
        while True:
            done += [self._tokenize(task) for task in readings.tasks()]
            self.num_rounds += 1
            table = load_documents(done, 2)
            found = _choose(self.config, table, readings, [])
            if not _next_round(self.config, readings, found):
                break
        self.shortfalls, parts = found.choice.shortfalls, found.choice.selection.parts
        self.chosen = found.choice.selection.tokens
        domain_P = table.domain_D[parts.document_P]
        sums = np.bincount(domain_P, parts.tokens_P, minlength=len(table.domains))
        return {name: int(n) for (_, name), n in zip(table.domains, sums, strict=True)}

    @property
    def tokens_read(self) -> int:
        """Tokens of all units that were opened."""
        return sum(int(documents_of(unit)[0].sum()) for unit in self.read)

    def _scan(self, stratum: scan.Stratum) -> StratumScan:
        """The first files, and a guess of the size that is a tenth too large."""
        domain, units = stratum[1], self.strata[stratum]
        assert domain is not None
        few = [unit for group in units.groups[:4] for unit in group.units]
        sizes = [(domain, int(n) * 4) for unit in few for n in documents_of(unit)[0]]
        whole = 1.1 * V1_TOKENS[domain] / SCALE / sum(size for _, size in sizes)
        return StratumScan(4.0, scan._tokens_by_cell(sizes, 4.0, whole, self.lengths))

    def _tokenize(self, task) -> TokenizedUnit:
        unit = TokenizedUnit(self._work, task.stem)
        with write_unit(self._work, task.stem, np.uint16) as add:
            for place, own in enumerate(task.unit.units):
                self.read.add(own)
                tokens, orders = documents_of(own)
                pairs = zip(tokens.tolist(), orders.tolist(), strict=True)
                for number, (size, order) in enumerate(pairs):
                    first, last = task.bands[task.classes.of(4 * size)]
                    if first <= order / 2**64 < last:
                        name = f"{own.name}:{number}"
                        text_hash = hashlib.md5(name.encode()).digest()
                        assert own.domain is not None
                        row = IndexRow(
                            name, place, own.domain, 4 * size, text_hash, text_hash, order
                        )
                        add(row, np.zeros(size - 2, np.uint16))
        unit.write_account(UnitAccount([own.name for own in task.unit.units], SOURCE))
        return unit


def true_tokens(units: list[Unit]) -> dict[str, np.ndarray]:
    """Part -> tokens by bucket (short, mid, long) of the whole corpus."""
    sums = {part: np.zeros(3) for part in PARTS}
    for unit in units:
        tokens, _ = documents_of(unit)
        assert unit.domain is not None
        sums[unit.domain] += np.bincount(np.searchsorted(LIMITS, tokens), tokens, minlength=3)
    return sums


@pytest.fixture
def config() -> PackConfig:
    given = ["target_len=131072", "model=llama3_8b", "corpus=redpajama_v1"]
    return compose(PackConfig, "pack", given)


def assert_shares(chosen: dict[str, int], expected: dict[str, float], tolerance: float) -> None:
    total, whole = sum(chosen.values()), sum(expected.values())
    for part, share in expected.items():
        assert chosen[part] / total == pytest.approx(share / whole, abs=tolerance), part


@pytest.mark.slow
def test_the_natural_mix(config, tmp_path) -> None:
    """As the corpus is: every part has its share, the two that stand in one file each too."""
    config.mixture = MixtureConfig(sources={SOURCE: 4_500_000}, short_survival=1.0)
    simulation = Simulation(config, tmp_path)
    chosen = simulation.run()
    assert not simulation.shortfalls and simulation.chosen[SOURCE, "long"] > 0
    assert simulation.tokens_read < 1.3 * 4_500_000
    whole = {part: V1_TOKENS[part] for part in PARTS}
    assert_shares(chosen, whole, 0.02)


@pytest.mark.slow
def test_natural_quotas(config, tmp_path) -> None:
    config.quotas = {SOURCE: BucketQuota(short=2_900_000, long=1_600_000)}
    simulation = Simulation(config, tmp_path)
    chosen = simulation.run()
    assert not simulation.shortfalls and simulation.tokens_read < 1.3 * 4_500_000
    assert_shares(chosen, {part: V1_TOKENS[part] for part in PARTS}, 0.025)


@pytest.mark.slow
def test_the_mix_of_fu_et_al(config, tmp_path) -> None:
    """A domain keeps its longer documents and a tenth of the others: what that needs is known."""
    of_fu = ["target_len=131072", "model=llama3_8b", "corpus=fu"]
    shares = compose(PackConfig, "pack", of_fu).mixture.domain_shares
    config.mixture = MixtureConfig(
        sources={SOURCE: 4_792_500}, short_survival=0.1, domain_shares=shares
    )
    simulation = Simulation(config, tmp_path)
    chosen = simulation.run()
    wanted, total = shares[SOURCE], sum(shares[SOURCE].values())
    needed = 0.0
    for part, (short, mid, long) in true_tokens(simulation.units).items():
        kept = (0.1 * short + mid + long) / (short + mid + long)
        needed += 4_792_500 * wanted[part] / total / kept
    assert not simulation.shortfalls and simulation.tokens_read < 1.3 * needed
    assert needed < 0.02 * sum(V1_TOKENS.values()) / SCALE
    assert_shares(chosen, wanted, 0.02)


def least_reading(truth: dict[str, np.ndarray], shares: np.ndarray, buckets: np.ndarray) -> float:
    """Fewest tokens of the true corpus that hold the table, parts times buckets."""
    density = np.array([row / row.sum() for row in truth.values()])
    number, width = density.shape
    # Tokens read of every part, then the cells; a cell is at most what the part's reading holds.
    limits = np.hstack([np.zeros((number * width, number)), np.eye(number * width)])
    for part in range(number):
        limits[part * width : (part + 1) * width, part] = -density[part]
    sums = np.vstack(
        [
            np.hstack([np.zeros((number, number)), np.kron(np.eye(number), np.ones(width))]),
            np.hstack([np.zeros((width, number)), np.kron(np.ones(number), np.eye(width))]),
        ]
    )
    cost = np.r_[np.ones(number), np.zeros(number * width)]
    wanted = np.r_[shares, buckets]
    found = linprog(cost, A_ub=limits, b_ub=np.zeros(len(limits)), A_eq=sums, b_eq=wanted)
    return found.fun


@pytest.mark.slow
def test_the_lengths_of_the_paper(config, tmp_path) -> None:
    """Table 1 of the paper without FineWeb-Edu's short documents: 1 to 1.5 to 2."""
    buckets = BucketTokens(short=1_000_000, mid=1_500_000, long=2_000_000)
    config.mixture = MixtureConfig(sources={SOURCE: 4_500_000}, buckets=buckets)
    simulation = Simulation(config, tmp_path)
    chosen = simulation.run()
    truth = true_tokens(simulation.units)
    whole = np.array([row.sum() for row in truth.values()])
    wanted = np.array([1.0e6, 1.5e6, 2.0e6])
    needed = least_reading(truth, 4_500_000 * whole / whole.sum(), wanted)
    assert not [s for s in simulation.shortfalls if s.startswith(("source", "bucket"))]
    assert simulation.tokens_read < 1.3 * needed
    # Documents of 100,000 tokens are a fortieth of what is wanted of a part: coarse.
    assert_shares(chosen, dict(zip(truth, whole.tolist(), strict=True)), 0.06)
