"""Records of .jsonl, .parquet and .txt files; faults are left out and counted by reason.

Every reader raises ``DataError`` where a file cannot be reached any more.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from longrope2.corpora.remote import FaultyFile, byte_blocks, parquet_batches

PACKED = (".gz", ".zst", ".zstd")
JSON_SUFFIXES = (".jsonl", *(f".jsonl{p}" for p in PACKED), *(f".json{p}" for p in PACKED))
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", *(f".txt{p}" for p in PACKED))
# A longer line or text file is no document but a damaged file; it would have to fit into memory.
MAX_RECORD_BYTES = 2**27
TOO_LONG = f"record above {MAX_RECORD_BYTES >> 20} MiB"


def json_records(
    location: str,
    skipped: Counter[str],
    *,
    unwanted: Callable[[int, bytes], str | None] | None = None,
    span: tuple[int, int] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of a file with a JSON object per line, each with its line number from 0.

    With ``span`` only those whose lines begin in that range of bytes, each with its first byte
    instead: the ranges of a file together have all its records once.

    ``unwanted`` is called with the number and the bytes of a line before it is parsed; a reason
    that it returns leaves the line out.
    """
    lines = _numbered_lines(location, skipped)
    if span is not None:
        lines = _lines_in(span, location, skipped)
    for number, line in lines:
        if not line.strip():
            continue
        if unwanted is not None and (reason := unwanted(number, line)) is not None:
            skipped[reason] += 1
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            skipped["invalid utf-8"] += 1
            continue
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield number, record
        else:
            skipped["bad json"] += 1


def parquet_records(
    location: str, columns: Sequence[str], skipped: Counter[str], *, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a parquet file, each with its number from 0.

    The rows of a file without one of the ``columns`` are left out; ``optional`` ones are None where
    they are missing.
    """
    number = 0
    try:
        for batch in parquet_batches(location, [*columns, *optional]):
            present = [name for name in (*columns, *optional) if name in batch.schema.names]
            absent = [name for name in columns if name not in present]
            if absent:
                skipped[f"no column {absent[0]}"] += batch.num_rows
                continue
            for row in range(batch.num_rows):
                try:
                    record = {name: batch.column(name)[row].as_py() for name in present}
                except UnicodeDecodeError:
                    skipped["invalid utf-8"] += 1
                else:
                    yield number + row, dict.fromkeys(optional) | record
            number += batch.num_rows
    except FaultyFile as fault:
        skipped[str(fault)] += 1


def whole_text(location: str, skipped: Counter[str]) -> str | None:
    """Text of a file that is one document, with line feeds; None (and counted) if at fault."""
    blocks, size = [], 0
    try:
        for block in byte_blocks(location):
            blocks.append(block)
            size += len(block)
            if size > MAX_RECORD_BYTES:
                raise FaultyFile(TOO_LONG)
        text = b"".join(blocks).decode("utf-8")
    except FaultyFile as fault:
        skipped[str(fault)] += 1
        return None
    except UnicodeDecodeError:
        skipped["invalid utf-8"] += 1
        return None
    return usable_text(text.replace("\r\n", "\n").replace("\r", "\n"), skipped)


def usable_text(value: Any, skipped: Counter[str]) -> str | None:
    """The text of a record if it can be a document, else None, counted."""
    if not isinstance(value, str):
        skipped["no text"] += 1
    elif not value.strip():
        skipped["empty text"] += 1
    elif not value.isascii() and _has_lone_surrogate(value):
        skipped["lone surrogate"] += 1
    else:
        return value
    return None


def _has_lone_surrogate(text: str) -> bool:
    """Half a surrogate pair, as an escape in JSON can give: no text in any encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _lines_in(
    span: tuple[int, int], location: str, skipped: Counter[str]
) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in a range of a plain file, with their first bytes."""
    start, end = span
    # From one byte before: if that ends a line, one begins at the start.
    lines = _placed_lines(location, skipped, max(0, start - 1))
    for position, line in lines:
        if position >= end:
            return
        if position >= start and line is not None:
            yield position, line
        elif position >= start:
            skipped[TOO_LONG] += 1


def _numbered_lines(location: str, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; the torn last line of a truncated file counts as missing."""
    for number, (_, line) in enumerate(_placed_lines(location, skipped, 0)):
        if line is None:
            skipped[TOO_LONG] += 1
        else:
            yield number, line


def _placed_lines(
    location: str, skipped: Counter[str], first_byte: int
) -> Iterator[tuple[int, bytes | None]]:
    """Lines with the places of their first bytes, from a byte on; None for one that is too long."""
    place, parts, size = first_byte, [], 0
    try:
        for block in byte_blocks(location, first_byte):
            *ends, rest = block.split(b"\n")
            for end in ends:
                size += len(end)
                yield place, b"".join([*parts, end]) if size <= MAX_RECORD_BYTES else None
                place, parts, size = place + size + 1, [], 0
            size += len(rest)
            parts = [*parts, rest] if size <= MAX_RECORD_BYTES else []
    except FaultyFile as fault:
        skipped[str(fault)] += 1
        return
    if size:
        yield place, b"".join(parts) if size <= MAX_RECORD_BYTES else None
