"""A folder of your own files: .txt (a document each), .jsonl and .parquet (one per record).

Files of other endings that are plain text are a document each too, where
``corpus.more_text_endings`` names them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longrope2.corpora import records
from longrope2.corpora.config import HELDOUT_FRACTION
from longrope2.corpora.corpus import Document, Split, Unit, split_documents
from longrope2.corpora.remote import line_ranges, ranged_name, split_ranged_name
from longrope2.errors import ConfigError
from longrope2.files.folder_hashes import cache_folder, sha256_of_files

SOURCE = "folder"
PLAIN_TEXT_ENDINGS = (".md", ".markdown", ".rst", ".text")
"""Of files that are plain text whatever they are called; others are for the user to say."""


def count_ignored(folder: Path, more_text_endings: Sequence[str] = ()) -> dict[str, int]:
    """Ending -> files below a folder that are not read because of it; hidden ones do not count."""
    suffixes = _suffixes(more_text_endings)
    counts: Counter[str] = Counter()
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and not path.name.endswith(suffixes) and path.is_file():
            packed = path.suffix in records.PACKED
            ending = "".join(path.suffixes[-2:] if packed else path.suffixes[-1:])
            counts[ending or "without ending"] += 1
    return dict(sorted(counts.items()))


def _suffixes(more_text_endings: Sequence[str]) -> tuple[str, ...]:
    """Endings of all files that are read."""
    texts = _text_suffixes(more_text_endings)
    return (*texts, *records.JSON_SUFFIXES, *records.PARQUET_SUFFIXES)


def _text_suffixes(more_text_endings: Sequence[str]) -> tuple[str, ...]:
    """Endings of files that are one document each, packed ones too."""
    more = [f"{end}{packed}" for end in more_text_endings for packed in ("", *records.PACKED)]
    return (*records.TEXT_SUFFIXES, *more)


def _nothing_to_read(folder: Path, suffixes: Sequence[str], more: Sequence[str]) -> str:
    """The fault of a folder without a file that is read: all endings that are, and those found."""
    fault = f"corpus.folder={folder} holds no file ending in {', '.join(suffixes)}"
    if others := [ending for ending in PLAIN_TEXT_ENDINGS if ending not in more]:
        fault += f"; {', '.join(others)} are read where corpus.more_text_endings names them, as it "
        fault += "does after launch.init"
    ignored = count_ignored(folder, more)
    if not ignored:
        return f"{fault}; it holds no file at all"
    texts = [ending for ending in ignored if ending in others]
    way_out = "corpus.more_text_endings names those that are plain text"
    if texts:
        way_out = f"corpus.more_text_endings=[{','.join(texts)}] reads those"
    there = ", ".join(f"{number} {ending}" for ending, number in ignored.items())
    return f"{fault}; it holds {there} ({way_out})"


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
        ConfigError: the folder does not exist or holds no file of a known kind, or the first record
            of a file has no such field.
    """

    sources = (SOURCE,)

    def __init__(
        self,
        folder: str,
        *,
        text_field: str,
        title_field: str | None = None,
        more_text_endings: Sequence[str] = (),
        heldout_fraction: float = HELDOUT_FRACTION,
    ) -> None:
        self.heldout_fraction = heldout_fraction
        self._folder = Path(folder)
        self._text_field, self._title_field = text_field, title_field
        if not self._folder.is_dir():
            raise ConfigError([f"corpus.folder={folder} is not a folder"])
        self._text_suffixes = _text_suffixes(more_text_endings)
        suffixes = _suffixes(more_text_endings)
        found = (path for path in self._folder.rglob("*") if path.name.endswith(suffixes))
        self._files = sorted(path for path in found if path.is_file())
        if not self._files:
            raise ConfigError([_nothing_to_read(self._folder, suffixes, more_text_endings)])
        if faults := list(self._field_faults()):
            raise ConfigError(faults)

    def units(self) -> Sequence[Unit]:
        """A unit per file, sorted by path; a large .jsonl file is several, ranges of its bytes."""
        units = []
        for path in self._files:
            name, size = self._name(path), path.stat().st_size
            domain, spans = _domain(name), line_ranges(name, size)
            if not spans:
                units.append(Unit(name, SOURCE, size, domain))
            for start, end in spans:
                units.append(Unit(ranged_name(name, (start, end)), SOURCE, end - start, domain))
        return units

    def read(self, unit: Unit, skipped: Counter[str]) -> Iterator[Document]:
        """Documents of one file."""
        name, span = split_ranged_name(unit.name)
        domain, path = _domain(name), self._folder / name
        if path.name.endswith(self._text_suffixes):
            text = records.whole_text(str(path), skipped)
            if text is not None:
                yield Document(f"{SOURCE}/{name}", text, SOURCE, domain)
            return
        for number, record in self._records(path, skipped, span):
            text = records.usable_text(record.get(self._text_field), skipped)
            if text is not None:
                title = None if self._title_field is None else record.get(self._title_field)
                suffix = f" {title}".rstrip() if isinstance(title, str) else ""
                yield Document(f"{SOURCE}/{name}:{number}{suffix}", text, SOURCE, domain)

    def documents(self, split: Split, skipped: Counter[str] | None = None) -> Iterator[Document]:
        """Documents of one split, file by file."""
        return split_documents(self, split, skipped)

    def reserved(self) -> Iterator[Document]:
        """None: the split goes by the text."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """Folder and SHA-256 of every file."""
        names = [self._name(path) for path in self._files]
        files = sha256_of_files(self._folder, names, cache_folder())
        return {"folder": str(self._folder), "files": files}

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _records(
        self, path: Path, skipped: Counter[str], span: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if path.name.endswith(records.PARQUET_SUFFIXES):
            titles = [] if self._title_field is None else [self._title_field]
            return records.parquet_records(str(path), [self._text_field], skipped, optional=titles)
        return records.json_records(str(path), skipped, span=span)

    def _field_faults(self) -> Iterator[str]:
        """Files whose first record lacks text or title: a wrong key, not a faulty record."""
        for path in self._files:
            if path.name.endswith(self._text_suffixes):
                continue
            skipped: Counter[str] = Counter()
            _, record = next(iter(self._records(path, skipped)), (0, None))
            for key, name in (("text_field", self._text_field), ("title_field", self._title_field)):
                if name is None:
                    continue
                lacks = record is not None and not isinstance(record.get(name), str)
                if lacks or f"no column {name}" in skipped:
                    missing = f"the first record has no text in field {name!r}"
                    yield f"{path}: {missing}; set corpus.{key}"
