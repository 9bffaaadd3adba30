"""What a run wants of each source and length: from quotas as they stand, or from a plan fitted to
the supply.

A table with given row and column sums under caps: what a plan wants of every (source, bucket) from
what there is.

Without binding caps the answer is iterative proportional fitting: the table nearest (in relative
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

Fit a plan to the documents there are: tokens per source and per length bucket -> tokens of every
cell.

The plan gives the margins (``plan_config.py``); the table between them is fitted to the measured
supply (``fitting.py``). Inside a source, lengths change and the mix of its domains stays [Fu et al.
2024, arXiv 2402.10171, "per-source upsampling"]. What cannot be met is reported, never filled with
something else silently.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_prep.config import PackConfig
from data_prep.quotas import Demand
from data_prep.token_files import LengthBuckets
from longrope2.corpora.config import BUCKETS, BucketQuota, CorpusConfig, DomainMix, PlanConfig
from longrope2.corpora.corpus import RETRIEVAL_SOURCE

# Relative to the sum of the margins: far below a token in 10^10, far above float64 rounding of such
# sums.
CLOSED = 1e-14  # an arc of the flow network with less left is full
TOLERANCE = 1e-12  # largest error of a margin
MAX_SWEEPS = 100_000
# Relative to the wanted amount: below this a margin counts as met.
MET = 1e-9
QUOTA_BUCKETS = ("short", "long")
Supply = Mapping[str, Mapping[str, Mapping[str, float]]]


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
    num_rows = len(rows_R)
    row_component_R, column_component_C = (
        component_N[1 : 1 + num_rows],
        component_N[1 + num_rows : -1],
    )
    free_RC = row_component_R[:, None] == column_component_C[None, :]
    fixed_RC = np.where(free_RC, 0.0, flow_RC)
    # A row in the component of the flow's source may fall short of its margin; any other has the
    # sum the flow gave it.
    return total * _scale(
        np.where(free_RC, caps_RC, 0.0),
        np.where(free_RC, weights_RC, 0.0),
        fixed_RC,
        _targets(rows_R, flow_RC.sum(1), row_component_R == component_N[0]) - fixed_RC.sum(1),
        _targets(columns_C, flow_RC.sum(0), column_component_C == component_N[-1])
        - fixed_RC.sum(0),
        row_component_R == component_N[0],
        column_component_C == component_N[-1],
    )


def share_out(total: float, weights: np.ndarray, caps: np.ndarray) -> np.ndarray:
    """Share ``total`` among cells in proportion to their weights, none above its cap; the caps where all bind."""
    scale = _common_scale(total, weights, caps)
    return np.minimum(caps, scale * weights)


def _targets(margins: np.ndarray, reached: np.ndarray, may_fall_short: np.ndarray) -> np.ndarray:
    """Sums to aim at: the margin itself where the fit decides how far to stay below, else what the flow reached."""
    return np.where(may_fall_short, margins, reached)


def _scale(
    caps_RC: np.ndarray,
    weights_RC: np.ndarray,
    fixed_RC: np.ndarray,
    rows_R: np.ndarray,
    columns_C: np.ndarray,
    loose_R: np.ndarray,
    loose_C: np.ndarray,
) -> np.ndarray:
    """Alternate row and column scaling of the free cells; loose margins are upper limits, scaled down but never up."""
    a_R, b_C = np.ones(len(rows_R)), np.ones(len(columns_C))
    for _ in range(MAX_SWEEPS):
        for i in range(len(a_R)):
            a_R[i] = _next_scale(rows_R[i], weights_RC[i] * b_C, caps_RC[i], loose=loose_R[i])
        for j in range(len(b_C)):
            b_C[j] = _next_scale(
                columns_C[j], weights_RC[:, j] * a_R, caps_RC[:, j], loose=loose_C[j]
            )
        table_RC = np.minimum(caps_RC, weights_RC * np.outer(a_R, b_C))
        error_R = table_RC.sum(1) - rows_R
        unscaled_R = loose_R & (a_R == 1.0)
        if np.abs(np.where(unscaled_R, np.maximum(error_R, 0.0), error_R)).max() < TOLERANCE:
            return table_RC + fixed_RC
    raise AssertionError(
        f"the scaling did not converge: rows {rows_R}, columns {columns_C}, caps {caps_RC}"
    )


def _next_scale(total: float, weights: np.ndarray, caps: np.ndarray, *, loose: bool) -> float:
    """Scale of one row or column; a loose one stays as it is while it keeps below its margin."""
    if loose and np.minimum(caps, weights).sum() <= total:
        return 1.0
    return _common_scale(total, weights, caps)


def _common_scale(total: float, weights: np.ndarray, caps: np.ndarray) -> float:
    """The a with sum(min(caps, a * weights)) = total; large enough for all caps when they sum to less."""
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
    """A largest table, and the strongly connected component of every node of its residual graph.

    Nodes: the flow's source, a node per row, a node per column, the sink. Between nodes of one
    component flow can be moved around without changing the total, so a cell between two components
    has the same value in every largest table with these sums.

    Returns:
        The table [R, C] and component numbers [N].
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
    return left_NN[1 + num_rows : -1, 1 : 1 + num_rows].T.copy(), np.argmax(
        reach_NN & reach_NN.T, axis=1
    )


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
    """Wanted sums of a table.

    Attributes:
        rows: Row (source or domain) -> tokens.
        columns: Bucket -> tokens.
        only: Row -> the buckets it may serve; rows that are not named may serve all.
    """

    rows: Mapping[str, float]
    columns: Mapping[str, float]
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shortfall:
    """Something a plan wants more of than there is.

    Attributes:
        kind: ``source`` and ``bucket``: a margin, the run gets fewer tokens. ``cell`` and
            ``domain``: the proportions the plan has without limits of supply; what is missing here
            was taken elsewhere as far as possible.
        name: ``starcoder``, ``long``, ``starcoder/long``, ``redpajama_v1/arxiv``.
        wanted_tokens: Tokens wanted.
        fitted_tokens: Tokens planned.
    """

    kind: str
    name: str
    wanted_tokens: float
    fitted_tokens: float

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.fitted_tokens:,.0f} of {self.wanted_tokens:,.0f} tokens"


