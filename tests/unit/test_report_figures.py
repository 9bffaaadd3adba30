"""The figures of the report: what is drawn, by matplotlib's own account."""

import re
from types import SimpleNamespace

import pytest
from report_run import (
    ACCURACIES,
    FACTORS,
    GEOMETRY,
    LENGTHS,
    SUBJECTS,
    search_history,
    training_records,
)

from longrope2.report import page as report_module
from longrope2.report.page import turns_text
from longrope2.report.plots import (
    Scale,
    Series,
    factors_figure,
    fresh_figure,
    lengths_figure,
    mix_figure,
    running_mean,
    search_figure,
    series_figure,
    turns_figure,
)
from longrope2.report.training import SERIES
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.rope.turns import turns_of


def lines_of(figure):
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def test_factors_figure_shows_methods_bound_and_both_critical_dimensions():
    figure = factors_figure(FACTORS)
    lines = lines_of(figure)
    assert lines["longrope2"] == list(FACTORS.factors)
    for label, method in (
        ("PI", RopeMethod.pi),
        ("NTK", RopeMethod.ntk),
        ("YaRN", RopeMethod.yarn),
    ):
        assert lines[label] == list(closed_form_factors(method, GEOMETRY, 2048).factors)
    marks = {
        line.get_label(): set(line.get_xdata())
        for line in figure.axes[0].lines
        if "critical" in line.get_label()
    }
    assert marks == {"theoretical critical dimension 6": {6}, "real critical dimension 5": {5}}
    (bound,) = figure.axes[0].collections
    assert bound.get_label() == "bound s = 16" and bound.get_segments()[0].tolist() == [
        [5, 16],
        [15, 16],
    ]


def test_turns_figure_shows_what_was_met_and_the_factors_over_it():
    turns = turns_of([128, 60, 60], GEOMETRY)
    figure = turns_figure(turns, FACTORS)
    shown, _, over = figure.axes  # the bar of colours is the second
    (picture,) = shown.images
    met = picture.get_array()
    assert met.shape == (32, 16)
    # Everything is at distance 0 of the slowest dimension's first parts; most of its turn is new.
    assert met[0, 15] == turns.shares_IP[15, 0] * 32 and met[31, 15] == 0.01
    (line,) = over.lines
    assert list(line.get_ydata()) == list(FACTORS.factors)
    (critical,) = [mark for mark in shown.lines if mark.get_linestyle() == "--"]
    assert set(critical.get_xdata()) == {5}


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        (
            [128] * 9,
            "From index 6 up some part of the turn was met under a tenth as often as in an even "
            "turn, and from 6 up never: it is the low frequencies, the high indices, whose angles "
            "are new. The critical dimension that was found, 5, lies below 6.",
        ),
        ([20, 20], "The critical dimension that was found, 5, lies above"),
    ],
)
def test_the_sentence_about_turns(lengths, says):
    text = turns_text(turns_of(lengths, GEOMETRY), FACTORS)
    assert f"counts {len(lengths)} documents of the short segments" in text
    assert says in text


def test_search_figure_shows_progress():
    lines = lines_of(search_figure(search_history()))
    assert lines["best so far"] == [9, 8, 7, 6]


def test_fresh_scores_are_drawn_and_listed():
    axes = fresh_figure(search_history()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "found 1",
        "ntk",
        "pi",
        "none",
    ]
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[1::2]]
    assert drawn == [(6.5, 0), (30.0, 1), (50.0, 2), (7700.0, 3)]
    page = report_module._search(
        SimpleNamespace(search_history=search_history(), corpus_of=lambda product: None)
    )
    assert "<p>confirmed: &lt;better&gt; than every closed form</p>" in page
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in page.split("<tr>")]
    assert ["ntk", "1.25", "30", "15 to 60", "32"] in rows
    assert ["pi", "1.25", "50", "25 to 100", "stopped after 4"] in rows
    history = search_history() | {"fresh": None}
    page = report_module._search(
        SimpleNamespace(search_history=history, corpus_of=lambda product: None)
    )
    assert "The result was not compared on fresh samples (search.fresh_samples=0)" in page


def test_losses_have_a_line_per_window():
    lines = lines_of(series_figure(training_records(), SERIES[0]))
    assert lines["short window"] == pytest.approx([3.9, 3.7, 3.5, 3.3])
    assert lines["long window"] == pytest.approx([3.8, 3.6, 3.4, 3.2])
    first = series_figure(training_records()[:1], SERIES[0])
    assert set(lines_of(first)) == {"short window"}


