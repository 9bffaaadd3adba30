"""What a run wants of each source and length: quotas as they stand, or a mixture fitted to supply.

A mixture gives the margins of a table (tokens per source, tokens per bucket); the cells between
them are fitted to the measured supply. Inside a source, lengths change and the mix of its domains
stays [Fu et al. 2024, arXiv 2402.10171, "per-source upsampling"]. What cannot be met is reported,
never filled with something else silently.

Without binding caps the fit is iterative proportional fitting: the table nearest (in relative
entropy) to independence that has the wanted margins (Deming and Stephan 1940). Two things go beyond
it, because supply is finite:

- caps: no cell exceeds its supply; what a capped cell cannot take goes to the others in proportion,
  ``x_ij = min(cap_ij, a_i * b_j)``;
- margins that cannot be met: the sum of the table is as large as any table's (a maximum flow), and
  among the largest it is the one nearest to the wanted proportions. Nothing exceeds its margin.

The flow also tells which cells are the same in every largest table (those between different
components of the residual graph, see ``_flow_components``); holding them makes the scaling converge
linearly. Sums are float64.

Shape letters: R rows (sources or domains), C columns (buckets), N = R + C + 2 nodes of the flow
network.
"""

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_prep.config import (
    BUCKETS,
    QUOTA_BUCKETS,
    BucketQuota,
    DomainMix,
    MixtureConfig,
    PackConfig,
)
from data_prep.quotas import Demand
from data_prep.token_files import LengthBuckets
from longrope2.corpora.corpus import RETRIEVAL_SOURCE

# Relative to the sum of the margins: far below a token in 10^10, far above float64 rounding of such
# sums.
CLOSED = 1e-14  # an arc of the flow network with less left is full
TOLERANCE = 1e-12  # largest error of a margin
MAX_SWEEPS = 100_000
MET = 1e-9  # relative to the wanted amount: below this a margin counts as met
Cells = Mapping[str, Mapping[str, float]]  # row (source or domain) -> bucket -> tokens
Supply = Mapping[str, Cells]  # source -> domain -> bucket -> tokens


def fit_table(
    row_sums_R: np.ndarray,
    column_sums_C: np.ndarray,
    caps_RC: np.ndarray,
    wanted_RC: np.ndarray | None = None,
) -> np.ndarray:
    """The table that meets the margins as far as the caps allow.

    Args:
        row_sums_R: Wanted row sums, float64, finite, >= 0.
        column_sums_C: Wanted column sums, float64, finite, >= 0.
        caps_RC: Largest value of each cell, >= 0, ``inf`` where there is no limit.
        wanted_RC: Table whose proportions to keep near to, > 0 wherever the cap is; independence if
            not given.

    Returns:
        Shape [R, C], float64: cells in [0, cap], row and column sums at most the wanted ones, equal
        to them (to 1e-12 of their total) whenever a table within the caps has them.
    """
    total = max(float(row_sums_R.sum()), float(column_sums_C.sum()))
    if total == 0.0:
        return np.zeros_like(caps_RC, dtype=np.float64)
    rows_R, columns_C = row_sums_R / total, column_sums_C / total
    caps_RC = np.minimum(caps_RC / total, np.minimum.outer(rows_R, columns_C))
    flow_RC, component_N = _flow_components(rows_R, columns_C, caps_RC)
    weights_RC = np.outer(rows_R, columns_C) if wanted_RC is None else wanted_RC / total
    component_R, component_C = np.split(component_N[1:-1], [len(rows_R)])
    free_RC = component_R[:, None] == component_C[None, :]
    fixed_RC = np.where(free_RC, 0.0, flow_RC)
    # A row in the component of the flow's source may fall short of its margin (and a column in the
    # sink's): the fit decides how far. Any other has the sum the flow gave it.
    loose_R, loose_C = component_R == component_N[0], component_C == component_N[-1]
    return total * _scale(
        caps_RC=np.where(free_RC, caps_RC, 0.0),
        weights_RC=np.where(free_RC, weights_RC, 0.0),
        fixed_RC=fixed_RC,
        rows_R=np.where(loose_R, rows_R, flow_RC.sum(1)) - fixed_RC.sum(1),
        columns_C=np.where(loose_C, columns_C, flow_RC.sum(0)) - fixed_RC.sum(0),
        loose_R=loose_R,
        loose_C=loose_C,
    )


