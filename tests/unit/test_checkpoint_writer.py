"""Writing a checkpoint while training goes on.

What is on disk at every moment, and what a failure leaves.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import Manifest, hashes_of, read_manifest, write_manifest
from longrope2.training import checkpoint, universal
from longrope2.training.checkpoint import CheckpointWriter, convert_before_ranks, find_newest, load
from longrope2.training.step import SkippedSteps
from longrope2.training.universal import ShardLayout, load_converted

IDENTITY = {"seed": 1}


class PlainEngine:
    """What the writer uses of DeepSpeed's engine, without ZeRO."""

    def __init__(self) -> None:
        self.weights = torch.zeros(4)
        self.mpu = None
        self.checkpoint_engine = SimpleNamespace()
        self.basic_optimizer = SimpleNamespace(state={}, param_groups=[{"step": 3}])
        self.loaded: list[str] = []

    def zero_optimization_stage(self) -> int:
        return 0

    def bfloat16_enabled(self) -> bool:
        return False

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        dist.barrier()
        for name in ("mp_rank_00_model_states.pt", "optimizer.pt"):
            self.checkpoint_engine.save(
                state_dict={name: self.weights}, path=str(Path(folder) / tag / name)
            )

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict]:
        self.loaded.append(tag)
        return folder, {}


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def make_writer(engine: PlainEngine, folder: Path, **settings: Any) -> CheckpointWriter:
    return CheckpointWriter(
        engine, folder, IDENTITY, **{"keep": 2, "in_background": True} | settings
    )


def newest(folder: Path) -> str:
    """The newest that is whole; another one may be written meanwhile."""
    for candidate in reversed(checkpoint._step_folders(folder)):
        manifest = checkpoint._read(candidate)
        if not isinstance(manifest, Manifest):
            continue
        if checkpoint._fault_of(candidate, manifest, list(manifest.files)) is None:
            return candidate.name
    raise AssertionError("none")


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("rendezvous"))


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = PlainEngine(), tmp_path / "run"
    writer = make_writer(engine, folder)
    writer.save(1, SkippedSteps())
    writer.finish()
    may_write = threading.Event()
    hashed = checkpoint.artifacts.sha256_of_file

    def slow_disk(path: Path) -> str:
        if path.parent.name.endswith(".writing"):  # reading the finished ones back does not wait
            assert may_write.wait(20)
        return hashed(path)

    monkeypatch.setattr(checkpoint.artifacts, "sha256_of_file", slow_disk)
    engine.weights.fill_(2.0)
    writer.save(2, SkippedSteps(total=1))
    time.sleep(0.2)
    engine.weights.fill_(3.0)  # the next step; what was saved must not change
    assert visible(folder) == [".step_00000002.writing", "latest", "step_00000001"]
    assert (
        newest(folder) == "step_00000001" and (folder / "latest").read_text() == "step_00000001\n"
    )
    may_write.set()
    writer.finish()
    assert (
        newest(folder) == "step_00000002" and (folder / "latest").read_text() == "step_00000002\n"
    )
    written = read_manifest(folder / "step_00000002", "training_state")
    assert 0.2 <= written.details["write_seconds"] < 20  # what a stop must leave time for
    saved = torch.load(folder / "step_00000002" / "mp_rank_00_model_states.pt")
    assert saved["mp_rank_00_model_states.pt"].tolist() == [2.0] * 4
    marks: list[tuple[str, bool]] = []

    def mark(phase: str, *, moves_bytes: bool = False) -> None:
        marks.append((phase, moves_bytes))

    found = find_newest(folder, IDENTITY, mark)
    assert found is not None and (found.steps, found.skipped) == (2, SkippedSteps(total=1))
    load(engine, found, mark)
    assert marks == [
        ("verifying checkpoints", True),
        ("telling the other ranks", False),
        ("telling the other ranks", False),
        ("verifying checkpoints", True),
        ("waiting for the other ranks", False),
        ("loading a checkpoint", True),
    ]


@pytest.mark.parametrize("in_background", [True, False])
def test_old_ones_go_and_a_damaged_one_is_written_again(
    tmp_path: Path, in_background: bool
) -> None:
    engine, folder = PlainEngine(), tmp_path / "run"
    writer = make_writer(engine, folder, in_background=in_background)
    for step in (1, 2, 3):
        writer.save(step, SkippedSteps())
    writer.finish()
    assert visible(folder) == ["latest", "step_00000002", "step_00000003"]
    (folder / "step_00000003" / "mp_rank_00_model_states.pt").write_bytes(b"damaged")
    assert newest(folder) == "step_00000002"
    writer.save(3, SkippedSteps())
    writer.finish()
    assert newest(folder) == "step_00000003"


