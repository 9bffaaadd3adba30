"""The planner's result: what a training takes, put together and printed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rich.console import Console
from rich.table import Table

from longrope2.kernel_choice import NormKernel
from longrope2.model.shape import ModelShape, Workload
from longrope2.planning import memory as of_memory
from longrope2.planning import timing
from longrope2.planning.choice import Choice, Refusal, choose_layout, find_refusal
from longrope2.planning.hardware import HardwareConfig, Machine, make_machine
from longrope2.planning.memory import Layout, MemoryUse, ZeroBuffers
from longrope2.planning.timing import RunTime
from longrope2.rope.factors import Window

GIB, GB, GFLOP, TFLOP = 2**30, 1e9, 1e9, 1e12
# Of the tables: a terminal that is narrower wraps them, a pipe does not.
_WIDTH = 118
_MOMENT_WORDS = {
    "loss": "at the loss",
    "layer": "in the backward pass",
    "update": "in the update (* is the peak)",
}
_TIME_PARTS = ("products", "attention", "elementwise", "exchange", "offload", "exposed_gathers",
              "total")  # fmt: skip


@dataclass
class PlanConfig:
    """What is assumed of the segments, and how far the tables go."""

    long_share: float | None = None
    """Share of long segments, 0 to 1; the rest is short. null is that of the run's segments, or
    0.7 where there are none yet."""
    short_document_tokens: float | None = None
    """Mean length of the documents in short segments, weighted by length; null is half of
    ``model.original_len``."""
    micro_batches: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Segments at once that are tried; the trainer runs 1."""
    lengths: list[int] = field(default_factory=lambda: [131_072, 262_144, 524_288, 1_048_576])
    """Targets of the cost table, tokens."""
    gpu_counts: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256, 512])
    """Machines of the cost table."""
    shown_layouts: int = 8
    """Rows of the table of layouts."""


@dataclass(frozen=True)
class Plan:
    """A training and a machine, and what the planner finds for them.

    Raises:
        ConfigError: ``hardware`` describes no machine (when it is first asked for).
    """

    name: str
    original_len: int
    """The model's window, in tokens."""
    options: PlanConfig
    mix_origin: str
    """Where the share of long segments comes from, in words behind it."""
    hardware: HardwareConfig
    shape: ModelShape
    workload: Workload
    norm: NormKernel
    zero: ZeroBuffers
    configured: Layout | None
    """The layout that the configuration asks for; None when it asks for one process."""
    search_forwards: int
    """Forward passes of a search at most, each of the target length."""
    evaluation_samples: Sequence[tuple[int, float]]
    """Length in tokens and number of samples of that length, over all subjects."""
    num_subjects: int

    @cached_property
    def machine(self) -> Machine:
        """The hardware with every number known."""
        return make_machine(self.hardware)

    @cached_property
    def choice(self) -> Choice:
        """All layouts on this machine."""
        return self._choice(self.machine, self.workload, self.options.micro_batches)

    @cached_property
    def refusal(self) -> Refusal | None:
        """Why the configured layout cannot run on the machine; None when it can."""
        if self.configured is None:
            return None
        return find_refusal(self.shape, self.workload, self.machine, self.configured)

    def choice_at(self, target_len: int, num_gpus: int) -> Choice:
        """The choice for another target and number of GPUs, all else as it is."""
        workload = replace(self.workload, target_len=target_len)
        return self._choice(replace(self.machine, num_gpus=num_gpus), workload, (1,))

    def _choice(self, machine: Machine, workload: Workload, micro_batches: Sequence[int]) -> Choice:
        run, fused = (self.shape, workload, machine, self.zero), self.norm is not NormKernel.model
        return choose_layout(*run, micro_batches=micro_batches, fused_norms=fused)


