"""One optimizer step: micro-steps, one exact loss normaliser, gradients, update, and its report.

*All ranks must work on what the schedule says.* They decide alone which segments they read; with
another code version, segments or configuration on one of them, attention would mix different texts,
or ranks wait for ever. Every step therefore sums fingerprints over all ranks, inside an all-reduce
it needs anyway: of the window kinds, the same everywhere, and, in a slot per data-parallel group,
of the segment ids, the same within the group. Of n equal numbers h the sums S of h and Q of h * h
obey n * Q = S * S; of n unequal ones they do not (Cauchy-Schwarz). The numbers are integers below
2 ** 20: float64 sums are exact, and two different contents pass once in a million.

*Steps that must not be applied*, with a loss or gradient norm that is not finite, or a norm far
above the usual, are refused on all ranks alike. Parameters and the optimizer's whole state stay as
they were; the step still counts, its segments are not tried again (they are the likeliest cause);
``training.max_skipped_steps`` of them in a row end the run. How: DeepSpeed computes the global norm
inside its optimizer step, just before it calls the optimizer it wraps, once per group of
parameters. Hooks of that optimizer take the gradients away before the step and put them back after
it (DeepSpeed keeps some of these buffers). An Adam without gradients does nothing, save that apex's
counts the step all the same: the counters of groups are put back too.

*A stop does not wait for the update*: a step of many micro-steps takes minutes, more than may be
left when a stop signal comes. Between micro-steps nothing but gradients has changed; a step
that ends there is as if it had not begun, and what is saved is the state after the one before.
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

from longrope2.errors import DataError, UserError
from longrope2.parallel.dims import ParallelDims
from longrope2.rope.factors import Window
from longrope2.training.batch import RankBatch

_FINGERPRINT_BITS = 20


def fingerprints(batches: Sequence[RankBatch], dims: ParallelDims) -> list[float]:
    """This rank's numbers to be summed over all ranks: 2 + 2 * data-parallel size of them."""
    values = [0.0] * (2 + 2 * dims.data)
    windows, segments = _content(batches)
    place = 2 + 2 * dims.data_rank
    values[:2], values[place : place + 2] = _with_square(windows), _with_square(segments)
    return values


def check_agreement(
    sums: Sequence[float], batches: Sequence[RankBatch], dims: ParallelDims, step: int
) -> None:
    """Compare the sums of all ranks' ``fingerprints``; no communication unless ranks disagree.

    Raises:
        DataError: on every rank, naming the ranks that differ from the others and the step.
    """
    sizes = [dims.world_size] + [dims.segment_ranks] * dims.data
    pairs = zip(sizes, sums[::2], sums[1::2], strict=True)
    if all(size * int(squares) == int(total) ** 2 for size, total, squares in pairs):
        return
    everyone = [_content(batches)] * dims.world_size
    dist.all_gather_object(everyone, everyone[0])
    who = _who_differs(everyone, dims)
    raise DataError(f"step {step}: {who}; do all nodes see the same segments, code and config?")


def _who_differs(everyone: Sequence[tuple[str, str]], dims: ParallelDims) -> str:
    """The ranks whose windows, or segments, are not those of most ranks they must agree with."""
    most_common = Counter(windows for windows, _ in everyone).most_common(1)[0][0]
    odd = [rank for rank, (windows, _) in enumerate(everyone) if windows != most_common]
    if odd:
        works_on = f"rank {odd[0]} works on windows {everyone[odd[0]][0]}"
        return f"{works_on}, the others on {most_common}{_more(odd)}"
    for first in range(0, dims.world_size, dims.segment_ranks):
        group = range(first, first + dims.segment_ranks)
        most_common = Counter(everyone[rank][1] for rank in group).most_common(1)[0][0]
        odd = [rank for rank in group if everyone[rank][1] != most_common]
        if odd:
            works_on = f"rank {odd[0]} works on segments {everyone[odd[0]][1]}"
            return f"{works_on}, the others of its segment on {most_common}{_more(odd)}"
    return "ranks disagree about windows or segments, but no longer when asked"


def _more(odd: Sequence[int]) -> str:
    return f" (so do ranks {', '.join(map(str, odd[1:]))})" if len(odd) > 1 else ""


