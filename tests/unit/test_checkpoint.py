"""Which checkpoint a resumed run takes, and what stops a run."""

import logging
from pathlib import Path

import pytest

from longrope2.artifacts import Manifest, sha256_of_file, write_manifest
from longrope2.errors import ArtifactError
from longrope2.rope import Window
from longrope2.training.checkpoint import _newest_intact
from longrope2.training.run import _stop_on_nan
from longrope2.training.step import StepReport

IDENTITY = {"seed": 1, "model": {"architecture_sha256": "a"}}


def checkpoint(folder: Path, steps: int, identity: dict | None = None) -> Path:
    step = folder / f"step_{steps:08d}"
    step.mkdir(parents=True)
    (step / "state.pt").write_bytes(bytes([steps]))
    files = {"state.pt": sha256_of_file(step / "state.pt")}
    manifest = Manifest("training_state", inputs=identity or IDENTITY, counts={"steps": steps}, files=files)
    write_manifest(step, manifest)
    return step


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert _newest_intact(tmp_path, IDENTITY) is None


def test_the_newest_is_taken(tmp_path: Path) -> None:
    for steps in (2, 10, 4):
        checkpoint(tmp_path, steps)
    assert _newest_intact(tmp_path, IDENTITY) == ("step_00000010", 10)


@pytest.mark.parametrize("damage", ["changed", "missing", "unfinished"])
def test_a_damaged_one_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    if damage == "changed":
        (newest / "state.pt").write_bytes(b"x")
    else:
        (newest / ("state.pt" if damage == "missing" else "manifest.json")).unlink()
    with caplog.at_level(logging.WARNING):
        assert _newest_intact(tmp_path, IDENTITY) == ("step_00000002", 2)
    assert "skipping a damaged checkpoint" in caplog.text and "step_00000004" in caplog.text


def test_all_damaged(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 2) / "state.pt").unlink()
    found = _newest_intact(tmp_path, IDENTITY)
    assert isinstance(found, ArtifactError)
    assert str(found).endswith("is intact (1 damaged); remove them to start over")


def test_another_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, {"seed": 2, "model": IDENTITY["model"]})
    found = _newest_intact(tmp_path, IDENTITY)
    assert isinstance(found, ArtifactError)
    assert "was written by another run: seed differ; use another run.name" in str(found)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (2.0, float("inf"))])
def test_a_loss_that_is_not_finite_stops_the_run(loss: float, norm: float) -> None:
    report = StepReport(loss, dict.fromkeys(Window, loss), dict.fromkeys(Window, 1), norm, 1.0, {})
    with pytest.raises(ArtifactError, match=r"step 8: loss .*; the last checkpoint is intact; lower training"):
        _stop_on_nan(report, 7)
