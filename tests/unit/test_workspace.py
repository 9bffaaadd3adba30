"""The W&B workspace, offline: the object tree that would be saved, and its figures."""

import json

import pytest
from report_run import SUBJECTS, evaluation_summary, finish

from longrope2.errors import ConfigError
from longrope2.files.artifacts import product_folder
from longrope2.report.data import load_run
from longrope2.report.plots import needle_map_figure
from longrope2.report.workspace import evaluated_metrics, run_workspace, save_workspace
from longrope2.tracking.metrics import TrackingConfig, WandbMode

pytest.importorskip("wandb_workspaces", reason="extra `dashboards` is not installed")
TRACKING = TrackingConfig(wandb=WandbMode.offline, project="longrope2", entity="lab")
# Logged by training and search; what is drawn must be among them.
LOGGED = {
    "train/loss",
    "train/loss_short",
    "train/loss_long",
    "train/grad_norm",
    "train/learning_rate",
    "train/skipped_steps",
    "train/tokens",
    "perf/tokens_per_second_per_gpu",
    "perf/mfu",
    "perf/step_seconds",
    "perf/memory_peak_gib",
    "perf/micro_step_seconds_short",
    "perf/micro_step_seconds_long",
    "search/best_needle_ppl",
    "search/best_ppl",
    "search/critical_index",
    "search/evaluations",
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo"
    finish(
        folder,
        "segments",
        counts={"tokens": {"books": {"short": 300, "long": 750}}, "padding_tokens": 4},
    )
    evaluations = finish(folder, "evaluations")
    (evaluations / "evaluations.json").write_text(json.dumps(evaluation_summary()))
    names = [f"eval/needle_accuracy/base/{length}" for length in (2048, 128)] + [
        "eval/ruler/niah/base/128"
    ]
    (evaluations / "metrics.jsonl").write_text(json.dumps(dict.fromkeys(names, 0.5)) + "\n")
    return folder


def saved_sections(workspace) -> dict[str, list[dict]]:
    """Section -> panels, as they would be sent."""
    spec = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))[
        "spec"
    ]
    sections = spec["section"]["panelBankConfig"]["sections"]
    return {
        section["name"]: [panel["config"] for panel in section["panels"]] for section in sections
    }


def test_every_panel_a_user_watches(run) -> None:
    workspace = run_workspace(load_run(run), "demo", TRACKING)
    assert (workspace.entity, workspace.project, workspace.name) == (
        "lab",
        "longrope2",
        "LongRoPE2 demo",
    )
    sections = saved_sections(workspace)
    assert list(sections) == [
        "Training",
        "Speed and memory",
        "Mix",
        "Search",
        "Evaluation: needle_accuracy",
        "Needle heat maps",
    ]
    lines = [
        panel for name in ("Training", "Speed and memory", "Search") for panel in sections[name]
    ]
    assert {metric for panel in lines for metric in panel["metrics"]} == LOGGED - {
        "train/tokens",
        "search/evaluations",
    }
    assert {panel["xAxis"] for panel in lines} == {"train/tokens", "search/evaluations"}
    titles = {panel["chartTitle"]: panel["metrics"] for panel in lines}
    assert titles["Loss by window"] == ["train/loss_short", "train/loss_long"]
    (mix,) = sections["Mix"]
    assert mix["metrics"] == ["report/mix_tokens/books/short", "report/mix_tokens/books/long"]
    (accuracy,) = sections["Evaluation: needle_accuracy"]
    assert accuracy["metrics"] == [
        "eval/needle_accuracy/base/128",
        "eval/needle_accuracy/base/2048",
    ]
    assert sections["Needle heat maps"][0]["mediaKeys"] == ["report/needle_maps"]


def test_names_of_evaluations() -> None:
    names = {
        "eval/perplexity/a/256",
        "eval/perplexity/a/128",
        "eval/retention/b/64",
        "eval/x/y/z/8",
        "eval/ruler/average/a/64",
        "train/loss",
        "eval/a/b/c",
    }
    assert evaluated_metrics(names) == {
        "perplexity": {"a": [128, 256]},
        "retention": {"b": [64]},
        "ruler/average": {"a": [64]},
    }


def test_mix_of_a_run_that_has_none(run) -> None:
    assert load_run(run).mix_tokens == {"books": {"short": 300, "long": 750}}
    (product_folder(run, "segments") / "manifest.json").unlink()
    assert load_run(run).mix_tokens == {}


def test_heat_map_holds_the_accuracies(run) -> None:
    figure = needle_map_figure(load_run(run).evaluation.needle, SUBJECTS[-1])
    (axes,) = figure.axes
    assert [
        [round(share, 3) for share in line] for line in axes.images[0].get_array().tolist()
    ] == [[0.9, 0.8, 0.6]] * 2
    assert [text.get_text() for text in axes.texts] == ["90", "80", "60"] * 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "512", "2,048"]


def test_what_a_workspace_needs(run) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.entity is null; give the W&B user or team"):
        run_workspace(load_run(run), "demo", TrackingConfig())
    with pytest.raises(ConfigError, match=r"W&B is offline here; `wandb login` first"):
        save_workspace(run, "demo", TRACKING)


def test_a_missing_package_is_named(run, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(
        ConfigError, match=r"wandb-workspaces is not installed; pip install '\.\[dashboards\]'"
    ):
        run_workspace(load_run(run), "demo", TRACKING)
