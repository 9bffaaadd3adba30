"""RedPajama-Data-1T: JSON lines per domain (``common_crawl`` packed with zstd), listed by URL.

Records are ``{text, meta}``; those of ``common_crawl`` have ``source`` and a quality prediction instead of ``meta``. Only the
text is used, so a record without ``meta`` is kept (and counted). The books were withdrawn; a mirror may have them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.corpora import HELDOUT_FRACTION, Document, Split, Unit
from data_prep.sources.config import RedpajamaV1Config
from data_prep.sources.heldout import source_documents
from data_prep.sources.places import FileSet, SourceInfo, StoredFile, hub_base, list_files, listed_names, reached
from data_prep.sources.records import json_records, usable_text
from data_prep.sources.remote import first_byte
from longrope2.errors import ConfigError

__all__ = ["RedpajamaV1"]

SOURCE = "redpajama_v1"
URL_PREFIX = "https://data.together.xyz/redpajama-data-1T/v1.0.0"
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
INFO = SourceInfo(
    SOURCE, "RedPajama-Data-1T", "togethercomputer/RedPajama-Data-1T", "FOLDER/arxiv/arxiv_023827cd.jsonl"
)


class RedpajamaV1:
    """RedPajama-Data-1T, a unit per file, a domain per part.

    Args:
        config: Place and parts.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: the files cannot be listed or read; says what to do.
    """

    sources = (SOURCE,)

    def __init__(self, config: RedpajamaV1Config, *, heldout_fraction: float = HELDOUT_FRACTION) -> None:
        self.heldout_fraction = heldout_fraction
        if not config.domains:
            raise ConfigError(["corpus.redpajama_v1.domains is empty; name at least one, for example [arxiv]"])
        base = URL_PREFIX if config.root is None else config.root.rstrip("/")
        files = [file for domain in config.domains for file in _domain_files(config, base, domain)]
        self._files = FileSet(base, tuple(files))

    def units(self) -> Sequence[Unit]:
        """A unit per file, domain by domain."""
        return [Unit(f"{SOURCE}/{file.path}", SOURCE, file.size_bytes) for file in self._files.files]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Documents of one file; the id is its path and the line."""
        path = unit.name.removeprefix(f"{SOURCE}/")
        domain = path.split("/")[0]
        for line, record in json_records(self._files.location(path), skipped):
            text = usable_text(record.get("text"), skipped)
            if text is None:
                continue
            if domain != "common_crawl" and not isinstance(record.get("meta"), dict):
                skipped["no meta (kept)"] += 1
            yield Document(f"{unit.name}:{line}", text, SOURCE, domain)

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split."""
        return source_documents(self, split, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()


def _domain_files(config: RedpajamaV1Config, base: str, domain: str) -> list[StoredFile]:
    """Files of one domain; the first one is tried."""
    if config.root is not None and not base.startswith(("http://", "https://")):
        return reached(INFO, f"{base}/{domain}", base, lambda: list_files(base, domain, SUFFIXES))
    place = base if config.root is not None else f"hub dataset {INFO.repository}"

    def listed() -> list[StoredFile]:
        lists = base if config.root is not None else hub_base(INFO, config.revision)
        names = [url.removeprefix(URL_PREFIX).lstrip("/") for url in listed_names(f"{lists}/urls/{domain}.txt")]
        first_byte(f"{base}/{names[0]}")
        return [StoredFile(name) for name in sorted(names)]

    return reached(INFO, f"urls/{domain}.txt of {place} and the first file it lists below {base}", config.root, listed)