def test_a_full_disk_ends_the_run_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder = PlainEngine(), tmp_path / "run"
    writer = make_writer(engine, folder)
    writer.save(1, SkippedSteps())
    writer.finish()

    def full(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint.artifacts, "atomic_path", full)
    writer.save(2, SkippedSteps())
    with pytest.raises(
        ArtifactError,
        match="could not be written: .*No space left on device.*the one before is intact",
    ):
        writer.finish()
    with pytest.raises(ArtifactError, match="the same command goes on from there"):
        writer.raise_if_failed()
    assert newest(folder) == "step_00000001"


def test_a_full_disk_without_a_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(PlainEngine(), tmp_path / "run", in_background=False)
    writer.save(1, SkippedSteps())

    def full(state: Any, path: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        ArtifactError, match="could not be written: .*file write failed.*the one before is intact"
    ):
        writer.save(2, SkippedSteps())
    assert newest(tmp_path / "run") == "step_00000001"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_one_does_not_displace_an_intact_one(tmp_path: Path, keep: int) -> None:
    """Resumed from step 1 because step 7 is damaged, the run saves at steps 2 and 3."""
    folder = tmp_path / "run"
    writer = make_writer(PlainEngine(), folder, keep=keep)
    for step in (1, 7):
        make_writer(PlainEngine(), folder, in_background=False).save(step, SkippedSteps())
    (folder / "step_00000007" / "mp_rank_00_model_states.pt").write_bytes(b"damaged")
    for step in (2, 3):
        writer.save(step, SkippedSteps())
        writer.finish()
        assert newest(folder) == f"step_{step:08d}"
    assert visible(folder) == ["latest", *["step_00000002", "step_00000003"][-keep:]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace(b'"steps": 2', b'"steps": 3'),
        lambda text: text.replace(b'"steps": 2', b'"steps": \xff'),
        lambda text: text.replace(b'"counts"', b'"cou\xeets"'),
    ],
)
def test_a_flipped_byte_in_the_newest_manifest(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "run"
    for step in (1, 2):
        make_writer(PlainEngine(), folder, in_background=False).save(step, SkippedSteps())
    manifest = folder / "step_00000002" / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(damage(before))
    assert manifest.read_bytes() != before and newest(folder) == "step_00000001"


def test_a_disk_that_cannot_read_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    for step in (1, 2):
        make_writer(PlainEngine(), folder, in_background=False).save(step, SkippedSteps())
    hashed = checkpoint.artifacts.sha256_of_file

    def unreadable(path: Path) -> str:
        if path.parent.name == "step_00000002":
            raise OSError(5, "Input/output error", str(path))
        return hashed(path)

    monkeypatch.setattr(checkpoint.artifacts, "sha256_of_file", unreadable)
    assert newest(folder) == "step_00000001"


def test_a_disk_that_returns_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer(PlainEngine(), tmp_path / "run")
    monkeypatch.setattr(checkpoint.artifacts, "sha256_of_file", lambda path: "0" * 64)
    writer.save(1, SkippedSteps())
    with pytest.raises(ArtifactError, match="states.pt reads back otherwise than it was written"):
        writer.finish()
    assert find_newest(tmp_path / "run", IDENTITY) is None


def test_what_a_killed_run_left_unfinished_is_removed(tmp_path: Path) -> None:
    engine, folder = PlainEngine(), tmp_path / "run"
    writer = make_writer(engine, folder)
    writer.save(1, SkippedSteps())
    writer.finish()
    (folder / ".step_00000002.writing").mkdir()
    (folder / ".step_00000002.writing" / "mp_rank_00_model_states.pt").write_bytes(b"half")
    found = find_newest(folder, IDENTITY)
    assert found is not None and found.steps == 1
    load(engine, found)
    assert engine.loaded == ["step_00000001"] and visible(folder) == ["latest", "step_00000001"]


def test_record_before_any_step_was_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed answers under ZeRO-3 when the guard has refused every step so far.

    The optimizer has no state.
    """
    import deepspeed.utils

    def no_state(parameter: torch.Tensor, name: str) -> torch.Tensor:
        raise KeyError(name)

    monkeypatch.setattr(deepspeed.utils, "safe_get_local_optimizer_state", no_state)
    monkeypatch.setattr(deepspeed.utils, "safe_get_local_fp32_param", lambda parameter: parameter)
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    module.weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    engine = SimpleNamespace(
        module=module,
        device="cpu",
        zero_optimization_stage=lambda: 3,
        basic_optimizer=SimpleNamespace(state={}, param_groups=[{}]),
    )
    assert universal.optimizer_record(engine) == {
        "step": None,
        "sums": {"weight": [25.0, 0.0, 0.0]},
    }


def test_which_layouts_load_directly() -> None:
    four = ShardLayout(4, 3, False)
    assert four.fits(ShardLayout(4, 3, False)) and not four.fits(ShardLayout(2, 3, False))
    assert not four.fits(ShardLayout(4, 2, False)) and not four.fits(ShardLayout(4, 3, True))
    assert ShardLayout(4, 0, False).fits(ShardLayout(2, 0, False))
    assert not ShardLayout(4, 0, True).fits(ShardLayout(2, 0, True))


@pytest.mark.parametrize(
    ("written_as", "stage", "words"),
    [
        (
            ShardLayout(4, 3, False),
            0,
            "ZeRO stage 3, which does not convert to stage 0: give parallel.zero_stage=3",
        ),
        (
            ShardLayout(4, 3, False),
            2,
            "ZeRO stage 3, which does not convert to stage 2: give parallel.zero_stage=3",
        ),
        (
            ShardLayout(4, 0, True),
            0,
            "in bf16, which does not convert to stage 0: give parallel.zero_stage=0 and as many",
        ),
    ],
)
def test_layouts_that_are_not_converted(
    tmp_path: Path, monkeypatch, written_as, stage, words
) -> None:
    engine = PlainEngine()
    monkeypatch.setattr(engine, "zero_optimization_stage", lambda: stage)
    with pytest.raises(ArtifactError) as refused:
        load_converted(engine, tmp_path / "step_00000004", written_as, {})
    assert "step_00000004 was written by 4 ranks at ZeRO stage" in str(
        refused.value
    ) and words in str(refused.value)


def test_a_conversion_that_fails_or_loses_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PlainEngine()
    monkeypatch.setattr(engine, "zero_optimization_stage", lambda: 3)
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nFileNotFoundError: no files\n")
    monkeypatch.setattr(universal.subprocess, "run", lambda *command, **settings: failed)
    written = tmp_path / "step_00000004"
    write_manifest(written, Manifest("training_state", commit="of no use"))
    with pytest.raises(ArtifactError, match="could not be converted: FileNotFoundError: no files"):
        load_converted(engine, written, ShardLayout(4, 3, False), {})
    saved = {"step": 7, "sums": {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.0]}}
    loaded = {"step": 1, "sums": {"a": [1.0, 0.0, 3.0], "b": [1.0, 2.0, 3.0 + 1e-6]}}
    with pytest.raises(ArtifactError) as lost:
        universal._compare(tmp_path, saved, loaded)
    assert (
        "lost something in the conversion: step 1 instead of 7, exp_avg of a, exp_avg_sq of b; "
        "go on" in str(lost.value)
    )


def test_a_converted_copy_is_made_once_and_anew_when_its_source_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the ranks start: what is not a whole checkpoint of another layout is left alone."""
    made: list[str] = []

    def converter(words: list[str], **settings: Any) -> SimpleNamespace:
        folder = Path(words[words.index("--output_folder") + 1])
        folder.mkdir()
        made.append(folder.name)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(universal.subprocess, "run", converter)
    written, shards = tmp_path / "step_00000004", {"world_size": 4, "zero_stage": 3, "bf16": True}
    manifest = Manifest("training_state", inputs=IDENTITY, counts={"steps": 4}, commit="one")
    manifest.details = {"shards": shards, "optimizer": {}}
    written.mkdir()
    for rank in range(4):
        (written / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        (written / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    manifest.files = hashes_of(written)
    write_manifest(written, manifest)

    def prepare(world_size: int, zero_stage: int = 3) -> int:
        kept = {"world_size": world_size, "zero_stage": zero_stage}
        convert_before_ranks(tmp_path, IDENTITY, **kept)
        return len(made)

    assert prepare(4) == 0 and prepare(2, zero_stage=1) == 0
    assert prepare(2) == 1 and prepare(2) == 1
    words = "step_00000004 was written by 4 ranks at ZeRO stage 3; converting it for 2 ranks at"
    assert words in capsys.readouterr().out
    assert visible(tmp_path) == ["converted_step_00000004", "step_00000004"]
    manifest.commit = "two"
    write_manifest(written, manifest)
    assert prepare(2) == 2
    with pytest.raises(ArtifactError, match="was written by another run: seed differ"):
        convert_before_ranks(tmp_path, {"seed": 2}, world_size=2, zero_stage=3)
    manifest.files = {**manifest.files, "absent.pt": "0"}
    write_manifest(written, manifest)
    assert prepare(2) == 2, "a damaged one is for the ranks, which take the one before"
    write_manifest(
        tmp_path / "step_00000006", Manifest("training_state", counts={"steps": 6}, commit="x")
    )
    assert prepare(2) == 2 and "converted_step_00000004" not in visible(tmp_path)
