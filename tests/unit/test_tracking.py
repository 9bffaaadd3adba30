"""Metrics reach the JSON-lines file and a real W&B offline run, read back from its own file."""

from pathlib import Path

import pytest
import wandb
from wandb_offline import history, offline_files, read_offline

from longrope2.errors import ConfigError
from longrope2.tracking.metrics import (
    MetricsLog,
    TrackingConfig,
    WandbMode,
    read_metrics,
    resolve_mode,
)

STEPS = [{"train/loss": 2.5, "train/tokens": 100}, {"train/loss": 2.0, "train/tokens": 200}]


def write(folder: Path, mode: WandbMode, steps: list[dict]) -> None:
    with MetricsLog(folder, TrackingConfig(wandb=mode), "runs/demo", "train", {"seed": 3}) as log:
        for number, values in enumerate(steps, 1):
            log.log(values, step=number)
        log.log_files("factors", [folder / "metrics.jsonl"])


def test_lines_are_appended_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, WandbMode.disabled, STEPS[:1])
    write(tmp_path, WandbMode.disabled, STEPS[1:])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/loss": 1.')
    found = read_metrics(tmp_path)
    assert [(r["train/loss"], r["train/tokens"]) for r in found] == [(2.5, 100), (2.0, 200)]
    assert not (tmp_path / "wandb").exists()


def test_a_torn_line_does_not_swallow_the_first_record_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, WandbMode.disabled, STEPS[:1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.5, "step": 2, "train/lo')
    with MetricsLog(tmp_path, TrackingConfig(wandb=WandbMode.disabled), "demo", "train", {}) as log:
        for step in (2, 3):
            log.log({"train/loss": 1.0}, step=step)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_steps_that_are_repeated_are_forgotten_first(tmp_path: Path) -> None:
    write(tmp_path, WandbMode.disabled, [{"train/loss": float(step)} for step in range(1, 6)])
    with MetricsLog(tmp_path, TrackingConfig(wandb=WandbMode.disabled), "demo", "train", {}) as log:
        assert log.forget_after(5) == 0 and log.forget_after(3) == 2
        log.log({"train/loss": 40.0}, step=4)
    assert [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0),
    ]  # fmt: skip


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_offline_wandb_run_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    write(tmp_path, WandbMode.auto, STEPS)
    wandb.teardown()  # what the end of the process does: the service flushes its file
    (file,) = offline_files(tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*")) == [
        file.parent
    ]  # what users are told to sync
    records = read_offline(file)
    logged = history(records)
    assert [{k: h[k] for k in STEPS[0]} for h in logged] == STEPS
    assert [h["_step"] for h in logged] == [1, 2]
    run = next(r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.display_name) == (
        "runs/demo",
        "train",
        "runs/demo/train",
    )
    x_axes = {
        r.metric.glob_name or r.metric.name: r.metric.step_metric
        for r in records
        if r.WhichOneof("record_type") == "metric"
    }
    assert x_axes["train/*"] == "train/tokens"
    (artifact,) = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    assert (artifact.type, artifact.name) == ("factors", f"{run.run_id}-factors")
    assert [entry.path for entry in artifact.manifest.contents] == ["metrics.jsonl"]
    write(tmp_path, WandbMode.auto, STEPS[1:])
    assert len({file.stem for file in offline_files(tmp_path)}) == 1, (
        "a resumed run is the same W&B run"
    )
    write(tmp_path / "elsewhere", WandbMode.auto, STEPS)
    other = offline_files(tmp_path / "elsewhere")[0].stem
    assert other.startswith("run-runs-demo-train-") and other != file.stem


def test_environment_decides_for_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write(tmp_path, WandbMode.auto, STEPS)
    assert not (tmp_path / "wandb").exists()
    for named in ("dryrun", "auto"):
        monkeypatch.setenv("WANDB_MODE", named)
        with pytest.raises(
            ConfigError, match=f"WANDB_MODE={named} .* must be one of online, offline, disabled"
        ):
            resolve_mode(WandbMode.auto)
