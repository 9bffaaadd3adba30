"""What a run wants of each source and length: from quotas as they stand, or from a plan fitted to the supply."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_prep.corpora import RETRIEVAL_SOURCE, BucketQuota, CorpusConfig
from data_prep.document_table import LengthBuckets
from data_prep.plan import FittedPlan, fit_plan
from data_prep.plan_config import BUCKETS, PlanConfig
from data_prep.quotas import Demand

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["QUOTA_BUCKETS", "FittedDemand", "demand_of", "length_buckets", "wanted_sources"]

QUOTA_BUCKETS = ("short", "long")
Supply = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class FittedDemand:
    """What is wanted, given what there is.

    Attributes:
        demand: Tokens per cell.
        missing: Source -> bucket -> tokens wanted over tokens there (above 1), where reading more may help.
        shortfalls: What stays below the plan, in words; quotas report theirs after the choice.
    """

    demand: Demand
    missing: dict[str, dict[str, float]]
    shortfalls: tuple[str, ...]


def length_buckets(config: "PackConfig") -> LengthBuckets:
    """Buckets of the plan; with quotas: up to L0, and longer."""
    plan = config.corpus.plan
    if not plan.is_given:
        return LengthBuckets(QUOTA_BUCKETS, (config.model.original_len, config.documents.max_tokens))
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
        natural: The same as the corpus has it, before a part of it was left unread: what "keep the mix of domains" means.
    """
    quota = corpus.quotas.get(RETRIEVAL_SOURCE, BucketQuota())
    generated = {(RETRIEVAL_SOURCE, b): None for b in (*BUCKETS, *QUOTA_BUCKETS) if quota.short or quota.long}
    if not corpus.plan.is_given:
        cells = {
            (source, bucket): getattr(quota, bucket)
            for source, quota in corpus.quotas.items()
            for bucket in QUOTA_BUCKETS
        }
        return FittedDemand(Demand(cells | generated), {}, ())
    fitted = fit_plan(_with_natural_shares(corpus.plan, natural), supply)
    cells = {(source, b): math.ceil(tokens) for source, row in fitted.cells.items() for b, tokens in row.items()}
    shortfalls = tuple(map(str, fitted.shortfalls))
    return FittedDemand(
        Demand(cells | generated, fitted.domains), _missing(fitted, corpus.plan.fixes_lengths), shortfalls
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
