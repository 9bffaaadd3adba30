"""The report of synthetic runs: every figure and number, what is missing, and its limits."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from launch import report as report_command
from launch.report import run_folder, watch_run
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import Manifest, product_folder, write_manifest
from longrope2.report import page as report_module
from longrope2.report import training as training_module
from longrope2.report.data import load_run
from longrope2.report.page import write_report
from longrope2.report.plots import (
    Scale,
    Series,
    document_lengths_figure,
    factors_figure,
    fresh_figure,
    lengths_figure,
    mix_figure,
    running_mean,
    search_figure,
    series_figure,
)
from longrope2.report.training import SERIES
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors, ntk_part

GEOMETRY = RopeGeometry(rotary_dim=32, rope_base=10_000.0, original_len=128)
FACTORS = RescaleFactors(
    factors=(*ntk_part(5, 17.0), *(17.0 + 0.5 * i for i in range(11))),
    geometry=GEOMETRY,
    target_len=2048,
    method="longrope2",
    critical_index=5,
)
SUBJECTS = ("base", "pi", "yarn<b>", "longrope2-trained")
LENGTHS = (128, 512, 2048)
ACCURACIES = dict(
    zip(
        SUBJECTS,
        ((0.95, 0.1, 0.0), (0.95, 0.0, 0.0), (0.95, 0.2, 0.1), (0.9, 0.8, 0.6)),
        strict=True,
    )
)


def needle_row(subject, length, accuracy):
    cell = {
        "num_samples": 8,
        "num_correct": round(8 * accuracy),
        "accuracy": accuracy,
        "accuracy_interval": [0.1, 0.7],
    }
    return {
        "subject": subject,
        "length": length,
        "window": "long",
        **cell,
        "num_samples": 16,
        "perplexity": 9 - 8 * accuracy,
        "depths": [{"depth": depth, **cell, "perplexity": 2.5} for depth in (0.0, 0.5)],
    }


def evaluation_summary():
    return {
        "original_len": 128,
        "target_len": 2048,
        "reference": "base",
        "subjects": [
            {
                "name": name,
                "trained": name.endswith("trained"),
                "method": "m",
                "critical_index": None,
                "factors": [1.0, 2.0],
                "long_attention_scale": 1.0,
                "source": {"checkpoint": {"path": "runs/elsewhere/3_checkpoints/final"}},
            }
            for name in SUBJECTS
        ],
        "needle": [
            needle_row(name, n, a)
            for name in SUBJECTS
            for n, a in zip(LENGTHS, ACCURACIES[name], strict=True)
        ],
        "perplexity": [
            {
                "subject": name,
                "length": n,
                "window": "long",
                "num_windows": 4,
                "num_tokens": 256,
                "perplexity": 7.5,
            }
            for name in SUBJECTS
            for n in LENGTHS
        ],
        "retention": [
            {
                "subject": name,
                "length": 128,
                "num_windows": 9,
                "num_tokens": 1143,
                "perplexity": 8 * ratio,
                "ratio": ratio,
            }
            for name, ratio in zip(SUBJECTS, (1.0, 1.0, 1.0, 1.0123), strict=True)
        ],
    }


def contestant(name, kind, value, num_reported=0):
    return {
        "name": name,
        "kind": kind,
        "value": value,
        "interval": [value / 2, 2 * value],
        "num_choosing": 32 if num_reported else 4,
        "num_reported": num_reported,
        "factors": [1.0] * 16,
        "attention_scale": 1.25,
    }


def search_history():
    rounds = [
        {
            "iteration": i,
            "best_value": 9 - i,
            "best_critical_index": 5,
            "worst_kept_value": 12 - i,
            "num_candidates": 64 + 32 * i,
            "num_terminated": 9 * i,
            "num_losses": 500,
        }
        for i in range(4)
    ]
    return {
        "objective": "needle",
        "value_name": "needle_ppl",
        "best_value": 6.0,
        "critical_index": 5,
        "theoretical_critical_index": 6,
        "ten_period_index": 2,
        "original_len": 128,
        "target_len": 2048,
        "sample_len": 2048,
        "algorithm": "longrope2",
        "fresh": {
            "verdict": "confirmed: <better> than every closed form",
            "contestants": [
                contestant("found 1", "found", 6.5, num_reported=32),
                contestant("ntk", "closed form", 30.0, num_reported=32),
                contestant("pi", "closed form", 50.0),
                contestant("none", "closed form", 7700.0),
            ],
        },
        "rounds": rounds,
        "kept": [],
    }


def training_records():
    return [
        {
            "step": step,
            "train/tokens": 4096 * step,
            "train/loss": 3.0,
            f"train/loss_{window}": 4.0 - step / 10,
        }
        for step, window in zip(range(1, 9), ("short", "long") * 4, strict=True)
    ]


HISTOGRAM = {
    "edges_tokens": [0, 16, 32, 64, 128, 256, 4096],
    "num_documents": {
        "books": {"tokenized": [0, 0, 1, 5, 40, 7], "chosen": [0, 0, 1, 4, 30, 7]},
        "retrieval": {"tokenized": [0, 0, 0, 10, 0, 0], "chosen": [0, 0, 0, 10, 0, 0]},
    },
}


def finish(run, product, **manifest):
    folder = product_folder(run, product)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"config": {"note": "a<b"}, "commit": "abc123", **manifest}
    write_manifest(folder, Manifest(product, **facts))
    return folder


def write_records(run, records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (product_folder(run, "checkpoints") / "metrics.jsonl").write_text(lines)


@pytest.fixture
def full_run(tmp_path):
    run = tmp_path / "demo"
    tokens = {"retrieval": {"short": 100, "long": 250}, "books": {"short": 300, "long": 750}}
    finish(
        run,
        "segments",
        counts={"tokens": tokens, "num_long_segments": 1234, "num_short_segments": 0},
        seeds={"seed": 3},
        config={"corpus": {"name": "mine", "folder": "/my <texts>"}, "note": "a<b"},
        details={"original_len": 128, "target_len": 2048, "length_histogram": HISTOGRAM},
    )
    factors = finish(run, "factors", seeds={"seed": 11})
    (factors / "factors.json").write_text(FACTORS.to_json())
    (factors / "history.json").write_text(json.dumps(search_history()))
    checkpoints = finish(run, "checkpoints")
    (checkpoints / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in training_records())
    )
    text = {"corpus": "books", "own": None, "is_other": False}
    evaluations = finish(
        run,
        "evaluations",
        seeds={"needle": 7001},
        inputs={"corpus": {}},
        details={"text": text, "text_hashes": []},
    )
    (evaluations / "evaluations.json").write_text(json.dumps(evaluation_summary()))
    finish(run, "exports")
    return run


class PageText(HTMLParser):
    """Collects visible text, table rows and images; fails on a tag closed out of order."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open_tags, self.rows, self.images, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_tags:
            self.text += data
        if self.open_tags and self.open_tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read_page(path):
    page = PageText()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open_tags == []
    return page


