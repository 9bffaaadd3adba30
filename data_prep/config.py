"""What the pack stage is told: how many tokens of which source and length, and what may be packed.

``short`` documents have at most L0 tokens (BOS and EOS included), ``mid`` more than L0 up to
``mid_limit``, ``long`` more than that up to ``long_limit`` [LongRoPE2, arXiv 2502.20082, section
4.1 and table 1]. The numbers themselves are data: ``conf/mixture/`` holds those of every corpus.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from data_prep.engine import ClusterConfig
from longrope2.config import StageConfig
from longrope2.corpora.config import CorpusConfig
from longrope2.corpora.corpus import RETRIEVAL_SOURCE
from longrope2.corpora.retrieval import RetrievalConfig

BUCKETS = ("short", "mid", "long")
QUOTA_BUCKETS = ("short", "long")


class Overlong(Enum):
    """What happens to documents longer than the longest bucket."""

    drop = "drop"
    cap = "cap"
    split = "split"


class ShortOverlong(Enum):
    """What the short bucket does with documents that are longer than the short window."""

    drop = "drop"
    split = "split"


class DomainMix(Enum):
    """What decides the shares of the domains inside a source."""

    keep = "keep"
    ignore = "ignore"


@dataclass
class BucketQuota:
    """Tokens (BOS and EOS included) wanted from one source; ``null``: all there is, 0: none."""

    short: int | None = 0
    """Tokens in short segments: documents of at most ``model.original_len`` tokens."""
    long: int | None = 0
    """Tokens in long segments: documents longer than ``model.original_len``."""


@dataclass
class BucketTokens:
    """Tokens wanted per bucket, over all sources."""

    short: int = 0
    """Documents of at most L0 tokens."""
    mid: int = 0
    """Documents of more than L0 and at most ``mid_limit`` tokens."""
    long: int = 0
    """Documents of more than ``mid_limit`` and at most ``long_limit`` tokens."""


@dataclass
class MixtureConfig:
    """Tokens (BOS and EOS included) wanted per source and per bucket."""

    sources: dict[str, int] = field(default_factory=dict)
    """Source -> tokens. Without any the ``quotas`` are taken as they stand."""
    buckets: BucketTokens = field(default_factory=BucketTokens)
    """Tokens per bucket; they sum to the same as ``sources``. All 0 leaves the lengths to
    ``short_survival``."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """Source -> the only buckets (short, mid, long) it serves; one not named serves all."""
    mid_limit: int = 100_000
    """Longest document of the bucket ``mid``, in tokens, BOS and EOS included."""
    long_limit: int = 200_000
    """Longest document of the bucket ``long``, in tokens, BOS and EOS included."""
    domain_mix: DomainMix = DomainMix.keep
    """``keep``: every domain of a source keeps its share of the source's tokens, only the
    lengths change, as far as the supply allows. ``ignore``: documents of a source are taken as
    they come."""
    domain_shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Source -> domain -> share (any scale). A source that is not named keeps the shares measured
    in the supply."""
    short_survival: float = 0.1
    """Only where ``buckets`` are all 0: share of the short documents that stay, in [0, 1], while
    all longer ones do."""
    total_tokens: int | None = None
    """Scale everything to this many tokens, at least 1; ``null``: the numbers as they stand."""

    @property
    def is_given(self) -> bool:
        """Whether there is a mixture at all: an empty one leaves the run to its quotas."""
        return bool(self.sources)

    @property
    def fixes_lengths(self) -> bool:
        """Whether it says how many tokens of which length, instead of ``short_survival``."""
        return any(vars(self.buckets).values())

    def faults(self, known_sources: Sequence[str], original_len: int) -> list[str]:
        """What is wrong with the values, each fault naming its key."""
        known = ", ".join(known_sources)
        found = [
            f"sources.{source}: the corpus has no such source; it has {known}"
            for source in self.sources
            if source not in known_sources
        ]
        if not any(self.sources.values()):
            found.append("sources asks for no tokens at all; give +mixture.sources.SOURCE=TOKENS")
        found += [*self._token_faults(), *self._rule_faults()]
        if original_len >= self.mid_limit:
            limit = f"model.original_len={original_len}"
            found.append(f"mid_limit={self.mid_limit} must be above {limit}")
        return [f"mixture.{fault}" for fault in found]

    def _token_faults(self) -> Iterator[str]:
        numbers = {f"sources.{source}": tokens for source, tokens in self.sources.items()}
        numbers |= {f"buckets.{bucket}": tokens for bucket, tokens in vars(self.buckets).items()}
        for key, tokens in numbers.items():
            if tokens < 0:
                yield f"{key}={tokens} must be tokens, 0 or more"
        of_sources, of_buckets = sum(self.sources.values()), sum(vars(self.buckets).values())
        if self.fixes_lengths and of_sources != of_buckets:
            sums = f"sources sum to {of_sources} tokens and mixture.buckets to {of_buckets}"
            yield f"{sums}; make them equal"
        if self.total_tokens is not None and self.total_tokens < 1:
            yield f"total_tokens={self.total_tokens} must be at least 1, or null"

    def _rule_faults(self) -> Iterator[str]:
        if not 0 < self.mid_limit < self.long_limit:
            limit = f"mixture.long_limit={self.long_limit}"
            yield f"mid_limit={self.mid_limit} must be between 0 and {limit}"
        if not 0.0 <= self.short_survival <= 1.0:
            yield f"short_survival={self.short_survival} is outside [0, 1]"
        for key in ("only", "domain_shares"):
            for source in getattr(self, key):
                if source not in self.sources:
                    yield f"{key}.{source}: mixture.sources has no such source"
        for source, buckets in self.only.items():
            if not buckets or not set(buckets) <= set(BUCKETS):
                allowed = ", ".join(BUCKETS)
                yield f"only.{source}={list(buckets)}: name at least one of {allowed}"
        for source, shares in self.domain_shares.items():
            if any(share < 0 for share in shares.values()) or not any(shares.values()):
                yield f"domain_shares.{source} must be shares of 0 or more, not all 0"


