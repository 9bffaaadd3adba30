"""How much of each stratum is needed: the least reading that gives a run what it wants.

Quotas take a source as it is: the same share of each of its strata, as much as the scarcest bucket
asks for. A mixture wants a table (domains x lengths), and a stratum gives of every cell in
proportion to how much of it is read; the least reading that holds the table is a linear program,
solved by HiGHS (Huangfu and Hall 2018) through scipy. Its variables are the share of each stratum
that is read, the cells of the table, and what stays short of it. Tokens that stay short cost far
more than reading does, so everything is read where it comes to that; only the mix of domains has a
price: no more than ``MOST_READ_FOR_A_DOMAIN`` tokens are read for one that a domain lacks.

Shape letters: R rows of the table (domains of sources, or sources), C buckets, V shares to decide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data_prep.config import (
    BUCKETS,
    BucketTokens,
    DomainMix,
    MixtureConfig,
    PackConfig,
    ShortOverlong,
)
from data_prep.demand import Cells, Supply, domain_tokens, fit_mixture
from data_prep.scan import Stratum

if TYPE_CHECKING:
    from scipy.sparse import coo_array

MOST_READ_FOR_A_DOMAIN = 100.0
PRICE_OF_A_TOKEN = 1e6  # that a source or a bucket lacks, in tokens read

Estimate = Mapping[Stratum, Cells | None]  # tokens of whole strata; None where unknown


@dataclass(frozen=True)
class Needed:
    """What is needed of a stratum."""

    fraction: float
    """Share of it that is to be read, 0 to 1."""
    wanted: dict[str, float]
    """Bucket -> tokens that will be packed of that, at most; ``inf``: all there are, and whatever
    turns up of a bucket that is asked for and was not seen yet."""


def needed_reading(
    config: PackConfig,
    estimate: Estimate,
    done: Mapping[Stratum, float],
    hope: Mapping[str, float] | None = None,
) -> dict[Stratum, Needed]:
    """What is needed of each stratum.

    Args:
        config: What is wanted.
        estimate: What there is, by the scan or by what has been read. A source with a stratum of
            unknown size is read whole.
        done: Share of each stratum that has been read: it costs nothing any more.
        hope: Bucket -> tokens that the unread part of a mixture's stratum may hold for each time as
            much as was read, beyond the estimate. Lengths that were not seen may be there all the
            same; they are looked for where that costs least, and hoped for the less the more has
            been read in vain.
    """
    if not config.mixture.is_given:
        return _for_quotas(config, estimate)
    mixture = at_full_size(config.mixture)
    unknown = {source for (source, _), cells in estimate.items() if cells is None}
    needed = {s: _everything(BUCKETS) for s in estimate if s[0] in unknown}
    known = {s: cells for s, cells in estimate.items() if cells is not None and s[0] not in unknown}
    sources = {source: n for source, n in mixture.sources.items() if source not in unknown}
    # Where windows are cut from longer documents, or part of the table is unknown, lengths are no
    # constraint yet.
    if mixture.fixes_lengths and (unknown or config.short_overlong is ShortOverlong.split):
        mixture = replace(mixture, buckets=BucketTokens(), short_survival=1.0)
    return needed | _for_mixture(replace(mixture, sources=sources), known, done, hope or {})


def at_full_size(mixture: MixtureConfig) -> MixtureConfig:
    """The mixture with ``total_tokens`` worked into its numbers."""
    total = sum(mixture.sources.values())
    scale = 1.0 if mixture.total_tokens is None else mixture.total_tokens / total
    sources = {source: round(tokens * scale) for source, tokens in mixture.sources.items()}
    buckets = {bucket: round(tokens * scale) for bucket, tokens in vars(mixture.buckets).items()}
    return replace(mixture, sources=sources, buckets=BucketTokens(**buckets), total_tokens=None)


def _everything(buckets: Sequence[str]) -> Needed:
    return Needed(1.0, dict.fromkeys(buckets, math.inf))


def _for_quotas(config: PackConfig, estimate: Estimate) -> dict[Stratum, Needed]:
    """The same share of each stratum of a source, by its scarcest bucket."""
    needed: dict[Stratum, Needed] = {}
    for source in sorted({source for source, _ in estimate}):
        own = {s: cells for s, cells in estimate.items() if s[0] == source}
        wanted: dict[str, int | None] = dict(vars(config.quotas[source]))
        if not any(number != 0 for number in wanted.values()):
            needed |= {s: Needed(0.0, dict.fromkeys(wanted, 0.0)) for s in own}
        elif None in wanted.values() or None in own.values():
            needed |= {s: _everything(list(wanted)) for s in own}
        else:
            there = {s: _by_bucket([cells], list(wanted)) for s, cells in own.items() if cells}
            is_pooled = config.short_overlong is ShortOverlong.split
            needed |= _same_share({b: n or 0 for b, n in wanted.items()}, own, there, is_pooled)
    return needed


def _same_share(
    wanted: Mapping[str, int],
    strata: Mapping[Stratum, Cells | None],
    there: Mapping[Stratum, Mapping[str, float]],
    is_pooled: bool,
) -> dict[Stratum, Needed]:
    """Of every stratum the share that the scarcest bucket of their sum needs.

    A bucket that the scan saw nothing of decides nothing; all of it that is read is wanted.
    """
    total = {bucket: sum(cells[bucket] for cells in there.values()) for bucket in wanted}
    asked = {bucket: float(number) for bucket, number in wanted.items()}
    counted = {"all": sum(total.values())} if is_pooled else total
    needs = {"all": sum(asked.values())} if is_pooled else asked
    fractions = [needs[bucket] / counted[bucket] for bucket in counted if counted[bucket]]
    fraction = min(1.0, max(fractions, default=1.0))
    needed = {}
    for stratum in strata:
        cells = there.get(stratum, dict.fromkeys(wanted, 0.0))
        of_stratum = {
            b: n * cells[b] / total[b] if total[b] else (math.inf if n else 0.0)
            for b, n in asked.items()
        }
        needed[stratum] = Needed(fraction, of_stratum)
    return needed


def _by_bucket(cells: Sequence[Cells], buckets: Sequence[str]) -> dict[str, float]:
    """Sums over domains."""
    rows = [row for domains in cells for row in domains.values()]
    return {bucket: sum(row.get(bucket, 0.0) for row in rows) for bucket in buckets}


@dataclass(frozen=True)
class _Row:
    """A domain of a source, or a source."""

    source: str
    share: int  # which share of ``_Table.shares_V`` it depends on, -1: there is nothing of it
    there: Mapping[str, float]  # bucket -> tokens of the whole stratum
    hoped: Mapping[str, float]
    wanted: float
    price: float  # of a token that it lacks


@dataclass(frozen=True, eq=False)
class _Table:
    """What is wanted and what there is, by rows and buckets."""

    sources_R: list[str]
    shares_V: list[tuple[Stratum, ...]]  # strata that are read to the same share
    share_R: np.ndarray  # which of them a row depends on, -1: there is nothing of it
    supply_RC: np.ndarray  # tokens of the whole strata
    hoped_RC: np.ndarray  # as many, were all of them like the best that the unread part may be
    wanted_R: np.ndarray
    price_R: np.ndarray  # of a token that a row lacks
    wanted_C: np.ndarray  # all inf where lengths are no constraint
    cost_V: np.ndarray  # tokens of the strata


def _for_mixture(
    mixture: MixtureConfig,
    estimate: Mapping[Stratum, Cells],
    done: Mapping[Stratum, float],
    hope: Mapping[str, float],
) -> dict[Stratum, Needed]:
    if not estimate or not any(mixture.sources.values()):
        return {s: Needed(0.0, dict.fromkeys(BUCKETS, 0.0)) for s in estimate}
    table = _table(mixture, estimate, _hopeful(estimate, done, hope))
    least_V = np.array([min(done.get(s, 0.0) for s in own) for own in table.shares_V])
    fraction_V = _least_reading(table, mixture, least_V)
    fractions = {
        s: float(f) for own, f in zip(table.shares_V, fraction_V, strict=True) for s in own
    }
    read = {s: _scaled(cells, fractions[s]) for s, cells in estimate.items()}
    fitted = fit_mixture(_with_shares(mixture, by_source(estimate)), by_source(read))
    needed = {}
    for stratum, cells in read.items():
        of_source = by_source({s: c for s, c in read.items() if s[0] == stratum[0]})[stratum[0]]
        wanted: dict[str, float] = dict.fromkeys(BUCKETS, 0.0)
        for domain, row in cells.items():
            for bucket, tokens in row.items():
                taken = fitted.domains.get((stratum[0], domain))
                if taken is not None:
                    wanted[bucket] += taken[bucket]
                elif tokens:
                    total = sum(cell.get(bucket, 0.0) for cell in of_source.values())
                    wanted[bucket] += fitted.cells[stratum[0]][bucket] * tokens / total
        there = _by_bucket([cells], BUCKETS)
        unseen = {b: math.inf for b in _asked(mixture, stratum[0]) if not there[b]}
        needed[stratum] = Needed(fractions[stratum], wanted | unseen)
    return needed


def _asked(mixture: MixtureConfig, source: str) -> list[str]:
    """Buckets that a mixture wants anything of."""
    if not mixture.fixes_lengths:
        return [bucket for bucket in BUCKETS if bucket != "short" or mixture.short_survival]
    serves = mixture.only.get(source, BUCKETS)
    return [b for b in BUCKETS if b in serves and getattr(mixture.buckets, b)]


def by_source(estimate: Mapping[Stratum, Cells]) -> Supply:
    """Source -> domain -> bucket -> tokens, over all strata."""
    supply: dict[str, dict[str, dict[str, float]]] = {}
    for (source, _), cells in estimate.items():
        for domain, row in cells.items():
            own = supply.setdefault(source, {}).setdefault(domain, dict.fromkeys(row, 0.0))
            for bucket, tokens in row.items():
                own[bucket] = own.get(bucket, 0.0) + tokens
    return supply


def _hopeful(
    estimate: Mapping[Stratum, Cells], done: Mapping[Stratum, float], hope: Mapping[str, float]
) -> dict[Stratum, Cells]:
    """Estimates with what may be hoped for, where a stratum was read in part."""
    hopeful: dict[Stratum, Cells] = {}
    for stratum, cells in estimate.items():
        read = done.get(stratum, 0.0)
        share = 1 / (read * len(cells)) if read and cells else 0.0
        hopeful[stratum] = {
            d: {bucket: n + share * hope.get(bucket, 0.0) for bucket, n in row.items()}
            for d, row in cells.items()
        }
    return hopeful


def _scaled(cells: Cells, by: float) -> Cells:
    return {d: {bucket: n * by for bucket, n in row.items()} for d, row in cells.items()}


def _with_shares(mixture: MixtureConfig, supply: Supply) -> MixtureConfig:
    """With the shares of the domains in the whole corpus where none are given."""
    shares = {
        source: {domain: sum(row.values()) for domain, row in domains.items()}
        for source, domains in supply.items()
        if source not in mixture.domain_shares
    }
    return replace(mixture, domain_shares={**shares, **mixture.domain_shares})


def _table(
    mixture: MixtureConfig, estimate: Mapping[Stratum, Cells], hopeful: Mapping[Stratum, Cells]
) -> _Table:
    """Rows are domains, or sources where their mix is ignored."""
    as_sources = mixture.domain_mix is DomainMix.ignore and mixture.fixes_lengths
    supply, hoped = by_source(estimate), by_source(hopeful)
    shares_V: list[tuple[Stratum, ...]] = [(stratum,) for stratum in estimate]
    if as_sources:
        shares_V = [tuple(s for s in estimate if s[0] == source) for source in supply]
    rows: list[_Row] = []
    for source, tokens in mixture.sources.items():
        domains, may_be = supply.get(source, {}), hoped.get(source, {})
        if as_sources:
            share = next((v for v, own in enumerate(shares_V) if own[0][0] == source), -1)
            there, most = _by_bucket([domains], BUCKETS), _by_bucket([may_be], BUCKETS)
            rows.append(_Row(source, share, there, most, wanted=tokens, price=0.0))
            continue
        wanted = domain_tokens(mixture, source, tokens, domains)
        for domain in sorted({*wanted, *domains}):
            share, price = _share_of(source, domain, estimate)
            there, most = domains.get(domain, {}), may_be.get(domain, {})
            asked = wanted.get(domain, 0.0)
            rows.append(_Row(source, share, there, most, wanted=asked, price=price))
    wanted_C = np.array([float(getattr(mixture.buckets, bucket)) for bucket in BUCKETS])
    if not mixture.fixes_lengths:
        wanted_C = np.array([math.inf])
    whole = {s: sum(sum(row.values()) for row in cells.values()) for s, cells in estimate.items()}
    return _Table(
        sources_R=[row.source for row in rows],
        shares_V=shares_V,
        share_R=np.array([row.share for row in rows]),
        supply_RC=np.array([_useful(mixture, row.source, row.there) for row in rows]),
        hoped_RC=np.array([_useful(mixture, row.source, row.hoped) for row in rows]),
        wanted_R=np.array([row.wanted for row in rows], float),
        price_R=np.array([row.price for row in rows]),
        wanted_C=wanted_C,
        cost_V=np.array([sum(whole[s] for s in own) for own in shares_V]),
    )


def _useful(mixture: MixtureConfig, source: str, cells: Mapping[str, float]) -> list[float]:
    """What a mixture can use of a row: by bucket, or in all where lengths are no constraint."""
    if mixture.fixes_lengths:
        serves = mixture.only.get(source, BUCKETS)
        return [cells.get(bucket, 0.0) if bucket in serves else 0.0 for bucket in BUCKETS]
    # A domain keeps all longer documents and some short ones.
    short, *longer = (cells.get(bucket, 0.0) for bucket in BUCKETS)
    return [mixture.short_survival * short + sum(longer)]


def _share_of(source: str, domain: str, estimate: Mapping[Stratum, Cells]) -> tuple[int, float]:
    """Which stratum holds a domain, and the price of a token it lacks.

    Nothing is read for a domain of a stratum that holds several.
    """
    for number, stratum in enumerate(estimate):
        if stratum[0] == source and stratum[1] in (domain, None):
            return number, 0.0 if stratum[1] is None else MOST_READ_FOR_A_DOMAIN
    return -1, 0.0


def _given(table: _Table, least_V: np.ndarray) -> np.ndarray:
    """What the part that has been read holds beyond what is hoped of the rest, [R, C]; negative."""
    read_R = np.where(table.share_R >= 0, least_V[table.share_R], 0.0)
    return read_R[:, None] * (table.supply_RC - table.hoped_RC)


def _least_reading(table: _Table, mixture: MixtureConfig, least_V: np.ndarray) -> np.ndarray:
    """Share [V] of each stratum, at least ``least_V``."""
    scale = max(1.0, float(table.wanted_R.sum()))
    program = _LinearProgram()
    share_V = program.variables(table.cost_V / scale, least=least_V, most=1.0)
    cell_RC = program.variables(np.zeros_like(table.supply_RC))
    lack_R = program.variables(table.price_R)
    above_R = program.variables(np.zeros_like(table.wanted_R))
    lack_S = program.variables(np.full(len(mixture.sources), PRICE_OF_A_TOKEN))
    lack_C = program.variables(np.full(table.supply_RC.shape[1], PRICE_OF_A_TOKEN))
    given_RC = _given(table, least_V) / scale
    for r, c in np.ndindex(*table.supply_RC.shape):
        terms = [(int(cell_RC[r, c]), 1.0)]
        if table.share_R[r] >= 0:
            share, hoped = share_V[table.share_R[r]], table.hoped_RC[r, c]
            terms.append((int(share), -float(hoped) / scale))
        program.at_most(float(given_RC[r, c]), terms)
    for r, wanted in enumerate(table.wanted_R / scale):
        program.equals(wanted, [*_each(cell_RC[r]), (int(lack_R[r]), 1.0), (int(above_R[r]), -1.0)])
    for s, (source, tokens) in enumerate(mixture.sources.items()):
        own = [r for r, name in enumerate(table.sources_R) if name == source]
        program.equals(tokens / scale, [*_each(cell_RC[own].ravel()), (int(lack_S[s]), 1.0)])
    if np.isfinite(table.wanted_C).all():
        for c, wanted in enumerate(table.wanted_C / scale):
            program.equals(wanted, [*_each(cell_RC[:, c]), (int(lack_C[c]), 1.0)])
    return np.clip(program.solve()[share_V], least_V, 1.0)


def _each(variables: np.ndarray) -> list[tuple[int, float]]:
    return [(int(variable), 1.0) for variable in variables]


Terms = Sequence[tuple[int, float]]  # variables and their coefficients


class _LinearProgram:
    """Least total price, written down block by block and sum by sum."""

    def __init__(self) -> None:
        self._prices: list[float] = []
        self._bounds: list[tuple[float, float | None]] = []
        self._limits: list[tuple[float, Terms]] = []
        self._sums: list[tuple[float, Terms]] = []

    def variables(
        self, prices: np.ndarray, least: np.ndarray | float = 0.0, most: float | None = None
    ) -> np.ndarray:
        """Numbers of a new block of variables, in the shape of their prices."""
        first = len(self._prices)
        self._prices += prices.ravel().tolist()
        lows = np.broadcast_to(least, prices.shape).ravel().tolist()
        self._bounds += [(low, most) for low in lows]
        return first + np.arange(prices.size).reshape(prices.shape)

    def at_most(self, limit: float, terms: Terms) -> None:
        """The sum of ``terms`` is ``limit`` or less."""
        self._limits.append((limit, terms))

    def equals(self, total: float, terms: Terms) -> None:
        """The sum of ``terms`` is ``total``."""
        self._sums.append((total, terms))

    def solve(self) -> np.ndarray:
        """The value of every variable."""
        from scipy.optimize import linprog  # loads for a second

        found = linprog(
            self._prices,
            A_ub=self._matrix(self._limits),
            b_ub=[limit for limit, _ in self._limits],
            A_eq=self._matrix(self._sums),
            b_eq=[total for total, _ in self._sums],
            bounds=self._bounds,
            method="highs",
        )
        assert found.status == 0, found.message
        return found.x

    def _matrix(self, lines: Sequence[tuple[float, Terms]]) -> "coo_array":
        from scipy.sparse import coo_array

        entries = [(line, *term) for line, (_, terms) in enumerate(lines) for term in terms]
        rows, variables, values = zip(*entries, strict=True)
        return coo_array((values, (rows, variables)), shape=(len(lines), len(self._prices)))