def test_report_holds_the_numbers_of_the_run(full_run):
    path = write_report(full_run)
    assert path == full_run / "report.html"
    page = read_page(path)
    head = [
        "model",
        "128",
        "512",
        "2,048",
        "95 % interval at 2,048",
        "needle ppl",
        "text ppl",
        "short window",
    ]
    assert head in page.rows
    assert ["yarn<b>", "95", "20", "10", "10-70 %", "8.2", "7.5", "+0.0 %"] in page.rows
    assert ["longrope2-trained", "90", "80", "60", "10-70 %", "4.2", "7.5", "+1.2 %"] in page.rows
    assert ["longrope2-trained", "8.0984", "1.0123", "+1.2 %"] in page.rows
    assert (
        page.rows.count(["0 %", "90", "80", "60"])
        == page.rows.count(["50 %", "90", "80", "60"])
        == 1
    )
    assert "On the search's own samples the best of 160 candidates has 6." in page.text
    assert ["none", "1.25", "7700", "3850 to 1.54e+04", "stopped after 4"] in page.rows
    assert "longrope2-trained retrieves 60 % of the needles (10-70 %), base 0 %" in page.text
    assert "its perplexity changes by +1.2 %" in page.text
    assert "Found critical dimension 5; theory says 6" in page.text
    assert "8 records, 32,768 tokens." in page.text
    assert page.text.count("abc123") == 5 and '"note": "a<b"' in page.text
    assert (
        "tokens.books.short 300, tokens.retrieval.long 250" in page.text
        and "num_long_segments 1234" in page.text
    )


