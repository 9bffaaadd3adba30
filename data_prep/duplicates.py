"""Texts that are not packed: near duplicates, and what search and evaluation read.

Near duplicates (``documents.near_duplicates``) are found by MinHash across all sources: documents
in their order of choice, each dropped if one before it is similar. Costs about as much time as
tokenizing, half a kilobyte a document on disk, and memory for all signatures while choosing.

A cluster (documents that a chain of similar ones connects) lies in one split: where held-out text,
as search and evaluation will read it, is in it, none of its documents is packed.

``exclude=[FILE, ...]`` takes three kinds of file:

- ``.txt``: one entry a line, ``#`` starts a comment. 64 hexadecimal digits are the SHA-256 of a
  text in UTF-8; anything else is a document id or a title.
- ``.json`` / ``.jsonl``: any JSON (a list of books, a needle record, a manifest); every string
  under a key ``sha256``, ``text_sha256``, ``doc_id``, ``doc_ids`` or ``title`` counts as an entry
  of the kind above.
- a folder: the SHA-256 and the name of every ``.txt`` in it.

A title matches a document whose id ends in it (``books/Moby Dick.txt``, ``pg19/train/2701 Moby
Dick``), whatever the case.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.token_files import HASH_BYTES
from longrope2.errors import ConfigError
from longrope2.files.artifacts import sha256_of_file

NUM_PERMUTATIONS = 128
SIGNATURE_BYTES = 4 * NUM_PERMUTATIONS
WORDS_PER_SHINGLE = 5
SCHEME = "affine32"  # of datasketch 2, whose values fit four bytes
SIMILARITY = 0.8  # estimated Jaccard similarity of the shingle sets
WORD = re.compile(r"\w+")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
ENTRY_KEYS = frozenset({"sha256", "text_sha256", "doc_id", "doc_ids", "title"})


def fault_of_near_duplicates() -> str | None:
    """Why MinHash cannot be used, or None."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        return "documents.near_duplicates=true needs datasketch: pip install datasketch"
    return None


def signature_of(text: str) -> bytes:
    """MinHash signature of the text's overlapping runs of five words, case ignored."""
    from datasketch import MinHash

    words = WORD.findall(text.casefold())
    starts = range(max(1, len(words) - WORDS_PER_SHINGLE + 1))
    shingles = {" ".join(words[start : start + WORDS_PER_SHINGLE]) for start in starts}
    signature = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME)
    signature.update_batch([shingle.encode() for shingle in shingles])
    return signature.hashvalues.astype("<u4").tobytes()


class _Index:
    """Signatures by which similar ones are found."""

    def __init__(self, signatures: Sequence[bytes]) -> None:
        from datasketch import MinHashLSH

        self._signatures = signatures
        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)

    def add(self, number: int) -> None:
        """Take up the signature with this number."""
        self._index.insert(number, _minhash(self._signatures[number]))

    def similar(self, signature: bytes) -> list[int]:
        """Numbers of those taken up that are similar."""
        values = np.frombuffer(signature, "<u4")
        found: list[int] = self._index.query(_minhash(signature))  # type: ignore[assignment]
        others = [(n, np.frombuffer(self._signatures[n], "<u4")) for n in found]
        return [n for n, other in others if np.mean(values == other) >= SIMILARITY]


def _minhash(signature: bytes) -> Any:
    from datasketch import MinHash

    values = np.frombuffer(signature, "<u4").astype(np.uint64)
    return MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=SCHEME, hashvalues=values)


def near_duplicates(signatures: Sequence[bytes]) -> np.ndarray:
    """Which documents are similar to an earlier one that stays: a bool per signature, in order.

    Raises:
        ConfigError: datasketch is not installed.
    """
    if fault := fault_of_near_duplicates():
        raise ConfigError([fault])
    seen, dropped = _Index(signatures), np.zeros(len(signatures), dtype=bool)
    for number, signature in enumerate(signatures):
        dropped[number] = bool(seen.similar(signature))
        if not dropped[number]:
            seen.add(number)
    return dropped


def clusters_of(held_out: Sequence[bytes], signatures: Sequence[bytes]) -> np.ndarray:
    """Which documents a chain of similar ones connects with held-out text: a bool per signature.

    Raises:
        ConfigError: datasketch is not installed.
    """
    if fault := fault_of_near_duplicates():
        raise ConfigError([fault])
    connected, index = np.zeros(len(signatures), dtype=bool), _Index(signatures)
    if not held_out:
        return connected
    for number in range(len(signatures)):
        index.add(number)
    reached = list(held_out)
    while reached:
        for number in index.similar(reached.pop()):
            if not connected[number]:
                connected[number] = True
                reached.append(signatures[number])
    return connected


@dataclass(frozen=True)
class Exclusions:
    """Hashes, ids and titles of texts that are not packed."""

    hashes: frozenset[bytes] = frozenset()  # first half of the SHA-256 of each text
    names: frozenset[str] = frozenset()  # ids and titles, lower case

    def match(self, doc_id: str, text_hash: bytes) -> bool:
        """Whether a document is to be left out."""
        if text_hash in self.hashes:
            return True
        if not self.names:
            return False
        name = doc_id.casefold()
        last = PurePosixPath(name)
        return not self.names.isdisjoint((name, last.name, last.stem, name.partition(" ")[2]))


def read_exclusions(paths: list[str]) -> Exclusions:
    """Read all lists.

    Raises:
        ConfigError: files that are not there, cannot be read, or hold no entry; all together.
    """
    entries, faults = set(), []
    for name in paths:
        try:
            found = set(_entries(Path(name)))
        except (OSError, ValueError) as error:
            allowed = "give .txt, .json or .jsonl files, or folders"
            faults.append(f"exclude: {name} cannot be read ({error}); {allowed}")
            continue
        if not found:
            allowed = "see data_prep/duplicates.py for what it may hold"
            faults.append(f"exclude: {name} names no text; {allowed}")
        entries |= found
    if faults:
        raise ConfigError(faults)
    hashes = {entry for entry in entries if SHA256.fullmatch(entry)}
    return Exclusions(
        hashes=frozenset(bytes.fromhex(entry)[:HASH_BYTES] for entry in hashes),
        names=frozenset(entry.casefold() for entry in entries - hashes),
    )


def _entries(path: Path) -> Iterator[str]:
    if path.is_dir():
        for text in sorted(path.glob("*.txt")):
            yield sha256_of_file(text)
            yield text.stem
        return
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        yield from _strings(json.loads(text), wanted=False)
    elif path.suffix == ".jsonl":
        for line in text.splitlines():
            yield from _strings(json.loads(line), wanted=False)
    else:
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        yield from filter(None, lines)


def _strings(node: Any, *, wanted: bool) -> Iterator[str]:
    """Strings below the keys that name texts."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _strings(value, wanted=key in ENTRY_KEYS)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value, wanted=wanted)
    elif isinstance(node, str) and wanted:
        yield node
