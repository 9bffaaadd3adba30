"""Schema of a plan: how many tokens of which source and which length a run wants.

``short`` documents have at most L0 tokens (BOS and EOS included), ``mid`` more than L0 up to ``mid_limit``, ``long`` more
than that up to ``long_limit`` [LongRoPE2, arXiv 2502.20082, section 4.1 and table 1]. The plans themselves are data:
``conf/corpus/`` holds ``paper``, ``paper_text``, ``nnscaler`` and ``fu``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["BUCKETS", "BucketTokens", "DomainMix", "PlanConfig"]


BUCKETS: tuple[str, ...] = ("short", "mid", "long")


class DomainMix(Enum):
    """What decides the shares of the domains inside a source."""

    keep = "keep"
    ignore = "ignore"


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
class PlanConfig:
    """Tokens (BOS and EOS included) wanted per source and per bucket."""

    sources: dict[str, int] = field(default_factory=dict)
    """Source -> tokens."""
    buckets: BucketTokens = field(default_factory=BucketTokens)
    """Tokens per bucket; they sum to the same as ``sources``. All 0 leaves the lengths to ``short_survival``."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """Source -> the only buckets (short, mid, long) it serves; a source that is not named serves all."""
    mid_limit: int = 100_000
    """Longest document of the bucket ``mid``, in tokens, BOS and EOS included."""
    long_limit: int = 200_000
    """Longest document of the bucket ``long``, in tokens, BOS and EOS included."""
    domain_mix: DomainMix = DomainMix.keep
    """``keep``: every domain of a source keeps its share of the source's tokens, only the lengths change, as far as the
    supply allows. ``ignore``: documents of a source are taken as they come."""
    domain_shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """Source -> domain -> share (any scale). A source that is not named keeps the shares measured in the supply."""
    short_survival: float = 0.1
    """Only where ``buckets`` are all 0: share of the short documents that stay, in [0, 1], while all longer ones do."""
    total_tokens: int | None = None
    """Scale the whole plan to this many tokens, at least 1; ``null`` takes the numbers as they stand."""

    @property
    def is_given(self) -> bool:
        """Whether there is a plan at all: an empty one leaves the corpus to its quotas."""
        return bool(self.sources)

    @property
    def fixes_lengths(self) -> bool:
        """Whether the plan says how many tokens of which length; otherwise ``short_survival`` does."""
        return any(getattr(self.buckets, bucket) for bucket in BUCKETS)

    def faults(self, known_sources: Sequence[str]) -> list[str]:
        """What is wrong with the values, each fault naming its key."""
        found = [
            f"corpus.plan.sources.{source}: the corpus has no such source; it has {', '.join(known_sources)}"
            for source in self.sources
            if source not in known_sources
        ]
        if not any(self.sources.values()):
            found.append("corpus.plan.sources asks for no tokens at all; give +corpus.plan.sources.SOURCE=TOKENS")
        return [*found, *self._token_faults(), *self._rule_faults()]

    def _token_faults(self) -> list[str]:
        """Faults of the margins."""
        lengths = {bucket: getattr(self.buckets, bucket) for bucket in BUCKETS}
        numbers = {f"sources.{source}": tokens for source, tokens in self.sources.items()}
        numbers |= {f"buckets.{bucket}": tokens for bucket, tokens in lengths.items()}
        found = [
            f"corpus.plan.{key}={tokens} must be tokens, 0 or more" for key, tokens in numbers.items() if tokens < 0
        ]
        if self.fixes_lengths and sum(self.sources.values()) != sum(lengths.values()):
            found.append(
                f"corpus.plan.sources sum to {sum(self.sources.values())} tokens and corpus.plan.buckets to "
                f"{sum(lengths.values())}; make them equal"
            )
        if self.total_tokens is not None and self.total_tokens < 1:
            found.append(f"corpus.plan.total_tokens={self.total_tokens} must be at least 1, or null")
        return found

    def _rule_faults(self) -> list[str]:
        """Faults of limits and shares."""
        found = []
        if not 0 < self.mid_limit < self.long_limit:
            found.append(
                f"corpus.plan.mid_limit={self.mid_limit} must be between 0 and corpus.plan.long_limit={self.long_limit}"
            )
        if not 0.0 <= self.short_survival <= 1.0:
            found.append(f"corpus.plan.short_survival={self.short_survival} is outside [0, 1]")
        for key in ("only", "domain_shares"):
            unknown = [source for source in getattr(self, key) if source not in self.sources]
            found += [f"corpus.plan.{key}.{source}: corpus.plan.sources has no such source" for source in unknown]
        for source, buckets in self.only.items():
            if not buckets or not set(buckets) <= set(BUCKETS):
                found.append(f"corpus.plan.only.{source}={list(buckets)}: name at least one of {', '.join(BUCKETS)}")
        for source, shares in self.domain_shares.items():
            if any(share < 0 for share in shares.values()) or not any(shares.values()):
                found.append(f"corpus.plan.domain_shares.{source} must be shares of 0 or more, not all 0")
        return found

    def bucket_of(self, num_tokens: int, original_len: int) -> str | None:
        """Bucket of a document by its length with BOS and EOS; None above ``long_limit``."""
        limits = (original_len, self.mid_limit, self.long_limit)
        return next((bucket for bucket, limit in zip(BUCKETS, limits, strict=True) if num_tokens <= limit), None)
