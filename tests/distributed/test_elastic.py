"""A run that goes on with other numbers of ranks on every axis is the same run."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked_ranks import ForkedRanks
from small_runs import losses, pack_segments, weights, write_config

from longrope2.files.artifacts import read_manifest
from longrope2.training.checkpoint import convert_before_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]  # minutes; an hour where cores are shared

STEPS = 8
SAME = 1e-6
# Weight decay, and an embedding that must not decay: two parameter groups with hyperparameters of
# their own.
TRAINING = ("training.global_batch_tokens=1024", f"training.tokens={1024 * STEPS}",
            "training.same_kind_segments=4",
            "training.checkpoint_steps=100", "training.weight_decay=0.5")  # fmt: skip
Outcome = tuple[dict[int, tuple[float, float]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pack_segments(folder, align=2, tokens=6000)
    return folder


@pytest.fixture(scope="module")
def ranks(runs: Path) -> Iterator[ForkedRanks]:
    with ForkedRanks(runs / "log") as server:
        yield server


def train(
    ranks: ForkedRanks,
    runs: Path,
    name: str,
    data: int,
    sequence: int,
    *overrides: str,
    context: int = 1,
) -> None:
    world = data * context * sequence
    parallel = (f"parallel.processes={world}", f"parallel.sequence={sequence}",
                f"parallel.context={context}")  # fmt: skip
    config = write_config(runs, name, *TRAINING, *parallel, *overrides)
    assert ranks.run(config, world) == [0] * world, ranks.printed()[-4000:]


@pytest.fixture(scope="module")
def undisturbed(ranks: ForkedRanks, runs: Path) -> Outcome:
    train(ranks, runs, "undisturbed", 2, 2)
    return losses(runs, "undisturbed"), weights(runs, "undisturbed")


def check_same(runs: Path, name: str, undisturbed: Outcome) -> None:
    """Every loss, and every weight by the distance of its tensor, within 1e-6 relative."""
    found = losses(runs, name)
    assert sorted(found) == sorted(undisturbed[0]) == list(range(1, STEPS + 1))
    for step, (expected, _) in undisturbed[0].items():
        assert math.isclose(expected, found[step][0], rel_tol=SAME), (
            f"step {step}: {found[step][0]}, not {expected}"
        )
    after = weights(runs, name)
    assert after.keys() == undisturbed[1].keys()
    for key, expected in undisturbed[1].items():
        distance = float((after[key] - expected).norm() / expected.norm())
        assert distance < SAME, f"{key}: {distance}"


def test_four_ranks_two_ranks_four_ranks(
    ranks: ForkedRanks, runs: Path, undisturbed: Outcome
) -> None:
    train(ranks, runs, "elastic", 2, 2, "training.stop_after_step=3")
    train(ranks, runs, "elastic", 2, 1, "training.stop_after_step=5")
    folder = runs / "elastic" / "3_checkpoints"
    written_by = read_manifest(folder / "step_00000005", "training_state").inputs
    convert_before_ranks(folder, written_by, world_size=4, zero_stage=3)  # as launch.train does
    assert (folder / "converted_step_00000005").is_dir()
    train(ranks, runs, "elastic", 1, 4)
    printed = ranks.printed()
    assert (
        "step_00000003 was written by 4 ranks at ZeRO stage 3; converting it for 2 ranks at stage 3"
        in printed
    )
    assert "step_00000003 converted and verified: step 3, 38 parameters" in printed
    assert "step_00000005 converted and verified: step 5, 38 parameters" in printed
    assert "step_00000005 was written by 2 ranks" not in printed, "it is not converted again"
    check_same(runs, "elastic", undisturbed)
    left = [
        p.name
        for p in (runs / "elastic" / "3_checkpoints").iterdir()
        if p.name.startswith((".step", "converted_", "latest_"))
    ]
    assert left == []


def test_context_ranks_come_and_go(ranks: ForkedRanks, runs: Path, undisturbed: Outcome) -> None:
    """Packed for two ranks a segment: with four, short segments gather keys too."""
    train(ranks, runs, "context", 1, 2, "training.stop_after_step=3", context=2)
    train(ranks, runs, "context", 2, 1, "training.stop_after_step=5")
    train(ranks, runs, "context", 1, 1, context=4)
    check_same(runs, "context", undisturbed)


def test_stages_1_and_2(ranks: ForkedRanks, runs: Path, undisturbed: Outcome) -> None:
    train(ranks, runs, "stages", 1, 2, "parallel.zero_stage=2", "training.stop_after_step=3")
    train(ranks, runs, "stages", 2, 2, "parallel.zero_stage=1", "training.stop_after_step=5")
    train(ranks, runs, "stages", 1, 2, "parallel.zero_stage=2")
    check_same(runs, "stages", undisturbed)
