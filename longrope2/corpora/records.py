"""Records of .jsonl, .parquet and .txt files; faults are left out and counted by reason.

Every reader raises ``DataError`` where a file cannot be reached any more, and names in ``skipped``
a file of which it could read no more.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from longrope2.corpora.decoding import PACKED
from longrope2.corpora.losses import Losses
from longrope2.corpora.remote import (
    LINE_SUFFIXES,
    READ_BYTES,
    FaultyFile,
    byte_blocks,
    parquet_batches,
)

# Endings of the files that are read, in small letters.
JSON_SUFFIXES = tuple(f"{end}{packed}" for end in LINE_SUFFIXES for packed in ("", *PACKED))
PARQUET_SUFFIXES = (".parquet",)
TEXT_SUFFIXES = (".txt", *(f".txt{packed}" for packed in PACKED))
# A longer line or text file is no document but a damaged file; it would have to fit into memory.
MAX_RECORD_BYTES = 2**27
TOO_LONG = f"record above {MAX_RECORD_BYTES >> 20} MiB"


def json_records(
    location: str,
    skipped: Losses,
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
    num_records = 0
    try:
        for number, line in _lines(location, span):
            if line is not None and not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            num_records += 1
            reason = TOO_LONG if line is None else unwanted and unwanted(number, line)
            if reason is not None:
                skipped[reason] += 1
            elif line is not None and (record := _parsed(line, skipped)) is not None:
                yield number, record
    except FaultyFile as fault:
        skipped.damaged(location, str(fault), num_records)


def _parsed(line: bytes, skipped: Losses) -> dict[str, Any] | None:
    """The record of a line; None for a faulty one, which is counted."""
    # Files that were joined have byte order marks at the start of some lines.
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        skipped["invalid utf-8"] += 1
        return None
    except json.JSONDecodeError:
        record = None
    except ValueError:  # Python reads no number of more than 4,300 digits
        skipped["number of too many digits"] += 1
        return None
    except RecursionError:
        skipped["json nested too deeply"] += 1
        return None
    if isinstance(record, dict):
        return record
    skipped["bad json"] += 1
    return None


def starts_with_records(location: str, fields: Sequence[str]) -> bool:
    """Whether a file holds an object per line, by its first ``READ_BYTES`` bytes.

    One object alone on one line, without any of the ``fields``, is no record but describes
    something else. An empty file and one that cannot be decoded count as records: reading them
    tells of it.
    """
    start = b""
    try:
        for block in byte_blocks(location):
            start += block
            if len(start) >= READ_BYTES:
                break
    except FaultyFile:
        return True
    start = start.removeprefix(codecs.BOM_UTF8)
    first, *others = [line for line in start.split(b"\n") if line.strip()] or [b""]
    if not first or (not others and len(start) >= READ_BYTES):
        return not first or first.lstrip().startswith(b"{")
    record = _parsed(first, Losses())
    return record is not None and (bool(others) or any(field in record for field in fields))


def parquet_records(
    location: str, columns: Sequence[str], skipped: Losses, *, optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a parquet file, each with its number from 0.

    The rows of a file with none of the ``columns`` are left out; columns that are missing, and
    ``optional`` ones, are None. Values of other types than text are as they are; a text above
    ``MAX_RECORD_BYTES`` leaves its row out, counted.
    """
    wanted, number = [*columns, *optional], 0
    try:
        for batch in parquet_batches(location, wanted):
            if not set(columns) & set(batch.schema.names):
                skipped[f"no column {' or '.join(columns)}"] += batch.num_rows
            else:
                for row in range(batch.num_rows):
                    if (record := _row(batch, row, skipped)) is not None:
                        yield number + row, dict.fromkeys(wanted) | record
            number += batch.num_rows
    except FaultyFile as fault:
        skipped.damaged(location, str(fault), number)


def _row(batch: pa.RecordBatch, row: int, skipped: Losses) -> dict[str, Any] | None:
    """One row; None where it is faulty, which is counted."""
    values = {name: batch.column(name)[row] for name in batch.schema.names}
    texts = [value for value in values.values() if isinstance(value, pa.BinaryScalar)]
    if any(text.is_valid and text.as_buffer().size > MAX_RECORD_BYTES for text in texts):
        skipped[TOO_LONG] += 1
        return None
    try:
        return {name: value.as_py() for name, value in values.items()}
    except UnicodeDecodeError:
        skipped["invalid utf-8"] += 1
        return None


def whole_text(location: str, skipped: Losses) -> str | None:
    """Text of a file that is one document, with line feeds; None (and counted) if at fault."""
    blocks, size = [], 0
    try:
        for block in byte_blocks(location):
            blocks.append(block)
            size += len(block)
            if size > MAX_RECORD_BYTES:
                skipped[TOO_LONG] += 1
                return None
        text = b"".join(blocks).removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except FaultyFile as fault:
        skipped.damaged(location, str(fault), 0)
        return None
    except UnicodeDecodeError:
        skipped["invalid utf-8"] += 1
        return None
    return usable_text(text.replace("\r\n", "\n").replace("\r", "\n"), skipped)


def usable_text(value: Any, skipped: Losses) -> str | None:
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


def _lines(location: str, span: tuple[int, int] | None) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers, or those that begin in a range of bytes with their first bytes.

    None stands for a line that is too long. The torn last line of a truncated file is no line.

    Raises:
        FaultyFile: after the last line that can be read.
    """
    if span is None:
        for number, (_, line) in enumerate(_placed_lines(location, 0)):
            yield number, line
        return
    start, end = span
    # From one byte before: if that ends a line, one begins at the start.
    for position, line in _placed_lines(location, max(0, start - 1)):
        if position >= end:
            return
        if position >= start:
            yield position, line


def _placed_lines(location: str, first_byte: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines with the places of their first bytes, from a byte on; None for one too long."""
    place, parts, size = first_byte, [], 0
    for block in byte_blocks(location, first_byte):
        *ends, rest = block.split(b"\n")
        for end in ends:
            size += len(end)
            yield place, b"".join([*parts, end]) if size <= MAX_RECORD_BYTES else None
            place, parts, size = place + size + 1, [], 0
        size += len(rest)
        if size <= MAX_RECORD_BYTES:
            parts.append(rest)
        else:
            parts = []
    if size:
        yield place, b"".join(parts) if size <= MAX_RECORD_BYTES else None
