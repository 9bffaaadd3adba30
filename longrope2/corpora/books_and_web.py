"""FineWeb-Edu and PG19: parquet files of the hub or a mirror.

FineWeb-Edu has the columns text, id, dump, url, file_path, language, language_score, token_count,
...; PG19 (a parquet mirror: the dataset itself is a loading script) short_book_title,
publication_date, url, text.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from longrope2.corpora.config import FinewebEduConfig, Pg19Config
from longrope2.corpora.corpus import Document, Unit
from longrope2.corpora.document_ids import name_in_id, with_unique_ids
from longrope2.corpora.losses import Losses
from longrope2.corpora.records import parquet_records, usable_text
from longrope2.corpora.remote import FileCorpus, SourceInfo, StoredFile, one_by_one, parquet_files

PAGES_LAYOUT = "FOLDER/sample/10BT/000_00000.parquet"
FINEWEB_EDU = SourceInfo("fineweb_edu", "FineWeb-Edu", "HuggingFaceFW/fineweb-edu", PAGES_LAYOUT)
PG19 = SourceInfo("pg19", "PG19", "emozilla/pg19", "FOLDER/data/train-00000-of-00023.parquet")


def fineweb_edu(
    config: FinewebEduConfig, heldout_fraction: float, recorded: Sequence[str] = ()
) -> FileCorpus:
    """FineWeb-Edu, a unit per file; the corpus' own ids. ``recorded``: columns for filters."""
    files = parquet_files(FINEWEB_EDU, config.root, config.revision, config.subset)
    key, groups = FINEWEB_EDU.key, one_by_one(files.files)
    reader = partial(_read_pages, tuple(recorded))
    return FileCorpus(key, files, groups, reader, heldout_fraction=heldout_fraction)


def _read_pages(
    recorded: Sequence[str], unit: Unit, own: Sequence[StoredFile], skipped: Losses
) -> Iterator[Document]:
    return with_unique_ids(_pages(recorded, unit, own, skipped), skipped)


def _pages(
    recorded: Sequence[str], unit: Unit, own: Sequence[StoredFile], skipped: Losses
) -> Iterator[Document]:
    optional = ["id", *recorded]
    for row, record in parquet_records(own[0].location, ["text"], skipped, optional=optional):
        text = usable_text(record["text"], skipped)
        if text is not None:
            own_id = name_in_id(str(record["id"] or ""))
            doc_id = f"{unit.source}/{own_id}" if own_id else f"{unit.name}:{row}"
            told = {name: record[name] for name in recorded}
            yield Document(doc_id, text, unit.source, "web", recorded=told)


def pg19(config: Pg19Config) -> FileCorpus:
    """PG19, a unit per file; ids are ``pg19/<split>/<number> <title>`` with Gutenberg's number.

    The split is the corpus' own: train books are packed, validation books are held out for search
    and evaluation (the paper's needle search draws on them), test books are never read.
    """
    files = parquet_files(PG19, config.root, config.revision, "")
    train, validation = (
        one_by_one([file for file in files.files if _file_name(file).startswith(split)])
        for split in ("train", "validation")
    )
    return FileCorpus(
        PG19.key, files, train, _read_books, heldout_fraction=0.0, own_heldout=validation
    )


def _file_name(file: StoredFile) -> str:
    return file.path.rpartition("/")[2]


def _read_books(unit: Unit, own: Sequence[StoredFile], skipped: Losses) -> Iterator[Document]:
    return with_unique_ids(_books(unit, own, skipped), skipped)


def _books(unit: Unit, own: Sequence[StoredFile], skipped: Losses) -> Iterator[Document]:
    columns, split = ("url", "short_book_title"), _file_name(own[0]).partition("-")[0]
    for row, record in parquet_records(own[0].location, ["text"], skipped, optional=columns):
        text = usable_text(record["text"], skipped)
        if text is not None:
            url, title = (name_in_id(str(record[column] or "")) for column in columns)
            number = url.rstrip("/").rpartition("/")[2] or f"{own[0].path}:{row}"
            name = f"{number} {title}".strip()
            yield Document(f"{unit.source}/{split}/{name}", text, unit.source, "books")
