"""Where documents are read from: ``corpus.*``, and ``corpus.<source>.*`` for each public source."""

import os
from dataclasses import dataclass, field
from enum import Enum

from longrope2.config import MISSING

HELDOUT_FRACTION = 0.05
DOMAINS = ("arxiv", "c4", "common_crawl", "github", "stackexchange", "wikipedia")  # of RedPajama


@dataclass
class RedpajamaV1Config:
    """RedPajama-Data-1T."""

    root: str | None = None
    """Mirror: folder or URL with the layout of the URLs, ``ROOT/arxiv/arxiv_023827cd.jsonl``;
    ``null`` reads the public URLs, as the lists ``urls/<domain>.txt`` of the hub name them."""
    revision: str = "main"
    """Revision of the hub repository that holds the lists."""
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))
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


class FilterRule(Enum):
    """What a filter goes by; ``filters.py`` has the numbers and their sources."""

    minimum_length = "minimum_length"
    language = "language"
    gopher = "gopher"
    gopher_repetition = "gopher_repetition"
    c4 = "c4"
    signal = "signal"


@dataclass
class FilterConfig:
    """Documents that are not read."""

    rule: FilterRule = MISSING
    """``minimum_length``; ``language``; ``gopher``, ``gopher_repetition`` and ``c4``: published
    rules, by RedPajama-V2's quality signals; ``signal``: a bound of your own on one of these."""
    sources: list[str] = field(default_factory=list)
    """Sources it holds for; empty: all."""
    characters: int = 0
    """Of ``minimum_length``: documents with fewer are dropped."""
    languages: list[str] = field(default_factory=list)
    """Of ``language``: codes that stay, as the corpus records them."""
    score: float = 0.0
    """Of ``language``: least recorded certainty, in [0, 1]."""
    signal: str | None = None
    """Of ``signal``: name of a quality signal, for example ``rps_doc_word_count``."""
    least: float | None = None
    """Of ``signal``: documents below are dropped; null: none."""
    most: float | None = None
    """Of ``signal``: documents above are dropped; null: none."""


# Keys of a corpus that say where it stands, not what it holds; and those of ``Corpus.describe``.
PLACES = ("folder", *(f"{kind.value}.root" for kind in CorpusKind))
PLACES_OF_A_DESCRIPTION = ("folder", "base")


@dataclass
class CorpusConfig:
    """Which documents to read."""

    name: str = MISSING
    """Name used in manifests and reports."""
    kind: CorpusKind = MISSING
    """Adapter: ``sample`` (the Python standard library, offline), ``folder`` (your own files),
    one of the public corpora (read from the hub, their URLs or a mirror:
    ``corpus.<kind>.root``), or ``mix`` (several of these)."""
    members: list[CorpusKind] = field(default_factory=list)
    """Adapters that kind ``mix`` puts together."""
    folder: str | None = None
    """Folder of .txt, .jsonl (or .ndjson, .json with a record per line) or .parquet files, packed
    or not (.gz, .bz2, .xz, .zst), in folders of any depth; needed by kind ``folder``. Hidden files
    and those with other endings are not read, and counted."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet records."""
    more_text_fields: list[str] = field(default_factory=list)
    """Fields of kind ``folder`` that hold it in records without text there, the first that does:
    ``[content,body]``."""
    more_text_endings: list[str] = field(default_factory=list)
    """Endings of further files of kind ``folder`` that are plain text, a document each, beside
    .txt: ``[.md,.rst]``."""
    title_field: str | None = None
    """Field whose value is added to the document ids of .jsonl and .parquet records, for readable
    records."""
    heldout_fraction: float = HELDOUT_FRACTION
    """Share of documents kept from packing, for search and evaluation, 0 to 1, drawn by their text
    (by name for the sample corpus; PG19 has a split of its own); 1.0: all of them, for a folder of
    books that only serve search or evaluation. Keep it the same for all stages that read the
    corpus."""
    heldout_characters: int | None = None
    """Read no more held-out text than this for search and evaluation; ``null`` reads all of it.
    Public corpora need a limit, their held-out share is terabytes."""
    filters: list[FilterConfig] = field(default_factory=list)
    """What is not read of it, for packing, search and evaluation alike:
    ``[{rule: language, languages: [en]}, {rule: minimum_length, characters: 500}]``. What each
    dropped is counted."""
    redpajama_v1: RedpajamaV1Config = field(default_factory=RedpajamaV1Config)
    redpajama_v2: RedpajamaV2Config = field(default_factory=RedpajamaV2Config)
    starcoder: StarcoderConfig = field(default_factory=StarcoderConfig)
    fineweb_edu: FinewebEduConfig = field(default_factory=FinewebEduConfig)
    pg19: Pg19Config = field(default_factory=Pg19Config)

    def __post_init__(self) -> None:
        """Folders may be given as a shell would take them: with ``~``, or in quotes."""
        self.folder = plain_place(self.folder)
        for source in (self.redpajama_v1, self.redpajama_v2, self.starcoder, self.fineweb_edu):
            source.root = plain_place(source.root)
        self.pg19.root = plain_place(self.pg19.root)


def plain_place(given: str | None) -> str | None:
    """A folder or address without quotes around it; ``~`` and ``~name`` are the home folders."""
    if given is None:
        return None
    if len(given) > 1 and given[0] == given[-1] and given[0] in "'\"":
        given = given[1:-1]
    return os.path.expanduser(given)
