"""Figures of the report, as inline SVG that needs no network and scales with the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from longrope2.evaluation.schema import NeedleRow
from longrope2.report.data import DocumentLengths
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import theoretical_critical_index
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.rope.turns import Turns

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
LEAST_TO_SMOOTH = 20
# Of an even share; what was met less often, or never, has the same colour.
_LEAST_SHOWN = 0.01
# Those further behind are in the table only.
_MOST_CONTESTANTS = 14


class Scale(Enum):
    """A vertical axis."""

    linear = "linear"
    from_zero = "from zero"
    log = "log"
    by_range = "log where values differ more than threefold, else linear"


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
def turns_figure(turns: Turns, factors: RescaleFactors) -> Figure:
    """How often each part of a turn was met, by dimension; the factors over it."""
    figure, axes = _figure()
    num_indices, num_parts = turns.shares_IP.shape
    relative_PI = np.maximum(turns.shares_IP.T * num_parts, _LEAST_SHOWN)
    shades = LogNorm(_LEAST_SHOWN, 1 / _LEAST_SHOWN)
    extent = (-0.5, num_indices - 0.5, 0.0, 1.0)
    kind: dict[str, Any] = {"origin": "lower", "aspect": "auto", "cmap": "RdBu"}
    image = axes.imshow(relative_PI, norm=shades, extent=extent, interpolation="nearest", **kind)
    figure.colorbar(image, ax=axes, label="met, of an even share", pad=0.2)
    axes.grid(visible=False)
    axes.set(xlabel="cosine index i (low frequency to the right)", ylabel="part of a turn")
    over = axes.twinx()
    ours: dict[str, Any] = {"color": "black", "markersize": 2.5, "linewidth": 1.2}
    over.plot(range(num_indices), factors.factors, "o-", **ours)
    over.set(yscale="log", ylabel="rescale factor $\\lambda_i$")
    over.grid(visible=False)
    if factors.critical_index is not None:
        axes.axvline(factors.critical_index, color="black", linewidth=1, linestyle=(0, (6, 3)))
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


@dataclass(frozen=True)
class Series:
    """A figure of metrics by tokens trained."""

    lines: Mapping[str, str]
    """Metrics with their names in the legend, the last one drawn strongest."""
    label: str
    """Of the vertical axis."""
    scale: Scale
    alternative: str
    """For who cannot see it."""
    is_noisy: bool = False
    """Long lines are drawn thin, with their running mean over them."""
    points: Mapping[str, str] = field(default_factory=dict)
    """Metrics of a few steps, drawn as points in the colours of ``lines``, in order."""


@rc_context(STYLE)
def series_figure(
    records: Sequence[dict[str, Any]], series: Series, resumed_at: Sequence[int] = ()
) -> Figure | None:
    """Metrics by tokens trained; None when no record has any of them.

    ``resumed_at``, in tokens, are marked: there the training was interrupted.
    """
    metrics = (*series.lines, *series.points)
    if not any(record.get(key) is not None for record in records for key in metrics):
        return None
    figure, axes = _figure()
    colors = [*SUBJECT_COLORS[: len(series.lines) - 1], OURS_COLOR]
    for (key, name), color in zip(series.lines.items(), colors, strict=True):
        _draw_line(axes, *_points(records, key), color, name, series.is_noisy)
    for (key, name), color in zip(series.points.items(), colors, strict=False):
        tokens, values = _points(records, key)
        if values:
            axes.plot(tokens, values, "o--", color=color, markersize=4, linewidth=0.8, label=name)
    for number, tokens in enumerate(resumed_at):
        label = "_" if number else "resumed"
        axes.axvline(tokens, color="#444444", linewidth=1, linestyle=":", label=label)
    axes.set(xlabel="tokens trained", ylabel=series.label)
    _count_tokens(axes, 5)
    low, high = _range(records, metrics)
    if series.scale is Scale.log:
        axes.set_yscale("log")
    elif series.scale is Scale.by_range and 0 < 3 * low < high:
        axes.set_yscale("log")
        _plain_log_ticks(axes, "y", _PERPLEXITY_TICKS)
    elif series.scale is Scale.from_zero:
        axes.set_ylim(bottom=0)
    if len(metrics) > 1 or resumed_at:
        _legend_below(axes)
    return figure


def _range(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> tuple[float, float]:
    """Lowest and highest value of some metrics, of which there is one."""
    values = [record[key] for record in records for key in keys if record.get(key) is not None]
    return min(values), max(values)


def _points(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Tokens and values of the records that have a metric."""
    having = [record for record in records if record.get(key) is not None]
    return [r["train/tokens"] for r in having], [r[key] for r in having]


def _draw_line(
    axes: Axes, tokens: list[int], values: list[float], color: str, name: str, is_noisy: bool
) -> None:
    """A metric; a long noisy one as its running mean, over a thin line of its values."""
    strong: dict[str, Any] = {"color": color, "linewidth": 1.4, "label": name}
    if is_noisy and len(values) >= LEAST_TO_SMOOTH:
        axes.plot(tokens, values, color=color, linewidth=0.7, alpha=0.35, label="_")
        strong["linewidth"], values = 1.8, running_mean(values)
    if values:
        axes.plot(tokens, values, **strong)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of every value and its neighbours, a twentieth of all; fewer at the ends.

    Both sides have the same number of neighbours everywhere, so that no slope is shifted.
    """
    reach = max(1, len(values) // 40)
    means = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        means.append(fmean(values[place - near : place + near + 1]))
    return means


@rc_context(STYLE)
def document_lengths_figure(lengths: DocumentLengths) -> Figure:
    """Documents by length, those that were read and those that were packed, and both windows."""
    figure, axes = _figure()
    edges = list(lengths.edges_tokens)
    edges[0] = edges[1] // 2  # a logarithm has no 0
    bottom = 0.7
    for counts, color, label in (
        (lengths.tokenized, "#c9c9c9", "read"),
        (lengths.chosen, OURS_COLOR, "packed"),
    ):
        seen = [max(count, bottom) for count in counts]
        alpha = 0.6 if label == "packed" else 1.0
        axes.stairs(seen, edges, baseline=bottom, fill=True, color=color, alpha=alpha, label=label)
    for tokens, name, style in (
        (lengths.original_len, "original window", "--"),
        (lengths.target_len, "target window", "-"),
    ):
        label = f"{name} {tokens:,}"
        axes.axvline(tokens, color="#444444", linewidth=1, linestyle=style, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.set_ylim(bottom=bottom)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
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
