"""One optimizer step: micro-steps, one exact loss normaliser, gradients, update, and what is reported of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrope2.parallel import ParallelDims
from longrope2.rope import Window
from longrope2.training.agreement import check_agreement, fingerprints
from longrope2.training.batch import RankBatch
from longrope2.training.guard import StepGuard

__all__ = ["StepReport", "gradient_scale", "run_step"]


@dataclass(frozen=True)
class StepReport:
    """What one step did, summed over all ranks; losses are means per target token, nan where there was none."""

    loss: float
    loss_by_window: dict[Window, float]
    targets_by_window: dict[Window, int]
    gradient_norm: float
    squared_lengths: float
    """Sum of squared lengths of all spans attended by themselves; what attention cost is proportional to."""
    seconds: float
    micro_step_seconds: dict[Window, float]
    """Mean on this rank, for the kinds that occurred."""
    applied: bool = True
    """False when the guard, or DeepSpeed, refused the update; then nothing but the step's number has changed."""


def gradient_scale(dims: ParallelDims, zero_stage: int, micro_steps: int, num_targets: int) -> float:
    """Factor from a rank's summed token loss to the loss it hands to DeepSpeed.

    The gradient wanted is that of (sum of all token losses of the step) / ``num_targets``. DeepSpeed divides by the
    micro-steps, and then by the whole world under ZeRO-3's reduce-scatter, but by world / sequence under stages 0 to 2.
    """
    averaged_over = dims.world_size if zero_stage == 3 else dims.data
    return averaged_over * micro_steps / max(1, num_targets)


def run_step(
    engine: Any,
    guard: StepGuard,
    batches: Sequence[RankBatch],
    dims: ParallelDims,
    *,
    zero_stage: int,
    learning_rate: float,
    gradient_clip: float,
    step: int = 0,
    mark: Callable[[str], None] = lambda phase: None,
) -> StepReport:
    """Forward and backward over the rank's micro-steps, then the update at ``learning_rate``.

    Args:
        engine: DeepSpeed engine around a ``WindowedModel``.
        guard: The engine's guard; it takes the last micro-step's ``engine.step()``.
        batches: The rank's micro-steps of this step.
        dims: This process's place on the grid.
        zero_stage: ZeRO stage of the engine; decides how DeepSpeed averages gradients.
        learning_rate: Learning rate of this step.
        gradient_clip: Largest global gradient norm; used here only where DeepSpeed neither clips nor reports the norm.
        step: Number of the step, 1-based, for messages.
        mark: Told what the rank does next.

    Raises:
        DataError: the ranks do not work on the same micro-steps; on every rank.
    """
    began = time.perf_counter()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    mark("comparing micro-steps")
    num_windows = len(Window)
    own = [float(sum(b.num_targets for b in batches if b.window is w)) for w in Window]
    totals = _sum_over_ranks([*own, *fingerprints(batches, dims)], engine.device)
    targets, agreement = totals[:num_windows], totals[num_windows:]
    check_agreement(agreement, batches, dims, step)
    scale = gradient_scale(dims, zero_stage, len(batches), int(sum(targets)))
    loss_sums = dict.fromkeys(Window, 0.0)
    seconds: dict[Window, list[float]] = {window: [] for window in Window}
    for number, batch in enumerate(batches, start=1):
        mark(f"micro-step {number} of {len(batches)}, {batch.window.value}")
        loss_sums[batch.window] += _micro_step(engine, batch, scale, seconds)
        if number < len(batches):
            engine.step()
    last = batches[-1]
    mark("update")
    squares = sum(batch.squared_lengths for batch in batches) / dims.sequence
    *sums, squared_lengths = _sum_over_ranks([*(loss_sums[window] for window in Window), squares], engine.device)
    own_norm: Tensor | None = None
    if engine.gradient_clipping() == 0:
        own_norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), gradient_clip)
    loss = _ratio(sum(sums), sum(targets))
    update_began = time.perf_counter()
    applied = guard.step(loss, None if own_norm is None else float(own_norm))
    seconds[last.window][-1] += time.perf_counter() - update_began
    return StepReport(
        loss=loss,
        loss_by_window={w: _ratio(s, n) for w, s, n in zip(Window, sums, targets, strict=True)},
        targets_by_window={w: int(n) for w, n in zip(Window, targets, strict=True)},
        gradient_norm=float(engine.get_global_grad_norm() if own_norm is None else own_norm),
        squared_lengths=squared_lengths,
        seconds=time.perf_counter() - began,
        micro_step_seconds={w: sum(times) / len(times) for w, times in seconds.items() if times},
        applied=applied,
    )


def _micro_step(engine: Any, batch: RankBatch, scale: float, seconds: dict[Window, list[float]]) -> float:
    """Forward and backward of one micro-step; returns this rank's loss sum and adds the time to ``seconds``."""
    began = time.perf_counter()
    loss_sum = engine(batch.tokens_BT, batch.labels_BT, batch.window, batch.layout)
    engine.backward(loss_sum * scale)
    value = loss_sum.detach().double().item()
    seconds[batch.window].append(time.perf_counter() - began)
    return value


def _sum_over_ranks(values: Sequence[float], device: torch.device | str) -> list[float]:
    """All ranks' sum of a few numbers, in float64."""
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return totals.tolist()


def _ratio(total: float, count: float) -> float:
    """Mean, or nan of nothing."""
    return total / count if count else float("nan")
