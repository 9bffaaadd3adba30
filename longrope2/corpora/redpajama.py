"""RedPajama-Data-1T: JSON lines per domain (``common_crawl`` packed with zstd), listed by URL.

Records are ``{text, meta}``; those of ``common_crawl`` have ``source`` and a quality prediction
instead of ``meta``. Only the text is used, so a record without ``meta`` is kept (and counted). The
books were withdrawn; a mirror may have them.

RedPajama-Data-V2: gzipped JSON lines per snapshot, shard and language, with side files.

A base tag such as ``2023-06/0000/en_head`` names the files of a shard: ``documents/<tag>.json.gz``
and, for head and middle, ``duplicates/<tag>.duplicates.parquet`` with the ids of the pages that
duplicate another one. A page has no id of its own; the corpus' side files call it
``<tag>.json.gz/<row>``, and so does this project. A few hundred files are truncated.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from longrope2.corpora.config import HELDOUT_FRACTION, RedpajamaV1Config, RedpajamaV2Config
from longrope2.corpora.corpus import Document, Split, Unit, source_documents, stable_fraction
from longrope2.corpora.records import json_records, parquet_records, usable_text
from longrope2.corpora.remote import (
    FileSet,
    SourceInfo,
    StoredFile,
    first_byte,
    hub_base,
    list_files,
    listed_names,
    reached,
)
from longrope2.errors import ConfigError

REDPAJAMA_V1_SOURCE = "redpajama_v1"
REDPAJAMA_V1_URL_PREFIX = "https://data.together.xyz/redpajama-data-1T/v1.0.0"
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
REDPAJAMA_V1_INFO = SourceInfo(
    REDPAJAMA_V1_SOURCE,
    "RedPajama-Data-1T",
    "togethercomputer/RedPajama-Data-1T",
    "FOLDER/arxiv/arxiv_023827cd.jsonl",
)
SOURCE = "redpajama_v2"
URL_PREFIX = "https://data.together.xyz/redpajama-data-v2/v1.0.0"
SUFFIX = ".json.gz"
INFO = SourceInfo(
    SOURCE,
    "RedPajama-Data-V2",
    "togethercomputer/RedPajama-Data-V2",
    "FOLDER/documents/2023-06/0000/en_head.json.gz",
)
ALLOWED = {"languages": ("en", "de", "fr", "es", "it"), "partitions": ("head_middle", "tail")}
# A quote inside a JSON string is escaped, so this can only match the key itself.
LENGTH_KEY = re.compile(rb'(?<!\\)"length"\s*:\s*(\d+)')


class RedpajamaV1:
    """RedPajama-Data-1T, a unit per file, a domain per part.

    Args:
        config: Place and parts.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: the files cannot be listed or read; says what to do.
    """

    sources = (REDPAJAMA_V1_SOURCE,)

    def __init__(
        self, config: RedpajamaV1Config, *, heldout_fraction: float = HELDOUT_FRACTION
    ) -> None:
        self.heldout_fraction = heldout_fraction
        if not config.domains:
            raise ConfigError(
                ["corpus.redpajama_v1.domains is empty; name at least one, for example [arxiv]"]
            )
        base = REDPAJAMA_V1_URL_PREFIX if config.root is None else config.root.rstrip("/")
        files = [file for domain in config.domains for file in _domain_files(config, base, domain)]
        self._files = FileSet(base, tuple(files))

    def units(self) -> Sequence[Unit]:
        """A unit per file, domain by domain."""
        return [
            Unit(f"{REDPAJAMA_V1_SOURCE}/{file.path}", REDPAJAMA_V1_SOURCE, file.size_bytes)
            for file in self._files.files
        ]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Documents of one file; the id is its path and the line."""
        path = unit.name.removeprefix(f"{REDPAJAMA_V1_SOURCE}/")
        domain = path.split("/")[0]
        for line, record in json_records(self._files.location(path), skipped):
            text = usable_text(record.get("text"), skipped)
            if text is None:
                continue
            if domain != "common_crawl" and not isinstance(record.get("meta"), dict):
                skipped["no meta (kept)"] += 1
            yield Document(f"{unit.name}:{line}", text, REDPAJAMA_V1_SOURCE, domain)

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split."""
        return source_documents(self, split, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()


def _domain_files(config: RedpajamaV1Config, base: str, domain: str) -> list[StoredFile]:
    """Files of one domain; the first one is tried."""
    if config.root is not None and not base.startswith(("http://", "https://")):
        return reached(
            REDPAJAMA_V1_INFO, f"{base}/{domain}", base, lambda: list_files(base, domain, SUFFIXES)
        )
    place = base if config.root is not None else f"hub dataset {REDPAJAMA_V1_INFO.repository}"

    def listed() -> list[StoredFile]:
        lists = base if config.root is not None else hub_base(REDPAJAMA_V1_INFO, config.revision)
        names = [
            url.removeprefix(REDPAJAMA_V1_URL_PREFIX).lstrip("/")
            for url in listed_names(f"{lists}/urls/{domain}.txt")
        ]
        first_byte(f"{base}/{names[0]}")
        return [StoredFile(name) for name in sorted(names)]

    return reached(
        REDPAJAMA_V1_INFO,
        f"urls/{domain}.txt of {place} and the first file it lists below {base}",
        config.root,
        listed,
    )


class RedpajamaV2:
    """RedPajama-Data-V2, a unit per base tag; the domain is language and perplexity class, as
    ``en_head``.

    Args:
        config: Place, parts and filters.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: a value is not allowed, or the files cannot be listed or read; says what to do.
    """

    sources = (SOURCE,)

    def __init__(
        self, config: RedpajamaV2Config, *, heldout_fraction: float = HELDOUT_FRACTION
    ) -> None:
        self.heldout_fraction = heldout_fraction
        self._config = config
        if faults := _faults(config):
            raise ConfigError(faults)
        base = URL_PREFIX if config.root is None else config.root.rstrip("/")
        parts = [
            (s, lang, p)
            for s in config.snapshots
            for lang in config.languages
            for p in config.partitions
        ]
        files = [file for part in parts for file in _part_files(config, base, *part)]
        self._files = FileSet(base, tuple(files))

    def units(self) -> Sequence[Unit]:
        """A unit per base tag."""
        return [
            Unit(f"{SOURCE}/{_tag(file)}", SOURCE, file.size_bytes) for file in self._files.files
        ]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Pages of one shard that are neither thinned nor listed as duplicates."""
        tag = unit.name.removeprefix(f"{SOURCE}/")
        duplicates = self._duplicate_rows(tag, skipped)
        location = self._files.location(f"documents/{tag}{SUFFIX}")
        for row, record in json_records(
            location, skipped, unwanted=self._unwanted(tag, duplicates)
        ):
            text = usable_text(record.get("raw_content"), skipped)
            if text is not None:
                length = record.get("length")
                hint = length if isinstance(length, int) else None
                yield Document(_doc_id(tag, row), text, SOURCE, tag.rpartition("/")[2], hint)

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split."""
        return source_documents(self, split, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()

    def _unwanted(self, tag: str, duplicates: set[int]) -> Callable[[int, bytes], str | None]:
        """Says why a page is left out before it is parsed, or None."""
        most, survival = self._config.short_characters, self._config.short_survival

        def reason(row: int, line: bytes) -> str | None:
            if row in duplicates:
                return "listed duplicate"
            if (
                most
                and (match := LENGTH_KEY.search(line)) is not None
                and int(match.group(1)) < most
            ):
                if stable_fraction("thin", _doc_id(tag, row)) >= survival:
                    return "thinned short page"
            return None

        return reason

    def _duplicate_rows(self, tag: str, skipped: Counter[str]) -> set[int]:
        """Rows of a shard that its list calls duplicates."""
        if not self._config.drop_duplicates or tag.endswith("_tail"):
            return set()
        faults: Counter[str] = Counter()
        location = self._files.location(f"duplicates/{tag}.duplicates.parquet")
        rows = {
            int(record["doc_id"].rpartition("/")[2])
            for _, record in parquet_records(location, ["doc_id"], faults)
            if isinstance(record["doc_id"], str) and record["doc_id"].rpartition("/")[2].isdecimal()
        }
        skipped.update(
            {f"list of duplicates, {reason} (kept)": number for reason, number in faults.items()}
        )
        return rows


def _faults(config: RedpajamaV2Config) -> list[str]:
    """Values that are not allowed."""
    found = []
    for key in ("languages", "snapshots", "partitions"):
        values = getattr(config, key)
        wrong = [value for value in values if key in ALLOWED and value not in ALLOWED[key]]
        if wrong or not values:
            allowed = ", ".join(ALLOWED.get(key, ("names such as 2023-06",)))
            found.append(f"corpus.redpajama_v2.{key}={values}: choose at least one of {allowed}")
    if not 0.0 <= config.short_survival <= 1.0:
        found.append(
            f"corpus.redpajama_v2.short_survival={config.short_survival} is outside [0, 1]"
        )
    if config.short_characters < 0:
        found.append(
            f"corpus.redpajama_v2.short_characters={config.short_characters} must be 0 or more"
        )
    return found


def _doc_id(tag: str, row: int) -> str:
    """Id of a page as the side files have it, after the source."""
    return f"{SOURCE}/{tag}{SUFFIX}/{row}"


def _tag(file: StoredFile) -> str:
    """``documents/2023-06/0000/en_head.json.gz`` -> ``2023-06/0000/en_head``."""
    return file.path.removeprefix("documents/").removesuffix(SUFFIX)


def _part_files(
    config: RedpajamaV2Config, base: str, snapshot: str, language: str, partition: str
) -> list[StoredFile]:
    """Document files of one listing; the first one is tried."""
    if not base.startswith(("http://", "https://")):
        suffixes = [f"/{language}_{bucket}{SUFFIX}" for bucket in partition.split("_")]
        folder = f"documents/{snapshot}"
        return reached(INFO, f"{base}/{folder}", base, lambda: list_files(base, folder, suffixes))
    listing = f"{base}/listings/{language}-{snapshot}-{partition}.txt"

    def listed() -> list[StoredFile]:
        files = [StoredFile(f"documents/{tag}{SUFFIX}") for tag in sorted(listed_names(listing))]
        first_byte(f"{base}/{files[0].path}")
        return files

    return reached(INFO, f"{listing} and its first file", config.root, listed)