@dataclass
class DocumentsConfig:
    """Which documents may be packed."""

    max_tokens: int = 200_000
    """Longest document of a run with quotas, in tokens, BOS and EOS included; a mixture has
    ``long_limit`` instead."""
    overlong: Overlong = Overlong.split
    """What happens to longer ones: ``split`` into nearly equal parts, each a document with BOS
    and EOS of its own, ``cap`` (the rest is left out) or ``drop``. All three are counted."""
    exact_duplicates: bool = True
    """Of documents with the same text, in whatever sources, keep only one."""
    near_duplicates: bool = False
    """Of documents with similar text (MinHash), keep only one; needs datasketch, and takes about as
    long again."""
    exclude: list[str] = field(default_factory=list)
    """Files or folders that name texts of search and evaluation; such documents are never
    packed."""
    max_units: int | None = None
    """Most units (files) that are read of a source; null: as many as are needed, all if it comes
    to that."""


@dataclass
class PackConfig(StageConfig):
    """Configuration of the pack stage."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    quotas: dict[str, BucketQuota] = field(default_factory=dict)
    """Source -> tokens wanted per bucket. The source ``retrieval`` (needle documents) exists for
    every corpus."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Tokens per source and per length bucket instead, fitted to what there is."""
    short_overlong: ShortOverlong = ShortOverlong.drop
    """What the short bucket does with documents longer than L0: ``drop`` leaves them out (of
    that bucket), ``split`` cuts some into windows of L0 tokens with BOS and EOS (for miniatures,
    whose window few natural documents fit)."""
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    align: int = 1
    """k: no document of a short segment crosses a multiple of L/k, so k sequence-parallel ranks
    need no exchange there."""
    tokens_per_shard: int = 2**26
    """Tokens of a shard file, at least ``target_len``."""
    tokens_per_unit: int = 2**28
    """Tokens that are shuffled and packed together, at least ``target_len``. Each such unit
    leaves less than one segment of long documents over, so small ones waste tokens."""
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    workers: int = 0
    """Processes; 0: one per core, or none but this one for small corpora. Changes no byte of the
    result."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    keep_work: bool = False
    """Keep the intermediate files (token ids and indices) in ``1_segments/work``."""

    @property
    def retrieval_tokens(self) -> dict[str, int]:
        """Bucket -> tokens of generated documents; only those that are wanted."""
        quota = self.quotas.get(RETRIEVAL_SOURCE, BucketQuota())
        return {bucket: tokens for bucket, tokens in vars(quota).items() if tokens}
