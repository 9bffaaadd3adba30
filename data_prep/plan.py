"""Fit a plan to the documents there are: tokens per source and per length bucket -> tokens of every cell.

The plan gives the margins (``plan_config.py``); the table between them is fitted to the measured supply (``fitting.py``).
Inside a source, lengths change and the mix of its domains stays [Fu et al. 2024, arXiv 2402.10171, "per-source
upsampling"]. What cannot be met is reported, never filled with something else silently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.fitting import fit_table, share_out
from data_prep.plan_config import BUCKETS, DomainMix, PlanConfig

__all__ = ["BUCKETS", "FittedPlan", "Margins", "Shortfall", "fit_plan", "fit_quotas"]


# Relative to the wanted amount: below this a margin counts as met.
MET = 1e-9


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
        kind: ``source`` and ``bucket``: a margin, the run gets fewer tokens. ``cell`` and ``domain``: the proportions
            the plan has without limits of supply; what is missing here was taken elsewhere as far as possible.
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
        supply: Row -> bucket -> tokens there are; a missing entry means none, ``inf`` means no limit.

    Returns:
        Cells within the supply. The margins are met to 1e-9 of their total whenever some table within the supply has
        them; otherwise the table is as large as the supply allows and nearest to the wanted proportions.
    """
    names, buckets = list(margins.rows), list(margins.columns)
    rows_R = np.array([margins.rows[name] for name in names], dtype=np.float64)
    columns_C = np.array([margins.columns[bucket] for bucket in buckets], dtype=np.float64)
    allowed_RC = np.array([[bucket in margins.only.get(name, buckets) for bucket in buckets] for name in names])
    supply_RC = np.array([[supply.get(name, {}).get(bucket, 0.0) for bucket in buckets] for name in names])
    ideal_RC = fit_table(rows_R, columns_C, np.where(allowed_RC, np.inf, 0.0))
    table_RC = fit_table(rows_R, columns_C, np.where(ideal_RC > 0.0, supply_RC, 0.0), ideal_RC)
    cells = {name: dict(zip(buckets, row.tolist(), strict=True)) for name, row in zip(names, table_RC, strict=True)}
    short_of = [("source", name, rows_R[i], table_RC[i].sum()) for i, name in enumerate(names)]
    short_of += [("bucket", bucket, columns_C[j], table_RC[:, j].sum()) for j, bucket in enumerate(buckets)]
    short_of += [
        ("cell", f"{name}/{bucket}", ideal_RC[i, j], table_RC[i, j])
        for i, name in enumerate(names)
        for j, bucket in enumerate(buckets)
        if table_RC[i, j] >= supply_RC[i, j] * (1 - MET)
    ]
    return FittedPlan(cells, _unmet(short_of))


def fit_plan(plan: PlanConfig, supply: Mapping[str, Mapping[str, Mapping[str, float]]]) -> FittedPlan:
    """Fit a plan to the supply: sources x buckets first, then the domains of every source.

    Args:
        plan: The plan, without faults.
        supply: Source -> domain -> bucket -> tokens measured (or estimated from a sample).

    Returns:
        Cells per source, and per domain where the plan keeps the mix of domains or leaves the lengths to
        ``short_survival``. The cells of a source are the sums over its domains.
    """
    scale = 1.0 if plan.total_tokens is None else plan.total_tokens / sum(plan.sources.values())
    sources = {source: tokens * scale for source, tokens in plan.sources.items()}
    if not plan.fixes_lengths:
        return _thin_short_documents(plan, sources, supply)
    buckets = {bucket: getattr(plan.buckets, bucket) * scale for bucket in BUCKETS}
    by_source = {
        s: {b: sum(cells.get(b, 0.0) for cells in supply.get(s, {}).values()) for b in BUCKETS} for s in sources
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
        shortfalls += _unmet([("domain", f"{source}/{d}", t, sum(divided[d].values())) for d, t in wanted.items()])
    return FittedPlan(fitted.cells, tuple(shortfalls), domains)


def _divide_source(
    wanted: Mapping[str, float], cells: Mapping[str, float], supply: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Divide the cells of a source among its domains: their mix first, then whoever has more of a bucket.

    The tokens of a source come before the mix of its domains: what the domains with the right shares cannot give of a
    bucket is taken from the supply that is left, in proportion to it.
    """
    divided = fit_quotas(Margins(wanted, cells), supply).cells
    for bucket, tokens in cells.items():
        left = np.array(
            [max(0.0, supply.get(domain, {}).get(bucket, 0.0) - divided[domain][bucket]) for domain in wanted]
        )
        missing = tokens - sum(divided[domain][bucket] for domain in wanted)
        for domain, more in zip(wanted, share_out(missing, left, left).tolist(), strict=True):
            divided[domain][bucket] += more
    return divided


def _thin_short_documents(
    plan: PlanConfig, sources: Mapping[str, float], supply: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> FittedPlan:
    """Fu et al.'s rule: every domain spends its share of the tokens on all longer and some short documents.

    Their code estimates lengths from characters and puts the edge at 4,096 tokens; here the edge is L0, and a domain that
    runs out is reported.
    """
    domains: dict[tuple[str, str], dict[str, float]] = {}
    short_of = []
    for source, tokens in sources.items():
        for domain, wanted in _domain_tokens(plan, source, tokens, supply.get(source, {})).items():
            there = supply.get(source, {}).get(domain, {})
            kept = np.array([there.get(b, 0.0) * (plan.short_survival if b == "short" else 1.0) for b in BUCKETS])
            cells = share_out(wanted, kept, kept)
            domains[source, domain] = dict(zip(BUCKETS, cells.tolist(), strict=True))
            short_of.append(("domain", f"{source}/{domain}", wanted, float(cells.sum())))
    cells = {s: {b: sum(t[b] for (source, _), t in domains.items() if source == s) for b in BUCKETS} for s in sources}
    short_of = [("source", s, tokens, sum(cells[s].values())) for s, tokens in sources.items()] + short_of
    return FittedPlan(cells, _unmet(short_of), domains)


def _domain_tokens(
    plan: PlanConfig, source: str, tokens: float, supply: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Tokens wanted of every domain of a source: by the plan's shares, else by the shares of the supply."""
    shares = plan.domain_shares.get(source) or {d: sum(cells.values()) for d, cells in supply.items()}
    total = sum(shares.values())
    return {domain: tokens * share / total if total else 0.0 for domain, share in sorted(shares.items())}


def _unmet(wanted_and_fitted: Sequence[tuple[str, str, float, float]]) -> tuple[Shortfall, ...]:
    """Those that stay below what was wanted by more than rounding."""
    return tuple(
        Shortfall(kind, name, float(wanted), float(fitted))
        for kind, name, wanted, fitted in wanted_and_fitted
        if fitted < wanted - MET * max(1.0, wanted)
    )
