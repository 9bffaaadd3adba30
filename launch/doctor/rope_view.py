"""What ``launch.doctor rope`` shows: the table of factors by dimension and the figure."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from longrope2.files.artifacts import atomic_path
from longrope2.report.plots import OURS_COLOR, STYLE, SUBJECT_COLORS
from longrope2.rope import frequencies
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import first_out_of_bound

WIDE_COLUMNS = 1000  # terminal columns no table reaches


@dataclass(frozen=True)
class RopeComparison:
    """A model's RoPE and the factors compared on it."""

    geometry: RopeGeometry
    target_len: int
    columns: dict[str, RescaleFactors]
    critical_index: int | None
    """c of the search result, or of the first file that states one."""
    critical_source: str

    @property
    def bounds(self) -> list[tuple[int, str]]:
        """Critical indices the bound is judged from, each with its name."""
        bounds = [(frequencies.theoretical_critical_index(self.geometry), "theoretical")]
        return bounds if self.critical_index is None else [*bounds, (self.critical_index, "real")]


def describe(comparison: RopeComparison, model_name: str) -> str:
    """The model and its critical dimensions in a few lines."""
    geometry = comparison.geometry
    ten = frequencies.ten_period_index(geometry)
    theoretical = frequencies.theoretical_critical_index(geometry)
    length, count, base = geometry.original_len, geometry.num_frequencies, geometry.rope_base
    scale, real = comparison.target_len / length, comparison.critical_index
    lines = [
        f"model        {model_name}: {count} cosine indices, base {base:g}",
        f"window       {length} -> {comparison.target_len} tokens, s = {scale:g}",
        f"theoretical  critical index {theoretical}: the first with less than one turn in "
        f"{length} tokens",
        f"ten turns    index {ten}: a search looks for the real one from {ten} to {theoretical}",
    ]
    if real is not None:
        lines.append(f"real         critical index {real}, of {comparison.critical_source}")
    return "\n".join(lines)


def print_table(table: Table) -> None:
    """Print the table whole: on a narrow terminal, long lines are better than cut cells."""
    wanted = Console(width=WIDE_COLUMNS).measure(table).maximum
    Console(width=max(Console().width, wanted)).print(table)


def comparison_table(comparison: RopeComparison) -> Table:
    """A row per cosine index; below, from which critical index the bound lambda_i >= s holds."""
    geometry, columns = comparison.geometry, comparison.columns
    title = "factor lambda_i of each method; * below s where the bound asks for it"
    table = Table(title_justify="left", title=title)
    for name in ("i", "period, tokens", "turns in L0", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    marks = {frequencies.ten_period_index(geometry): "< ten turns"}
    for index, name in comparison.bounds:
        before = f"{marks[index]}," if index in marks else "<"
        marks[index] = f"{before} {name} critical"
    strictest = min(index for index, _ in comparison.bounds)
    for i, period in enumerate(frequencies.periods(geometry).tolist()):
        turns = geometry.original_len / period
        cells = [_three_digits(period), _three_digits(turns)]
        cells += [_factor_cell(column, i, strictest) for column in columns.values()]
        table.add_row(str(i), *cells, marks.get(i, ""))
    table.add_section()
    for index, name in comparison.bounds:
        broken = [first_out_of_bound(column, index) for column in columns.values()]
        cells = [f"bound from {index}", f"({name})"]
        cells += ["holds" if at is None else f"no, at {at}" for at in broken]
        table.add_row("", *cells, "")
    scales = [f"{column.long_attention_scale:.4g}" for column in columns.values()]
    cells = ["cos, sin times", "(long)", *scales]
    table.add_row("", *cells, "")
    return table


def _three_digits(value: float) -> str:
    """At least three digits, never an exponent above 1."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _factor_cell(column: RescaleFactors, index: int, bound_from: int) -> str:
    """A factor, with a star where it is too small."""
    factor = column.factors[index]
    star = "*" if index >= bound_from and first_out_of_bound(column, index) == index else ""
    return f"{factor:.5g}{star}"


def write_figure(comparison: RopeComparison, model_name: str, path: Path) -> None:
    """Write the figure in the format its suffix names; one file that needs nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE), atomic_path(path) as temporary:
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else None
        figure = rope_figure(comparison, model_name)
        figure.savefig(temporary, format=kind, bbox_inches="tight", metadata=metadata, dpi=150)


def rope_figure(comparison: RopeComparison, model_name: str) -> Figure:
    """Above: factors by dimension, against the bound. Below: turns inside L0."""
    figure = Figure(figsize=(7.5, 6.5))
    factor_axes, turn_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    geometry, scale = comparison.geometry, comparison.target_len / comparison.geometry.original_len
    indices = range(geometry.num_frequencies)
    for number, (name, column) in enumerate(comparison.columns.items()):
        ours = column.critical_index is not None and name == comparison.critical_source
        color = OURS_COLOR if ours else SUBJECT_COLORS[number % len(SUBJECT_COLORS)]
        dashes = "-" if number < len(SUBJECT_COLORS) else "--"
        line = {"color": color, "linewidth": 2.2 if ours else 1.3, "label": name}
        factor_axes.plot(indices, column.factors, dashes, **line)
    bound = {"color": "#444444", "linestyle": ":", "linewidth": 1.2}
    factor_axes.axhline(scale, label=f"bound s = {scale:g}", **bound)
    title = f"{model_name}: {geometry.original_len:,} to {comparison.target_len:,} tokens"
    factor_axes.set(yscale="log", ylabel="rescale factor $\\lambda_i$", title=title)
    turns = [geometry.original_len / period for period in frequencies.periods(geometry).tolist()]
    turn_axes.plot(indices, turns, color="#444444", linewidth=1.3)
    for level in (1, 10):
        turn_axes.axhline(level, color="#999999", linestyle=":", linewidth=1)
    across = "cosine index i (low frequency to the right)"
    turn_axes.set(yscale="log", ylabel="turns inside L0", xlabel=across)
    _mark_critical(comparison, factor_axes, turn_axes)
    factor_axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _mark_critical(comparison: RopeComparison, *all_axes: Axes) -> None:
    """Vertical lines at the critical dimensions that exist (all of them trained gives none)."""
    dashes = (0, (6, 3))
    for (index, name), color in zip(comparison.bounds, ("#777777", OURS_COLOR), strict=False):
        if index < comparison.geometry.num_frequencies:
            label = f"{name} critical: {index}"
            for axes in all_axes:
                axes.axvline(index, color=color, linewidth=1, linestyle=dashes, label=label)