def test_report_states_its_limits(full_run):
    text = read_page(write_report(full_run)).text
    long_share = "250 of 1,000 tokens of the long segments (25 %)"
    assert f"contain retrieval documents in the wording of the needles: {long_share}, " in text
    assert "100 of 400 tokens of the short segments (25 %). Keys" in text
    assert (
        "16 needle samples per length: near 50 % the 95 % interval is about 24 points either way"
        in text
    )
    assert "untrained models (pi, yarn<b>) are the base model by construction" in text
    assert "share text is unknown: searched by an earlier version" in text
    assert "The run's segments hold no short ones: its short window was not trained." in text
    assert (
        "Trained in other runs, whose configuration stands there: longrope2-trained "
        "(runs/elsewhere/" in text
    )


def test_no_claim_of_retrieval_documents_where_there_are_none(full_run):
    finish(full_run, "segments", counts={"tokens": {"books": {"short": 300, "long": 750}}})
    assert "retrieval documents" not in read_page(write_report(full_run)).text


def test_report_is_self_contained_and_its_figures_are_whole(full_run):
    path = write_report(full_run)
    page = read_page(path)
    assert len(page.images) == 9
    for image in page.images:
        assert image["alt"]
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    content = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=(?![\"']?data:)|@import|url\(|<script", content)
    first = path.read_bytes()
    assert write_report(full_run).read_bytes() == first


def test_missing_stages_are_said_to_be_missing(tmp_path):
    run = tmp_path / "young"
    product_folder(run, "segments").mkdir(parents=True)
    (product_folder(run, "segments") / "config.yaml").write_text("a: 1\n")
    text = read_page(write_report(run)).text
    assert "Nothing has been evaluated yet." in text
    assert text.count("This stage has not been run: python -m launch.evaluate run.name=young") == 3
    assert text.count("This stage has not been run: python -m launch.search run.name=young") == 2
    assert "This stage has not been run: python -m launch.train run.name=young" in text
    assert "1_segments: unfinished" in text and "5_exports: missing" in text


def test_a_training_in_progress_is_shown_as_unfinished(full_run):
    (product_folder(full_run, "checkpoints") / "manifest.json").unlink()
    page = read_page(write_report(full_run))
    assert "The training is not finished." in page.text and "3_checkpoints: unfinished" in page.text
    assert len(page.images) == 9


def test_a_step_repeated_after_a_resume_counts_once(full_run):
    path = product_folder(full_run, "checkpoints") / "metrics.jsonl"
    repeated = [{**record, "train/loss": 1.5} for record in training_records()[4:6]]
    path.write_text(
        path.read_text() + "".join(json.dumps(record) + "\n" for record in repeated) + '{"torn'
    )
    records = load_run(full_run).training_metrics
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["train/loss"] for record in records] == [3.0] * 4 + [1.5] * 2 + [3.0] * 2


