"""The best layout of a training by enumeration, and why the other layouts do not do."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from longrope2.model.shape import ModelShape, Workload
from longrope2.parallel.dims import head_faults, token_multiple
from longrope2.planning.hardware import Machine
from longrope2.planning.memory import Layout, MemoryUse, Recompute, ZeroBuffers, predict_memory
from longrope2.planning.timing import RunTime, predict_time

_GIB = 2**30
# The model of time is not good to one per cent, so memory decides between layouts that close.
_CLOSE_ENOUGH = 1.01


@dataclass(frozen=True)
class FittingLayout:
    """A layout that could run, with what it takes."""

    layout: Layout
    memory: MemoryUse
    time: RunTime


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot run, or that does not fit, and why."""

    layout: Layout
    reason: str
    memory: MemoryUse | None = None
    """None where the layout is impossible before memory counts."""


@dataclass(frozen=True)
class Choice:
    """All layouts, those that fit by time, the fastest first."""

    fitting: tuple[FittingLayout, ...]
    refused: tuple[Refusal, ...]

    @property
    def best(self) -> FittingLayout | None:
        """Of those within 1 % of the fastest, the one that takes least memory.

        The trainer works on one segment a group at a time, so a larger micro-batch is shown but
        never chosen.
        """
        runnable = [fit for fit in self.fitting if fit.layout.micro_batch == 1]
        close = [f for f in runnable if f.time.hours <= _CLOSE_ENOUGH * runnable[0].time.hours]
        return min(close, key=lambda fit: fit.memory.peak, default=None)

    @property
    def closest(self) -> Refusal | None:
        """The refused layout that takes least memory, when memory alone is in the way."""
        too_large = ((r.memory.peak, r) for r in self.refused if r.memory is not None)
        return min(too_large, key=lambda pair: pair[0], default=(0.0, None))[1]


def choose_layout(
    shape: ModelShape,
    workload: Workload,
    machine: Machine,
    zero: ZeroBuffers,
    micro_batches: Sequence[int] = (1, 2, 4),
    *,
    fused_norms: bool = False,
) -> Choice:
    """Try every sequence, context and data size, recompute policy and micro-batch on all GPUs."""
    fitting: list[FittingLayout] = []
    refused: list[Refusal] = []
    for layout in _layouts(machine.num_gpus, micro_batches):
        layout = replace(layout, zero=zero, fused_norms=fused_norms)
        refusal = find_refusal(shape, workload, machine, layout)
        if refusal is not None:
            refused.append(refusal)
            continue
        fewest = fewest_recomputed_layers(shape, workload, layout, machine.usable_bytes)
        for layers in {None, fewest or None}:  # none of them: another policy
            chosen = replace(layout, recompute_layers=layers)
            time = predict_time(shape, workload, chosen, machine)
            fitting.append(FittingLayout(chosen, predict_memory(shape, workload, chosen), time))
    fitting.sort(key=lambda fit: (round(fit.time.hours, 3), fit.memory.peak))
    return Choice(tuple(fitting), tuple(refused))


def fewest_recomputed_layers(
    shape: ModelShape, workload: Workload, layout: Layout, usable_bytes: float
) -> int | None:
    """How few layers must be recomputed for a layout to fit; None when it must be all.

    Without recompute it is None too: no layer is.
    """
    if layout.recompute is Recompute.none:
        return None

    def fits(layers: int) -> bool:
        some = replace(layout, recompute_layers=layers)
        return predict_memory(shape, workload, some).peak <= usable_bytes

    candidates = range(shape.num_layers)
    fewest = bisect.bisect_left(candidates, True, key=fits)
    return fewest if fewest < shape.num_layers else None


def find_refusal(
    shape: ModelShape, workload: Workload, machine: Machine, layout: Layout
) -> Refusal | None:
    """Why a layout cannot run on a machine; None when it can."""
    if layout.num_processes > machine.num_gpus:
        there = f"the {machine.num_gpus} GPUs there are"
        return Refusal(layout, f"{layout.num_processes} processes need more than {there}")
    if fault := _impossible(shape, workload, layout):
        return Refusal(layout, fault)
    memory = predict_memory(shape, workload, layout)
    if memory.peak <= machine.usable_bytes:
        return None
    largest, size = max(vars(memory).items(), key=lambda part: part[1])
    reason = f"{memory.peak / _GIB:.0f} GiB of {machine.usable_bytes / _GIB:.0f}"
    reason += f"; the largest part is {largest} with {size / _GIB:.0f} GiB"
    return Refusal(layout, reason, memory)


def _layouts(num_gpus: int, micro_batches: Sequence[int]) -> Iterator[Layout]:
    """Every layout on ``num_gpus`` GPUs; only what recompute leaves can be offloaded."""
    divisors = [n for n in range(1, num_gpus + 1) if num_gpus % n == 0]
    grids = [(s, c) for s, c in product(divisors, divisors) if num_gpus % (s * c) == 0]
    for (sequence, context), micro_batch, recompute in product(grids, micro_batches, Recompute):
        for offload in (False,) if recompute is Recompute.none else (False, True):
            layout = Layout(num_gpus // (sequence * context), sequence, recompute, context=context)
            yield replace(layout, micro_batch=micro_batch, offload=offload)


def _impossible(shape: ModelShape, workload: Workload, layout: Layout) -> str | None:
    """Why heads, tokens or segments cannot be shared like this; None when they can."""
    step, target, sequence = workload.step_tokens, workload.target_len, layout.sequence
    at_once, segments = layout.data * layout.micro_batch, workload.segments_per_step
    if head_faults(sequence, shape.num_heads, shape.num_kv_heads):
        heads = f"{shape.num_heads} query and {shape.num_kv_heads} key/value heads"
        return f"{sequence} processes cannot share {heads}"
    if step % target:
        return f"a step of {step} tokens is no whole number of segments of {target}"
    if target % token_multiple(sequence, layout.context):
        return f"{layout.segment_ranks} processes cannot share {target} tokens evenly"
    if segments % at_once or not segments:
        return f"the {segments} segments of a step cannot be worked on {at_once} at a time"
    return None
