"""Where each public corpus is read from and what is taken of it; one schema per source, keys
``corpus.<source>.*``.

Schema of a plan: how many tokens of which source and which length a run wants.

``short`` documents have at most L0 tokens (BOS and EOS included), ``mid`` more than L0 up to
``mid_limit``, ``long`` more than that up to ``long_limit`` [LongRoPE2, arXiv 2502.20082, section
4.1 and table 1]. The plans themselves are data: ``conf/corpus/`` holds ``paper``, ``paper_text``,
``nnscaler`` and ``fu``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from longrope2.config import MISSING

BUCKETS: tuple[str, ...] = ("short", "mid", "long")
HELDOUT_FRACTION = 0.05


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
    """Tokens per bucket; they sum to the same as ``sources``. All 0 leaves the lengths to
    ``short_survival``."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """Source -> the only buckets (short, mid, long) it serves; a source that is not named serves
    all."""
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
    """Scale the whole plan to this many tokens, at least 1; ``null`` takes the numbers as they
    stand."""

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
            found.append(
                "corpus.plan.sources asks for no tokens at all; give +corpus.plan.sources.SOURCE=TOKENS"
            )
        return [*found, *self._token_faults(), *self._rule_faults()]

    def _token_faults(self) -> list[str]:
        """Faults of the margins."""
        lengths = {bucket: getattr(self.buckets, bucket) for bucket in BUCKETS}
        numbers = {f"sources.{source}": tokens for source, tokens in self.sources.items()}
        numbers |= {f"buckets.{bucket}": tokens for bucket, tokens in lengths.items()}
        found = [
            f"corpus.plan.{key}={tokens} must be tokens, 0 or more"
            for key, tokens in numbers.items()
            if tokens < 0
        ]
        if self.fixes_lengths and sum(self.sources.values()) != sum(lengths.values()):
            found.append(
                f"corpus.plan.sources sum to {sum(self.sources.values())} tokens and corpus.plan.buckets to "
                f"{sum(lengths.values())}; make them equal"
            )
        if self.total_tokens is not None and self.total_tokens < 1:
            found.append(
                f"corpus.plan.total_tokens={self.total_tokens} must be at least 1, or null"
            )
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
            found += [
                f"corpus.plan.{key}.{source}: corpus.plan.sources has no such source"
                for source in unknown
            ]
        for source, buckets in self.only.items():
            if not buckets or not set(buckets) <= set(BUCKETS):
                found.append(
                    f"corpus.plan.only.{source}={list(buckets)}: name at least one of {', '.join(BUCKETS)}"
                )
        for source, shares in self.domain_shares.items():
            if any(share < 0 for share in shares.values()) or not any(shares.values()):
                found.append(
                    f"corpus.plan.domain_shares.{source} must be shares of 0 or more, not all 0"
                )
        return found

    def bucket_of(self, num_tokens: int, original_len: int) -> str | None:
        """Bucket of a document by its length with BOS and EOS; None above ``long_limit``."""
        limits = (original_len, self.mid_limit, self.long_limit)
        return next(
            (bucket for bucket, limit in zip(BUCKETS, limits, strict=True) if num_tokens <= limit),
            None,
        )


@dataclass
class RedpajamaV1Config:
    """RedPajama-Data-1T."""

    root: str | None = None
    """Mirror: folder or URL with the layout of the URLs, ``ROOT/arxiv/arxiv_023827cd.jsonl``;
    ``null`` reads the public URLs, as the lists ``urls/<domain>.txt`` of the hub name them."""
    revision: str = "main"
    """Revision of the hub repository that holds the lists."""
    domains: list[str] = field(
        default_factory=lambda: [
            "arxiv",
            "c4",
            "common_crawl",
            "github",
            "stackexchange",
            "wikipedia",
        ]
    )
    """Parts to read. ``book`` is no longer published; only a mirror can have it."""


@dataclass
class RedpajamaV2Config:
    """RedPajama-Data-V2: web pages of Common Crawl."""

    root: str | None = None
    """Mirror: folder or URL with the layout of the URLs,
    ``ROOT/documents/2023-06/0000/en_head.json.gz`` and ``ROOT/duplicates/...``; ``null`` reads
    the public URLs, as the listings name them."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """Of en, de, fr, es, it."""
    snapshots: list[str] = field(default_factory=lambda: ["2023-06"])
    """Common Crawl snapshots; each holds 5,000 shards."""
    partitions: list[str] = field(default_factory=lambda: ["head_middle"])
    """``head_middle`` (the better two of three perplexity classes) and ``tail`` (no list of
    duplicates)."""
    drop_duplicates: bool = True
    """Leave out pages that the corpus' own list calls duplicates of another one."""
    short_characters: int = 0
    """Pages whose recorded ``length`` is below this are thinned before they are parsed; 0 keeps
    all."""
    short_survival: float = 0.1
    """Share of those pages that stays, in [0, 1], drawn by id."""