def print_plan(plan: Plan) -> None:
    """Print all parts of a plan."""
    console = Console(width=_WIDTH, soft_wrap=True)

    def say(*parts: list[str]) -> None:
        console.print("\n".join(line for part in parts for line in part), highlight=False)

    say(_model_lines(plan), _machine_lines(plan))
    best, refusal = plan.choice.best, plan.refusal
    if best is None:
        say([f"\nNo layout fits on {plan.machine.num_gpus} GPUs."])
    else:
        console.print(_layouts_table(plan))
        say(_choice_lines(plan))
        shown = {"best": best.layout}
        is_planned = refusal is None or refusal.memory is not None
        if is_planned and plan.configured is not None and plan.configured != best.layout:
            shown["configured"] = plan.configured
        console.print(_memory_table(plan, shown))
        console.print(_time_table(plan, shown))
        console.print(_traffic_table(plan, shown))
    say(_refused_lines(plan.choice))
    console.print(_cost_table(plan))
    say(_stage_lines(plan), _closing_lines(plan))


def _layout_words(layout: Layout) -> str:
    words = f"{layout.describe()}, recompute {layout.recompute.value}"
    words += "" if layout.recompute_layers is None else f" in {layout.recompute_layers} layers"
    words += ", offloaded" if layout.offload else ""
    return words + (f", {layout.micro_batch} segments at once" if layout.micro_batch > 1 else "")


def _model_lines(plan: Plan) -> list[str]:
    shape, work = plan.shape, plan.workload
    lines = [
        f"model      {plan.name}: {shape.parameters / 1e9:.3f} B parameters, "
        f"{shape.matrix_parameters / 1e9:.3f} B of them in matrices that every token meets",
        f"training   {work.total_tokens / 1e9:g} B tokens in {work.total_steps:,} steps of "
        f"{work.segments_per_step} segments of {work.target_len:,}; {100 * work.long_share:.0f} % "
        f"long{plan.mix_origin}, short documents of {work.short_document_tokens:,.0f} tokens",
    ]
    for window in (Window.LONG, Window.SHORT):
        reach = work.attended_len(window)
        causal, whole = (shape.model_flops(reach, whole_square=w) / GFLOP for w in (False, True))
        flops = f"FLOPs      {window.value:<5} {causal:.1f} G a token, attention's causal half"
        lines.append(f"{flops} counted ({whole:.1f} G with the whole square)")
    mean = work.mean_model_flops(shape)
    total = mean * work.total_tokens
    return [*lines, f"FLOPs      mix   {mean / GFLOP:.1f} G a token, {total:.3g} in all"]


def _machine_lines(plan: Plan) -> list[str]:
    machine = plan.machine
    return [
        f"machine    {machine.num_gpus} {machine.name}, {machine.gpus_per_node} a node; "
        f"{machine.usable_bytes / GIB:.0f} GiB of each usable "
        f"({100 * plan.hardware.usable_memory:.0f} %)",
        f"rates      products {machine.gemm_flops / TFLOP:.0f}, attention "
        f"{machine.attention_flops / TFLOP:.0f} TFLOP/s; memory {machine.memory_bytes / GB:.0f}, "
        f"node links {machine.node_link_bytes / GB:.0f}, network {machine.network_bytes / GB:.1f} "
        "GB/s a GPU (assumed; hardware.* changes them)",
    ]


def _layouts_table(plan: Plan) -> Table:
    fitting, best = plan.choice.fitting, plan.choice.best
    shown = fitting[: plan.options.shown_layouts]
    rows = []
    for fit in shown:
        layout, time = fit.layout, fit.time
        row = [str(layout.sequence), str(layout.context), str(layout.data)]
        row += [_short_recompute(layout)]
        row += [str(layout.micro_batch), f"{fit.memory.peak / GIB:.1f}", f"{time.hours:.1f}"]
        row += [f"{time.tokens_per_second_per_gpu:,.0f}", f"{100 * time.mfu:.1f}"]
        rows.append([*row, "<- best" if fit is best else ""])
    if best is not None and best not in shown:
        rows.append(["...", *[""] * 9])
    head = ["sequence", "context", "data", "recompute", "segments", "GiB", "hours", "tok/s/GPU"]
    head += ["MFU %", ""]
    return _table(f"layouts that fit: {len(fitting)}, the fastest first", head, rows)


def _short_recompute(layout: Layout) -> str:
    """Policy and number of layers, as tables have them."""
    layers = "" if layout.recompute_layers is None else f" {layout.recompute_layers}"
    return f"{layout.recompute.value}{layers}{' +cpu' if layout.offload else ''}"


