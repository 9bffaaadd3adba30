"""A run says which windows its segments train: mixed only where both kinds fill groups."""

from pathlib import Path

import pytest
import torch

from longrope2.config import ModelConfig
from longrope2.segments.schedule import StepSchedule
from longrope2.training.config import TrainingConfig, TrainRoot
from longrope2.training.forecast import make_forecast
from longrope2.training.machine import machine_setup
from longrope2.training.plan import ResolvedRun

TINY = Path(__file__).parents[2] / "models" / "tiny"


def run_of(num_short: int, num_long: int, *, target_len: int = 2048, mixed: bool = True):
    config = TrainRoot(
        model=ModelConfig(name="tiny", original_len=128),
        target_len=target_len,
        training=TrainingConfig(mixed=mixed),
    )
    return ResolvedRun(
        config=config,
        world_size=1,
        machine=machine_setup(config, torch.device("cpu"), run=False),
        model_folder=TINY,
        segments_folder=Path("runs/x/1_segments"),
        schedule=StepSchedule(tuple(range(num_short)), tuple(range(num_long)), 4, 4, seed=0),
        total_steps=3,
        micro_steps=4,
        found_factors=None,
    )


@pytest.mark.parametrize(
    ("num_short", "num_long", "rope", "mix"),
    [
        (8, 24, "mixed windows on", "75 % long;"),
        (0, 24, "long window only, as the segments have it", "100 % long;"),
        (8, 0, "short window only, as the segments have it", "0 % long;"),
        (3, 24, "long window only, as the segments have it", "100 % long;"),
        (0, 0, "mixed windows if the segments will be of both kinds",
         "70 % long (assumed: there are no segments yet);"),
    ],
)  # fmt: skip
def test_the_mix_is_that_of_the_segments(
    num_short: int, num_long: int, rope: str, mix: str
) -> None:
    """Of those that are trained on: three short segments fill no group of four."""
    run = run_of(num_short, num_long)
    assert f"rope       searched, {rope}\n" in run.describe()
    assert f"a step with {mix}" in make_forecast(run).line()


@pytest.mark.parametrize(
    ("num_short", "num_long", "expected"),
    [
        (
            0,
            4,
            "runs/x/1_segments holds no short segments: the short window, up to 128 tokens, is not "
            "trained; pack with short_overlong=split or more texts of at most 128 tokens",
        ),
        (
            4,
            0,
            "runs/x/1_segments holds no long segments: the long window, up to 2,048 tokens, is not "
            "trained; pack with more texts of above 128 tokens",
        ),
        (
            3,
            4,
            "3 short segments fill no group of training.same_kind_segments=4: the short window, up "
            "to 128 tokens, is not trained; use at most 3 there, or pack more",
        ),
    ],
)
def test_a_window_that_is_not_trained(num_short: int, num_long: int, expected: str) -> None:
    run = run_of(num_short, num_long)
    assert run.untrained_windows() == [expected]
    assert run.describe().splitlines()[-1] == f"note: {expected}"


def test_where_nothing_is_missing() -> None:
    assert run_of(4, 4).untrained_windows() == run_of(0, 0).untrained_windows() == []
    assert run_of(4, 0, target_len=128).untrained_windows() == []  # pre-training: one window
    without = run_of(0, 4, mixed=False)  # the paper's ablation has one window by intention
    assert without.untrained_windows() == [] and "mixed windows off\n" in without.describe()
    assert "100 % long;" in make_forecast(without).line()


def test_the_share_counts_what_fills_groups() -> None:
    schedule = run_of(7, 12).schedule
    assert schedule.long_share == 0.75 and schedule.groups_per_epoch == 4
    assert run_of(0, 0).schedule.long_share is None