def _content(batches: Sequence[RankBatch]) -> tuple[str, str]:
    kinds = " ".join(batch.window.value for batch in batches)
    return kinds, " ".join(str(batch.segment_id) for batch in batches)


def _with_square(text: str) -> tuple[float, float]:
    value = zlib.crc32(text.encode()) >> (32 - _FINGERPRINT_BITS)
    return float(value), float(value * value)


class StepAbandoned(Exception):
    """A step ended between two micro-steps because a stop was asked for; nothing was updated."""


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
        """End a run that no longer trains; step, loss and norm are the latest step's.

        Raises:
            UserError: ``at_most`` steps in a row were refused.
        """
        if self.in_a_row >= at_most:
            raise UserError(
                f"training.max_skipped_steps={at_most}: that many steps in a row were skipped, the "
                f"last one step {step} with loss {loss} and gradient norm {norm}; the checkpoints "
                "are intact. Lower training.learning_rate, raise training.skip_grad_norm if the "
                "norm is finite, or look at the segments of these steps"
            )


class StepGuard:
    """Takes and judges the last ``engine.step()`` of every optimizer step.

    Make it once, after ``deepspeed.initialize`` has taken its own first steps.
    """

    def __init__(
        self,
        engine: Any,
        max_norm: float | None = None,
        *,
        clip: float | None = None,
        skipped: SkippedSteps | None = None,
    ) -> None:
        """Hook into the optimizer of a DeepSpeed engine.

        A step is refused above ``max_norm`` (before clipping); ``clip`` is used where DeepSpeed
        neither clips nor reports the norm.
        """
        self.engine, self.skipped = engine, skipped or SkippedSteps()
        self._max_norm = math.inf if max_norm is None else max_norm
        self._clip = math.inf if clip is None else clip
        self._loss = 0.0
        self._norm: float | None = None
        self._refused = False
        self._taken: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._counted: list[tuple[dict[str, Any], Any]] = []
        engine.basic_optimizer.register_step_pre_hook(self._take_gradients_if_refused)
        engine.basic_optimizer.register_step_post_hook(self._put_gradients_back)

    def clipped_norm(self) -> float | None:
        """Clip the gradients and return their norm before, where DeepSpeed does neither."""
        if self.engine.gradient_clipping() != 0:
            return None
        parameters = self.engine.module.parameters()
        return float(torch.nn.utils.clip_grad_norm_(parameters, self._clip))

    def step(self, loss: float, norm: float | None) -> bool:
        """The engine's step for the last micro-step; returns whether the update was applied.

        ``loss`` is the whole step's; ``norm`` is None where DeepSpeed computes it itself.
        """
        self._loss, self._norm, self._refused = loss, norm, False
        self.engine.step()
        applied = not self._refused and bool(self.engine.was_step_applied())
        self.skipped.count(applied)
        return applied

    def _take_gradients_if_refused(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """Hook: without gradients the optimizer changes neither parameters nor state."""
        norm = float(self.engine.optimizer._global_grad_norm) if self._norm is None else self._norm
        is_finite = math.isfinite(self._loss) and math.isfinite(norm)
        self._refused = not (is_finite and norm <= self._max_norm)
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


@dataclass(frozen=True)
class StepReport:
    """What one step did, summed over all ranks."""

    loss: float
    """Mean per target token, as the next; nan where there was none."""
    loss_by_window: dict[Window, float]
    targets_by_window: dict[Window, int]
    gradient_norm: float
    squared_lengths: float
    """Sum of squared lengths of all spans attended by themselves, to which its cost is in
    proportion."""
    seconds: float
    micro_step_seconds: dict[Window, float]
    """Mean on this rank, for the kinds that occurred."""
    applied: bool = True
    """False when the guard, or DeepSpeed, refused the update."""
    step: int = 0
    """Number of the step, 1-based."""
    learning_rate: float = 0.0
    skipped_steps: int = 0
    """Refused since the start of the run."""


def gradient_scale(
    dims: ParallelDims, zero_stage: int, micro_steps: int, num_targets: int
) -> float:
    """Factor from a rank's summed token loss to the loss it hands to DeepSpeed.

    The gradient wanted is that of (sum of all token losses of the step) / ``num_targets``.
    DeepSpeed divides by the micro-steps, and then by the whole world under ZeRO-3's reduce-scatter,
    but under stages 0 to 2 by the groups that work on different segments.
    """
    averaged_over = dims.world_size if zero_stage == 3 else dims.data
    return averaged_over * micro_steps / max(1, num_targets)


def run_step(
    guard: StepGuard,
    batches: Sequence[RankBatch],
    dims: ParallelDims,
    *,
    learning_rate: float,
    step: int = 0,
    mark: Callable[[str], None] = lambda phase: None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> StepReport:
    """Forward and backward over the rank's micro-steps, then the update at ``learning_rate``.

    ``step`` is 1-based; ``mark`` is told what the rank does next; ``stop_asked`` is called between
    micro-steps and must answer the same on all ranks. After ``StepAbandoned`` the engine holds
    gradients of half a step: save, but do not train on.

    Raises:
        DataError: the ranks do not work on the same micro-steps; on every rank.
        StepAbandoned: ``stop_asked`` said so.
    """
    began, engine = time.perf_counter(), guard.engine
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    mark("comparing micro-steps")
    own = dict.fromkeys(Window, 0.0)
    for batch in batches:
        own[batch.window] += batch.num_targets
    zero = torch.zeros((), dtype=torch.float64, device=engine.device)
    totals = _sum_over_ranks(zero.new_tensor([*own.values(), *fingerprints(batches, dims)]))
    targets, agreement = totals[: len(Window)], totals[len(Window) :]
    check_agreement(agreement, batches, dims, step)
    stage = engine.zero_optimization_stage()
    scale = gradient_scale(dims, stage, len(batches), int(sum(targets)))
    loss_sums, moments = dict.fromkeys(Window, zero), list[tuple[Window, Any, Any]]()
    for number, batch in enumerate(batches, start=1):
        if number > 1 and stop_asked():
            raise StepAbandoned(f"step {step}, before micro-step {number} of {len(batches)}")
        mark(f"micro-step {number} of {len(batches)}, {batch.window.value}")
        micro_began = _moment(engine.device)
        loss_sum = engine(batch.tokens_BT, batch.labels_BT, batch.window, batch.layout)
        engine.backward(loss_sum * scale)
        # Not read here: the host would wait for the device, and the device then for the host.
        loss_sums[batch.window] = loss_sums[batch.window] + loss_sum.detach().double()
        moments.append((batch.window, micro_began, _moment(engine.device)))
        if number < len(batches):
            engine.step()
    mark("update")
    squares = sum(batch.squared_lengths for batch in batches) / dims.segment_ranks
    *sums, squared_lengths = _sum_over_ranks(torch.stack([*loss_sums.values(), zero + squares]))
    seconds: dict[Window, list[float]] = {window: [] for window in Window}
    for window, *of_micro_step in moments:
        seconds[window].append(_seconds_between(*of_micro_step))
    norm, loss = guard.clipped_norm(), _ratio(sum(sums), sum(targets))
    update_began = time.perf_counter()
    applied = guard.step(loss, norm)
    seconds[batches[-1].window][-1] += time.perf_counter() - update_began
    return StepReport(
        loss=loss,
        loss_by_window={w: _ratio(s, n) for w, s, n in zip(Window, sums, targets, strict=True)},
        targets_by_window={w: int(n) for w, n in zip(Window, targets, strict=True)},
        gradient_norm=float(engine.get_global_grad_norm()) if norm is None else norm,
        squared_lengths=squared_lengths,
        seconds=time.perf_counter() - began,
        micro_step_seconds={w: sum(times) / len(times) for w, times in seconds.items() if times},
        applied=applied,
        step=step,
        learning_rate=learning_rate,
        skipped_steps=guard.skipped.total,
    )


def _sum_over_ranks(values_N: torch.Tensor) -> list[float]:
    """Every rank's numbers added up; the host waits for the device here."""
    dist.all_reduce(values_N)
    return values_N.tolist()


def _moment(device: torch.device | str) -> Any:
    """Now, on the device, which nothing waits for."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(began: Any, ended: Any) -> float:
    """Of two moments that have passed on the device too."""
    if isinstance(began, float):
        return ended - began
    return began.elapsed_time(ended) / 1000


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")
