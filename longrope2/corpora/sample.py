"""The offline sample corpus: the standard library's sources and the topics that ``help()`` shows.

The split goes by the names, as it did when the shipped miniature was trained on this corpus: what
is held out must be text that it has not seen. No text that equals a held-out one is in the train
split, whatever its name.

Packages that distributions leave out, split off or generate per machine are skipped, so machines
with the same Python version agree; the manifest records the version and a hash of all text.
"""

import hashlib
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from longrope2.corpora.config import HELDOUT_FRACTION
from longrope2.corpora.corpus import Document, Split, Unit, content_hash, stable_fraction
from longrope2.corpora.losses import Losses

MODULES_SOURCE = "stdlib_modules"
TOPICS_SOURCE = "stdlib_topics"
NAMES_PER_UNIT = 50
# Tests and bundled packages; parts that Debian ships separately; tables of numbers (encodings); the
# topics themselves.
SKIPPED_FOLDERS = frozenset(
    """
    test tests idle_test idlelib lib2to3 site-packages dist-packages __pycache__ ensurepip
    distutils tkinter turtledemo encodings pydoc_data lib-dynload
    """.split()
)
SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize", "turtle")


class SampleCorpus:
    """Standard-library modules and documentation topics (``corpus=sample``)."""

    sources = (MODULES_SOURCE, TOPICS_SOURCE)
    heldout_fraction = 0.0  # by the text; ``reserved`` draws by name

    def __init__(self, *, heldout_fraction: float = HELDOUT_FRACTION) -> None:
        self._reserved_fraction = heldout_fraction

    def units(self) -> Sequence[Unit]:
        """Groups of ``NAMES_PER_UNIT`` names, sorted."""
        return [
            Unit(f"{source}/{start // NAMES_PER_UNIT:03d}", source)
            for source in self.sources
            for start in range(0, len(self._names[source]), NAMES_PER_UNIT)
        ]

    def read(self, unit: Unit, skipped: Losses) -> Iterator[Document]:
        """Documents of one group, sorted by name."""
        start = int(unit.name.rpartition("/")[2]) * NAMES_PER_UNIT
        for name in self._names[unit.source][start : start + NAMES_PER_UNIT]:
            text = _module_text(name) if unit.source == MODULES_SOURCE else _topics()[name]
            if text.strip():
                domain = _domain(unit.source, name)
                yield Document(f"{unit.source}/{name}", text, unit.source, domain)
            else:
                skipped["empty text"] += 1

    def documents(self, split: Split, skipped: Losses | None = None) -> Iterator[Document]:
        """Documents of one split, sorted by id; ``skipped`` gets what ``read`` counts."""
        skipped = Losses() if skipped is None else skipped
        if split is Split.heldout:
            yield from (d for d in self._all(skipped) if self._is_reserved(d))
            return
        reserved = {content_hash(document.text) for document in self.reserved()}
        for document in self._all(skipped):
            if not self._is_reserved(document):
                is_copy = content_hash(document.text) in reserved
                if (split is Split.unused) is is_copy:
                    yield document

    def reserved(self) -> Iterator[Document]:
        """The held-out documents, drawn by name."""
        return self.documents(Split.heldout)

    def _all(self, skipped: Losses) -> Iterator[Document]:
        for unit in self.units():
            yield from self.read(unit, skipped)

    def _is_reserved(self, document: Document) -> bool:
        return stable_fraction("split", document.doc_id) < self._reserved_fraction

    def describe(self) -> dict[str, Any]:
        """Python version, number of documents and a SHA-256 over all ids and texts."""
        digest, num_documents = hashlib.sha256(), 0
        for unit in self.units():
            for document in self.read(unit, Losses()):
                digest.update(f"{document.doc_id}\0{document.text}\0".encode())
                num_documents += 1
        python, sha256 = platform.python_version(), digest.hexdigest()
        return {"python": python, "num_documents": num_documents, "sha256": sha256}

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {MODULES_SOURCE: sorted(_module_names()), TOPICS_SOURCE: sorted(_topics())}


def _module_names() -> Iterator[str]:
    root = _library_folder()
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        skipped = SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith(SKIPPED_FILES)
        if not skipped and not parts[0].startswith("config-"):
            yield "/".join(parts)


def _library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _domain(source: str, name: str) -> str:
    """The package of a module; one domain for all topics."""
    if source == TOPICS_SOURCE:
        return "reference"
    return name.split("/")[0] if "/" in name else "modules"


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _module_text(name: str) -> str:
    """Text of a module in the encoding that it declares."""
    with tokenize.open(_library_folder() / name) as handle:
        return handle.read()
