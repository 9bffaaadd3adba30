"""FineWeb-Edu: parquet with the columns text, id, dump, url, file_path, language, language_score,
token_count, ...

PG19 from a parquet mirror (the dataset itself is a loading script): short_book_title,
publication_date, url, text.

The split is the corpus' own: train books are packed, validation books are held out for search and
evaluation (the paper's needle search draws on them), test books are never read.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from longrope2.corpora.config import HELDOUT_FRACTION, FinewebEduConfig, Pg19Config
from longrope2.corpora.corpus import Document, Split, Unit, source_documents
from longrope2.corpora.records import parquet_records, usable_text
from longrope2.corpora.remote import SourceInfo, parquet_files

FINEWEB_EDU_SOURCE = "fineweb_edu"
FINEWEB_EDU_INFO = SourceInfo(
    FINEWEB_EDU_SOURCE,
    "FineWeb-Edu",
    "HuggingFaceFW/fineweb-edu",
    "FOLDER/sample/10BT/000_00000.parquet",
)
SOURCE = "pg19"
INFO = SourceInfo(SOURCE, "PG19", "emozilla/pg19", "FOLDER/data/train-00000-of-00023.parquet")
PREFIXES = {Split.train: "train", Split.heldout: "validation"}


class FinewebEdu:
    """FineWeb-Edu, a unit per file; the corpus' own ids.

    Args:
        config: Place and subset.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: the files cannot be listed or read; says what to do.
    """

    sources = (FINEWEB_EDU_SOURCE,)

    def __init__(
        self, config: FinewebEduConfig, *, heldout_fraction: float = HELDOUT_FRACTION
    ) -> None:
        self.heldout_fraction = heldout_fraction
        self._files = parquet_files(FINEWEB_EDU_INFO, config.root, config.revision, config.subset)

    def units(self) -> Sequence[Unit]:
        """A unit per file."""
        return [
            Unit(f"{FINEWEB_EDU_SOURCE}/{file.path}", FINEWEB_EDU_SOURCE, file.size_bytes)
            for file in self._files.files
        ]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Pages of one file."""
        path = unit.name.removeprefix(f"{FINEWEB_EDU_SOURCE}/")
        for row, record in parquet_records(
            self._files.location(path), ["text"], skipped, optional=["id"]
        ):
            text = usable_text(record["text"], skipped)
            if text is not None:
                doc_id = (
                    f"{FINEWEB_EDU_SOURCE}/{record['id']}" if record["id"] else f"{unit.name}:{row}"
                )
                yield Document(doc_id, text, FINEWEB_EDU_SOURCE, "web")

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split."""
        return source_documents(self, split, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()


class Pg19:
    """PG19, a unit per train file; ids are ``pg19/<split>/<number> <title>`` with Project
    Gutenberg's number.

    Args:
        config: Place.

    Raises:
        ConfigError: the files cannot be listed or read; says what to do.
    """

    sources = (SOURCE,)
    heldout_fraction = 0.0  # of the train books: the held-out split is the validation books

    def __init__(self, config: Pg19Config) -> None:
        self._files = parquet_files(INFO, config.root, config.revision, "")

    def units(self) -> Sequence[Unit]:
        """A unit per train file."""
        return self._split_units(Split.train)

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Books of one file."""
        path = unit.name.removeprefix(f"{SOURCE}/")
        split = path.rpartition("/")[2].partition("-")[0]
        columns = ("url", "short_book_title")
        for row, record in parquet_records(
            self._files.location(path), ["text"], skipped, optional=columns
        ):
            text = usable_text(record["text"], skipped)
            if text is None:
                continue
            number, title = (str(record[column] or "") for column in columns)
            name = f"{number.rstrip('/').rpartition('/')[2] or f'{path}:{row}'} {title}".strip()
            yield Document(f"{SOURCE}/{split}/{name}", text, SOURCE, "books")

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Books of the train or of the validation split."""
        skipped = Counter() if skipped is None else skipped
        for unit in self._split_units(split):
            yield from self.read(unit, skipped)

    def describe(self) -> dict[str, Any]:
        """Place and listing."""
        return self._files.describe()

    def _split_units(self, split: Split) -> list[Unit]:
        """Units of the files of one split."""
        files = [file for file in self._files.files if _is_of(file.path, split)]
        return [Unit(f"{SOURCE}/{file.path}", SOURCE, file.size_bytes) for file in files]


def _is_of(path: str, split: Split) -> bool:
    """Whether a file's name starts with the name of the split."""
    return path.rpartition("/")[2].startswith(PREFIXES[split])
