"""FineWeb-Edu: parquet with the columns text, id, dump, url, file_path, language, language_score, token_count, ..."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.corpora import HELDOUT_FRACTION, Document, Split, Unit
from data_prep.sources.config import FinewebEduConfig
from data_prep.sources.heldout import source_documents
from data_prep.sources.places import SourceInfo, parquet_files
from data_prep.sources.records import parquet_records, usable_text

__all__ = ["FinewebEdu"]

SOURCE = "fineweb_edu"
INFO = SourceInfo(SOURCE, "FineWeb-Edu", "HuggingFaceFW/fineweb-edu", "FOLDER/sample/10BT/000_00000.parquet")


class FinewebEdu:
    """FineWeb-Edu, a unit per file; the corpus' own ids.

    Args:
        config: Place and subset.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: the files cannot be listed or read; says what to do.
    """

    sources = (SOURCE,)

    def __init__(self, config: FinewebEduConfig, *, heldout_fraction: float = HELDOUT_FRACTION) -> None:
        self.heldout_fraction = heldout_fraction
        self._files = parquet_files(INFO, config.root, config.revision, config.subset)

    def units(self) -> Sequence[Unit]:
        """A unit per file."""
        return [Unit(f"{SOURCE}/{file.path}", SOURCE, file.size_bytes) for file in self._files.files]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Pages of one file."""
        path = unit.name.removeprefix(f"{SOURCE}/")
        for row, record in parquet_records(self._files.location(path), ["text"], skipped, optional=["id"]):
            text = usable_text(record["text"], skipped)
            if text is not None:
                doc_id = f"{SOURCE}/{record['id']}" if record["id"] else f"{unit.name}:{row}"
                yield Document(doc_id, text, SOURCE, "web")

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split."""
        return source_documents(self, split, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()