def test_folders_and_files_that_are_no_run(tmp_path, full_run):
    with pytest.raises(
        ArtifactError, match=r"nowhere does not exist; give the run folder, or run\.name=NAME"
    ):
        write_report(tmp_path / "nowhere")
    (tmp_path / "page.html").touch()
    with pytest.raises(ArtifactError, match=r"page\.html is a file; give the run folder"):
        write_report(tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ArtifactError, match=r"empty holds no product of a run \(1_segments, 2_factors"
    ):
        write_report(tmp_path / "empty")
    assert not (tmp_path / "empty" / "report.html").exists()
    (product_folder(full_run, "evaluations") / "evaluations.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"evaluations\.json is damaged .* run its stage again"):
        write_report(full_run)


def test_the_command_takes_a_folder_or_a_name():
    assert str(run_folder(["runs/demo"])) == "runs/demo"
    assert str(run_folder(["run.name=demo", "run.root=elsewhere"])) == "elsewhere/demo"
    with pytest.raises(
        ConfigError, match=r"give one run folder, or run\.name=NAME; got runs/a runs/b"
    ):
        run_folder(["runs/a", "runs/b"])
    with pytest.raises(ConfigError, match=r"run\.name is not set"):
        run_folder([])


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


def test_a_search_without_a_critical_dimension_says_so():
    history = {**search_history(), "critical_index": None}
    record = SimpleNamespace(search_history=history, corpus_of=lambda product: None)
    assert "No critical dimension; theory says 6." in report_module._search(record)
    assert "Found critical dimension 5; theory says 6." in report_module._search(
        SimpleNamespace(search_history=search_history(), corpus_of=lambda product: None)
    )


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


def test_held_out_losses_are_told_at_first_at_their_lowest_and_at_last(full_run):
    measured = {0: 5.0, 4: 3.25, 8: 3.5}
    records = [{"step": 0, "train/tokens": 0}, *training_records()]
    for record in records:
        if record["step"] in measured:
            record["train/heldout_loss_long"] = measured[record["step"]]
    write_records(full_run, records)
    text = read_page(write_report(full_run)).text
    assert "8 records, 32,768 tokens. Text: corpus mine (/my <texts>)." in text
    assert (
        "Loss on held-out text, long window: 5.000 after step 0, lowest 3.250 after step 4, 3.500 "
        "after step 8." in text
    )
    assert "held-out text, short window" not in text


def test_a_resume_is_marked_and_told(full_run):
    records = training_records()
    records[3]["train/resumed_after_step"] = 3
    records[6]["train/resumed_after_step"] = 6
    write_records(full_run, records)
    record = load_run(full_run)
    assert record.resumed_after_steps == [3, 6]
    axes = series_figure(records, SERIES[0], [12_288, 24_576]).axes[0]
    marks = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [set(line.get_xdata()) for line in marks] == [{12_288}, {24_576}]
    assert [line.get_label() for line in marks][0] == "resumed"
    text = read_page(write_report(full_run)).text
    assert "Interrupted and resumed after steps 3, 6 (dotted)." in text
    write_records(full_run, training_records())
    assert "resumed" not in read_page(write_report(full_run)).text


def test_the_marks_stand_where_the_step_ended(full_run):
    records = training_records()
    records[3]["train/resumed_after_step"] = 3
    write_records(full_run, records)
    assert training_module._resumed_at_tokens(load_run(full_run)) == [3 * 4096]


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


def test_document_lengths_are_summed_over_sources(full_run):
    lengths = load_run(full_run).document_lengths
    assert lengths.tokenized == (0, 0, 1, 15, 40, 7) and lengths.chosen == (0, 0, 1, 14, 30, 7)
    axes = document_lengths_figure(lengths).axes[0]
    read, packed = axes.patches
    assert (read.get_label(), packed.get_label()) == ("read", "packed")
    assert list(read.get_data().values[2:]) == [1, 15, 40, 7]
    assert list(packed.get_data().edges) == [8, 16, 32, 64, 128, 256, 4096]
    assert {tuple(set(line.get_xdata())) for line in axes.lines} == {(128,), (2048,)}
    assert "Packed from corpus mine (/my <texts>)." in read_page(write_report(full_run)).text


def test_segments_packed_before_lengths_were_counted_have_no_figure(full_run):
    finish(full_run, "segments", counts={"tokens": {"books": {"short": 300, "long": 750}}})
    page = read_page(write_report(full_run))
    assert len(page.images) == 8 and "Packed from corpus" not in page.text


def test_segments_of_another_run_are_shown_where_they_were_trained_on(full_run):
    own, other = product_folder(full_run, "segments"), full_run.parent / "other"
    own.rename(other)
    finish(full_run, "checkpoints", inputs={"segments": {"path": str(other), "sha256": "1"}})
    text = read_page(write_report(full_run)).text
    assert "Packed from corpus mine" in text and "1_segments: missing" in text
    gone = {"path": f"{other}_gone", "sha256": "1"}
    finish(full_run, "checkpoints", inputs={"segments": gone})
    assert "Packed from corpus" not in read_page(write_report(full_run)).text


def test_every_figure_names_its_corpus(full_run):
    finish(full_run, "factors", config={"corpus": {"name": "of the search", "folder": None}})
    finish(full_run, "evaluations", config={"corpus": {"name": "asked", "folder": "b"}})
    text = read_page(write_report(full_run)).text
    assert text.count("Text: held out of corpus asked (b).") == 3
    assert text.count("Text: held out of corpus of the search.") == 1
    assert "Text: corpus mine (/my <texts>)." in text


def test_models_without_any_needle_are_said_to_do_none(full_run):
    summary = evaluation_summary()
    place = product_folder(full_run, "evaluations") / "evaluations.json"
    assert "do needles" not in read_page(write_report(full_run)).text
    for row in summary["needle"]:
        if row["subject"] in ("pi", "yarn<b>"):
            row["accuracy"] = 0.0
    place.write_text(json.dumps(summary))
    text = read_page(write_report(full_run)).text
    assert (
        "pi, yarn<b>: this model cannot do needles. None was retrieved at any length, inside the "
        "original window of 128 tokens either" in text
    )
    summary["needle"] = [row for row in summary["needle"] if row["length"] > 128]
    place.write_text(json.dumps(summary))
    text = read_page(write_report(full_run)).text
    assert "pi, yarn<b>: no needle was retrieved at any length. None was asked for inside" in text
    assert "cannot do needles" not in text


def test_exports_are_listed_untrained_ones_too(full_run):
    details = {"trained": True, "factors": {"method": "longrope2"}}
    files = {"hugging_face/config.json": "1", "hugging_face/x.safetensors": "2"}
    finish(full_run, "exports", details=details, files={**files, "hugging_face_long_only/x": "3"})
    text = read_page(write_report(full_run)).text
    assert "hugging_face, hugging_face_long_only; weights trained, factors longrope2" in text
    exports = product_folder(full_run, "exports")
    (exports / "manifest.json").unlink()
    details = {"trained": False, "factors": {"method": "yarn"}}
    manifest = Manifest("exports", details=details, files={"hugging_face_long_only/x": "3"})
    write_manifest(exports / "untrained", manifest)
    text = read_page(write_report(full_run)).text
    assert "5_exports: missing" in text and "5_exports/untrained" in text
    assert "hugging_face_long_only; weights untrained (the base model's), factors yarn" in text


def test_a_run_of_an_untrained_export_alone_has_a_report(tmp_path):
    exports = product_folder(tmp_path / "run", "exports")
    write_manifest(exports / "untrained", Manifest("exports"))
    assert "5_exports/untrained" in read_page(write_report(tmp_path / "run")).text


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


def test_watching_writes_again_when_the_run_moves_on(tmp_path, capsys):
    run, pages = tmp_path / "training", []
    checkpoints = product_folder(run, "checkpoints")
    checkpoints.mkdir(parents=True)
    (checkpoints / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in training_records())
    )

    def pause(seconds):
        pages.append((run / "report.html").read_text())
        if len(pages) == 2:
            more = {"step": 9, "train/tokens": 36_864, "train/loss_long": 3.0}
            with (checkpoints / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(more) + "\n")
            (checkpoints / "factors.json").symlink_to("removed just now")
        if len(pages) == 4:
            raise KeyboardInterrupt

    watch_run(run, pause)
    assert ["8 records" in page for page in pages] == [True, True, False, False]
    assert "9 records, 36,864 tokens" in pages[2]
    assert all("<meta http-equiv='refresh' content='10'>" in page for page in pages)
    assert "http-equiv" not in (run / "report.html").read_text()
    assert capsys.readouterr().out.count("written\n") == 2


def test_the_watch_flag_of_the_command(full_run, monkeypatch):
    seen = []
    monkeypatch.setattr(report_command, "watch_run", seen.append)
    for arguments in (
        [str(full_run), "--watch"],
        ["--watch", "run.name=demo", f"run.root={full_run.parent}"],
    ):
        monkeypatch.setattr(sys, "argv", ["launch.report", *arguments])
        report_command.main()
    assert seen == [full_run, full_run]


def test_a_search_of_an_earlier_version_is_said_to_be_one(full_run):
    history = {key: value for key, value in search_history().items() if key != "fresh"}
    (product_folder(full_run, "factors") / "history.json").write_text(json.dumps(history))
    assert "run by an earlier version" in read_page(write_report(full_run)).text