def _align_words(layout: Layout, most: int) -> str:
    """``--align`` for a layout: its processes a segment, where packing allows ``most`` of them.

    A chunk holds a short window at least, so that no document that fits one is cut or left out.
    """
    ranks = layout.segment_ranks
    if ranks <= most:
        return f"--align {ranks}"
    align = next(n for n in range(max(1, most), 0, -1) if ranks % n == 0)
    shortest = f"chunks for {ranks} processes would be shorter than the short window"
    return f"--align {align}: {shortest}, so they exchange in short segments too"


def _choice_lines(plan: Plan) -> list[str]:
    best, refusal, configured = plan.choice.best, plan.refusal, plan.configured
    assert best is not None
    layout, layers = best.layout, best.layout.recompute_layers
    short_chunks = plan.workload.target_len // plan.original_len
    settings = (
        f"parallel.processes={layout.num_processes} parallel.sequence={layout.sequence} "
        f"{f'parallel.context={layout.context} ' if layout.context > 1 else ''}"
        f"training.recompute={layout.recompute.value} training.same_kind_segments={layout.data}"
        f"{'' if layers is None else f' training.recompute_layers={layers}'}"
        f"{' training.offload_activations=true' if layout.offload else ''}"
    )
    lines = [
        f"best       {_layout_words(layout)}: {_takes(best.time, best.memory)}",
        f"settings   {settings}  (pack with {_align_words(layout, short_chunks)})",
    ]
    if refusal is not None:
        lines.append(f"configured {_layout_words(refusal.layout)}: cannot run: {refusal.reason}")
    elif configured is not None:
        time = timing.predict_time(plan.shape, plan.workload, configured, plan.machine)
        memory = of_memory.predict_memory(plan.shape, plan.workload, configured)
        lines.append(f"configured {_layout_words(configured)}: {_takes(time, memory)}")
    return lines


def _takes(time: RunTime, memory: MemoryUse) -> str:
    return (
        f"{time.hours:.1f} h = {time.gpu_hours:,.0f} GPU-hours, "
        f"{time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {100 * time.mfu:.1f} % causal MFU; "
        f"floor of products and attention {time.floor_hours:.1f} h, {memory.peak / GIB:.1f} GiB"
    )


def _memory_table(plan: Plan, shown: dict[str, Layout]) -> Table:
    layouts = shown.values()
    found = [of_memory.predict_memory(plan.shape, plan.workload, layout) for layout in layouts]
    rows = []
    for part, words in of_memory.PART_WORDS.items():
        cells = [f"{vars(memory)[part] / GIB:.2f}" for memory in found]
        rows.append([part, *cells, words])
    for moment, words in _MOMENT_WORDS.items():
        cells = []
        for memory in found:
            mark = "*" if moment == memory.peak_moment else ""
            cells.append(f"{memory.moments[moment] / GIB:.2f}{mark}")
        rows.append([f"= {moment}", *cells, words])
    loaded = [f"{of_memory.load_bytes(plan.shape, layout) / GIB:.2f}" for layout in layouts]
    rows.append(["whole model", *loaded, "for comparison: nothing keeps it after loading"])
    return _table("memory of one GPU by part, GiB", ["part", *shown, ""], rows)


def _time_table(plan: Plan, shown: dict[str, Layout]) -> Table:
    head, micro_steps, steps = ["part"], [], ["step (mix)"]
    for name, layout in shown.items():
        time = timing.predict_time(plan.shape, plan.workload, layout, plan.machine)
        for window in (Window.LONG, Window.SHORT):
            head.append(f"{name} {window.value}")
            micro_steps.append(time.micro_steps[window])
        steps += [f"{time.step_seconds:.1f}", ""]
    rows = []
    for part in _TIME_PARTS:
        cells = [f"{getattr(micro, part):.2f}" for micro in micro_steps]
        rows.append([part.replace("_", " "), *cells])
    return _table("seconds of a micro-step by part", head, [*rows, steps])


