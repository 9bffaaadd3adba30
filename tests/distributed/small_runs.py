"""Small runs of ``train`` for tests: segments, written configurations, and what came out."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from data_prep.pack import main as pack_main
from longrope2.config import compose, dump
from longrope2.files.artifacts import product_folder
from longrope2.training.config import TrainRoot

SETTINGS = [
    "experiment=tiny_extend", "rope=yarn", "target_len=256", "model.from_scratch=true",
    "tracking.wandb=disabled",
    "training.warmup_steps=2", "training.learning_rate=1e-3", "training.selftest=false",
]  # fmt: skip


def pack_segments(folder: Path, align: int, tokens: int) -> None:
    """Segments of 256 tokens, about ``tokens`` of each kind, in ``folder/packed/1_segments``."""
    pack_main(
        [
            "--target",
            "256",
            "--corpus",
            "sample",
            "--model",
            "tiny",
            "--align",
            str(align),
            "run.name=packed",
            f"run.root={folder}",
            f"quotas.stdlib_modules={{short: {tokens}, long: {tokens}}}",
            "quotas.stdlib_topics={short: 0, long: 0}",
            "quotas.retrieval={short: 0, long: 0}",
        ]
    )


def write_config(runs: Path, name: str, *overrides: str) -> Path:
    """The ``config.yaml`` of one part of a run, where ranks read it."""
    config = compose(
        TrainRoot,
        "train",
        [
            *SETTINGS,
            f"run.root={runs}",
            f"run.name={name}",
            f"segments={runs}/packed/1_segments",
            *overrides,
        ],
    )
    path = product_folder(config.run.folder, "checkpoints") / "config.yaml"
    dump(config, path)
    return path


def records(runs: Path, name: str) -> list[dict]:
    """Metric records in the order they were written."""
    file = runs / name / "3_checkpoints" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(runs: Path, name: str) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm.

    A step repeated after a kill must repeat its numbers exactly.
    """
    found: dict[int, tuple[float, float]] = {}
    for record in records(runs, name):
        values = (record["train/loss"], record["train/grad_norm"])
        assert found.setdefault(record["step"], values) == values, (
            f"step {record['step']} was not repeated exactly"
        )
    return found


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of ``final/``."""
    return load_file(runs / name / "3_checkpoints" / "final" / "model.safetensors")
