"""What ``launch.plan`` prints."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from longrope2.model.norms import NormKernel
from longrope2.model.shape import ModelShape, Workload
from longrope2.planning.choice import Choice, Refusal
from longrope2.planning.hardware import HardwareConfig, Machine
from longrope2.planning.memory import Layout, MemoryPlan, load_bytes, plan_memory
from longrope2.planning.timing import RunTime, exchange_bytes, gather_bytes, plan_time
from longrope2.rope.factors import Window

GIB, GB, GFLOP, TFLOP = 2**30, 1e9, 1e9, 1e12
# Of the tables: a terminal that is narrower wraps them, a pipe does not.
WIDTH = 118
PART_WORDS = {
    "states": "weights, gradients, master weights, two moments, sharded",
    "checkpoints": "inputs of the layers",
    "activations": "what all layers keep without recompute",
    "attention": "what dense recompute keeps of attention",
    "layer": "one layer in the backward pass",
    "head": "LM head, its float32 gradient, hidden states",
    "logits": "tiles of logits",
    "gathered": "parameters gathered, largest gradient",
    "communication": "buckets of gradients",
    "update": "copies of the optimizer",
}
MOMENT_WORDS = {
    "loss": "at the loss",
    "layer": "in the backward pass",
    "update": "in the update (* is the peak)",
}


@dataclass(frozen=True)
class PlannedRun:
    """Everything that is printed."""

    name: str
    config: HardwareConfig
    machine: Machine
    shape: ModelShape
    workload: Workload
    configured: Layout | None
    """The layout that the configuration asks for; None when it asks for one process."""
    configured_refusal: Refusal | None
    """Why it cannot run on the machine; None when it can."""
    choice: Choice
    table: dict[tuple[int, int], Choice]
    shown_layouts: int
    search_hours: float
    search_forwards: int
    evaluation_hours: float
    num_subjects: int
    norm: NormKernel


def print_plan(run: PlannedRun) -> None:
    """Print all parts of a plan."""
    console = Console(width=WIDTH, soft_wrap=True)
    console.print("\n".join([*_model_lines(run), *_machine_lines(run)]), highlight=False)
    best = run.choice.best
    if best is None:
        console.print(f"\nNo layout fits on {run.machine.num_gpus} GPUs.", highlight=False)
    else:
        console.print(_layouts_table(run))
        console.print("\n".join(_choice_lines(run)), highlight=False)
        named = {"best": best.layout}
        refusal = run.configured_refusal
        planned = refusal is None or refusal.memory is not None
        if planned and run.configured is not None and run.configured != best.layout:
            named["configured"] = run.configured
        console.print(_memory_table(run, named))
        console.print(_time_table(run, named))
        console.print(_traffic_table(run, named))
    console.print("\n".join(_refused_lines(run)), highlight=False)
    console.print(_cost_table(run))
    console.print("\n".join([*_stage_lines(run), *_closing_lines(run)]), highlight=False)


def layout_words(layout: Layout) -> str:
    """A layout in a few words."""
    words = f"{layout.sequence} sequence x {layout.data} data, recompute {layout.recompute.value}"
    words += ", offloaded" if layout.offload else ""
    return words + (f", {layout.micro_batch} segments at once" if layout.micro_batch > 1 else "")


def _model_lines(run: PlannedRun) -> list[str]:
    """Parameters, budget and FLOPs by window."""
    shape, work = run.shape, run.workload
    lines = [
        f"model      {run.name}: {shape.parameters / 1e9:.3f} B parameters, {shape.matrix_parameters / 1e9:.3f} B of them "
        "in matrices that every token meets",
        f"training   {work.total_tokens / 1e9:g} B tokens in {work.total_steps:,} steps of {work.segments_per_step} segments "
        f"of {work.target_len:,}; {100 * work.long_share:.0f} % long, short documents of "
        f"{work.short_document_tokens:,.0f} tokens",
    ]
    for window in (Window.LONG, Window.SHORT):
        reach = work.attended_len(window)
        lines.append(
            f"FLOPs      {window.value:<5} {shape.model_flops(reach) / GFLOP:.1f} G a token, attention's causal half counted "
            f"({shape.model_flops(reach, whole_square=True) / GFLOP:.1f} G with the whole square)"
        )
    total = work.mean_model_flops(shape) * work.total_tokens
    mean = work.mean_model_flops(shape) / GFLOP
    return [*lines, f"FLOPs      mix   {mean:.1f} G a token, {total:.3g} in all"]


def _machine_lines(run: PlannedRun) -> list[str]:
    """The cluster and the rates that are assumed of it."""
    machine = run.machine
    return [
        f"machine    {machine.num_gpus} {machine.name}, {machine.gpus_per_node} a node; "
        f"{machine.usable_bytes / GIB:.0f} GiB of each usable ({100 * run.config.usable_memory:.0f} %)",
        f"rates      products {machine.gemm_flops / TFLOP:.0f}, attention {machine.attention_flops / TFLOP:.0f} TFLOP/s; "
        f"memory {machine.memory_bytes / GB:.0f}, node links {machine.node_link_bytes / GB:.0f}, network "
        f"{machine.network_bytes / GB:.1f} GB/s a GPU (assumed; hardware.* changes them)",
    ]


def _layouts_table(run: PlannedRun) -> Table:
    """The fastest layouts that fit."""
    fitting = run.choice.fitting
    rows = [
        [
            str(c.layout.sequence),
            str(c.layout.data),
            c.layout.recompute.value + (" +cpu" if c.layout.offload else ""),
            str(c.layout.micro_batch),
            f"{c.memory.peak / GIB:.1f}",
            f"{c.time.hours:.1f}",
            f"{c.time.tokens_per_second_per_gpu:,.0f}",
            f"{100 * c.time.mfu:.1f}",
            "<- best" if c is run.choice.best else "",
        ]
        for c in fitting[: run.shown_layouts]
    ]
    best = run.choice.best
    if best is not None and best not in fitting[: run.shown_layouts]:
        rows.append(["...", *[""] * 8])
    head = ["sequence", "data", "recompute", "segments", "GiB", "hours", "tok/s/GPU", "MFU %", ""]
    return _table(f"layouts that fit: {len(fitting)}, the fastest first", head, rows)


def _choice_lines(run: PlannedRun) -> list[str]:
    """The best layout as settings."""
    best = run.choice.best
    assert best is not None
    layout = best.layout
    settings = [
        f"parallel.processes={layout.num_processes}",
        f"parallel.sequence={layout.sequence}",
        f"training.recompute={layout.recompute.value}",
        f"training.same_kind_segments={layout.data}",
    ]
    settings += ["training.offload_activations=true"] if layout.offload else []
    lines = [
        f"best       {layout_words(layout)}: {_time_words(best.time)}, {best.memory.peak / GIB:.1f} GiB",
        f"settings   {' '.join(settings)}  (pack with --align {layout.sequence})",
    ]
    refusal = run.configured_refusal
    if refusal is not None:
        lines.append(f"configured {layout_words(refusal.layout)}: cannot run: {refusal.reason}")
    elif run.configured is not None:
        time = plan_time(run.shape, run.workload, run.configured, run.machine)
        peak = plan_memory(run.shape, run.workload, run.configured).peak / GIB
        lines.append(
            f"configured {layout_words(run.configured)}: {_time_words(time)}, {peak:.1f} GiB"
        )
    return lines


def _time_words(time: RunTime) -> str:
    """Hours and rates."""
    return (
        f"{time.hours:.1f} h = {time.gpu_hours:,.0f} GPU-hours, {time.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, "
        f"{100 * time.mfu:.1f} % causal MFU; floor of products and attention {time.floor_hours:.1f} h"
    )


def _memory_table(run: PlannedRun, named: dict[str, Layout]) -> Table:
    """Memory by part."""
    plans = {name: plan_memory(run.shape, run.workload, layout) for name, layout in named.items()}
    first = next(iter(plans.values()))
    rows = [
        [part, *(f"{plan.parts[part] / GIB:.2f}" for plan in plans.values()), PART_WORDS[part]]
        for part in first.parts
    ]
    rows += [
        [
            f"= {moment}",
            *(_moment_words(plan, moment) for plan in plans.values()),
            MOMENT_WORDS[moment],
        ]
        for moment in first.moments
    ]
    loaded = [f"{load_bytes(run.shape, layout) / GIB:.2f}" for layout in named.values()]
    rows.append(["whole model", *loaded, "for comparison: nothing keeps it after loading"])
    return _table("memory of one GPU by part, GiB", ["part", *plans, ""], rows)


def _moment_words(plan: MemoryPlan, moment: str) -> str:
    """A moment's sum, marked where it is the peak."""
    return f"{plan.moments[moment] / GIB:.2f}" + ("*" if moment == plan.peak_moment else "")


