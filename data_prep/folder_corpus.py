"""A folder of your own files: .txt (a document each), .jsonl, .jsonl.gz and .parquet (a document per record)."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.corpora import HELDOUT_FRACTION, Document, Split, Unit, split_documents
from longrope2.artifacts import sha256_of_file
from longrope2.errors import ConfigError, DataError

__all__ = ["FolderCorpus"]

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
SOURCE = "folder"


class FolderCorpus:
    """All usable files below a folder (``corpus=folder corpus.folder=PATH``).

    The id of a document is the file's path below the folder, and the record's number where a file holds several; with
    ``title_field`` the record's title follows.

    Args:
        folder: The folder.
        text_field: Field that holds the text in .jsonl and .parquet records.
        title_field: Field of such records that holds a title, or None.
        heldout_fraction: Share of documents held out, 0 to 1.

    Raises:
        ConfigError: the folder does not exist or holds no file of a known kind.
    """

    sources = (SOURCE,)

    def __init__(
        self,
        folder: str,
        *,
        text_field: str,
        title_field: str | None = None,
        heldout_fraction: float = HELDOUT_FRACTION,
    ) -> None:
        self.heldout_fraction = heldout_fraction
        self._folder = Path(folder)
        self._text_field = text_field
        self._title_field = title_field
        if not self._folder.is_dir():
            raise ConfigError([f"corpus.folder={folder} is not a folder"])
        self._files = sorted(p for p in self._folder.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        if not self._files:
            raise ConfigError([f"corpus.folder={folder} holds no file ending in {', '.join(SUFFIXES)}"])

    def units(self) -> Sequence[Unit]:
        """A unit per file, sorted by path."""
        return [Unit(self._name(path), SOURCE, path.stat().st_size) for path in self._files]

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Documents of one file.

        Raises:
            DataError: a file cannot be read, or a record has no text field; names file and record.
        """
        domain = unit.name.split("/")[0] if "/" in unit.name else "files"
        for suffix, text in self._texts(self._folder / unit.name):
            if text.strip():
                yield Document(f"{SOURCE}/{unit.name}{suffix}", text, SOURCE, domain)
            else:
                skipped["empty text"] += 1

    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of one split, file by file."""
        return split_documents(self, split)

    def describe(self) -> dict[str, Any]:
        """Folder and SHA-256 of every file."""
        files = {self._name(path): sha256_of_file(path) for path in self._files}
        return {"folder": str(self._folder), "files": files}

    def _name(self, path: Path) -> str:
        """Path below the folder."""
        return path.relative_to(self._folder).as_posix()

    def _texts(self, path: Path) -> Iterator[tuple[str, str]]:
        """Every text of a file with the suffix of its id."""
        try:
            if path.suffix == ".txt":
                yield "", path.read_text(encoding="utf-8")
            else:
                fields = {"text_field": self._text_field, "title_field": self._title_field}
                for number, record in enumerate(_records(path, fields)):
                    text, title = (_text_in(record, key, name, path, number) for key, name in fields.items())
                    yield f":{number} {title}".rstrip(), text
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def _text_in(record: Any, key: str, name: str | None, path: Path, number: int) -> str:
    """Text of one field of a record; empty where no field is asked for."""
    text = record.get(name) if isinstance(record, dict) and name is not None else None
    if name is not None and not isinstance(text, str):
        raise DataError(f"{path}: record {number} has no text in field {name!r}; set corpus.{key}")
    return text or ""


def _records(path: Path, fields: dict[str, str | None]) -> Iterator[Any]:
    """Records of a .jsonl, .jsonl.gz or .parquet file, one at a time; ``fields`` maps configuration keys to fields."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(path)
        for key, name in fields.items():
            if name is not None and name not in file.schema_arrow.names:
                raise DataError(f"{path} has no column {name!r}; set corpus.{key}")
        for batch in file.iter_batches(batch_size=256, columns=[name for name in fields.values() if name is not None]):
            yield from batch.to_pylist()
        return
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as handle:
        yield from (json.loads(line) for line in handle if line.strip())
