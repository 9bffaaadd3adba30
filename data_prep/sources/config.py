"""Where each public corpus is read from and what is taken of it; one schema per source, keys ``corpus.<source>.*``."""

from dataclasses import dataclass, field

__all__ = ["FinewebEduConfig", "Pg19Config", "RedpajamaV1Config", "RedpajamaV2Config", "StarcoderConfig"]


@dataclass
class RedpajamaV1Config:
    """RedPajama-Data-1T."""

    root: str | None = None
    """Mirror: folder or URL with the layout of the URLs, ``ROOT/arxiv/arxiv_023827cd.jsonl``; ``null`` reads the public
    URLs, as the lists ``urls/<domain>.txt`` of the hub name them."""
    revision: str = "main"
    """Revision of the hub repository that holds the lists."""
    domains: list[str] = field(
        default_factory=lambda: ["arxiv", "c4", "common_crawl", "github", "stackexchange", "wikipedia"]
    )
    """Parts to read. ``book`` is no longer published; only a mirror can have it."""


@dataclass
class RedpajamaV2Config:
    """RedPajama-Data-V2: web pages of Common Crawl."""

    root: str | None = None
    """Mirror: folder or URL with the layout of the URLs, ``ROOT/documents/2023-06/0000/en_head.json.gz`` and
    ``ROOT/duplicates/...``; ``null`` reads the public URLs, as the listings name them."""
    languages: list[str] = field(default_factory=lambda: ["en"])
    """Of en, de, fr, es, it."""
    snapshots: list[str] = field(default_factory=lambda: ["2023-06"])
    """Common Crawl snapshots; each holds 5,000 shards."""
    partitions: list[str] = field(default_factory=lambda: ["head_middle"])
    """``head_middle`` (the better two of three perplexity classes) and ``tail`` (no list of duplicates)."""
    drop_duplicates: bool = True
    """Leave out pages that the corpus' own list calls duplicates of another one."""
    short_characters: int = 0
    """Pages whose recorded ``length`` is below this are thinned before they are parsed; 0 keeps all."""
    short_survival: float = 0.1
    """Share of those pages that stays, in [0, 1], drawn by id."""


@dataclass
class StarcoderConfig:
    """The StarCoder training data: source code, a folder per language."""

    root: str | None = None
    """Mirror: folder or URL with the hub's layout, ``ROOT/python/train-00000-of-00059.parquet``; ``null`` reads the hub."""
    revision: str = "main"
    """Revision of the hub repository."""
    languages: list[str] = field(default_factory=list)
    """Folders to read; empty: all that hold code (not notebooks, issues and commits, whose columns are others)."""
    join_repositories: bool = True
    """Make one document of the files of a repository: single files of 100,000 tokens are rare."""
    files_per_unit: int = 8
    """Parquet files that are read together, so that a repository's files meet; costs temporary disk of their size."""
    repository_characters: int = 800_000
    """A larger repository becomes several documents, cut between files."""
    strip_control_text: bool = True
    """Remove ``<reponame>``, ``<filename>`` and ``<gh_stars>`` headers from the start of a file."""


@dataclass
class FinewebEduConfig:
    """FineWeb-Edu: educational web pages."""

    root: str | None = None
    """Mirror: folder or URL with the hub's layout, ``ROOT/sample/10BT/*.parquet``; ``null`` reads the hub."""
    revision: str = "main"
    """Revision of the hub repository."""
    subset: str = "sample/10BT"
    """Folder of the repository; the 10-billion-token sample is ten times what the paper takes."""


@dataclass
class Pg19Config:
    """PG19: books of Project Gutenberg, published before 1919."""

    root: str | None = None
    """Mirror: folder or URL with ``train-*.parquet`` and ``validation-*.parquet``; ``null`` reads the hub."""
    revision: str = "main"
    """Revision of the hub repository."""
