"""The best layout of a training by enumeration: every way to split the processes, and why the others do not do."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from longrope2.model.shape import ModelShape, Workload
from longrope2.parallel.dims import head_faults
from longrope2.planning.hardware import Machine
from longrope2.planning.memory import Layout, MemoryPlan, RecomputePolicy, ZeroBuffers, plan_memory
from longrope2.planning.timing import RunTime, plan_time

GIB = 2**30
# The model of time is not good to one per cent, so memory decides between layouts that close.
CLOSE_ENOUGH = 1.01


@dataclass(frozen=True)
class Candidate:
    """A layout that could run, with what it takes."""

    layout: Layout
    memory: MemoryPlan
    time: RunTime


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot run, or that does not fit, and why."""

    layout: Layout
    reason: str
    memory: MemoryPlan | None = None
    """None where the layout is impossible before memory counts."""


@dataclass(frozen=True)
class Choice:
    """All layouts, those that fit by time, the fastest first."""

    fitting: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]

    @property
    def best(self) -> Candidate | None:
        """Of those within ``CLOSE_ENOUGH`` of the fastest that the trainer can run, the one that
        takes least memory.

        The trainer works on one segment a group at a time, so a larger micro-batch is shown but
        never chosen.
        """
        runnable = [candidate for candidate in self.fitting if candidate.layout.micro_batch == 1]
        if not runnable:
            return None
        close = [c for c in runnable if c.time.hours <= CLOSE_ENOUGH * runnable[0].time.hours]
        return min(close, key=lambda candidate: candidate.memory.peak)

    @property
    def closest(self) -> Refusal | None:
        """The refused layout that takes least memory, when memory alone is in the way."""
        short = [refusal for refusal in self.refused if refusal.memory is not None]
        return min(
            short, key=lambda refusal: refusal.memory.peak if refusal.memory else 0.0, default=None
        )


def choose_layout(
    shape: ModelShape,
    workload: Workload,
    machine: Machine,
    zero: ZeroBuffers,
    micro_batches: Sequence[int] = (1, 2, 4),
    *,
    fused_norms: bool = False,
) -> Choice:
    """Enumerate sequence and data sizes, recompute policies and micro-batches on all GPUs of a machine."""
    fitting, refused = [], []
    for layout in _layouts(machine.num_gpus, zero, micro_batches, fused_norms):
        refusal = find_refusal(shape, workload, machine, layout)
        if refusal is not None:
            refused.append(refusal)
            continue
        memory = plan_memory(shape, workload, layout)
        fitting.append(Candidate(layout, memory, plan_time(shape, workload, layout, machine)))
    fitting.sort(key=lambda candidate: (round(candidate.time.hours, 3), candidate.memory.peak))
    return Choice(tuple(fitting), tuple(refused))


def find_refusal(
    shape: ModelShape, workload: Workload, machine: Machine, layout: Layout
) -> Refusal | None:
    """Why a layout cannot run on a machine; None when it can."""
    if layout.num_processes > machine.num_gpus:
        return Refusal(
            layout,
            f"{layout.num_processes} processes need more than the {machine.num_gpus} GPUs there are",
        )
    fault = _impossible(shape, workload, layout)
    if fault:
        return Refusal(layout, fault)
    memory = plan_memory(shape, workload, layout)
    if memory.peak > machine.usable_bytes:
        return Refusal(layout, _too_large(memory, machine), memory)
    return None


def cost_table(
    shape: ModelShape,
    workload: Workload,
    machine: Machine,
    zero: ZeroBuffers,
    lengths: Sequence[int],
    gpu_counts: Sequence[int],
    *,
    fused_norms: bool = False,
) -> dict[tuple[int, int], Choice]:
    """The choice for every target length and number of GPUs; the batch in tokens and everything else stays."""
    table = {}
    for length in lengths:
        for num_gpus in gpu_counts:
            scaled, cluster = (
                replace(workload, target_len=length),
                replace(machine, num_gpus=num_gpus),
            )
            table[length, num_gpus] = choose_layout(
                shape, scaled, cluster, zero, (1,), fused_norms=fused_norms
            )
    return table


def _layouts(
    num_gpus: int, zero: ZeroBuffers, micro_batches: Sequence[int], fused_norms: bool
) -> Iterator[Layout]:
    """Every layout on ``num_gpus`` GPUs; only what recompute leaves can be offloaded."""
    for sequence in (n for n in range(1, num_gpus + 1) if num_gpus % n == 0):
        for micro_batch in micro_batches:
            for recompute in RecomputePolicy:
                for offload in (False,) if recompute is RecomputePolicy.none else (False, True):
                    yield Layout(
                        num_gpus // sequence,
                        sequence,
                        recompute,
                        micro_batch,
                        offload,
                        zero=zero,
                        fused_norms=fused_norms,
                    )


def _impossible(shape: ModelShape, workload: Workload, layout: Layout) -> str | None:
    """Why heads, tokens or segments cannot be shared like this; None when they can."""
    if head_faults(layout.sequence, shape.num_heads, shape.num_kv_heads):
        return f"{layout.sequence} processes cannot share {shape.num_heads} query and {shape.num_kv_heads} key/value heads"
    if workload.step_tokens % workload.target_len:
        return f"a step of {workload.step_tokens} tokens is no whole number of segments of {workload.target_len}"
    if workload.target_len % layout.sequence:
        return f"{layout.sequence} processes cannot share {workload.target_len} tokens evenly"
    at_once = layout.data * layout.micro_batch
    if workload.segments_per_step % at_once or not workload.segments_per_step:
        return f"the {workload.segments_per_step} segments of a step cannot be worked on {at_once} at a time"
    return None


def _too_large(memory: MemoryPlan, machine: Machine) -> str:
    """How much is too much, and the part that takes most."""
    parts = memory.parts
    largest = max(parts, key=parts.__getitem__)
    return (
        f"{memory.peak / GIB:.0f} GiB of {machine.usable_bytes / GIB:.0f}; "
        f"the largest part is {largest} with {parts[largest] / GIB:.0f} GiB"
    )