@dataclass
class StarcoderConfig:
    """The StarCoder training data: source code, a folder per language."""

    root: str | None = None
    """Mirror: folder or URL with the hub's layout, ``ROOT/python/train-00000-of-00059.parquet``;
    ``null`` reads the hub."""
    revision: str = "main"
    """Revision of the hub repository."""
    languages: list[str] = field(default_factory=list)
    """Folders to read; empty: all that hold code (not notebooks, issues and commits, whose columns
    are others)."""
    join_repositories: bool = True
    """Make one document of the files of a repository: single files of 100,000 tokens are rare."""
    files_per_unit: int = 8
    """Parquet files that are read together, so that a repository's files meet; costs temporary disk
    of their size."""
    repository_characters: int = 800_000
    """A larger repository becomes several documents, cut between files."""
    strip_control_text: bool = True
    """Remove ``<reponame>``, ``<filename>`` and ``<gh_stars>`` headers from the start of a file."""


@dataclass
class FinewebEduConfig:
    """FineWeb-Edu: educational web pages."""

    root: str | None = None
    """Mirror: folder or URL with the hub's layout, ``ROOT/sample/10BT/*.parquet``; ``null`` reads
    the hub."""
    revision: str = "main"
    """Revision of the hub repository."""
    subset: str = "sample/10BT"
    """Folder of the repository; the 10-billion-token sample is ten times what the paper takes."""


@dataclass
class Pg19Config:
    """PG19: books of Project Gutenberg, published before 1919."""

    root: str | None = None
    """Mirror: folder or URL with ``train-*.parquet`` and ``validation-*.parquet``; ``null`` reads
    the hub."""
    revision: str = "main"
    """Revision of the hub repository."""


class CorpusKind(Enum):
    """Which adapter reads the corpus."""

    sample = "sample"
    folder = "folder"
    redpajama_v1 = "redpajama_v1"
    redpajama_v2 = "redpajama_v2"
    starcoder = "starcoder"
    fineweb_edu = "fineweb_edu"
    pg19 = "pg19"
    mix = "mix"


class ShortOverlong(Enum):
    """What the short bucket does with documents that are longer than the short window."""

    drop = "drop"
    split = "split"


@dataclass
class BucketQuota:
    """Tokens (BOS and EOS included) wanted from one source; ``null`` means all there is, 0 means none."""

    short: int | None = 0
    """Tokens in short segments: documents of at most ``model.original_len`` tokens."""
    long: int | None = 0
    """Tokens in long segments: documents longer than ``model.original_len``."""


@dataclass
class CorpusConfig:
    """Which documents to read, and how many tokens of each source to pack."""

    name: str = MISSING
    """Name used in manifests and reports."""
    kind: CorpusKind = MISSING
    """Adapter: ``sample`` (the Python standard library, offline), ``folder`` (your own files),
    one of the public corpora (read from the hub, their URLs or a mirror:
    ``corpus.<kind>.root``), or ``mix`` (several of these)."""
    members: list[CorpusKind] = field(default_factory=list)
    """Adapters that kind ``mix`` puts together."""
    folder: str | None = None
    """Folder of .txt, .jsonl or .parquet files, packed or not (.gz, .zst); needed by kind
    ``folder``."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    title_field: str | None = None
    """Field whose value is added to the document ids of .jsonl and .parquet records, for readable
    records."""
    short_overlong: ShortOverlong = ShortOverlong.drop
    """What the short bucket does with documents longer than L0: ``drop`` leaves them out (of
    that bucket), ``split`` cuts some into windows of L0 tokens with BOS and EOS (for miniatures,
    whose window few natural documents fit)."""
    heldout_fraction: float = HELDOUT_FRACTION
    """Share of documents kept from packing, for search and evaluation, 0 to 1, drawn by id; 1.0:
    all of them, for a folder of books that only serve search or evaluation. Keep it the same for
    all stages that read the corpus."""
    quotas: dict[str, BucketQuota] = field(default_factory=dict)
    """Source -> tokens wanted per bucket. The source ``retrieval`` (needle documents) exists for
    every corpus."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Tokens per source and per length bucket instead, fitted to what there is; without
    ``plan.sources`` the ``quotas`` are taken as they stand."""
    heldout_characters: int | None = None
    """Read no more held-out text than this for search and evaluation; ``null`` reads all of it.
    Public corpora need a limit, their held-out share is terabytes."""
    redpajama_v1: RedpajamaV1Config = field(default_factory=RedpajamaV1Config)
    redpajama_v2: RedpajamaV2Config = field(default_factory=RedpajamaV2Config)
    starcoder: StarcoderConfig = field(default_factory=StarcoderConfig)
    fineweb_edu: FinewebEduConfig = field(default_factory=FinewebEduConfig)
    pg19: Pg19Config = field(default_factory=Pg19Config)
