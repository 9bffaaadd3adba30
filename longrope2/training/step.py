"""One optimizer step: micro-steps, one exact loss normaliser, gradients, update, and what is
reported of it.

All ranks must work on what the schedule says: checked every step, inside an all-reduce the step
needs anyway.

Ranks decide alone which segments they read, from the same schedule. If one of them has another code
version, another copy of the segments or another configuration, attention mixes different texts, or
ranks wait for each other for ever. Every step therefore sums a few fingerprints over all ranks: of
the window kinds, which must be the same everywhere, and, in a slot per data-parallel group, of the
segment ids, which must be the same within the group. Of n equal numbers h the sums S of h and Q of
h * h obey n * Q = S * S; of n unequal ones they do not (Cauchy-Schwarz). The numbers are integers
below 2 ** 20, so float64 sums are exact, and two different contents pass with a probability of one
in a million.

Steps that must not be applied: a loss or gradient norm that is not finite, or a norm far above the
usual.

A refused step is refused on all ranks alike, because what it is judged by (loss and norm of the
whole step) is the same on all of them. Then

- the parameters and the optimizer's state, moments and bias-correction counters alike, stay as they
  were;
- the step still counts: the learning-rate schedule and the order of segments go on, and its
  segments are not tried again (they are the likeliest cause);
- ``train/skipped_steps`` counts it, and ``training.max_skipped_steps`` of them in a row end the
  run.

How: DeepSpeed computes the global norm inside its optimizer step, just before it calls the
optimizer it wraps, once per group of parameters. Hooks of that optimizer take the gradients away
before the step and put them back after it (DeepSpeed keeps some of these buffers), and an Adam
without gradients does nothing, save that apex's counts the step all the same: the counters of
groups are put back too. (DeepSpeed itself leaves a step out when the norm is not finite, before it
comes to the hook.)
"""

import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longrope2.errors import DataError, UserError
from longrope2.parallel.dims import ParallelDims
from longrope2.rope.factors import Window
from longrope2.training.batch import RankBatch

FINGERPRINT_BITS = 20


def fingerprints(batches: Sequence[RankBatch], dims: ParallelDims) -> list[float]:
    """This rank's numbers to be summed over all ranks: 2 + 2 * data-parallel size of them."""
    values = [0.0] * (2 + 2 * dims.data)
    values[:2] = _with_square(_windows(batches))
    place = 2 + 2 * dims.data_rank
    values[place : place + 2] = _with_square(_segments(batches))
    return values


def check_agreement(
    sums: Sequence[float], batches: Sequence[RankBatch], dims: ParallelDims, step: int
) -> None:
    """Compare the sums of all ranks' ``fingerprints``; no communication unless ranks disagree.

    Args:
        sums: Sums over all ranks.
        batches: This rank's micro-steps, to say what it works on.
        dims: The process grid.
        step: Number of the step, 1-based, for the message.

    Raises:
        DataError: on every rank, naming the ranks that differ from the others and the step.
    """
    sizes = [dims.world_size] + [dims.sequence] * dims.data
    pairs = zip(sizes, sums[::2], sums[1::2], strict=True)
    if all(size * int(squares) == int(total) ** 2 for size, total, squares in pairs):
        return
    mine = (_windows(batches), _segments(batches))
    everyone: list[tuple[str, str]] = [mine] * dims.world_size
    dist.all_gather_object(everyone, mine)
    raise DataError(
        f"step {step}: {_who_differs(everyone, dims)}; do all nodes see the same segments, code and config?"
    )


def _who_differs(everyone: Sequence[tuple[str, str]], dims: ParallelDims) -> str:
    """The ranks whose window kinds, or segments, are not those of most ranks they must agree with."""
    most_common = Counter(windows for windows, _ in everyone).most_common(1)[0][0]
    odd = [rank for rank, (windows, _) in enumerate(everyone) if windows != most_common]
    if odd:
        return (
            f"rank {odd[0]} works on windows {everyone[odd[0]][0]}, the others on {most_common}"
            + _more(odd)
        )
    for first in range(0, dims.world_size, dims.sequence):
        group = range(first, first + dims.sequence)
        most_common = Counter(everyone[rank][1] for rank in group).most_common(1)[0][0]
        odd = [rank for rank in group if everyone[rank][1] != most_common]
        if odd:
            text = f"rank {odd[0]} works on segments {everyone[odd[0]][1]}, its sequence-parallel group on {most_common}"
            return text + _more(odd)
    return "ranks disagree about windows or segments, but no longer when asked"


def _more(odd: Sequence[int]) -> str:
    """The other ranks that differ."""
    return f" (so do ranks {', '.join(map(str, odd[1:]))})" if len(odd) > 1 else ""


def _windows(batches: Sequence[RankBatch]) -> str:
    """Window kinds of the micro-steps."""
    return " ".join(batch.window.value for batch in batches)


