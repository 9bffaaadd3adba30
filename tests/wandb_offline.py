"""Read a W&B offline run back from its own file, without W&B's server or its reader."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

WANDB_HEADER_BYTES, BLOCK_BYTES = 7, 32768
CHUNK_HEADER, FULL, LAST = struct.Struct("<IHB"), 1, 4


def offline_files(folder: Path) -> list[Path]:
    """The files of all offline runs below a product folder, oldest first."""
    return sorted(
        folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )


def read_offline(file: Path) -> list[wandb_internal_pb2.Record]:
    """All records of one offline run."""
    records = []
    for data in leveldb_log(file.read_bytes(), start=WANDB_HEADER_BYTES):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records


def history(records: list[wandb_internal_pb2.Record]) -> list[dict[str, Any]]:
    """What was logged, one dictionary a call."""
    return [
        {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def leveldb_log(data: bytes, start: int) -> Iterator[bytes]:
    """Records of LevelDB's log: 32 KiB blocks of chunks (checksum, length, kind, bytes)."""
    position, whole = start, b""
    while position + CHUNK_HEADER.size <= len(data):
        if BLOCK_BYTES - position % BLOCK_BYTES < CHUNK_HEADER.size:
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        whole += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield whole
            whole = b""
