"""What can be wrong with the configuration of the pack stage, all of it at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.corpora import RETRIEVAL_SOURCE
from data_prep.demand import QUOTA_BUCKETS
from data_prep.exclusions import read_exclusions
from data_prep.near_duplicates import fault_of_near_duplicates
from longrope2.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.pack import PackConfig

__all__ = ["faults_of"]


def faults_of(config: "PackConfig", sources: Sequence[str] | None) -> list[str]:
    """Faults of all keys; ``sources`` are those of the corpus, None if it could not be built."""
    faults = [
        *_length_faults(config), *_document_faults(config), *config.retrieval.faults(), *config.cluster.faults(),
        *_retrieval_faults(config),
    ]  # fmt: skip
    if sources is not None:
        faults += _plan_faults(config, sources) if config.corpus.plan.is_given else _quota_faults(config, sources)
    return faults


def _length_faults(config: "PackConfig") -> list[str]:
    """Faults of the window lengths, of the alignment and of the sizes that depend on them."""
    original, target, faults = config.model.original_len, config.target_len, []
    if original < 8:
        return [f"model.original_len={original} is not a window; give the pre-trained window in tokens"]
    if target < original or target % original:
        faults.append(
            f"target_len={target} is not a multiple of model.original_len={original}; "
            f"use for example {max(1, round(target / original)) * original}"
        )
    if config.align < 1 or target % config.align:
        faults.append(f"align={config.align} does not divide target_len={target}")
    elif target // config.align < original:
        faults.append(
            f"align={config.align} leaves chunks of {target // config.align} tokens, shorter than "
            f"model.original_len={original}; use at most {max(1, target // original)}"
        )
    for key in ("tokens_per_shard", "tokens_per_unit"):
        if getattr(config, key) < target:
            faults.append(f"{key}={getattr(config, key)} must be at least target_len={target}")
    return faults


def _document_faults(config: "PackConfig") -> list[str]:
    """Faults of what may be packed and of who does it."""
    documents, faults = config.documents, []
    if documents.max_tokens <= config.model.original_len:
        faults.append(
            f"documents.max_tokens={documents.max_tokens} must be above model.original_len={config.model.original_len}"
        )
    if documents.max_units is not None and documents.max_units < 1:
        faults.append(f"documents.max_units={documents.max_units} must be at least 1, or null")
    if config.workers < 0:
        faults.append(f"workers={config.workers} must be 0 (one per core) or more")
    if documents.near_duplicates and (fault := fault_of_near_duplicates()):
        faults.append(fault)
    try:
        read_exclusions(documents.exclude)
    except ConfigError as error:
        faults += error.faults
    return faults


def _retrieval_faults(config: "PackConfig") -> list[str]:
    """Faults of the quota of generated documents."""
    quota = config.corpus.quotas.get(RETRIEVAL_SOURCE)
    unlimited = [bucket for bucket in QUOTA_BUCKETS if quota is not None and getattr(quota, bucket) is None]
    return [
        f"corpus.quotas.{RETRIEVAL_SOURCE}.{bucket}=null: these documents are generated, give their tokens"
        for bucket in unlimited
    ]


def _plan_faults(config: "PackConfig", sources: Sequence[str]) -> list[str]:
    """Faults of the plan."""
    plan = config.corpus.plan
    faults = plan.faults(sources)
    if config.model.original_len >= plan.mid_limit:
        faults.append(
            f"corpus.plan.mid_limit={plan.mid_limit} must be above model.original_len={config.model.original_len}"
        )
    return faults


def _quota_faults(config: "PackConfig", sources: Sequence[str]) -> list[str]:
    """Faults of the quotas."""
    known = (*sources, RETRIEVAL_SOURCE)
    faults = []
    for source, quota in config.corpus.quotas.items():
        if source not in known:
            faults.append(f"corpus.quotas.{source}: the corpus has no such source; it has {', '.join(known)}")
        for bucket in QUOTA_BUCKETS:
            wanted = getattr(quota, bucket)
            if wanted is not None and wanted < 0:
                faults.append(f"corpus.quotas.{source}.{bucket}={wanted} must be tokens, 0, or null for all there is")
    if not any(getattr(quota, bucket) != 0 for quota in config.corpus.quotas.values() for bucket in QUOTA_BUCKETS):
        faults.append("corpus.quotas asks for no tokens at all; set corpus.quotas.SOURCE.short or .long")
    return faults
