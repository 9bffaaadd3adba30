"""The report of synthetic runs: every figure and number, what is missing, and its limits."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
from report_run import (
    evaluation_summary,
    finish,
    read_page,
    search_history,
    training_records,
    write_full_run,
    write_records,
)

from launch import report as report_command
from launch.report import run_folder, watch_run
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import Manifest, product_folder, write_manifest
from longrope2.report import page as report_module
from longrope2.report import training as training_module
from longrope2.report.data import load_run
from longrope2.report.page import write_report
from longrope2.report.plots import document_lengths_figure, series_figure
from longrope2.report.training import SERIES


@pytest.fixture
def full_run(tmp_path):
    write_full_run(tmp_path / "demo")
    return tmp_path / "demo"


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


def test_a_search_without_a_critical_dimension_says_so():
    history = {**search_history(), "critical_index": None}
    record = SimpleNamespace(search_history=history, corpus_of=lambda product: None)
    assert "No critical dimension; theory says 6." in report_module._search(record)
    assert "Found critical dimension 5; theory says 6." in report_module._search(
        SimpleNamespace(search_history=search_history(), corpus_of=lambda product: None)
    )


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
