"""A folder of your own files: .txt (a document each), .jsonl and .parquet (one per record).

Files of other endings that are plain text are a document each too, where
``corpus.more_text_endings`` names them. Which files count is said by ``folder_files.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from longrope2.corpora import records
from longrope2.corpora.config import HELDOUT_FRACTION
from longrope2.corpora.corpus import Document, Split, Unit, split_documents
from longrope2.corpora.document_ids import name_in_id
from longrope2.corpora.folder_files import has_ending, list_folder, nothing_to_read, text_suffixes
from longrope2.corpora.losses import Losses
from longrope2.corpora.remote import column_names, line_ranges, ranged_name, split_ranged_name
from longrope2.errors import ConfigError
from longrope2.files.folder_hashes import cache_folder, sha256_of_files

SOURCE = "folder"
FIRST_RECORDS = 100  # of a file, one of which must have a text, or the key is wrong
MOST_FIELDS = 12  # named in a message


def _domain(name: str) -> str:
    """The uppermost folder of a file; one domain for those that stand in none."""
    return name.split("/")[0] if "/" in name else "files"


class FolderCorpus:
    """All usable files below a folder (``corpus=folder corpus.folder=PATH``).

    The id of a document is the file's path below the folder, and the record's row or line where a
    file holds several (the first byte of the line in a .jsonl file that is large enough to be read
    in ranges); with ``title_field`` the record's title follows. The other arguments are those of
    ``CorpusConfig``.

    Raises:
        ConfigError: the folder does not exist or holds no file of a known kind, or the first
            records of a file have no such field.
    """

    sources = (SOURCE,)

    def __init__(
        self,
        folder: str,
        *,
        text_field: str,
        more_text_fields: Sequence[str] = (),
        title_field: str | None = None,
        more_text_endings: Sequence[str] = (),
        heldout_fraction: float = HELDOUT_FRACTION,
    ) -> None:
        self.heldout_fraction = heldout_fraction
        self._folder = Path(folder)
        self._text_fields, self._title_field = (text_field, *more_text_fields), title_field
        if not self._folder.is_dir():
            raise ConfigError([f"corpus.folder={folder} is not a folder"])
        self._text_suffixes = text_suffixes(more_text_endings)
        found = list_folder(
            self._folder, text_endings=more_text_endings, text_fields=self._text_fields
        )
        if not found.read:
            raise ConfigError([nothing_to_read(self._folder, found, more_text_endings)])
        self._files: Mapping[str, str] = found.read
        if faults := list(self._field_faults()):
            raise ConfigError(faults)

    def units(self) -> Sequence[Unit]:
        """A unit per file, sorted by path; a large .jsonl file is several, ranges of its bytes."""
        units = []
        for name, path in self._files.items():
            size = (self._folder / path).stat().st_size
            domain, spans = _domain(name), line_ranges(name, size)
            if not spans:
                units.append(Unit(name, SOURCE, size, domain))
            for start, end in spans:
                units.append(Unit(ranged_name(name, (start, end)), SOURCE, end - start, domain))
        return units

    def read(self, unit: Unit, skipped: Losses) -> Iterator[Document]:
        """Documents of one file."""
        name, span = split_ranged_name(unit.name)
        domain = _domain(name)
        if has_ending(name, self._text_suffixes):
            text = records.whole_text(self._location(name), skipped)
            if text is not None:
                yield Document(f"{SOURCE}/{name}", text, SOURCE, domain)
            return
        for number, record in self._records(name, skipped, span):
            text = records.usable_text(self._text_of(record), skipped)
            if text is not None:
                title = None if self._title_field is None else record.get(self._title_field)
                suffix = f" {name_in_id(title)}".rstrip() if isinstance(title, str) else ""
                yield Document(f"{SOURCE}/{name}:{number}{suffix}", text, SOURCE, domain)

    def _text_of(self, record: Mapping[str, Any]) -> Any:
        """The first of the fields with text; without any, what is there in their place."""
        values = [record.get(field) for field in self._text_fields]
        texts = [value for value in values if isinstance(value, str)]
        return next((text for text in texts if text.strip()), next(iter(texts), None))

    def documents(self, split: Split, skipped: Losses | None = None) -> Iterator[Document]:
        """Documents of one split, file by file."""
        return split_documents(self, split, skipped)

    def reserved(self) -> Iterator[Document]:
        """None: the split goes by the text."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """Folder and SHA-256 of every file."""
        hashes = sha256_of_files(self._folder, list(self._files.values()), cache_folder())
        files = {name: hashes[path] for name, path in self._files.items()}
        return {"folder": str(self._folder), "files": files}

    def _location(self, name: str) -> str:
        return str(self._folder / self._files[name])

    def _records(
        self, name: str, skipped: Losses, span: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        location = self._location(name)
        if has_ending(name, records.PARQUET_SUFFIXES):
            titles = [] if self._title_field is None else [self._title_field]
            return records.parquet_records(location, self._text_fields, skipped, optional=titles)
        return records.json_records(location, skipped, span=span)

    def _field_faults(self) -> Iterator[str]:
        """Files whose first records all lack text or title: a wrong key, not faulty records."""
        for name in self._files:
            if not has_ending(name, self._text_suffixes):
                yield from self._faults_of(name)

    def _faults_of(self, name: str) -> Iterator[str]:
        skipped, seen = Losses(), dict.fromkeys(("text", "title"), False)
        fields: dict[str, None] = {}
        for _, record in islice(self._records(name, skipped), FIRST_RECORDS):
            title = self._title_field is None or record.get(self._title_field)
            seen["text"] |= isinstance(self._text_of(record), str)
            seen["title"] |= title is True or isinstance(title, str)
            if all(seen.values()):
                return
            fields |= dict.fromkeys(field for field, value in record.items() if value is not None)
        if not fields and not any(reason.startswith("no column") for reason in skipped):
            return  # empty, or damaged: reading it tells
        if has_ending(name, records.PARQUET_SUFFIXES):
            fields = dict.fromkeys(column_names(self._location(name)))
        there = ", ".join(map(name_in_id, [*fields][:MOST_FIELDS]))
        where = f"{self._folder / name}: its first records have no text in"
        if not seen["text"]:
            asked = " or ".join(map(repr, self._text_fields))
            keys = "corpus.text_field, or more_text_fields=[...] beside it"
            yield f"{where} {asked} (their fields: {there}); set {keys}"
        if not seen["title"]:
            yield f"{where} {self._title_field!r} (their fields: {there}); set corpus.title_field"