def test_held_out_losses_are_points_beside_the_training_losses():
    records = [
        {"step": 0, "train/tokens": 0, "train/heldout_loss_long": 5.0},
        *training_records(),
        {"step": 9, "train/tokens": 36_864, "train/heldout_loss_long": 3.5},
    ]
    axes = series_figure(records, SERIES[0]).axes[0]
    (drawn,) = [line for line in axes.lines if line.get_label() == "long, held out"]
    assert list(drawn.get_xdata()) == [0, 36_864] and list(drawn.get_ydata()) == [5.0, 3.5]
    (long,) = [line for line in axes.lines if line.get_label() == "long window"]
    assert drawn.get_color() == long.get_color()


def test_long_noisy_curves_are_smoothed_without_a_shift():
    ramp = [float(step) for step in range(100)]
    assert running_mean(ramp) == pytest.approx(ramp)
    # Of 100 values two neighbours on either side, one beside the ends, none at them.
    spike = [0.0] * 100
    spike[50] = spike[1] = spike[99] = 30.0
    means = running_mean(spike)
    assert means[48:53] == [6.0] * 5 and means[47] == means[53] == 0.0
    assert means[0] == 0.0 and means[1] == 10.0 and means[99] == 30.0
    records = [{"train/tokens": n, "a": value} for n, value in enumerate(spike)]
    raw, mean = series_figure(records, a_series(is_noisy=True)).axes[0].lines
    assert list(raw.get_ydata()) == spike and list(mean.get_ydata()) == means
    assert raw.get_label().startswith("_") and mean.get_label() == "first"
    assert raw.get_linewidth() < mean.get_linewidth()
    (only,) = series_figure(records, a_series(is_noisy=False)).axes[0].lines
    assert list(only.get_ydata()) == spike
    (few,) = series_figure(records[:19], a_series(is_noisy=True)).axes[0].lines
    assert list(few.get_ydata()) == spike[:19]


def test_the_loss_axis_is_logarithmic_where_losses_differ_much():
    records = [{"train/tokens": n, "train/loss_long": 9.0 / n} for n in (1, 2)]
    assert series_figure(records, SERIES[0]).axes[0].get_yscale() == "linear"
    records.append({"train/tokens": 3, "train/loss_long": 2.9})
    axes = series_figure(records, SERIES[0]).axes[0]
    assert axes.get_yscale() == "log"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["3", "5", "7"]


def a_series(**options):
    return Series({"a": "first"}, "things", Scale.linear, "", **options)


def test_lengths_figure_has_a_line_per_subject():
    values = {name: dict(zip(LENGTHS, ACCURACIES[name], strict=True)) for name in SUBJECTS}
    lines = lines_of(lengths_figure(values, "needles retrieved", is_share=True))
    assert lines == {name: list(ACCURACIES[name]) for name in SUBJECTS}


@pytest.mark.parametrize(
    "perplexities", [(1.001, 1.002, 1.004), (2.0, 30.0, 900.0), (20.0, 3e5, 1.6e8)]
)
def test_every_range_of_perplexities_has_labelled_ticks(perplexities):
    values = {"a": dict(zip(LENGTHS, perplexities, strict=True))}
    figure = lengths_figure(values, "text perplexity", is_share=False)
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    low, high = figure.axes[0].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    assert (
        sum(low <= tick.get_loc() <= high and tick.label1.get_text() != "" for tick in ticks) >= 2
    )


def test_series_figure_draws_what_was_recorded():
    records = [
        {"train/tokens": 10 * step, "a": step, **({"b": 2 * step} if step > 1 else {})}
        for step in (1, 2, 3)
    ]
    both = Series({"a": "first", "b": "second"}, "things", Scale.log, "")
    assert lines_of(series_figure(records, both)) == {"first": [1, 2, 3], "second": [4, 6]}
    assert series_figure(records, Series({"c": "none"}, "things", Scale.log, "")) is None


def test_mix_figure_shows_tokens_by_source_and_window():
    figure = mix_figure({"books": {"short": 300, "long": 750}, "code": {"long": 20}})
    widths = {
        box.get_label(): [bar.get_width() for bar in box] for box in figure.axes[0].containers
    }
    assert widths == {"short window": [300, 0], "long window": [750, 20]}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["books", "code"]