def _time_table(run: PlannedRun, named: dict[str, Layout]) -> Table:
    """Seconds of a micro-step by part and window."""
    times = {
        name: plan_time(run.shape, run.workload, layout, run.machine)
        for name, layout in named.items()
    }
    columns = [(name, window) for name in times for window in (Window.LONG, Window.SHORT)]
    parts = [
        "products",
        "attention",
        "elementwise",
        "exchange",
        "offload",
        "exposed_gathers",
        "total",
    ]
    rows = [
        [
            part.replace("_", " "),
            *(f"{getattr(times[name].micro_steps[window], part):.2f}" for name, window in columns),
        ]
        for part in parts
    ]
    rows.append(
        [
            "step (mix)",
            *(f"{times[name].step_seconds:.1f}" if w is Window.LONG else "" for name, w in columns),
        ]
    )
    return _table(
        "seconds of a micro-step by part", ["part", *(f"{n} {w.value}" for n, w in columns)], rows
    )


def _traffic_table(run: PlannedRun, named: dict[str, Layout]) -> Table:
    """Bytes a GPU sends and receives in a micro-step."""
    rows = []
    for name, layout in named.items():
        forward = exchange_bytes(run.shape, run.workload, layout)
        weights, gradients = gather_bytes(run.shape, layout)
        rows.append([name, f"{forward / GB:.1f}", f"{weights / GB:.1f}", f"{gradients / GB:.1f}"])
    head = ["", "exchange, one long forward", "weights gathered", "gradients reduced"]
    return _table("communication of a micro-step, GB a GPU", head, rows)


