"""The step schedule: exact mix, equal kinds, every segment once an epoch, any grid."""

import numpy as np
import pytest

from longrope2.rope.factors import Window
from longrope2.segments.schedule import StepSchedule


def make(
    num_short: int, num_long: int, per_step: int = 8, group: int = 4, seed: int = 3
) -> StepSchedule:
    short = tuple(range(num_short))
    long = tuple(range(num_short, num_short + num_long))
    return StepSchedule(short, long, per_step, group, seed)


def flat(schedule: StepSchedule, steps: range, data_size: int) -> list[int]:
    return [i for s in steps for m in schedule.micro_steps(s, data_size) for i in m.segment_ids]


def test_every_segment_once_per_epoch() -> None:
    schedule = make(num_short=32, num_long=48)
    seen = flat(schedule, range(schedule.steps_per_epoch), data_size=2)
    assert sorted(seen) == list(range(80))
    second = flat(
        schedule, range(schedule.steps_per_epoch, 2 * schedule.steps_per_epoch), data_size=2
    )
    assert sorted(second) == list(range(80))
    assert second != seen


@pytest.mark.parametrize(
    ("num_short", "num_long"), [(300, 700), (440, 560), (30, 970), (1000, 0), (0, 1000)]
)
def test_mix_is_exact_over_any_stretch(num_short: int, num_long: int) -> None:
    schedule = make(num_short, num_long, per_step=10, group=1)
    steps = range(schedule.steps_per_epoch)
    kinds = np.array([m.window is Window.LONG for s in steps for m in schedule.micro_steps(s, 1)])
    share = num_long / (num_short + num_long)
    for first in range(0, len(kinds), 37):
        counts = np.cumsum(kinds[first:])
        assert np.abs(counts - share * np.arange(1, len(counts) + 1)).max() < 1 + 1e-9


def test_micro_steps_hold_one_kind() -> None:
    schedule = make(num_short=40, num_long=40)
    for step in range(schedule.steps_per_epoch):
        micro_steps = schedule.micro_steps(step, data_size=4)
        assert len(micro_steps) == 2
        for micro in micro_steps:
            assert {i >= 40 for i in micro.segment_ids} == {micro.window is Window.LONG}


def test_same_segments_in_a_step_for_any_data_size() -> None:
    schedule = make(num_short=24, num_long=56)
    for step in (0, 3, 17):
        expected = flat(schedule, range(step, step + 1), data_size=1)
        for data_size in (2, 4):
            assert flat(schedule, range(step, step + 1), data_size) == expected


def test_left_over_segments_are_counted() -> None:
    schedule = make(num_short=33, num_long=50, group=4)
    assert schedule.unused_per_epoch == {"short": 1, "long": 2}
    seen = flat(schedule, range(schedule.steps_per_epoch), data_size=1)
    assert len(seen) == len(set(seen)) == 80


def test_seed_decides_the_order() -> None:
    steps = range(5)
    assert flat(make(40, 40, seed=1), steps, 1) == flat(make(40, 40, seed=1), steps, 1)
    assert flat(make(40, 40, seed=1), steps, 1) != flat(make(40, 40, seed=2), steps, 1)
