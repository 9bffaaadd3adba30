"""The offline sample corpus: text that every Python machine has.

``stdlib_modules`` holds the sources of the standard library, ``stdlib_topics`` the language reference that ``help()``
shows. Packages that distributions leave out, split off or generate per machine are skipped, so machines with the same
Python version agree; the manifest records the version and a hash of all text.
"""

import hashlib
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.corpora import Document, Split, split_of

__all__ = ["SampleCorpus"]

MODULES_SOURCE = "stdlib_modules"
TOPICS_SOURCE = "stdlib_topics"
# Tests and bundled packages; parts that Debian ships separately; tables of numbers (encodings); the topics themselves.
SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__", "ensurepip",
    "distutils", "tkinter", "turtledemo", "encodings", "pydoc_data", "lib-dynload",
})  # fmt: skip
SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize", "turtle")


class SampleCorpus:
    """Standard-library modules and documentation topics (``corpus=sample``)."""

    sources = (MODULES_SOURCE, TOPICS_SOURCE)

    def documents(self, split: Split) -> Iterator[Document]:
        """Documents of one split, sorted by id."""
        return (document for document in self._all if split_of(document.doc_id) is split)

    def describe(self) -> dict[str, Any]:
        """Python version, number of documents and a SHA-256 over all ids and texts."""
        digest = hashlib.sha256()
        for document in self._all:
            digest.update(f"{document.doc_id}\0{document.text}\0".encode())
        return {"python": platform.python_version(), "num_documents": len(self._all), "sha256": digest.hexdigest()}

    @cached_property
    def _all(self) -> list[Document]:
        documents = [*_module_documents(), *_topic_documents()]
        return sorted((d for d in documents if d.text.strip()), key=lambda document: document.doc_id)


def _module_documents() -> Iterator[Document]:
    """One document per module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        skipped = SKIPPED_FOLDERS.intersection(parts) or parts[-1].startswith(SKIPPED_FILES)
        if skipped or parts[0].startswith("config-"):
            continue
        name = "/".join(parts)
        domain = parts[0] if len(parts) > 1 else "modules"
        yield Document(f"{MODULES_SOURCE}/{name}", _read_source(path), MODULES_SOURCE, domain)


def _topic_documents() -> Iterator[Document]:
    """One document per topic of the language reference."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(f"{TOPICS_SOURCE}/{name}", text, TOPICS_SOURCE, "reference")


def _read_source(path: Path) -> str:
    """Text of a Python file in the encoding that it declares."""
    with tokenize.open(path) as handle:
        return handle.read()