def _refused_lines(run: PlannedRun) -> list[str]:
    """What does not fit and why; the impossible ones together."""
    too_large = [
        r for r in run.choice.refused if r.memory is not None and r.layout.micro_batch == 1
    ]
    lines = ["", "does not fit (one segment at a time):"]
    lines += [f"  {layout_words(refusal.layout)}: {refusal.reason}" for refusal in too_large] or [
        "  nothing"
    ]
    reasons: dict[str, None] = {
        r.reason: None for r in run.choice.refused if r.memory is None and r.layout.micro_batch == 1
    }
    return [*lines, *(["impossible:", *(f"  {reason}" for reason in reasons)] if reasons else [])]


def _cost_table(run: PlannedRun) -> Table:
    """Hours, and under them the layout, by target and number of GPUs."""
    lengths = list(dict.fromkeys(length for length, _ in run.table))
    counts = list(dict.fromkeys(count for _, count in run.table))
    rows = [
        [str(count), *(_cost_cell(run.table[length, count]) for length in lengths)]
        for count in counts
    ]
    title = (
        f"hours of {run.workload.total_tokens / 1e9:g} B tokens with the best layout, sequence x data and recompute; "
        f"steps of {run.workload.step_tokens:,} tokens"
    )
    return _table(title, ["GPUs", *(f"{length:,}" for length in lengths)], rows)


def _cost_cell(choice: Choice) -> str:
    """One cell of the cost table."""
    best = choice.best
    if best is None:
        closest = choice.closest
        return (
            f"no: {closest.memory.peak / GIB:.0f} GiB"
            if closest and closest.memory
            else "impossible"
        )
    layout = best.layout
    short = f"{layout.sequence}x{layout.data} {layout.recompute.value}{'+cpu' if layout.offload else ''}"
    return f"{best.time.hours:,.1f}  {short:>12}"


def _stage_lines(run: PlannedRun) -> list[str]:
    """Search and evaluation."""
    gpus = run.machine.num_gpus
    return [
        "",
        f"search     at most {run.search_forwards:,} forward passes of {run.workload.target_len:,} tokens: "
        f"{run.search_hours:.2g} h on {gpus} GPUs = {run.search_hours * gpus:.3g} GPU-hours; early termination "
        "saves some of them",
        f"evaluation needles and perplexity of {run.num_subjects} models: {run.evaluation_hours:.2g} h on {gpus} GPUs = "
        f"{run.evaluation_hours * gpus:.3g} GPU-hours; tasks with generation are not in it",
    ]


def _closing_lines(run: PlannedRun) -> list[str]:
    """What the figures are worth."""
    return [
        "",
        "Memory is counted from what the training keeps; tests/distributed/test_memory.py compares it with measured peaks.",
        f"Norms are counted {'as transformers computes them' if run.norm is NormKernel.model else 'in one kernel'} "
        f"(training.norm={run.norm.value}).",
        "Hours follow from the rates above, which are assumptions: longrope2/planning/timing.py says how.",
    ]


def _table(title: str, head: list[str], rows: list[list[str]]) -> Table:
    """A plain table, the first column to the left."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(head):
        table.add_column(
            name, justify="left" if number == 0 or name == "" else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*row)
    return table
