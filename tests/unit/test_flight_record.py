"""Torch's record of collectives is written beside the heartbeats, as torchfrtrace reads it."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longrope2.parallel.flight_record import keep_flight_record, write_flight_record


def test_without_processes_there_is_nothing_to_write(tmp_path: Path) -> None:
    assert write_flight_record(tmp_path, 0) == "no collective was begun"
    assert not list(tmp_path.iterdir())


def test_the_latest_collectives(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(7))
        said = write_flight_record(tmp_path, 0)
        refused = write_flight_record(tmp_path / "absent", 0)
    finally:
        dist.destroy_process_group()
    file = tmp_path / "collectives_0"
    assert said.startswith(f"latest collectives of rank 0: {file}; those of all ranks compared: ")
    assert said.endswith(f"torchfrtrace --allow-incomplete-ranks --prefix collectives_ {tmp_path}")
    last = pickle.loads(file.read_bytes())["entries"][-1]
    assert (last["profiling_name"], last["input_sizes"]) == ("gloo:all_reduce", [[7]])
    assert refused.startswith(f"the latest collectives could not be written to {tmp_path}/absent/")


def test_what_the_environment_says_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"):
        monkeypatch.setenv(name, "")  # so that it is unset again at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "5")
    keep_flight_record(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "5"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/collectives_"