def share_out(total: float, weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """Share ``total`` in proportion to weights, none above its cap; the caps where all bind."""
    return np.minimum(caps, _common_scale(total, weights, caps) * weights)


def _scale(
    *,
    caps_RC: np.ndarray,
    weights_RC: np.ndarray,
    fixed_RC: np.ndarray,
    rows_R: np.ndarray,
    columns_C: np.ndarray,
    loose_R: np.ndarray,
    loose_C: np.ndarray,
) -> np.ndarray:
    """Scale rows and columns of the free cells in turn; loose margins are upper limits only."""
    a_R, b_C = np.ones(len(rows_R)), np.ones(len(columns_C))
    for _ in range(MAX_SWEEPS):
        for i in range(len(a_R)):
            a_R[i] = _next_scale(rows_R[i], weights_RC[i] * b_C, caps_RC[i], loose_R[i])
        for j in range(len(b_C)):
            b_C[j] = _next_scale(columns_C[j], weights_RC[:, j] * a_R, caps_RC[:, j], loose_C[j])
        table_RC = np.minimum(caps_RC, weights_RC * np.outer(a_R, b_C))
        error_R = table_RC.sum(1) - rows_R
        unscaled_R = loose_R & (a_R == 1.0)
        if np.abs(np.where(unscaled_R, np.maximum(error_R, 0.0), error_R)).max() < TOLERANCE:
            return table_RC + fixed_RC
    raise AssertionError(f"no convergence: rows {rows_R}, columns {columns_C}, caps {caps_RC}")


def _next_scale(total: float, weights: np.ndarray, caps: np.ndarray, loose: bool) -> float:
    """Scale of one row or column; a loose one stays as it is while it keeps below its margin."""
    if loose and np.minimum(caps, weights).sum() <= total:
        return 1.0
    return _common_scale(total, weights, caps)


def _common_scale(total: float, weights: np.ndarray, caps: np.ndarray) -> float:
    """The a with sum(min(caps, a * weights)) = total; enough for all caps if they sum to less."""
    used = weights > 0.0
    weights, caps = weights[used], caps[used]
    if len(weights) == 0 or total <= 0.0:
        return 0.0
    order = np.argsort(caps / weights)
    weights, caps = weights[order], caps[order]
    capped_before = np.concatenate([[0.0], np.cumsum(caps)[:-1]])
    weight_left = np.cumsum(weights[::-1])[::-1]
    scales = (total - capped_before) / weight_left  # if exactly the first k cells were capped
    fits = np.flatnonzero(scales <= caps / weights)
    return float(scales[fits[0]]) if len(fits) else float((caps / weights)[-1])


def _flow_components(
    rows_R: np.ndarray, columns_C: np.ndarray, caps_RC: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A largest table [R, C], and the component [N] of every node of its residual graph.

    Nodes: the flow's source, a node per row, a node per column, the sink. Between nodes of one
    (strongly connected) component flow can be moved around without changing the total, so a cell
    between two components has the same value in every largest table with these sums.
    """
    num_rows, num_nodes = len(rows_R), len(rows_R) + len(columns_C) + 2
    left_NN = np.zeros((num_nodes, num_nodes))
    left_NN[0, 1 : 1 + num_rows] = rows_R
    left_NN[1 : 1 + num_rows, 1 + num_rows : -1] = caps_RC
    left_NN[1 + num_rows : -1, -1] = columns_C
    while (path := _shortest_path(left_NN > CLOSED)) is not None:
        amount = left_NN[path[:-1], path[1:]].min()
        left_NN[path[:-1], path[1:]] -= amount
        left_NN[path[1:], path[:-1]] += amount
    reach_NN = (left_NN > CLOSED) | np.eye(num_nodes, dtype=bool)
    for node in range(num_nodes):  # Warshall
        reach_NN |= np.outer(reach_NN[:, node], reach_NN[node])
    flow_RC = left_NN[1 + num_rows : -1, 1 : 1 + num_rows].T.copy()
    return flow_RC, np.argmax(reach_NN & reach_NN.T, axis=1)


def _shortest_path(open_NN: np.ndarray) -> list[int] | None:
    """Nodes of a shortest path from the first node to the last, breadth first."""
    last = len(open_NN) - 1
    parent = {0: -1}
    queue = deque([0])
    while queue and last not in parent:
        node = queue.popleft()
        for following in np.flatnonzero(open_NN[node]).tolist():
            if following not in parent:
                parent[following] = node
                queue.append(following)
    if last not in parent:
        return None
    path = [last]
    while parent[path[-1]] != -1:
        path.append(parent[path[-1]])
    return path[::-1]


@dataclass(frozen=True)
class Margins:
    """Wanted sums of a table, in tokens."""

    rows: Mapping[str, float]  # row (source or domain) -> tokens
    columns: Mapping[str, float]  # bucket -> tokens
    # Row -> the buckets it may serve; rows that are not named may serve all.
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shortfall:
    """Something a mixture wants more of than there is."""

    # ``source`` and ``bucket``: a margin, the run gets fewer tokens. ``cell`` and ``domain``: the
    # proportions without limits of supply; what is missing was taken elsewhere where possible.
    kind: str
    name: str  # ``starcoder``, ``long``, ``starcoder/long``, ``redpajama_v1/arxiv``
    wanted_tokens: float
    fitted_tokens: float

    def __str__(self) -> str:
        fitted, wanted = self.fitted_tokens, self.wanted_tokens
        return f"{self.kind} {self.name}: {fitted:,.0f} of {wanted:,.0f} tokens"


@dataclass(frozen=True)
class FittedMixture:
    """What to take."""

    cells: dict[str, dict[str, float]]  # row -> bucket -> tokens, never above the supply
    shortfalls: tuple[Shortfall, ...]
    # (Source, domain) -> bucket -> tokens; empty where sources are not divided.
    domains: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)


def fit_margins(margins: Margins, supply: Cells) -> FittedMixture:
    """Fit the table (rows x buckets) that has the margins, within the supply.

    A missing entry of ``supply`` means no tokens, ``inf`` means no limit.

    Returns:
        Cells within the supply. The margins are met to 1e-9 of their total whenever some table
        within the supply has them; otherwise the table is as large as the supply allows and nearest
        to the wanted proportions.
    """
    names, buckets = list(margins.rows), list(margins.columns)
    rows_R = np.array([margins.rows[name] for name in names], dtype=np.float64)
    columns_C = np.array([margins.columns[bucket] for bucket in buckets], dtype=np.float64)
    allowed_RC, supply_RC = np.zeros((2, len(names), len(buckets)))
    for i, name in enumerate(names):
        allowed_RC[i] = [bucket in margins.only.get(name, buckets) for bucket in buckets]
        supply_RC[i] = [supply.get(name, {}).get(bucket, 0.0) for bucket in buckets]
    ideal_RC = fit_table(rows_R, columns_C, np.where(allowed_RC, np.inf, 0.0))
    table_RC = fit_table(rows_R, columns_C, np.where(ideal_RC > 0.0, supply_RC, 0.0), ideal_RC)
    table = zip(names, table_RC.tolist(), strict=True)
    cells = {name: dict(zip(buckets, row, strict=True)) for name, row in table}
    short_of = [("source", name, rows_R[i], table_RC[i].sum()) for i, name in enumerate(names)]
    short_of += [("bucket", b, columns_C[j], table_RC[:, j].sum()) for j, b in enumerate(buckets)]
    short_of += [
        ("cell", f"{name}/{bucket}", ideal_RC[i, j], table_RC[i, j])
        for i, name in enumerate(names)
        for j, bucket in enumerate(buckets)
        if table_RC[i, j] >= supply_RC[i, j] * (1 - MET)
    ]
    return FittedMixture(cells, _unmet(short_of))


def fit_mixture(
    mixture: MixtureConfig, supply: Supply, read: Supply | None = None
) -> FittedMixture:
    """Fit a mixture without faults to the supply: sources x buckets, then every source's domains.

    Args:
        mixture: What is wanted.
        supply: What can be packed.
        read: What was read of the corpus, where the supply is only a part of that: the share of the
            short documents that stays (``short_survival``) is one of all that were read.

    Returns:
        Cells per source, and per domain where the mix of domains is kept or the lengths are left to
        ``short_survival``. The cells of a source are the sums over its domains.
    """
    total = sum(mixture.sources.values())
    scale = 1.0 if mixture.total_tokens is None else mixture.total_tokens / total
    sources = {source: tokens * scale for source, tokens in mixture.sources.items()}
    if not mixture.fixes_lengths:
        return _thin_short_documents(mixture, sources, supply, read or supply)
    buckets = {bucket: getattr(mixture.buckets, bucket) * scale for bucket in BUCKETS}
    by_source = {source: _sum_of(supply.get(source, {})) for source in sources}
    fitted = fit_margins(Margins(sources, buckets, mixture.only), by_source)
    if mixture.domain_mix is DomainMix.ignore:
        return fitted
    domains: dict[tuple[str, str], dict[str, float]] = {}
    short_of: list[tuple[str, str, float, float]] = []
    for source, cells in fitted.cells.items():
        wanted = domain_tokens(mixture, source, sum(cells.values()), supply.get(source, {}))
        divided = _divide_source(wanted, cells, supply.get(source, {}))
        for domain, tokens in wanted.items():
            domains[source, domain] = divided[domain]
            short_of.append(("domain", f"{source}/{domain}", tokens, sum(divided[domain].values())))
    return FittedMixture(fitted.cells, (*fitted.shortfalls, *_unmet(short_of)), domains)


def _sum_of(rows: Cells) -> dict[str, float]:
    return {bucket: sum(cells.get(bucket, 0.0) for cells in rows.values()) for bucket in BUCKETS}


def _divide_source(
    wanted: Mapping[str, float], cells: Mapping[str, float], supply: Cells
) -> dict[str, dict[str, float]]:
    """Divide the cells of a source among its domains: their mix first, then whoever has more.

    The tokens of a source come before the mix of its domains: what the domains with the right
    shares cannot give of a bucket is taken from the supply that is left, in proportion to it.
    """
    divided = fit_margins(Margins(wanted, cells), supply).cells
    for bucket, tokens in cells.items():
        missing = tokens - sum(divided[domain][bucket] for domain in wanted)
        there = {domain: supply.get(domain, {}).get(bucket, 0.0) for domain in wanted}
        left = np.array([max(0.0, there[domain] - divided[domain][bucket]) for domain in wanted])
        for domain, more in zip(wanted, share_out(missing, left, left).tolist(), strict=True):
            divided[domain][bucket] += more
    return divided


def _thin_short_documents(
    mixture: MixtureConfig, sources: Mapping[str, float], supply: Supply, read: Supply
) -> FittedMixture:
    """Fu et al.'s rule: a domain spends its share on all longer and some short documents.

    Their code estimates lengths from characters and puts the edge at 4,096 tokens; here the edge is
    L0, and a domain that runs out is reported.
    """
    domains: dict[tuple[str, str], dict[str, float]] = {}
    cells: dict[str, dict[str, float]] = {}
    of_sources: list[tuple[str, str, float, float]] = []
    of_domains: list[tuple[str, str, float, float]] = []
    survival = {bucket: mixture.short_survival if bucket == "short" else 1.0 for bucket in BUCKETS}
    for source, tokens in sources.items():
        there, divided = supply.get(source, {}), {}
        for domain, wanted in domain_tokens(mixture, source, tokens, there).items():
            seen = read.get(source, {}).get(domain, {})
            kept = np.array([seen.get(b, 0.0) * survival[b] for b in BUCKETS])
            most = np.array([there.get(domain, {}).get(b, 0.0) for b in BUCKETS])
            shared = share_out(wanted, kept, np.minimum(kept, most))
            divided[domain] = dict(zip(BUCKETS, shared.tolist(), strict=True))
            domains[source, domain] = divided[domain]
            of_domains.append(("domain", f"{source}/{domain}", wanted, float(shared.sum())))
        cells[source] = _sum_of(divided)
        of_sources.append(("source", source, tokens, sum(cells[source].values())))
    return FittedMixture(cells, _unmet([*of_sources, *of_domains]), domains)


def domain_tokens(
    mixture: MixtureConfig, source: str, tokens: float, supply: Cells
) -> dict[str, float]:
    """Tokens wanted of every domain of a source, by the stated shares or those of the supply."""
    shares = mixture.domain_shares.get(source) or {d: sum(c.values()) for d, c in supply.items()}
    total = sum(shares.values())
    return {d: tokens * share / total if total else 0.0 for d, share in sorted(shares.items())}


def _unmet(wanted_and_fitted: Sequence[tuple[str, str, float, float]]) -> tuple[Shortfall, ...]:
    """Those that stay below what was wanted by more than rounding."""
    return tuple(
        Shortfall(kind, name, float(wanted), float(fitted))
        for kind, name, wanted, fitted in wanted_and_fitted
        if fitted < wanted - MET * max(1.0, wanted)
    )


@dataclass(frozen=True)
class FittedDemand:
    """What is wanted, given what there is."""

    demand: Demand
    # What stays below the mixture, in words; quotas report theirs after the choice.
    shortfalls: tuple[str, ...]


def length_buckets(config: PackConfig) -> LengthBuckets:
    """Buckets of the mixture; with quotas: up to L0, and longer."""
    original_len, mixture = config.model.original_len, config.mixture
    if mixture.is_given:
        return LengthBuckets(BUCKETS, (original_len, mixture.mid_limit, mixture.long_limit))
    return LengthBuckets(QUOTA_BUCKETS, (original_len, config.documents.max_tokens))


def wanted_sources(config: PackConfig) -> list[str]:
    """Sources of the corpus that the mixture or the quotas name, without generated documents."""
    names = config.mixture.sources if config.mixture.is_given else config.quotas
    return sorted(source for source in names if source != RETRIEVAL_SOURCE)


def demand_of(
    config: PackConfig,
    supply: Supply,
    natural: Supply,
    read: Supply | None = None,
    divided: Collection[str] = (),
) -> FittedDemand:
    """Demand for a measured or estimated supply of tokens that can be packed.

    Args:
        config: What is wanted.
        supply: Tokens that can be packed.
        natural: Tokens of the whole corpus: what "keep the mix of domains" means.
        read: Tokens of what was read, whether they were tokenized or not; None: the supply.
        divided: Sources of which quotas are divided among domains as the corpus is: those that are
            read in part, and of one domain more than of another.
    """
    generated: dict[tuple[str, str], int | None] = {}
    if config.retrieval_tokens:  # all that were generated are packed
        generated = {(RETRIEVAL_SOURCE, b): None for b in (*BUCKETS, *QUOTA_BUCKETS)}
    if not config.mixture.is_given:
        cells = {(s, b): getattr(q, b) for s, q in config.quotas.items() for b in QUOTA_BUCKETS}
        shares = {
            (source, domain): row
            for source in divided
            for domain, row in _natural_mix(config.quotas[source], natural.get(source, {})).items()
        }
        return FittedDemand(Demand(cells | generated, shares), ())
    fitted = fit_mixture(_with_natural_shares(config.mixture, natural), supply, read)
    cells = {
        (source, bucket): math.ceil(tokens)
        for source, row in fitted.cells.items()
        for bucket, tokens in row.items()
    }
    shortfalls = tuple(map(str, fitted.shortfalls))
    return FittedDemand(Demand(cells | generated, fitted.domains), shortfalls)


def _natural_mix(quota: BucketQuota, natural: Cells) -> dict[str, dict[str, float]]:
    """Domain -> bucket -> tokens of a quota, as the corpus has them."""
    mix: dict[str, dict[str, float]] = {domain: {} for domain in natural}
    for bucket, tokens in vars(quota).items():
        total = sum(row.get(bucket, 0.0) for row in natural.values())
        if tokens is not None and total:
            for domain, row in natural.items():
                mix[domain][bucket] = tokens * row.get(bucket, 0.0) / total
    return mix


def _with_natural_shares(mixture: MixtureConfig, natural: Supply) -> MixtureConfig:
    """The mixture with the corpus' own mix of domains for the sources that state none."""
    shares = {
        source: {domain: sum(cells.values()) for domain, cells in natural[source].items()}
        for source in mixture.sources
        if source not in mixture.domain_shares and natural.get(source)
    }
    return replace(mixture, domain_shares={**shares, **mixture.domain_shares})
