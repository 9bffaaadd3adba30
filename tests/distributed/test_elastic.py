"""A run that goes on with another number of ranks, another sequence-parallel size or another ZeRO stage: the same run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.pack import main as pack_main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
STEPS = 8
SAME = 1e-6
# Weight decay and an embedding that must not decay: two parameter groups with hyperparameters of their own.
TRAIN = [
    sys.executable, "-m", "launch.train", "experiment=tiny_extend", "rope=yarn", "target_len=256",
    "model.from_scratch=true", "training.global_batch_tokens=1024", f"training.tokens={1024 * STEPS}",
    "training.same_kind_segments=4", "training.warmup_steps=2", "training.checkpoint_steps=100",
    "training.weight_decay=0.5", "training.learning_rate=1e-3", "tracking.wandb=disabled",
]  # fmt: skip
FOUR, TWO = ("parallel.processes=4", "parallel.sequence=2"), ("parallel.processes=2", "parallel.sequence=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with packed segments in ``packed/1_segments``."""
    folder = tmp_path_factory.mktemp("runs")
    pack_main([
        "--target", "256", "--corpus", "sample", "--model", "tiny", "--align", "2", "run.name=packed",
        f"run.root={folder}", "corpus.quotas.stdlib_modules={short: 6000, long: 6000}",
        "corpus.quotas.stdlib_topics={short: 0, long: 0}", "corpus.quotas.retrieval={short: 0, long: 0}",
    ])  # fmt: skip
    return folder


def train(runs: Path, name: str, *overrides: str) -> str:
    command = [*TRAIN, f"run.root={runs}", f"run.name={name}", f"segments={runs}/packed/1_segments", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-5000:]
    return ended.stdout


def losses(runs: Path, name: str) -> list[float]:
    lines = (runs / name / "3_checkpoints" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(runs / name / "3_checkpoints" / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(runs: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    train(runs, "undisturbed", *FOUR)
    return losses(runs, "undisturbed"), weights(runs, "undisturbed")


def check_same(runs: Path, name: str, undisturbed: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    """Every loss, and every weight by the distance of its tensor, within 1e-6 relative."""
    found = losses(runs, name)
    assert len(found) == STEPS
    for step, (expected, actual) in enumerate(zip(undisturbed[0], found, strict=True), 1):
        assert math.isclose(expected, actual, rel_tol=SAME), f"step {step}: {actual} instead of {expected}"
    after = weights(runs, name)
    assert after.keys() == undisturbed[1].keys()
    for key, expected in undisturbed[1].items():
        distance = float((after[key] - expected).norm() / expected.norm())
        assert distance < SAME, f"{key}: {distance}"


def test_four_ranks_two_ranks_four_ranks(runs: Path, undisturbed: tuple) -> None:
    train(runs, "elastic", *FOUR, "training.stop_after_step=3")
    printed = train(runs, "elastic", *TWO, "training.stop_after_step=5")
    assert "step_00000003 was written by 4 ranks at ZeRO stage 3; converting it for 2 ranks at stage 3" in printed
    assert "step_00000003 converted and verified: step 3, 38 parameters" in printed
    printed = train(runs, "elastic", "parallel.processes=4", "parallel.sequence=4")
    assert "step_00000005 was written by 2 ranks at ZeRO stage 3; converting it for 4 ranks at stage 3" in printed
    check_same(runs, "elastic", undisturbed)
    left = [p.name for p in (runs / "elastic" / "3_checkpoints").iterdir() if p.name.startswith((".step", "latest_"))]
    assert left == []


def test_another_zero_stage(runs: Path, undisturbed: tuple) -> None:
    train(runs, "stages", *TWO, "parallel.zero_stage=3", "training.stop_after_step=3")
    train(runs, "stages", *FOUR, "parallel.zero_stage=2", "training.stop_after_step=5")
    train(runs, "stages", *TWO, "parallel.zero_stage=3")
    check_same(runs, "stages", undisturbed)