@dataclass(frozen=True)
class FittedPlan:
    """What to take.

    Attributes:
        cells: Row -> bucket -> tokens, float64, never above the supply.
        shortfalls: Everything that stays below what was wanted.
        domains: (Source, domain) -> bucket -> tokens; empty where the plan does not divide sources.
    """

    cells: dict[str, dict[str, float]]
    shortfalls: tuple[Shortfall, ...]
    domains: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)


def fit_quotas(margins: Margins, supply: Mapping[str, Mapping[str, float]]) -> FittedPlan:
    """Fit the table (rows x buckets) that has the margins, within the supply.

    Args:
        margins: Wanted sums, tokens.
        supply: Row -> bucket -> tokens there are; a missing entry means none, ``inf`` means no
            limit.

    Returns:
        Cells within the supply. The margins are met to 1e-9 of their total whenever some table
        within the supply has them; otherwise the table is as large as the supply allows and nearest
        to the wanted proportions.
    """
    names, buckets = list(margins.rows), list(margins.columns)
    rows_R = np.array([margins.rows[name] for name in names], dtype=np.float64)
    columns_C = np.array([margins.columns[bucket] for bucket in buckets], dtype=np.float64)
    allowed_RC = np.array(
        [[bucket in margins.only.get(name, buckets) for bucket in buckets] for name in names]
    )
    supply_RC = np.array(
        [[supply.get(name, {}).get(bucket, 0.0) for bucket in buckets] for name in names]
    )
    ideal_RC = fit_table(rows_R, columns_C, np.where(allowed_RC, np.inf, 0.0))
    table_RC = fit_table(rows_R, columns_C, np.where(ideal_RC > 0.0, supply_RC, 0.0), ideal_RC)
    cells = {
        name: dict(zip(buckets, row.tolist(), strict=True))
        for name, row in zip(names, table_RC, strict=True)
    }
    short_of = [("source", name, rows_R[i], table_RC[i].sum()) for i, name in enumerate(names)]
    short_of += [
        ("bucket", bucket, columns_C[j], table_RC[:, j].sum()) for j, bucket in enumerate(buckets)
    ]
    short_of += [
        ("cell", f"{name}/{bucket}", ideal_RC[i, j], table_RC[i, j])
        for i, name in enumerate(names)
        for j, bucket in enumerate(buckets)
        if table_RC[i, j] >= supply_RC[i, j] * (1 - MET)
    ]
    return FittedPlan(cells, _unmet(short_of))


