"""Ids of documents that their records name: the one rule that keeps them apart.

Ids that adapters make themselves, of a file's name and a row, are different by that. What a record
brings (a page's id, a book's title, a repository's name) may stand twice, be no text, or look like
the id of a part: ``NAME#3`` is the fourth part of the document NAME where that is cut. Such ids are
changed, the same way in every reading, and all others stay as they are.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b

from longrope2.corpora.corpus import Document
from longrope2.corpora.losses import Losses

MOST_CHARACTERS = 300  # of what a record names; more is cut
CHANGED = "id that stands twice, numbered (kept)"
_LIKE_A_PART = re.compile(r"#\d+\Z")


def name_in_id(value: str) -> str:
    """What a record names as one short line: white space closed up, what cannot be shown spelt."""
    line = " ".join(value[: 4 * MOST_CHARACTERS].split())[:MOST_CHARACTERS]
    if line.isprintable():
        return line
    spelt = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return "".join(spelt)


def with_unique_ids(documents: Iterator[Document], skipped: Losses) -> Iterator[Document]:
    """Documents of one unit; the second with the same id gets " (2)" behind it, and so on.

    Memory: about 80 bytes a document of the unit.
    """
    last: dict[bytes, int] = {}  # hash of an id -> the number that its latest double got
    for document in documents:
        doc_id = document.doc_id
        if _LIKE_A_PART.search(doc_id):
            doc_id += " (1)"
        unique, number = doc_id, last.get(_hash(doc_id), 0) + 1
        while number > 1 and _hash(unique) in last:
            unique = f"{doc_id} ({number})"
            number += 1
        if number > 1:
            skipped[CHANGED] += 1
            last[_hash(doc_id)] = number - 1
        last[_hash(unique)] = 1
        yield document if unique == document.doc_id else replace(document, doc_id=unique)


def _hash(doc_id: str) -> bytes:
    return blake2b(doc_id.encode(), digest_size=8).digest()
