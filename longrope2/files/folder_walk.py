"""All files below a folder, each once: links are followed, loops are not, hidden files stand aside.

What is found does not depend on the order in which a file system lists it. Real folders come first,
links to folders after them in the order of their names; a folder that was walked already, by
whatever name, is not walked again, and neither is one that holds the link itself.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOOP = "link to a folder that holds it"
TWICE = "link to a folder that is read under another name"
BROKEN = "link to nothing"
NO_FILE = "neither file nor folder"


@dataclass(frozen=True)
class FolderWalk:
    """What stands below a folder; paths below it with "/", sorted."""

    files: tuple[str, ...]
    hidden: tuple[str, ...]
    """Files whose name, or that of a folder above them, starts with a dot."""
    aside: dict[str, int]
    """Reason -> other entries that are not read."""


def walk_folder(folder: Path) -> FolderWalk:
    """Walk ``folder``; inside hidden folders links are not followed.

    Raises:
        OSError: a folder cannot be listed.
    """
    files: dict[bool, list[str]] = {False: [], True: []}
    aside: Counter[str] = Counter()
    seen: set[str] = set()
    folders, links = [""], []
    while folders or links:
        links.sort()
        name = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder / name)
        if real in seen:
            aside[TWICE] += 1
            continue
        seen.add(real)
        for entry in _entries(folder / name):
            below = f"{name}/{entry.name}".lstrip("/")
            is_hidden = any(part.startswith(".") for part in below.split("/"))
            match _kind(entry, real):
                case "file":
                    files[is_hidden].append(below)
                case "folder":
                    folders.append(below)
                case "link":
                    links += [] if is_hidden else [below]
                case reason:
                    aside[reason] += 0 if is_hidden else 1
    return FolderWalk(tuple(sorted(files[False])), tuple(sorted(files[True])), dict(+aside))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from entries


def _kind(entry: os.DirEntry[str], holder: str) -> str:
    """``file``, ``folder``, ``link`` (to a folder), or why an entry is not read.

    ``holder``: real path of the folder that it stands in.
    """
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    try:
        if entry.is_file():
            return "file"
        is_folder = entry.is_dir()
    except OSError:  # a link to itself
        return BROKEN
    if not is_folder:
        return BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else NO_FILE
    target = os.path.realpath(entry.path)
    return LOOP if os.path.commonpath([target, holder]) == target else "link"
