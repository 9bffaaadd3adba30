"""Metrics reach the JSON-lines file and a real W&B offline run, read back from its own file."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from longrope2.tracking import MetricsLog, TrackingConfig, WandbMode, read_metrics

WANDB_HEADER_BYTES, BLOCK_BYTES = 7, 32768
CHUNK_HEADER, FULL, LAST = struct.Struct("<IHB"), 1, 4
STEPS = [{"train/loss": 2.5, "train/tokens": 100}, {"train/loss": 2.0, "train/tokens": 200}]


def write(folder: Path, mode: WandbMode, steps: list[dict]) -> None:
    with MetricsLog(folder, TrackingConfig(wandb=mode), "runs/demo", "train", {"seed": 3}) as log:
        for number, values in enumerate(steps, 1):
            log.log(values, step=number)


def offline_records(folder: Path) -> list[wandb_internal_pb2.Record]:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = []
    for data in leveldb_log(file.read_bytes(), start=WANDB_HEADER_BYTES):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        records.append(record)
    return records


def leveldb_log(data: bytes, start: int) -> Iterator[bytes]:
    """Records of LevelDB's log format: 32 KiB blocks of chunks, each a checksum, a length, a kind and its bytes."""
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


def test_lines_are_appended_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, WandbMode.disabled, STEPS[:1])
    write(tmp_path, WandbMode.disabled, STEPS[1:])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/loss": 1.')
    found = read_metrics(tmp_path)
    assert [(r["train/loss"], r["train/tokens"]) for r in found] == [(2.5, 100), (2.0, 200)]
    assert not (tmp_path / "wandb").exists()


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_offline_wandb_run_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    write(tmp_path, WandbMode.auto, STEPS)
    wandb.teardown()  # what the end of the process does: the service flushes its file
    records = offline_records(tmp_path)
    history = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in records
               if r.WhichOneof("record_type") == "history"]  # fmt: skip
    assert [{k: h[k] for k in STEPS[0]} for h in history] == STEPS
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.display_name) == ("runs/demo", "train", "runs/demo/train")
    x_axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records
              if r.WhichOneof("record_type") == "metric"}  # fmt: skip
    assert x_axes["train/*"] == "train/tokens"


def test_environment_decides_for_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write(tmp_path, WandbMode.auto, STEPS)
    assert not (tmp_path / "wandb").exists()
