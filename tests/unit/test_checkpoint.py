"""Which checkpoint a resumed run takes, and what stops a run."""

import logging
from pathlib import Path

import pytest

from longrope2.errors import ArtifactError, UserError
from longrope2.files.artifacts import Manifest, sha256_of_file, write_manifest
from longrope2.training.checkpoint import _newest_intact
from longrope2.training.step import SkippedSteps

IDENTITY = {"seed": 1, "model": {"architecture_sha256": "a"}}


def checkpoint(folder: Path, steps: int, identity: dict | None = None) -> Path:
    step = folder / f"step_{steps:08d}"
    step.mkdir(parents=True)
    (step / "state.pt").write_bytes(bytes([steps]))
    files = {"state.pt": sha256_of_file(step / "state.pt")}
    manifest = Manifest(
        "training_state", inputs=identity or IDENTITY, counts={"steps": steps}, files=files
    )
    write_manifest(step, manifest)
    return step


def found(folder: Path) -> tuple[str, dict]:
    newest = _newest_intact(folder, IDENTITY)
    assert isinstance(newest, tuple)
    return newest[0], newest[1].counts


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert _newest_intact(tmp_path, IDENTITY) is None


def test_the_newest_is_taken(tmp_path: Path) -> None:
    for steps in (2, 10, 4):
        checkpoint(tmp_path, steps)
    assert found(tmp_path) == ("step_00000010", {"steps": 10})


@pytest.mark.parametrize("damage", ["changed", "missing", "unfinished"])
def test_a_damaged_one_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    if damage == "changed":
        (newest / "state.pt").write_bytes(b"x")
    else:
        (newest / ("state.pt" if damage == "missing" else "manifest.json")).unlink()
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == ("step_00000002", {"steps": 2})
    assert "skipping a damaged checkpoint" in caplog.text and "step_00000004" in caplog.text


def test_all_damaged(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 2) / "state.pt").unlink()
    error = _newest_intact(tmp_path, IDENTITY)
    assert isinstance(error, ArtifactError)
    assert str(error).endswith("is intact (1 damaged); remove them to start over")


def test_another_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, {"seed": 2, "model": IDENTITY["model"]})
    error = _newest_intact(tmp_path, IDENTITY)
    assert isinstance(error, ArtifactError)
    assert "was written by another run: seed differ; use another run.name" in str(error)


def test_inputs_may_be_moved_but_not_changed(tmp_path: Path) -> None:
    identity = {"segments": {"path": "/before", "sha256": "a"}}
    checkpoint(tmp_path, 2, identity)
    assert isinstance(
        _newest_intact(tmp_path, {"segments": {"path": "/after", "sha256": "a"}}), tuple
    )
    error = _newest_intact(tmp_path, {"segments": {"path": "/before", "sha256": "b"}})
    assert "was written by another run: segments differ" in str(error)


def test_too_many_skipped_steps_stop_the_run() -> None:
    skipped = SkippedSteps()
    for applied in (False, False, True, False, False):
        skipped.count(applied)
        skipped.stop_if_too_many(3, step=1, loss=0.0, norm=0.0)
    assert (skipped.total, skipped.in_a_row) == (4, 2)
    skipped.count(False)
    with pytest.raises(UserError) as stopped:
        skipped.stop_if_too_many(3, step=8, loss=float("nan"), norm=2.5)
    assert str(stopped.value) == (
        "training.max_skipped_steps=3: that many steps in a row were skipped, the last one step "
        "8 with loss nan and "
        "gradient norm 2.5; the checkpoints are intact. Lower training.learning_rate, raise "
        "training.skip_grad_norm if "
        "the norm is finite, or look at the segments of these steps"
    )
