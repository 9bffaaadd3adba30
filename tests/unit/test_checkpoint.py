"""Which checkpoint a resumed run takes, and what stops a run."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from longrope2.errors import ArtifactError, UserError
from longrope2.files.artifacts import Manifest, sha256_of_file, write_manifest
from longrope2.training.checkpoint import find_newest, owner_of_file
from longrope2.training.step import SkippedSteps

pytestmark = pytest.mark.usefixtures("one_process")
IDENTITY = {"seed": 1, "model": {"architecture_sha256": "a"}}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoint(folder: Path, steps: int, identity: dict | None = None) -> Path:
    step = folder / f"step_{steps:08d}"
    step.mkdir(parents=True)
    (step / "mp_rank_00_model_states.pt").write_bytes(bytes([steps]))
    files = {"mp_rank_00_model_states.pt": sha256_of_file(step / "mp_rank_00_model_states.pt")}
    manifest = Manifest(
        "training_state", inputs=identity or IDENTITY, counts={"steps": steps}, files=files
    )
    write_manifest(step, manifest)
    return step


def found(folder: Path) -> tuple[str, dict]:
    newest = find_newest(folder, IDENTITY)
    assert newest is not None
    return newest.folder.name, newest.manifest.counts


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert find_newest(tmp_path, IDENTITY) is None


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
        (newest / "mp_rank_00_model_states.pt").write_bytes(b"x")
    else:
        (
            newest / ("mp_rank_00_model_states.pt" if damage == "missing" else "manifest.json")
        ).unlink()
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == ("step_00000002", {"steps": 2})
    assert "skipping a damaged checkpoint" in caplog.text and "step_00000004" in caplog.text


STATES = "mp_rank_00_model_states.pt"
OF_TWO_RANKS = {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}


@pytest.mark.parametrize(
    ("listed", "there", "fault"),
    [
        (set(), set(), "manifest.json lists no *model_states.pt"),
        ({STATES}, {STATES}, "manifest.json lists no *optim_states.pt of rank 0"),
        ({STATES, min(OF_TWO_RANKS)}, OF_TWO_RANKS, "lists no *optim_states.pt of rank 1"),
        ({STATES, *OF_TWO_RANKS}, {"more_states.pt"}, "more_states.pt is not listed in"),
        ({STATES, *OF_TWO_RANKS}, set(), None),
    ],
)
def test_the_states_of_all_ranks_are_listed_and_no_others_are_there(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    listed: set[str],
    there: set[str],
    fault: str | None,
) -> None:
    """They are pickles: a strange one would be executed."""
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    (newest / STATES).unlink()
    for name in listed | there:
        (newest / name).write_bytes(b"x")
    files = {name: sha256_of_file(newest / name) for name in listed}
    shards = {"shards": {"world_size": 2, "zero_stage": 3, "bf16": False}}
    counts, inputs = {"steps": 4}, IDENTITY
    write_manifest(
        newest, Manifest("training_state", inputs, counts=counts, files=files, details=shards)
    )
    assert found(tmp_path)[0] == ("step_00000004" if fault is None else "step_00000002")
    assert (fault or "") in caplog.text


def test_a_damaged_manifest_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(tmp_path, 2)
    manifest = checkpoint(tmp_path, 4) / "manifest.json"
    whole = manifest.read_bytes()
    for damage in (
        b"",
        whole[: len(whole) // 2],
        whole.replace(b'"steps": 4', b'"steps": 5'),
        b"[",
    ):
        manifest.write_bytes(damage)
        caplog.clear()
        assert found(tmp_path) == ("step_00000002", {"steps": 2})
        assert "skipping a damaged checkpoint" in caplog.text and str(manifest) in caplog.text


def test_all_damaged(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 2) / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(ArtifactError, match=r"is intact \(1 damaged\); remove them to start over$"):
        find_newest(tmp_path, IDENTITY)


def test_another_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, {"seed": 2, "model": IDENTITY["model"]})
    words = "was written by another run: seed differ; use another run.name"
    with pytest.raises(ArtifactError, match=words):
        find_newest(tmp_path, IDENTITY)


def test_inputs_may_be_moved_but_not_changed(tmp_path: Path) -> None:
    identity = {"segments": {"path": "/before", "sha256": "a"}}
    checkpoint(tmp_path, 2, identity)
    assert find_newest(tmp_path, {"segments": {"path": "/after", "sha256": "a"}}) is not None
    with pytest.raises(ArtifactError, match="was written by another run: segments differ"):
        find_newest(tmp_path, {"segments": {"path": "/before", "sha256": "b"}})


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_every_file_is_verified_by_one_rank_its_own_if_it_is_there(num_ranks: int) -> None:
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(8)]
    names += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(8)]
    owners = [owner_of_file(name, num_ranks) for name in names]
    assert owners == [rank % num_ranks for rank in range(8)] * 2
    assert owner_of_file("mp_rank_00_model_states.pt", num_ranks) == 0


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