def fit_plan(
    plan: PlanConfig, supply: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> FittedPlan:
    """Fit a plan to the supply: sources x buckets first, then the domains of every source.

    Args:
        plan: The plan, without faults.
        supply: Source -> domain -> bucket -> tokens measured (or estimated from a sample).

    Returns:
        Cells per source, and per domain where the plan keeps the mix of domains or leaves the
        lengths to ``short_survival``. The cells of a source are the sums over its domains.
    """
    scale = 1.0 if plan.total_tokens is None else plan.total_tokens / sum(plan.sources.values())
    sources = {source: tokens * scale for source, tokens in plan.sources.items()}
    if not plan.fixes_lengths:
        return _thin_short_documents(plan, sources, supply)
    buckets = {bucket: getattr(plan.buckets, bucket) * scale for bucket in BUCKETS}
    by_source = {
        s: {b: sum(cells.get(b, 0.0) for cells in supply.get(s, {}).values()) for b in BUCKETS}
        for s in sources
    }
    fitted = fit_quotas(Margins(sources, buckets, plan.only), by_source)
    if plan.domain_mix is DomainMix.ignore:
        return fitted
    domains: dict[tuple[str, str], dict[str, float]] = {}
    shortfalls = list(fitted.shortfalls)
    for source, cells in fitted.cells.items():
        wanted = _domain_tokens(plan, source, sum(cells.values()), supply.get(source, {}))
        divided = _divide_source(wanted, cells, supply.get(source, {}))
        domains |= {(source, domain): tokens for domain, tokens in divided.items()}
        shortfalls += _unmet(
            [("domain", f"{source}/{d}", t, sum(divided[d].values())) for d, t in wanted.items()]
        )
    return FittedPlan(fitted.cells, tuple(shortfalls), domains)


def _divide_source(
    wanted: Mapping[str, float],
    cells: Mapping[str, float],
    supply: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Divide the cells of a source among its domains: their mix first, then whoever has more of a
    bucket.

    The tokens of a source come before the mix of its domains: what the domains with the right
    shares cannot give of a bucket is taken from the supply that is left, in proportion to it.
    """
    divided = fit_quotas(Margins(wanted, cells), supply).cells
    for bucket, tokens in cells.items():
        left = np.array(
            [
                max(0.0, supply.get(domain, {}).get(bucket, 0.0) - divided[domain][bucket])
                for domain in wanted
            ]
        )
        missing = tokens - sum(divided[domain][bucket] for domain in wanted)
        for domain, more in zip(wanted, share_out(missing, left, left).tolist(), strict=True):
            divided[domain][bucket] += more
    return divided


def _thin_short_documents(
    plan: PlanConfig,
    sources: Mapping[str, float],
    supply: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> FittedPlan:
    """Fu et al.'s rule: every domain spends its share of the tokens on all longer and some short
    documents.

    Their code estimates lengths from characters and puts the edge at 4,096 tokens; here the edge is
    L0, and a domain that runs out is reported.
    """
    domains: dict[tuple[str, str], dict[str, float]] = {}
    short_of = []
    for source, tokens in sources.items():
        for domain, wanted in _domain_tokens(plan, source, tokens, supply.get(source, {})).items():
            there = supply.get(source, {}).get(domain, {})
            kept = np.array(
                [
                    there.get(b, 0.0) * (plan.short_survival if b == "short" else 1.0)
                    for b in BUCKETS
                ]
            )
            cells = share_out(wanted, kept, kept)
            domains[source, domain] = dict(zip(BUCKETS, cells.tolist(), strict=True))
            short_of.append(("domain", f"{source}/{domain}", wanted, float(cells.sum())))
    cells = {
        s: {b: sum(t[b] for (source, _), t in domains.items() if source == s) for b in BUCKETS}
        for s in sources
    }
    short_of = [
        ("source", s, tokens, sum(cells[s].values())) for s, tokens in sources.items()
    ] + short_of
    return FittedPlan(cells, _unmet(short_of), domains)


def _domain_tokens(
    plan: PlanConfig, source: str, tokens: float, supply: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Tokens wanted of every domain of a source: by the plan's shares, else by the shares of the supply."""
    shares = plan.domain_shares.get(source) or {
        d: sum(cells.values()) for d, cells in supply.items()
    }
    total = sum(shares.values())
    return {
        domain: tokens * share / total if total else 0.0 for domain, share in sorted(shares.items())
    }


def _unmet(wanted_and_fitted: Sequence[tuple[str, str, float, float]]) -> tuple[Shortfall, ...]:
    """Those that stay below what was wanted by more than rounding."""
    return tuple(
        Shortfall(kind, name, float(wanted), float(fitted))
        for kind, name, wanted, fitted in wanted_and_fitted
        if fitted < wanted - MET * max(1.0, wanted)
    )


@dataclass(frozen=True)
class FittedDemand:
    """What is wanted, given what there is.

    Attributes:
        demand: Tokens per cell.
        missing: Source -> bucket -> tokens wanted over tokens there (above 1), where reading more
            may help.
        shortfalls: What stays below the plan, in words; quotas report theirs after the choice.
    """

    demand: Demand
    missing: dict[str, dict[str, float]]
    shortfalls: tuple[str, ...]


def length_buckets(config: "PackConfig") -> LengthBuckets:
    """Buckets of the plan; with quotas: up to L0, and longer."""
    plan = config.corpus.plan
    if not plan.is_given:
        return LengthBuckets(
            QUOTA_BUCKETS, (config.model.original_len, config.documents.max_tokens)
        )
    return LengthBuckets(BUCKETS, (config.model.original_len, plan.mid_limit, plan.long_limit))


def wanted_sources(corpus: CorpusConfig) -> list[str]:
    """Sources of the corpus that the plan or the quotas name, without generated documents."""
    names = corpus.plan.sources if corpus.plan.is_given else corpus.quotas
    return sorted(source for source in names if source != RETRIEVAL_SOURCE)


def demand_of(corpus: CorpusConfig, supply: Supply, natural: Supply) -> FittedDemand:
    """Demand for a measured or estimated supply.

    Args:
        corpus: Quotas or plan.
        supply: Source -> domain -> bucket -> tokens that can be packed.
        natural: The same as the corpus has it, before a part of it was left unread: what "keep the
            mix of domains" means.
    """
    quota = corpus.quotas.get(RETRIEVAL_SOURCE, BucketQuota())
    generated = {
        (RETRIEVAL_SOURCE, b): None for b in (*BUCKETS, *QUOTA_BUCKETS) if quota.short or quota.long
    }
    if not corpus.plan.is_given:
        cells = {
            (source, bucket): getattr(quota, bucket)
            for source, quota in corpus.quotas.items()
            for bucket in QUOTA_BUCKETS
        }
        return FittedDemand(Demand(cells | generated), {}, ())
    fitted = fit_plan(_with_natural_shares(corpus.plan, natural), supply)
    cells = {
        (source, b): math.ceil(tokens)
        for source, row in fitted.cells.items()
        for b, tokens in row.items()
    }
    shortfalls = tuple(map(str, fitted.shortfalls))
    return FittedDemand(
        Demand(cells | generated, fitted.domains),
        _missing(fitted, corpus.plan.fixes_lengths),
        shortfalls,
    )


def _missing(fitted: FittedPlan, has_buckets: bool) -> dict[str, dict[str, float]]:
    """Cells below their proportion while a source or a bucket as a whole stays short."""
    if not any(shortfall.kind in ("source", "bucket") for shortfall in fitted.shortfalls):
        return {}
    missing: dict[str, dict[str, float]] = {}
    for shortfall in fitted.shortfalls:
        ratio = shortfall.wanted_tokens / max(1.0, shortfall.fitted_tokens)
        if shortfall.kind == "cell":
            source, _, bucket = shortfall.name.rpartition("/")
            missing.setdefault(source, {})[bucket] = ratio
        elif shortfall.kind == "source" and not has_buckets:
            missing[shortfall.name] = dict.fromkeys(BUCKETS, ratio)
    return missing


def _with_natural_shares(plan: PlanConfig, natural: Supply) -> PlanConfig:
    """The plan with the corpus' own mix of domains for the sources that state none."""
    shares = {
        source: {domain: sum(cells.values()) for domain, cells in natural[source].items()}
        for source in plan.sources
        if source not in plan.domain_shares and natural.get(source)
    }
    return replace(plan, domain_shares={**shares, **plan.domain_shares})
