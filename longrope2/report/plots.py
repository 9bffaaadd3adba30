"""Figures of the report, as inline SVG that needs no network and scales with the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longrope2.evaluation.schema import NeedleRow
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import theoretical_critical_index
from longrope2.rope.methods import RopeMethod, closed_form_factors

# Narrow on purpose: shown at 390 px the letters still have about ten pixels.
_FIGURE_INCHES = (5.0, 3.2)
OURS_COLOR = "#0b6e69"
STYLE: dict[Any, Any] = {
    "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e3e3e3", "grid.linewidth": 0.6,
    "legend.frameon": False, "legend.fontsize": 8.5, "svg.hashsalt": "longrope2",
}  # fmt: skip
SUBJECT_COLORS = (
    "#7a7a7a", "#c8622d", "#8a5fb0", "#b8952b", "#3f7fbf", "#a04668", "#5b8c3a", "#2b3a67",
)  # fmt: skip
_PERPLEXITY_TICKS = (*(1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70), *(100, 200, 500, 1000, 2000))
# Those further behind are in the table only.
_MOST_CONTESTANTS = 14


class Scale(Enum):
    """A vertical axis."""

    linear = "linear"
    from_zero = "from zero"
    log = "log"


@rc_context(STYLE)
def factors_figure(factors: RescaleFactors) -> Figure:
    """Factors by dimension beside NTK, YaRN and PI, the bound s and both critical dimensions."""
    figure, axes = _figure()
    indices = range(factors.geometry.num_frequencies)
    for method, label, color, style in (
        (RopeMethod.pi, "PI", "#b8952b", ":"),
        (RopeMethod.ntk, "NTK", "#8a5fb0", "-"),
        (RopeMethod.yarn, "YaRN", "#c8622d", "-"),
    ):
        values = closed_form_factors(method, factors.geometry, factors.target_len).factors
        axes.plot(indices, values, style, color=color, label=label, linewidth=1.3)
    ours: dict[str, Any] = {"color": OURS_COLOR, "linewidth": 1.8, "markersize": 3.5}
    axes.plot(indices, factors.factors, "o-", label=factors.method, **ours)
    theoretical = theoretical_critical_index(factors.geometry)
    bound_from = theoretical if factors.critical_index is None else factors.critical_index
    thin: dict[str, Any] = {"color": "#444444", "linestyle": "--", "linewidth": 1}
    bound = f"bound s = {factors.scale:g}"
    axes.hlines(factors.scale, bound_from, indices[-1], label=bound, **thin)
    if theoretical <= indices[-1]:
        label = f"theoretical critical dimension {theoretical}"
        axes.axvline(theoretical, color="#999999", linewidth=1, label=label)
    if factors.critical_index is not None:
        dashed: dict[str, Any] = {"color": OURS_COLOR, "linewidth": 1, "linestyle": (0, (6, 3))}
        label = f"real critical dimension {factors.critical_index}"
        axes.axvline(factors.critical_index, label=label, **dashed)
    xlabel, ylabel = "cosine index i (low frequency to the right)", "rescale factor $\\lambda_i$"
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    _plain_log_ticks(axes, "y", [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    _legend_below(axes)
    return figure


@rc_context(STYLE)
def search_figure(history: dict[str, Any]) -> Figure:
    """Best and worst kept objective by candidates, on the samples that the search chose by."""
    figure, axes = _figure()
    rounds = history["rounds"]
    evaluated = [finished["num_candidates"] for finished in rounds]
    best = [finished["best_value"] for finished in rounds]
    worst = [finished["worst_kept_value"] for finished in rounds]
    band: dict[str, Any] = {"color": OURS_COLOR, "alpha": 0.15, "linewidth": 0}
    axes.fill_between(evaluated, best, worst, label="kept candidates", **band)
    axes.plot(evaluated, best, "o-", color=OURS_COLOR, markersize=3.5, label="best so far")
    axes.set(yscale="log", xlabel="candidates evaluated", ylabel=_objective(history))
    _plain_log_ticks(axes, "y", _PERPLEXITY_TICKS[:-1])
    _legend_below(axes)
    return figure


@rc_context(STYLE)
def fresh_figure(history: dict[str, Any]) -> Figure:
    """Fresh samples: what was found and the best closed forms, with 95 % intervals."""
    shown = history["fresh"]["contestants"][:_MOST_CONTESTANTS]
    figure = Figure(figsize=(_FIGURE_INCHES[0], 1.2 + 0.26 * len(shown)))
    axes = figure.subplots()
    for place, contestant in enumerate(shown):
        low, high = contestant["interval"]
        color = OURS_COLOR if contestant["kind"] == "found" else SUBJECT_COLORS[0]
        axes.plot([low, high], [place, place], color=color, linewidth=1.6)
        axes.plot(contestant["value"], place, "o", color=color, markersize=4.5)
    axes.set_yticks(range(len(shown)), [contestant["name"] for contestant in shown])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=f"{_objective(history)}, fresh samples")
    _plain_log_ticks(axes, "x", _PERPLEXITY_TICKS[:-1])
    return figure


def _objective(history: dict[str, Any]) -> str:
    return "needle perplexity" if history["value_name"] == "needle_ppl" else "perplexity"


@rc_context(STYLE)
def series_figure(
    records: Sequence[dict[str, Any]], keys: Mapping[str, str], label: str, scale: Scale
) -> Figure | None:
    """Metrics by tokens trained; None when no record has any of them.

    ``keys`` are metrics with their names in the legend, the last one drawn strongest; ``label`` and
    ``scale`` are those of the vertical axis.
    """
    lines = {}
    for key, name in keys.items():
        recorded = (record for record in records if record.get(key) is not None)
        points = [(record["train/tokens"], record[key]) for record in recorded]
        lines |= {name: points} if points else {}
    if not lines:
        return None
    figure, axes = _figure()
    colors = [*SUBJECT_COLORS[: len(keys) - 1], OURS_COLOR]
    for name, color in zip(keys.values(), colors, strict=True):
        if name in lines:
            axes.plot(*zip(*lines[name], strict=True), color=color, linewidth=1.4, label=name)
    axes.set(xlabel="tokens trained", ylabel=label)
    _count_tokens(axes, 5)
    if scale is Scale.log:
        axes.set_yscale("log")
    elif scale is Scale.from_zero:
        axes.set_ylim(bottom=0)
    if len(keys) > 1:
        _legend_below(axes)
    return figure


@rc_context(STYLE)
def mix_figure(tokens: Mapping[str, Mapping[str, int]]) -> Figure:
    """Tokens of the packed segments by source, short and long beside each other."""
    figure, axes = _figure()
    sources = list(tokens)
    for offset, (window, color) in enumerate((("short", "#7a7a7a"), ("long", OURS_COLOR))):
        heights = [tokens[source].get(window, 0) for source in sources]
        places = [index + 0.4 * (offset - 0.5) for index in range(len(sources))]
        axes.barh(places, heights, height=0.38, color=color, label=f"{window} window")
    axes.set_yticks(range(len(sources)), sources)
    axes.invert_yaxis()
    axes.set(xlabel="tokens")
    _count_tokens(axes, 4)
    _legend_below(axes)
    return figure


@rc_context({**STYLE, "axes.grid": False})
def needle_map_figure(rows: Sequence[NeedleRow], subject: str) -> Figure:
    """Needles of one subject retrieved by depth (down) and length (across), for trackers."""
    figure, axes = _figure()
    chosen = sorted((row for row in rows if row.subject == subject), key=lambda row: row.length)
    depths = [place.depth for place in chosen[0].depths]
    shares = []
    for number in range(len(depths)):
        shares.append([row.depths[number].accuracy for row in chosen])
    axes.imshow(shares, vmin=0, vmax=1, cmap="BuGn", aspect="auto")
    axes.set_xticks(range(len(chosen)), [f"{row.length:,}" for row in chosen])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    for down, line in enumerate(shares):
        for across, share in enumerate(line):
            color = "white" if share > 0.6 else "black"
            axes.text(across, down, f"{100 * share:.0f}", ha="center", va="center", color=color)
    axes.set(xlabel="length, tokens", ylabel="depth of the needle", title=subject)
    return figure


@rc_context(STYLE)
def lengths_figure(
    values: Mapping[str, Mapping[int, float]], label: str, *, is_share: bool
) -> Figure:
    """One line per subject over the length, the last drawn strongest.

    Shares stand on a linear axis, perplexities on a logarithmic one, named ``label``.
    """
    figure, axes = _figure()
    lengths = sorted({length for by_length in values.values() for length in by_length})
    for number, (subject, by_length) in enumerate(values.items()):
        is_last = number == len(values) - 1
        color = OURS_COLOR if is_last else SUBJECT_COLORS[number % len(SUBJECT_COLORS)]
        points = zip(*sorted(by_length.items()), strict=True)
        width = 2.2 if is_last else 1.3
        axes.plot(*points, "o-", color=color, markersize=3, linewidth=width, label=subject)
    axes.set(xscale="log", xlabel="length, tokens", ylabel=label)
    _plain_log_ticks(axes, "x", lengths)
    if is_share:
        axes.set_ylim(-0.03, 1.03)
    else:
        axes.set_yscale("log")
        _plain_log_ticks(axes, "y", _PERPLEXITY_TICKS)
    _legend_below(axes)
    return figure


@rc_context(STYLE)
def svg_data_uri(figure: Figure) -> str:
    """The figure as the ``src`` of an image; the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_FIGURE_INCHES)
    return figure, figure.subplots()


def _count_tokens(axes: Axes, most_ticks: int) -> None:
    axes.xaxis.set_major_locator(ticker.MaxNLocator(most_ticks))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _legend_below(axes: Axes) -> None:
    """Names under the figure, where they hide no line."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.16)}
    axes.legend(**place, ncols=2, handlelength=1.6, columnspacing=1.2)


def _plain_log_ticks(axes: Axes, axis: str, candidates: Sequence[float]) -> None:
    """Plain numbers in view as ticks; where they do not cover the view, powers of ten stay."""
    low, high = getattr(axes, f"get_{axis}lim")()
    ticks = [tick for tick in candidates if low <= tick <= high]
    if len(ticks) < 2 or high > 3 * candidates[-1]:
        return
    chosen = getattr(axes, f"{axis}axis")
    chosen.set_major_locator(ticker.FixedLocator(ticks))
    chosen.set_major_formatter(ticker.FixedFormatter([f"{tick:g}" for tick in ticks]))
    chosen.set_minor_locator(ticker.NullLocator())
