"""The loss on held-out text while training: the training's own forward, without a gradient.

Held-out segments (``data_prep.heldout``) are read as training reads its own, in the layout of its
ranks. Parameters, optimizer, schedule and random numbers stay as they are: a run that measures
trains the same weights, bit for bit, as one that does not.

Shape legend: W = windows, short and long.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import MANIFEST_NAME
from longrope2.parallel.processes import Processes
from longrope2.rope.window import Window
from longrope2.segments.format import SegmentStore
from longrope2.segments.schedule import MicroStep
from longrope2.training.batch import load_rank_batch
from longrope2.training.plan import ResolvedRun


class HeldoutLoss:
    """The held-out segments of a run, and their loss."""

    def __init__(self, run: ResolvedRun) -> None:
        """Open them.

        Raises:
            ArtifactError: they were not written.
        """
        if not (run.heldout_folder / MANIFEST_NAME).is_file():
            lacking = f"{run.heldout_folder} holds no held-out segments"
            way_out = "python -m launch.train writes them before it starts ranks"
            raise ArtifactError(f"{lacking}; {way_out} (training.heldout_every)")
        self._store = SegmentStore(run.heldout_folder)
        self._mixed = run.config.training.mixed
        self._kernel = run.machine.attention.kernel

    def losses(
        self, engine: Any, processes: Processes, mark: Callable[[str], None]
    ) -> dict[str, float]:
        """Mean loss per target token of the segments of each kind; every rank calls this.

        Metric names; a kind without segments has none. ``mark`` is told what the rank does next.
        """
        sums, data = [], processes.dims.data
        kinds = {Window.SHORT: self._store.short_ids, Window.LONG: self._store.long_ids}
        engine.eval()
        for window, ids in kinds.items():
            loss_sum = num_targets = 0.0
            for first in range(0, len(ids), data):
                mark(f"held-out text, {window.value} segment {first + 1} of {len(ids)}")
                own = self._own_loss(engine, processes, window, tuple(ids[first : first + data]))
                loss_sum, num_targets = loss_sum + own[0], num_targets + own[1]
            sums.append((loss_sum, num_targets))
        engine.train()
        totals_W2 = torch.tensor(sums, dtype=torch.float64, device=processes.device)
        dist.all_reduce(totals_W2)
        return {
            f"train/heldout_loss_{window.value}": total / count
            for window, (total, count) in zip(kinds, totals_W2.tolist(), strict=True)
            if count
        }

    @torch.no_grad()
    def _own_loss(
        self, engine: Any, processes: Processes, window: Window, chosen: tuple[int, ...]
    ) -> tuple[float, int]:
        """Summed loss and targets of this rank's chunk of its data-parallel group's segment."""
        dims = processes.dims
        # Ranks wait for each other in every forward: where segments do not go round, a group reads
        # one a second time and does not count it.
        filled = (*chosen, *(chosen[-1:] * (dims.data - len(chosen))))
        batch = load_rank_batch(
            self._store,
            MicroStep(window, filled),
            dims,
            processes.sequence_group,
            mixed=self._mixed,
            kernel=self._kernel,
        ).to(processes.device)
        loss_sum = engine(batch.tokens_BT, batch.labels_BT, batch.window, batch.layout)
        counts = dims.data_rank < len(chosen)
        return (loss_sum.double().item(), batch.num_targets) if counts else (0.0, 0)
