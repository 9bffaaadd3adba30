"""Whether files of a product are still what was written: the one owner of that comparison.

A manifest lists the SHA-256 of its product's files. Whoever reads one of them asks here first, and
whoever calls a product complete. A file whose size and times are those it was hashed with is not
read again (``folder_hashes.py``); any other is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope2.errors import DamagedError
from longrope2.files.artifacts import MANIFEST_NAME
from longrope2.files.checked import read_object
from longrope2.files.folder_hashes import cache_folder, sha256_of_files

_MOST_NAMED = 3


def changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """What differs from a manifest's ``files``, a phrase for each file; none where nothing does.

    Args:
        folder: Of the product.
        files: Name below it -> SHA-256, as it was written.
    """
    faults = [f"{folder / name} is missing" for name in files if not (folder / name).is_file()]
    present = [name for name in files if (folder / name).is_file()]
    try:
        hashes = sha256_of_files(folder, present, cache_folder())
    except OSError as error:
        return [*faults, f"{error.filename} cannot be read: {error.strerror}"]
    changed = [name for name in present if hashes[name] != files[name]]
    return faults + [f"{folder / name} is not as it was written (SHA-256)" for name in changed]


def require_unchanged(folder: Path, files: Mapping[str, str], way_out: str) -> None:
    """Refuse a product whose files are not what its manifest lists.

    Raises:
        DamagedError: names the files; ``way_out`` says what to do.
    """
    if faults := changed_files(folder, files):
        more = len(faults) - _MOST_NAMED
        also = f"; and {more} more" if more > 0 else ""
        raise DamagedError(f"{'; '.join(faults[:_MOST_NAMED])}{also}: {way_out}")


def require_as_listed(path: Path, way_out: str) -> None:
    """The same of one file, by the manifest beside it.

    Without a manifest that lists it there is nothing to compare with: its stage has not ended, or
    it comes from elsewhere.

    Raises:
        DamagedError: it is not as listed, or the manifest cannot be read.
    """
    beside = path.parent / MANIFEST_NAME
    if not beside.is_file():
        return
    content = read_object(beside, "a manifest", f"bring it back, or remove it; {way_out}")
    files: Any = content.get("files")
    if isinstance(files, dict) and isinstance(files.get(path.name), str):
        require_unchanged(path.parent, {path.name: files[path.name]}, way_out)
