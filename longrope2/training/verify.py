"""The planner's figures of a run beside those that its rehearsal counts.

Both are of one rank and one micro-step, or of one rank's memory at one moment. FLOPs of attention
are of whole squares here, as torch counts them, twice the causal half that the planner charges.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from longrope2.model.shape import ModelShape, Workload
from longrope2.planning.memory import Layout, predict_memory
from longrope2.planning.timing import (
    attention_flops,
    exchange_bytes,
    exchange_passes,
    gather_bytes,
    gathered_from_all,
    key_bytes,
    product_flops,
)
from longrope2.rope.factors import Window
from longrope2.training.meter import Phase

TOLERANCE = 0.05
_GIB, _GB, _TFLOP = 2**30, 1e9, 1e12
_WIDTH = 118


@dataclass(frozen=True)
class Figure:
    """One quantity, planned and counted."""

    what: str
    unit: str
    planned: float
    counted: float

    @property
    def difference(self) -> float:
        """Relative to what is counted; 0 where both are 0."""
        if self.counted == 0:
            return 0.0 if self.planned == 0 else float("inf")
        return self.planned / self.counted - 1

    @property
    def agrees(self) -> bool:
        """Within ``TOLERANCE``."""
        return abs(self.difference) <= TOLERANCE


@dataclass(frozen=True)
class Verification:
    """A rehearsed run: its phases, and the planner's figures beside them."""

    layout: Layout
    phases: Sequence[Phase]
    figures: Sequence[Figure]

    @property
    def wrong(self) -> list[Figure]:
        """What the planner does not know: figures that differ."""
        return [figure for figure in self.figures if not figure.agrees]

    def to_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        return {
            "layout": _plain_layout(self.layout),
            "figures": [
                asdict(figure) | {"difference": round(figure.difference, 4)}
                for figure in self.figures
            ],
            "phases": [_plain_phase(phase) for phase in self.phases],
        }


def verify(
    shape: ModelShape, workload: Workload, layout: Layout, phases: Sequence[Phase], *, mixed: bool
) -> Verification:
    """Set the planner beside a rehearsal of one micro-step a window kind.

    Args:
        shape: The model's.
        workload: Its short documents are those that were rehearsed.
        layout: The run's.
        phases: Of ``rehearse``.
        mixed: Whether short segments are short windows; else all are long.
    """
    figures = _memory_figures(shape, workload, layout, phases)
    for kind in Window:
        counted = _Sum([phase for phase in phases if phase.name.startswith(f"{kind.value}:")])
        window = kind if mixed else Window.LONG
        figures += _micro_step_figures(shape, workload, layout, counted, kind=kind, window=window)
    weights, _ = gather_bytes(shape, layout)
    everywhere = len(Window) * weights * gathered_from_all(shape, layout, len(Window))
    if layout.num_processes > 1:
        everywhere += layout.compute_bytes * shape.replicated(layout.zero.replicate_below)
    counted = _Sum(phases[1:]).moved("all_gather_into_tensor", layout.num_processes)
    figures.append(
        Figure("step: weights gathered from all ranks", "GB", everywhere / _GB, counted / _GB)
    )
    return Verification(layout, phases, figures)


def print_verification(found: Verification) -> None:
    """The phases, then the planner's figures beside the counted ones."""
    console = Console(width=_WIDTH, soft_wrap=True)
    console.print(_phase_table(found.phases))
    console.print(_figure_table(found.figures))
    reads = [line for phase in found.phases[1:] for line in phase.host_reads.items()]
    lines = ["numbers that the host waits for in a step of two micro-steps, by the line that asks:"]
    lines += [f"  {count} {line}" for line, count in _summed(reads)]
    console.print("\n".join(lines), highlight=False, markup=False)