def _traffic_table(plan: Plan, shown: dict[str, Layout]) -> Table:
    rows = []
    for name, layout in shown.items():
        run = (plan.shape, plan.workload, layout)
        exchanged, keys = timing.exchange_bytes(*run), timing.key_bytes(*run)
        sizes = (exchanged, keys, *timing.gather_bytes(plan.shape, layout))
        rows.append([name, *(f"{size / GB:.1f}" for size in sizes)])
    head = [
        "",
        "exchange, one long forward",
        "keys gathered",
        "weights gathered",
        "gradients reduced",
    ]
    return _table("communication of a micro-step, GB a GPU", head, rows)


def _refused_lines(choice: Choice) -> list[str]:
    """What does not fit and why; the impossible ones together.

    Of layouts with as many processes a segment, the one that comes closest.
    """
    one_segment = [r for r in choice.refused if r.layout.micro_batch == 1]
    closest: dict[tuple[object, ...], tuple[float, Refusal]] = {}
    for refusal in one_segment:
        layout, peak = refusal.layout, refusal.memory.peak if refusal.memory else None
        kind = (layout.segment_ranks, layout.recompute, layout.offload)
        if peak is not None and peak < closest.get(kind, (math.inf,))[0]:
            closest[kind] = (peak, refusal)
    lines = ["", "does not fit (one segment at a time):"]
    lines += [f"  {_layout_words(r.layout)}: {r.reason}" for _, r in closest.values()] or [
        "  nothing"
    ]
    reasons = dict.fromkeys(r.reason for r in one_segment if r.memory is None)
    return [*lines, *(["impossible:"] if reasons else []), *(f"  {reason}" for reason in reasons)]


def _cost_table(plan: Plan) -> Table:
    """Hours, and under them the layout, by target and number of GPUs."""
    lengths = list(dict.fromkeys(plan.options.lengths))
    rows = []
    for count in dict.fromkeys(plan.options.gpu_counts):
        cells = [_cost_cell(plan.choice_at(length, count)) for length in lengths]
        rows.append([str(count), *cells])
    title = f"hours of {plan.workload.total_tokens / 1e9:g} B tokens with the best layout, sequence"
    title += f" x context x data and recompute; steps of {plan.workload.step_tokens:,} tokens"
    return _table(title, ["GPUs", *(f"{length:,}" for length in lengths)], rows)


def _cost_cell(choice: Choice) -> str:
    best, closest = choice.best, choice.closest
    if best is not None:
        layout = best.layout
        short = f"{layout.sequence}x{layout.context}x{layout.data} {_short_recompute(layout)}"
        return f"{best.time.hours:,.1f}  {short:>17}"
    if closest is not None and closest.memory is not None:
        return f"no: {closest.memory.peak / GIB:.0f} GiB"
    return "impossible"


def _stage_lines(plan: Plan) -> list[str]:
    gpus, target = plan.machine.num_gpus, plan.workload.target_len
    search = timing.forward_hours(plan.shape, plan.machine, [(target, plan.search_forwards)])
    evaluation = timing.forward_hours(plan.shape, plan.machine, plan.evaluation_samples)
    return [
        "",
        f"search     at most {plan.search_forwards:,} forward passes of {target:,} tokens: "
        f"{search:.2g} h on {gpus} GPUs = {search * gpus:.3g} GPU-hours; early termination "
        "saves some of them",
        f"evaluation needles and perplexity of {plan.num_subjects} models: {evaluation:.2g} h on "
        f"{gpus} GPUs = {evaluation * gpus:.3g} GPU-hours; tasks with generation are not in it",
    ]


def _closing_lines(plan: Plan) -> list[str]:
    own = plan.norm is NormKernel.model
    return [
        "",
        "Memory, FLOPs and traffic follow from what the training keeps and does; verify=true "
        "executes one rank of the configured run without memory or time and compares.",
        f"Norms are counted {'as transformers computes them' if own else 'in one kernel'} "
        f"(training.norm={plan.norm.value}).",
        "Hours follow from the rates above, which are assumptions: longrope2/planning/timing.py "
        "says how.",
    ]


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    """A plain table, the first column to the left."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number and name else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
