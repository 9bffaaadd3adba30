"""RedPajama: RedPajama-Data-1T (version 1) and RedPajama-Data-V2, JSON lines listed by URL.

Version 1 has a folder per domain (``common_crawl`` packed with zstd). Records are ``{text, meta}``;
those of ``common_crawl`` have ``source`` and a quality prediction instead of ``meta``. Only the
text is used, so a record without ``meta`` is kept (and counted). The books were withdrawn; a mirror
may have them. Large plain files are read in ranges of bytes; the ids of their documents have the
line's first byte instead of its number.

Version 2 is gzipped per snapshot, shard and language, with side files. A base tag such as
``2023-06/0000/en_head`` names the files of a shard: ``documents/<tag>.json.gz`` and, for head and
middle, ``duplicates/<tag>.duplicates.parquet`` with the ids of the pages that duplicate another
one. A page has no id of its own; the side files call it ``<tag>.json.gz/<row>``, and so does this
project. A few hundred files are truncated.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

from longrope2.corpora import remote
from longrope2.corpora.config import RedpajamaV1Config, RedpajamaV2Config
from longrope2.corpora.corpus import Document, Unit, stable_fraction
from longrope2.corpora.filters import LANGUAGE, LANGUAGE_SCORE, score_of
from longrope2.corpora.losses import Losses
from longrope2.corpora.records import json_records, parquet_records, usable_text
from longrope2.corpora.remote import FileCorpus, FileSet, SourceInfo, StoredFile
from longrope2.errors import ConfigError

V1_HUB = "togethercomputer/RedPajama-Data-1T"
V1 = SourceInfo("redpajama_v1", "RedPajama-Data-1T", V1_HUB, "FOLDER/arxiv/arxiv_023827cd.jsonl")
# Tokens of the parts by the card of the hub repository (GPT-NeoX's tokenizer); of use are their
# proportions, where the sizes of files are unknown.
V1_TOKENS = {
    "arxiv": 28e9,
    "book": 26e9,
    "c4": 175e9,
    "common_crawl": 878e9,
    "github": 59e9,
    "stackexchange": 20e9,
    "wikipedia": 24e9,
}
V1_PREFIX = "https://data.together.xyz/redpajama-data-1T/v1.0.0"
V1_SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
V2_HUB = "togethercomputer/RedPajama-Data-V2"
V2_LAYOUT = "FOLDER/documents/2023-06/0000/en_head.json.gz"
V2 = SourceInfo("redpajama_v2", "RedPajama-Data-V2", V2_HUB, V2_LAYOUT)
V2_PREFIX = "https://data.together.xyz/redpajama-data-v2/v1.0.0"
V2_SUFFIX = ".json.gz"
ALLOWED = {"languages": ("en", "de", "fr", "es", "it"), "partitions": ("head_middle", "tail")}
MOST_DIGITS = 18
# A quote inside a JSON string is escaped, so this can only match the key itself.
LENGTH_KEY = re.compile(rb'(?<!\\)"length"\s*:\s*(\d+)')


def redpajama_v1(config: RedpajamaV1Config, heldout_fraction: float) -> FileCorpus:
    """RedPajama-Data-1T, a unit per file, a domain per part; the id is the path and the line."""
    if not config.domains:
        key = f"corpus.{V1.key}.domains"
        raise ConfigError([f"{key} is empty; name at least one, for example [arxiv]"])
    base = V1_PREFIX if config.root is None else config.root.rstrip("/")
    files = [file for domain in config.domains for file in _domain_files(config, base, domain)]
    found, groups = FileSet(base, tuple(files)), remote.in_ranges(files)
    return FileCorpus(
        V1.key,
        found,
        groups,
        _read_domain,
        heldout_fraction=heldout_fraction,
        domain_of=_first_folder,
        published_tokens=V1_TOKENS,
    )


def _first_folder(file: StoredFile) -> str:
    return file.path.split("/")[0]


def _domain_files(config: RedpajamaV1Config, base: str, domain: str) -> list[StoredFile]:
    """Files of one domain; the first one is tried."""
    if config.root is not None and not remote.is_web(base):
        return remote.mirror_files(V1, base, domain, V1_SUFFIXES)
    place = base if config.root is not None else f"hub dataset {V1.repository}"

    def paths() -> list[str]:
        lists = base if config.root is not None else remote.hub_base(V1, config.revision)
        urls = remote.listed_names(f"{lists}/urls/{domain}.txt")
        return [url.removeprefix(V1_PREFIX).lstrip("/") for url in urls]

    tried = f"urls/{domain}.txt of {place} and the first file it lists below {base}"
    return remote.listed_files(V1, tried=tried, root=config.root, base=base, paths=paths)


def _read_domain(unit: Unit, own: Sequence[StoredFile], skipped: Losses) -> Iterator[Document]:
    domain, path = _first_folder(own[0]), f"{unit.source}/{own[0].path}"
    for line, record in json_records(own[0].location, skipped, span=own[0].span):
        text = usable_text(record.get("text"), skipped)
        if text is not None:
            if domain != "common_crawl" and not isinstance(record.get("meta"), dict):
                skipped["no meta (kept)"] += 1
            yield Document(f"{path}:{line}", text, unit.source, domain)


def redpajama_v2(
    config: RedpajamaV2Config, heldout_fraction: float, recorded: Sequence[str] = ()
) -> FileCorpus:
    """RedPajama-Data-V2, a unit per base tag; the domain is language and class, as ``en_head``.

    ``recorded``: what filters ask of a page: its language, or quality signals, whose files are then
    read beside the pages.
    """
    if faults := list(_value_faults(config)):
        raise ConfigError(faults)
    base = V2_PREFIX if config.root is None else config.root.rstrip("/")
    parts = product(config.snapshots, config.languages, config.partitions)
    files = [file for part in parts for file in _part_files(config, base, *part)]
    tags = [file.path.removeprefix("documents/").removesuffix(V2_SUFFIX) for file in files]
    groups = {tag: [file] for tag, file in zip(tags, files, strict=True)}
    found = FileSet(base, tuple(files))
    reader = partial(_read_shard, config, tuple(recorded))
    return FileCorpus(
        V2.key,
        found,
        groups,
        reader,
        heldout_fraction=heldout_fraction,
        domain_of=_language_and_class,
    )


def _language_and_class(file: StoredFile) -> str:
    """``documents/2023-06/0000/en_head.json.gz`` -> ``en_head``."""
    return file.path.rpartition("/")[2].removesuffix(V2_SUFFIX)


def _value_faults(config: RedpajamaV2Config) -> Iterator[str]:
    for key in ("languages", "snapshots", "partitions"):
        values = getattr(config, key)
        if not values or not set(values) <= set(ALLOWED.get(key, values)):
            allowed = ", ".join(ALLOWED.get(key, ("names such as 2023-06",)))
            yield f"corpus.{V2.key}.{key}={values}: choose at least one of {allowed}"
    if not 0.0 <= config.short_survival <= 1.0:
        yield f"corpus.{V2.key}.short_survival={config.short_survival} is outside [0, 1]"
    if config.short_characters < 0:
        yield f"corpus.{V2.key}.short_characters={config.short_characters} must be 0 or more"


def _part_files(
    config: RedpajamaV2Config, base: str, snapshot: str, language: str, partition: str
) -> list[StoredFile]:
    """Document files of one listing; the first one is tried."""
    if not remote.is_web(base):
        suffixes = [f"/{language}_{bucket}{V2_SUFFIX}" for bucket in partition.split("_")]
        return remote.mirror_files(V2, base, f"documents/{snapshot}", suffixes)
    listing = f"{base}/listings/{language}-{snapshot}-{partition}.txt"

    def paths() -> list[str]:
        return [f"documents/{tag}{V2_SUFFIX}" for tag in sorted(remote.listed_names(listing))]

    return remote.listed_files(
        V2, tried=f"{listing} and its first file", root=config.root, base=base, paths=paths
    )


def _read_shard(
    config: RedpajamaV2Config,
    recorded: Sequence[str],
    unit: Unit,
    own: Sequence[StoredFile],
    skipped: Losses,
) -> Iterator[Document]:
    """Pages of one shard that are neither thinned nor listed as duplicates."""
    duplicates: set[int] = set()
    tag = unit.name.removeprefix(f"{unit.source}/")
    signals = [name for name in recorded if name not in (LANGUAGE, LANGUAGE_SCORE)]
    scores: dict[int, dict[str, float]] = {}
    if signals:
        beside = StoredFile(own[0].base, f"quality_signals/{tag}.signals{V2_SUFFIX}")
        scores = _signals_by_row(beside.location, signals, skipped)
    if config.drop_duplicates and not unit.name.endswith("_tail"):
        listed = StoredFile(own[0].base, f"duplicates/{tag}.duplicates.parquet")
        duplicates = _duplicate_rows(listed.location, skipped)
    unwanted = _unwanted(config, unit, duplicates)
    for row, record in json_records(own[0].location, skipped, unwanted=unwanted):
        text = usable_text(record.get("raw_content"), skipped)
        if text is not None:
            domain = unit.name.rpartition("/")[2]
            told = {name: record.get(name) for name in (LANGUAGE, LANGUAGE_SCORE)}
            told |= scores.get(row, {})
            yield Document(_doc_id(unit, row), text, unit.source, domain, recorded=told)


def _signals_by_row(
    location: str, names: Sequence[str], skipped: Losses
) -> dict[int, dict[str, float]]:
    """Row of a shard -> the signals of its page that are asked for, as far as they are there."""
    faults = Losses()
    rows: dict[int, dict[str, float]] = {}
    for _, record in json_records(location, faults):
        row, signals = str(record.get("id")).rpartition("/")[2], record.get("quality_signals")
        if row.isdecimal() and isinstance(signals, dict):
            scores = ((name, score_of(signals, name)) for name in names)
            rows[int(row)] = {name: score for name, score in scores if score is not None}
    skipped.take(faults, prefix="quality signals, ", suffix=" (kept)")
    return rows


def _doc_id(unit: Unit, row: int) -> str:
    """Id of a page as the side files have it, after the source."""
    return f"{unit.name}{V2_SUFFIX}/{row}"


def _unwanted(
    config: RedpajamaV2Config, unit: Unit, duplicates: set[int]
) -> Callable[[int, bytes], str | None]:
    """Says why a page is left out before it is parsed, or None."""
    most, survival = config.short_characters, config.short_survival

    def reason(row: int, line: bytes) -> str | None:
        if row in duplicates:
            return "listed duplicate"
        length = LENGTH_KEY.search(line) if most else None
        if length is not None and _number(length.group(1)) < most:
            if stable_fraction("thin", _doc_id(unit, row)) >= survival:
                return "thinned short page"
        return None

    return reason


def _duplicate_rows(location: str, skipped: Losses) -> set[int]:
    """Rows of a shard that its list calls duplicates."""
    faults = Losses()
    rows = set()
    for _, record in parquet_records(location, ["doc_id"], faults):
        doc_id = record["doc_id"]
        row = doc_id.rpartition("/")[2] if isinstance(doc_id, str) else ""
        if row.isascii() and row.isdecimal():
            rows.add(_number(row))
        else:
            faults["no row in doc_id"] += 1
    skipped.take(faults, prefix="list of duplicates, ", suffix=" (kept)")
    return rows


def _number(digits: str | bytes) -> int:
    """A number of any length; of more digits than a place in a file can have, a large one."""
    return int(digits) if len(digits) <= MOST_DIGITS else 10**MOST_DIGITS