class _Sum:
    """Counts over the phases of one micro-step."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        self.products = sum(phase.product_flops for phase in phases)
        self.attention = sum(phase.attention_flops for phase in phases)
        self._bytes: Counter[tuple[str, int]] = Counter()
        for phase in phases:
            self._bytes.update(phase.collective_bytes)

    def moved(self, name: str, ranks: int | None = None) -> int:
        """Bytes of a collective, in groups of one size or in all."""
        return sum(
            size
            for (found, group), size in self._bytes.items()
            if found == name and ranks in (None, group)
        )


def _memory_figures(
    shape: ModelShape, workload: Workload, layout: Layout, phases: Sequence[Phase]
) -> list[Figure]:
    moments = predict_memory(shape, workload, layout).moments
    ends = {"loss": ": loss", "layer": ": backward", "update": "update"}
    words = {
        "loss": "memory at the loss",
        "layer": "memory in the backward pass",
        "update": "memory in the update",
    }
    figures = []
    for moment, end in ends.items():
        counted = max(phase.peak_bytes for phase in phases if phase.name.endswith(end)) / _GIB
        figures.append(Figure(words[moment], "GiB", moments[moment] / _GIB, counted))
    counted = max(phase.peak_bytes for phase in phases[1:]) / _GIB
    return [*figures, Figure("memory, the peak", "GiB", max(moments.values()) / _GIB, counted)]


def _micro_step_figures(
    shape: ModelShape,
    workload: Workload,
    layout: Layout,
    counted: _Sum,
    *,
    kind: Window,
    window: Window,
) -> list[Figure]:
    tokens = layout.local_tokens(workload)
    forward = 2 * shape.attention_flops(workload.attended_len(window)) * tokens
    is_long, context, passes = window is Window.LONG, layout.context, exchange_passes(shape, layout)
    exchanged = exchange_bytes(shape, workload, layout) if is_long else 0.0
    keys = key_bytes(shape, workload, layout) if is_long else 0.0
    if is_long and context > 1:  # two chunks of 2n, which read r and 2n + 1 - r of as many
        forward *= (2 * context + 1) / (4 * context)
    weights, gradients = gather_bytes(shape, layout)
    # Keys are gathered forward, with a rank's own; their gradients sent back all to all.
    all_keys = (passes - 1) * keys * context / max(1, context - 1)
    planned = {
        ("products", "TFLOP"): product_flops(shape, layout) * tokens,
        ("attention, whole squares", "TFLOP"): attention_flops(shape, layout, forward),
        ("exchanged, sent", "GB"): passes * exchanged + keys,
        ("weights gathered" if context == 1 else "weights and keys gathered", "GB"): weights
        + all_keys,
        ("gradients reduced", "GB"): gradients,
    }
    found = (
        counted.products,
        counted.attention,
        sum(
            counted.moved("all_to_all_single", ranks) * (ranks - 1) / ranks
            for ranks in {layout.sequence, context}
        ),
        counted.moved("all_gather_into_tensor"),
        counted.moved("reduce_scatter_tensor"),
    )
    units = {"TFLOP": _TFLOP, "GB": _GB}
    return [
        Figure(f"{kind.value}: {what}", unit, value / units[unit], number / units[unit])
        for ((what, unit), value), number in zip(planned.items(), found, strict=True)
    ]


def _summed(pairs: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    total: Counter[str] = Counter()
    for line, count in pairs:
        total[line] += count
    return total.most_common()


def _phase_table(phases: Sequence[Phase]) -> Table:
    head = ["phase", "peak GiB", "products TFLOP", "attention TFLOP", "collectives: calls, GB"]
    rows = []
    for phase in phases:
        moved = [
            f"{name} of {ranks}: {phase.collectives[name, ranks]}, {size / _GB:.2f}"
            for (name, ranks), size in phase.collective_bytes.items()
        ]
        flops = [f"{n / _TFLOP:.1f}" for n in (phase.product_flops, phase.attention_flops)]
        rows.append([phase.name, f"{phase.peak_bytes / _GIB:.2f}", *flops, "; ".join(moved)])
    return _table("one rank in the second step, one micro-step of each kind", head, rows)


def _figure_table(figures: Sequence[Figure]) -> Table:
    head = ["", "unit", "planned", "counted", "difference"]
    rows = [
        [
            figure.what,
            figure.unit,
            f"{figure.planned:.2f}",
            f"{figure.counted:.2f}",
            f"{100 * figure.difference:+.1f} %{'' if figure.agrees else ' *'}",
        ]
        for figure in figures
    ]
    return _table("the planner beside it (* differs by more than 5 %)", head, rows)


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(head):
        is_number = 0 < number < len(head) - 1 or name == "difference"
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _plain_layout(layout: Layout) -> dict[str, Any]:
    return {**asdict(layout), "recompute": layout.recompute.value}


def _plain_phase(phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "peak_bytes": phase.peak_bytes,
        "product_flops": phase.product_flops,
        "attention_flops_whole_squares": phase.attention_flops,
        "collectives": [
            {"name": name, "ranks": ranks, "calls": calls, "bytes": phase.collective_bytes[key]}
            for key, calls in phase.collectives.items()
            for name, ranks in [key]
        ],
        "host_reads": dict(phase.host_reads),
    }
