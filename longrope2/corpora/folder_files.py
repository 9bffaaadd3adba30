"""Which files of a folder are read, and which are not: one answer for all who look at it.

A file is read by what its name ends in, in small letters or large; hidden ones are not, and of
``.json`` files only those with a record per line (others describe something, or are one array).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope2.corpora import records
from longrope2.corpora.decoding import PACKED, packing_of
from longrope2.corpora.losses import printable
from longrope2.errors import ConfigError
from longrope2.files.folder_walk import walk_folder

PLAIN_TEXT_ENDINGS = (".md", ".markdown", ".rst", ".text")
"""Of files that are plain text whatever they are called; others are for the user to say."""
HIDDEN = "hidden"
NO_LINES = "without a record per line"


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder."""

    read: dict[str, str]
    """Name of each that is read, for ids and manifests, sorted -> its path below the folder.

    They differ where a path is no UTF-8: its other bytes are spelt (``caf\\\\xe9.txt``).
    """
    ignored: dict[str, int]
    """Ending -> files that are not read because of it."""
    aside: dict[str, int]
    """Other reasons -> files, links and folders that are not read."""


def list_folder(
    folder: Path, *, text_endings: Sequence[str], text_fields: Sequence[str]
) -> FolderFiles:
    """The files of a folder.

    Args:
        folder: Where they are.
        text_endings: Endings of plain text beside .txt (``corpus.more_text_endings``).
        text_fields: Fields that hold the text of a record.

    Raises:
        ConfigError: two paths have one name.
        OSError: a folder or file cannot be read.
    """
    walk, suffixes = walk_folder(folder), all_suffixes(text_endings)
    read: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    aside = Counter(walk.aside)
    aside[HIDDEN] = sum(has_ending(name, suffixes) for name in walk.hidden)
    for path in walk.files:
        name = printable(path)
        if not has_ending(name, suffixes):
            ignored[_ending(name)] += 1
        elif _says_lines(name) or records.starts_with_records(str(folder / path), text_fields):
            if name in read:
                twice = f"corpus.folder={folder}: two files have the name {name}"
                raise ConfigError([f"{twice} when bytes that are no UTF-8 are spelt; rename one"])
            read[name] = path
        else:
            ignored[f"{_ending(name)} {NO_LINES}"] += 1
    return FolderFiles(dict(sorted(read.items())), dict(sorted(ignored.items())), dict(+aside))


def all_suffixes(text_endings: Sequence[str]) -> tuple[str, ...]:
    """Endings of all files that are read."""
    return (*text_suffixes(text_endings), *records.JSON_SUFFIXES, *records.PARQUET_SUFFIXES)


def text_suffixes(text_endings: Sequence[str]) -> tuple[str, ...]:
    """Endings of files that are one document each, packed ones too."""
    more = [f"{end.lower()}{packed}" for end in text_endings for packed in ("", *PACKED)]
    return (*records.TEXT_SUFFIXES, *more)


def has_ending(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a name ends in one of the suffixes, which are in small letters."""
    return name.lower().endswith(tuple(suffixes))


def nothing_to_read(folder: Path, files: FolderFiles, text_endings: Sequence[str]) -> str:
    """The fault of a folder without a file that is read: all endings that are, and those found."""
    suffixes = ", ".join(all_suffixes(text_endings))
    fault = f"corpus.folder={folder} holds no file ending in {suffixes}"
    if others := [ending for ending in PLAIN_TEXT_ENDINGS if ending not in text_endings]:
        fault += f"; {', '.join(others)} are read where corpus.more_text_endings names them, as it "
        fault += "does after launch.init"
    if not files.ignored and not files.aside:
        return f"{fault}; it holds no file at all"
    texts = [ending for ending in files.ignored if ending in others]
    way_out = "corpus.more_text_endings names those that are plain text"
    if texts:
        way_out = f"corpus.more_text_endings=[{','.join(texts)}] reads those"
    there = ", ".join(f"{n} {what}" for what, n in [*files.ignored.items(), *files.aside.items()])
    return f"{fault}; it holds {there} ({way_out})"


def _says_lines(name: str) -> bool:
    """Whether a file is read by its name alone."""
    packing = packing_of(name)
    return not name.lower().removesuffix(packing).endswith(".json")


def _ending(name: str) -> str:
    """What a name ends in, as messages count it: ``.md``, ``.md.gz``."""
    suffixes = Path(name).suffixes
    ending = "".join(suffixes[-2:] if packing_of(name) else suffixes[-1:]).lower()
    return ending or "without ending"