def _segments(batches: Sequence[RankBatch]) -> str:
    """Segment ids of the micro-steps."""
    return " ".join(str(batch.segment_id) for batch in batches)


def _with_square(text: str) -> tuple[float, float]:
    """Fingerprint of a text and its square."""
    value = zlib.crc32(text.encode()) >> (32 - FINGERPRINT_BITS)
    return float(value), float(value * value)


class StepGuard:
    """Judges every step of one engine; make it once, after ``deepspeed.initialize`` has taken its own first steps."""

    def __init__(self, engine: Any, max_norm: float | None = None) -> None:
        """Hook into the engine's optimizer.

        Args:
            engine: DeepSpeed engine; ``engine.basic_optimizer`` is the optimizer that was given to
                it.
            max_norm: Gradient norm (before clipping) above which a step is refused; None refuses
                none for its size.
        """
        self._engine = engine
        self._max_norm = math.inf if max_norm is None else max_norm
        self._loss = 0.0
        self._norm: float | None = None
        self._refused = False
        self._taken: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._counted: list[tuple[dict[str, Any], Any]] = []
        engine.basic_optimizer.register_step_pre_hook(self._take_gradients_if_refused)
        engine.basic_optimizer.register_step_post_hook(self._put_gradients_back)

    def step(self, loss: float, norm: float | None) -> bool:
        """Call ``engine.step()`` for the last micro-step; returns whether the update was applied.

        Args:
            loss: Loss of the whole step, the same on all ranks.
            norm: Global gradient norm, where DeepSpeed does not compute it itself; else None.
        """
        self._loss, self._norm, self._refused = loss, norm, False
        self._engine.step()
        return not self._refused and bool(self._engine.was_step_applied())

    def _take_gradients_if_refused(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """Hook: without gradients the optimizer changes neither parameters nor state."""
        norm = float(self._engine.optimizer._global_grad_norm) if self._norm is None else self._norm
        self._refused = not (
            math.isfinite(self._loss) and math.isfinite(norm) and norm <= self._max_norm
        )
        if self._refused:
            self._taken = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
            self._counted = [(group, group.get("step")) for group in optimizer.param_groups]
            for parameter, _ in self._taken:
                parameter.grad = None

    def _put_gradients_back(self, *unused: Any) -> None:
        """Hook: DeepSpeed goes on as after any step."""
        for parameter, gradient in self._taken:
            parameter.grad = gradient
        for group, step in self._counted:
            group.pop("step", None)
            if step is not None:
                group["step"] = step
        self._taken, self._counted = [], []


@dataclass
class SkippedSteps:
    """How many steps were refused; kept in checkpoints."""

    total: int = 0
    """Since the start of the run."""
    in_a_row: int = 0
    """Up to and including the latest step."""

    def count(self, applied: bool) -> None:
        """Count one step."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied

    def stop_if_too_many(self, at_most: int, *, step: int, loss: float, norm: float) -> None:
        """End a run that no longer trains.

        Args:
            at_most: ``training.max_skipped_steps``.
            step: Number of the latest step, 1-based.
            loss: Its loss.
            norm: Its gradient norm.

        Raises:
            UserError: ``at_most`` steps in a row were refused.
        """
        if self.in_a_row >= at_most:
            raise UserError(
                f"training.max_skipped_steps={at_most}: that many steps in a row were skipped, the last one step {step} "
                f"with loss {loss} and gradient norm {norm}; the checkpoints are intact. Lower training.learning_rate, "
                "raise training.skip_grad_norm if the norm is finite, or look at the segments of these steps"
            )


@dataclass(frozen=True)
class StepReport:
    """What one step did, summed over all ranks; losses are means per target token, nan where there was none."""

    loss: float
    loss_by_window: dict[Window, float]
    targets_by_window: dict[Window, int]
    gradient_norm: float
    squared_lengths: float
    """Sum of squared lengths of all spans attended by themselves; what attention cost is
    proportional to."""
    seconds: float
    micro_step_seconds: dict[Window, float]
    """Mean on this rank, for the kinds that occurred."""
    applied: bool = True
    """False when the guard, or DeepSpeed, refused the update; then nothing but the step's number
    has changed."""


def gradient_scale(
    dims: ParallelDims, zero_stage: int, micro_steps: int, num_targets: int
) -> float:
    """Factor from a rank's summed token loss to the loss it hands to DeepSpeed.

    The gradient wanted is that of (sum of all token losses of the step) / ``num_targets``.
    DeepSpeed divides by the micro-steps, and then by the whole world under ZeRO-3's reduce-scatter,
    but by world / sequence under stages 0 to 2.
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
        gradient_clip: Largest global gradient norm; used here only where DeepSpeed neither clips
            nor reports the norm.
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
    *sums, squared_lengths = _sum_over_ranks(
        [*(loss_sums[window] for window in Window), squares], engine.device
    )
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


def _micro_step(
    engine: Any, batch: RankBatch, scale: float, seconds: dict[Window, list[float]]
) -> float:
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
