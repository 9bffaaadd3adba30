"""Which segments a step trains on: a pure function of the step, so the cursor is one integer.

All data-parallel groups advance together, so a micro-step costs as much as its most expensive
segment: each draws segments of one window kind only. The kinds follow the exact short/long ratio at
every point of the run (error diffusion); the segments of a kind come in a seeded random order, each
once an epoch. Any data-parallel size that divides ``group_size``, the unit of the schedule, sees
the same segments in the same optimizer step.
"""

from dataclasses import dataclass

import numpy as np

from longrope2.rope.window import Window


@dataclass(frozen=True)
class MicroStep:
    """What every data-parallel rank works on at the same time."""

    window: Window
    segment_ids: tuple[int, ...]
    """One segment per data-parallel rank."""


@dataclass(frozen=True)
class StepSchedule:
    """The whole run's order.

    ``group_size`` segments in a row share the window kind; it must divide ``segments_per_step``
    (global batch / target length).
    """

    short_ids: tuple[int, ...]
    long_ids: tuple[int, ...]
    segments_per_step: int
    group_size: int
    seed: int

    @property
    def groups_per_epoch(self) -> int:
        """Groups in one pass over the data."""
        return sum(map(self.num_groups, Window))

    def num_groups(self, window: Window) -> int:
        """Groups of one kind in one pass over the data."""
        return len(self._ids(window)) // self.group_size

    @property
    def trained_windows(self) -> tuple[Window, ...]:
        """The kinds that fill a group: only their windows are trained."""
        return tuple(window for window in Window if self.num_groups(window))

    @property
    def long_share(self) -> float | None:
        """Share of the tokens of a pass that stand in long segments; None without any group."""
        groups = self.groups_per_epoch
        return self.num_groups(Window.LONG) / groups if groups else None

    @property
    def steps_per_epoch(self) -> int:
        """Whole optimizer steps in one pass; what is left over begins the next pass."""
        return self.groups_per_epoch * self.group_size // self.segments_per_step

    @property
    def unused_per_epoch(self) -> dict[str, int]:
        """Segments of each kind that do not fill a group and are left out of a pass."""
        return {w.value: len(self._ids(w)) % self.group_size for w in Window}

    def micro_steps(self, step: int, data_size: int) -> list[MicroStep]:
        """The micro-steps of optimizer step ``step`` (0-based) for ``data_size`` data ranks."""
        assert self.group_size % data_size == 0 and self.segments_per_step % self.group_size == 0
        groups_per_step = self.segments_per_step // self.group_size
        steps = []
        for group in range(step * groups_per_step, (step + 1) * groups_per_step):
            window, ids = self._group(group)
            firsts = range(0, self.group_size, data_size)
            steps += [MicroStep(window, ids[first : first + data_size]) for first in firsts]
        return steps

    def _group(self, index: int) -> tuple[Window, tuple[int, ...]]:
        """Kind and segments of one group of the endless sequence of groups."""
        epoch, place = divmod(index, self.groups_per_epoch)
        num_long = self.num_groups(Window.LONG)
        # Exact error diffusion in integers: the long groups are spread evenly over the epoch.
        long_before = place * num_long // self.groups_per_epoch
        is_long = (place + 1) * num_long // self.groups_per_epoch > long_before
        window = Window.LONG if is_long else Window.SHORT
        number = long_before if is_long else place - long_before
        rng = np.random.default_rng([self.seed, epoch, int(is_long)])
        order = rng.permutation(self._ids(window))
        chosen = order[number * self.group_size : (number + 1) * self.group_size]
        return window, tuple(int(i) for i in chosen)

    def _ids(self, window: Window) -> tuple[int, ...]:
        return self.long_ids if window is Window.LONG else self.short_ids
