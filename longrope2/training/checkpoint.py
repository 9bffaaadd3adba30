"""Checkpoints that can be trusted: hashed when written, verified when read, ``latest`` moved last.

``step_00000120/`` holds DeepSpeed's files and a manifest with their SHA-256 and the cursor: the
number of finished optimizer steps, of which all else is a pure function, save for the count of
skipped steps beside it. It is written as ``.step_00000120.writing`` and renamed when complete:
whatever ends the run in between, the one before is used. Another number of ranks takes the way of
``universal.py``; ``final.py`` writes the result of a run.

DeepSpeed's own ``save_checkpoint`` runs as ever, and only its last act is replaced: the state is
serialised into memory, which fixes it, and a thread writes the bytes while training goes on. The
engines of DeepSpeed 0.19.8 that write beside the training are not used: one hands live tensors to
another process, must be done before the next update and neither hashes nor fsyncs; the other
(DataStates) needs a package that is not on the Python index.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrope2.errors import ArtifactError
from longrope2.files import artifacts
from longrope2.files.artifacts import Manifest
from longrope2.parallel.processes import done_by_each, done_by_main
from longrope2.training.step import SkippedSteps
from longrope2.training.universal import (
    Mark,
    ShardLayout,
    convert,
    forget_converted_but,
    load_converted,
    no_mark,
    optimizer_record,
)

_LATEST_FILE = "latest"
_STEP_KIND = "training_state"
_POLL_SECONDS = 0.05
_MODEL_STATES, _OPTIMIZER_STATES = "model_states.pt", "optim_states.pt"
_RANK_IN_NAME = re.compile(r"pp_rank_(\d+)_")  # DeepSpeed's names of a rank's own files
_log = logging.getLogger(__name__)


class _RankFiles:
    """The files that one rank contributes to the checkpoint in ``folder``."""

    def __init__(self, folder: Path, rank: int, *, in_memory: bool) -> None:
        """``in_memory`` keeps their bytes until ``write``, else they are written at once."""
        self._folder, self._rank, self._in_memory = folder, rank, in_memory
        self._waiting: dict[Path, io.BytesIO] = {}
        self._hashes: dict[str, str] = {}

    @contextlib.contextmanager
    def taken_from(self, engine: Any) -> Iterator[None]:
        """While open, the engine's checkpoint files come here.

        The engine is without its sequence-parallel groups meanwhile: it would note their size as a
        tensor-parallel one, and stages 1 and 2 could not be converted.
        """
        saver, mpu = engine.checkpoint_engine, engine.mpu
        saver.save, engine.mpu = self._take, None  # the former hides the method of its class
        try:
            yield
        finally:
            del saver.save
            engine.mpu = mpu

    def write(self) -> None:
        """Write what waits in memory, read it back, and list all hashes for rank 0."""
        for path, buffer in self._waiting.items():
            data = buffer.getbuffer()
            with artifacts.atomic_path(path) as temporary, temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            digest = artifacts.sha256_of_bytes(data)
            if artifacts.sha256_of_file(path) != digest:
                raise OSError(f"{path} reads back otherwise than it was written")
            self._hashes[path.name] = digest
            del data
            buffer.close()
        self._waiting.clear()
        artifacts.write_text(_list_of(self._folder, self._rank), json.dumps(self._hashes))

    def remove(self) -> None:
        """Give back the space of what was written; of all ranks' when nothing else is left."""
        with contextlib.suppress(OSError):
            for name in self._hashes:
                (self._folder / name).unlink(missing_ok=True)
            self._folder.rmdir()

    def _take(self, state_dict: Any, path: str) -> None:
        """In place of the engine's ``save``."""
        file = Path(path)
        if self._in_memory:
            self._waiting[file] = buffer = io.BytesIO()
            torch.save(state_dict, buffer)
            return
        with artifacts.atomic_path(file) as temporary:
            try:
                torch.save(state_dict, temporary)
            except RuntimeError as error:  # torch's word for a disk that takes no more
                raise OSError(f"{path}: {error}") from error
        self._hashes[file.name] = artifacts.sha256_of_file(file)


def _collect_hashes(folder: Path, num_ranks: int) -> dict[str, str]:
    """Wait until every rank has written its files into ``folder``; file name -> SHA-256.

    Ranks tell each other by files, not by collectives: those belong to the training thread. A rank
    that failed leaves no list; it ends the run itself.
    """
    hashes: dict[str, str] = {}
    for rank in range(num_ranks):
        path = _list_of(folder, rank)
        while not path.is_file():
            time.sleep(_POLL_SECONDS)
        hashes |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return dict(sorted(hashes.items()))


def _list_of(folder: Path, rank: int) -> Path:
    """Where a rank lists its hashes until they are in the manifest."""
    return folder / f"rank_{rank:05d}.json"


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank has one and calls it at the same steps."""

    def __init__(
        self, engine: Any, folder: Path, identity: dict[str, Any], *, keep: int, in_background: bool
    ) -> None:
        """Prepare to write into ``3_checkpoints``, of which the newest ``keep`` stay.

        Every manifest holds ``identity``, compared on resume. ``in_background`` lets training go on
        meanwhile and costs host memory for a rank's share.
        """
        self._engine, self._folder, self._identity = engine, folder, identity
        self._keep, self._in_background = keep, in_background
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(self, steps_done: int, skipped: SkippedSteps) -> None:
        """Begin to write ``step_<n>``.

        With ``in_background`` it is complete only after the next ``save`` or ``finish``.

        Raises:
            ArtifactError: a file of this or the checkpoint before could not be written.
        """
        self._join()
        began = time.monotonic()
        tag, is_main = _tag(steps_done), dist.get_rank() == 0
        working = self._folder / f".{tag}.writing"
        files = _RankFiles(working, dist.get_rank(), in_memory=self._in_background)
        try:
            if is_main:
                shutil.rmtree(working, ignore_errors=True)
                working.mkdir(parents=True)
            with files.taken_from(self._engine):
                # It begins with a barrier: the folder is there.
                self._engine.save_checkpoint(str(self._folder), tag=working.name, save_latest=False)
        except OSError as error:
            files.remove()
            self._failure = error
            self.raise_if_failed()
        details = {"shards": asdict(ShardLayout.of(self._engine))}
        details["optimizer"] = optimizer_record(self._engine)
        manifest = None
        if is_main:  # the others need none, and it asks git for the commit
            counts = {"steps": steps_done, "skipped_steps": skipped.total}
            counts["skipped_in_a_row"] = skipped.in_a_row
            manifest = Manifest(_STEP_KIND, inputs=self._identity, counts=counts, details=details)
        given, name = (files, working, tag, manifest, began), "checkpoint-writer"
        self._thread = threading.Thread(target=self._write, args=given, name=name, daemon=True)
        self._thread.start()
        if not self._in_background:
            self.finish()

    def raise_if_failed(self) -> None:
        """End the run soon after its checkpoint could not be written.

        Raises:
            ArtifactError: what failed.
        """
        if self._failure is not None:
            way_on = "there is none before it, and the same command begins again"
            if _step_folders(self._folder):
                way_on = "the one before is intact, and the same command goes on from there"
            way_on = f"free space or repair the disk: {way_on}"
            fault = f"a checkpoint in {self._folder} could not be written: {self._failure}"
            raise ArtifactError(f"{fault}; {way_on}") from self._failure

    def finish(self) -> None:
        """Wait until the checkpoint is complete on all ranks.

        Raises:
            ArtifactError: it could not be written.
        """
        self._join()
        dist.barrier()

    def _join(self) -> None:
        """Wait for this rank's part (on rank 0: for the whole)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_if_failed()

    def _write(
        self, files: _RankFiles, working: Path, tag: str, manifest: Manifest | None, began: float
    ) -> None:
        """The thread: this rank's files; on rank 0 then everything that makes them a checkpoint."""
        try:
            files.write()
            if manifest is not None:
                manifest.files = _collect_hashes(working, dist.get_world_size())
                # What a stop signal must leave time for (launch/cluster/attempts.py).
                manifest.details["write_seconds"] = round(time.monotonic() - began, 1)
                self._publish(working, tag, manifest)
        except Exception as error:  # told to the training thread
            files.remove()
            self._failure = error

    def _publish(self, working: Path, tag: str, manifest: Manifest) -> None:
        """Manifest, final name, ``latest``, and only then old checkpoints go."""
        artifacts.write_manifest(working, manifest)
        if (self._folder / tag).exists():  # a damaged one, from before the run was resumed
            shutil.rmtree(self._folder / tag)
        working.rename(self._folder / tag)
        artifacts.fsync_folder(self._folder)
        artifacts.write_text(self._folder / _LATEST_FILE, tag + "\n")
        # A newer one was found damaged when the run was resumed: it must not take the place of an
        # intact one.
        intact = [path for path in _step_folders(self._folder) if path.name <= tag]
        for path in set(_step_folders(self._folder)) - set(intact[-self._keep :]):
            shutil.rmtree(path)


@dataclass(frozen=True)
class Found:
    """A checkpoint that is intact and of this run."""

    folder: Path
    manifest: Manifest

    @property
    def steps(self) -> int:
        """Finished optimizer steps."""
        return self.manifest.counts["steps"]

    @property
    def skipped(self) -> SkippedSteps:
        """How many of them were skipped."""
        counts = self.manifest.counts
        return SkippedSteps(counts.get("skipped_steps", 0), counts.get("skipped_in_a_row", 0))

    @property
    def written_as(self) -> ShardLayout | None:
        """How it is cut into files, where that is known."""
        shards = self.manifest.details.get("shards")
        return ShardLayout(**shards) if shards else None


def find_newest(folder: Path, identity: dict[str, Any], mark: Mark = no_mark) -> Found | None:
    """The newest undamaged checkpoint, or None without any; every rank calls this.

    A damaged one is skipped with a warning. Every rank compares the files of its own shard with
    their hashes: together they read a checkpoint once.

    Raises:
        ArtifactError: there are checkpoints and all are damaged, or they belong to another run.
    """
    mark("verifying checkpoints", moves_bytes=True)
    candidates = done_by_main(partial(_candidates, folder), mark)
    for candidate in reversed(candidates):
        manifest = done_by_main(partial(_read, candidate), mark)
        if isinstance(manifest, Manifest):
            mark("verifying checkpoints", moves_bytes=True)
            faults = done_by_each(partial(_fault_of_own_shard, candidate, manifest), mark)
            manifest = next((fault for fault in faults if fault is not None), manifest)
        if isinstance(manifest, Manifest):
            _refuse_another_run(candidate, manifest, identity)
            return Found(candidate, manifest)
        if dist.get_rank() == 0:
            _log.warning("skipping a damaged checkpoint: %s", manifest)
    if not candidates:
        return None
    text = f"no checkpoint in {folder} is intact ({len(candidates)} damaged)"
    raise ArtifactError(f"{text}; remove them to start over")


def refuse_open_folder(folder: Path) -> None:
    """Let nobody else say what this process runs: training states are pickles.

    Args:
        folder: ``3_checkpoints``.

    Raises:
        ArtifactError: every user of the machine may write to it, to a checkpoint or to a state.
    """
    inside = [path for step in _step_folders(folder) for path in (step, *step.glob("*"))]
    for path in (folder, *inside):
        if path.stat().st_mode & stat.S_IWOTH:
            raise ArtifactError(
                f"{path} may be written by every user of this machine, and training states are "
                f"pickles, which run what they say when they are loaded: chmod -R o-w {folder}, or "
                "set training.trust_folder=true where only you can reach it"
            )


def load(engine: Any, found: Found, mark: Mark = no_mark) -> None:
    """Load a checkpoint into an engine; every rank calls this, after ``find_newest``.

    One that another number of ranks wrote is converted first, unless that was done before they
    started (``convert_before_ranks``). ``mark`` is told what the rank does (``Heartbeat.mark``): it
    may take long, and moves bytes meanwhile.

    Raises:
        ArtifactError: it cannot be loaded or converted.
    """
    folder, written_as = found.folder, found.written_as
    if written_as and not written_as.fits(ShardLayout.of(engine)):
        load_converted(engine, folder, written_as, found.manifest.details["optimizer"], mark)
        return
    mark("loading a checkpoint", moves_bytes=True)
    if engine.load_checkpoint(str(folder.parent), tag=folder.name)[0] is None:
        text = f"DeepSpeed could not load {folder}"
        raise ArtifactError(f"{text}; remove it to go on from the one before")


def convert_before_ranks(
    folder: Path, identity: dict[str, Any], *, world_size: int, zero_stage: int
) -> None:
    """Convert the newest checkpoint where another number of ranks wrote it; one process calls this.

    Nobody waits for it then: ranks hold GPUs, and their collectives have a time limit. What is not
    as expected here (damage, another run, formats that do not convert) is left to the ranks, which
    look themselves.

    Raises:
        ArtifactError: the conversion failed.
    """
    candidates = _candidates(folder)
    if not candidates:
        return
    newest = candidates[-1]
    manifest = _read(newest)
    if not isinstance(manifest, Manifest) or not (written_as := Found(newest, manifest).written_as):
        return
    # The number format shows on the ranks' devices only; it cannot change with their number.
    wanted = ShardLayout(world_size, zero_stage, written_as.bf16)
    if written_as.fits(wanted) or not written_as.converts_to(wanted):
        return
    _refuse_another_run(newest, manifest, identity)
    if _fault_of(newest, manifest, list(manifest.files)) is None:
        convert(newest, written_as, wanted)


def _candidates(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, when what a killed run left unfinished is gone."""
    folders = _step_folders(folder)
    for unfinished in folder.glob(".step_*"):
        shutil.rmtree(unfinished)
    if folders:
        forget_converted_but(folders[-1])
    return folders


def _read(candidate: Path) -> Manifest | str:
    """The manifest, or what is wrong with it."""
    try:
        manifest = artifacts.read_manifest(candidate, _STEP_KIND)
    except (ArtifactError, OSError) as error:  # OSError: a disk that cannot read what it holds
        return str(error)
    steps = manifest.counts.get("steps")  # the cursor, which no hash covers
    if not isinstance(steps, int) or candidate.name != _tag(steps):
        text = f"{candidate / artifacts.MANIFEST_NAME} says counts.steps={steps}"
        return f"{text}, its folder another number"
    return _fault_of_file_set(candidate, manifest) or manifest


def _fault_of_file_set(candidate: Path, manifest: Manifest) -> str | None:
    """Whether the manifest lists a state of every rank, and the folder holds no other one.

    DeepSpeed loads what it finds there, and executes it: states are pickles.
    """
    listed, written_as = manifest.files, Found(candidate, manifest).written_as
    where = candidate / artifacts.MANIFEST_NAME
    if not any(name.endswith(_MODEL_STATES) for name in listed):
        return f"{where} lists no *{_MODEL_STATES}"
    ranks = range(written_as.world_size if written_as and written_as.zero_stage else 0)
    for rank in ranks:
        if not any(f"pp_rank_{rank}_" in n and n.endswith(_OPTIMIZER_STATES) for n in listed):
            return f"{where} lists no *{_OPTIMIZER_STATES} of rank {rank}"
    strange = sorted(path.name for path in candidate.glob("*.pt") if path.name not in listed)
    return f"{candidate / strange[0]} is not listed in {where}" if strange else None


def _fault_of_own_shard(candidate: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files that are this rank's to verify."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = [name for name in manifest.files if owner_of_file(name, world_size) == rank]
    return _fault_of(candidate, manifest, own)


def owner_of_file(name: str, world_size: int) -> int:
    """The rank that verifies a file: the one that reads it, when as many ranks wrote it."""
    numbered = _RANK_IN_NAME.search(name)
    return int(numbered[1]) % world_size if numbered else 0


def _fault_of(candidate: Path, manifest: Manifest, names: list[str]) -> str | None:
    """Compare files with their hashes; what is wrong with the first that differs."""
    paths = [candidate / name for name in names]
    if missing := next((path for path in paths if not path.is_file()), None):
        return f"{missing} is missing"
    try:
        # Hashing leaves Python's lock: 100 GB of an 8B model should not take minutes.
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(artifacts.sha256_of_file, paths))
    except OSError as error:
        return str(error)
    wrong = (p for p, found in zip(paths, hashes, strict=True) if found != manifest.files[p.name])
    return next((f"{path} does not match its SHA-256" for path in wrong), None)


def _refuse_another_run(candidate: Path, manifest: Manifest, identity: dict[str, Any]) -> None:
    """A checkpoint of other segments, factors or settings is not to be gone on with."""
    inputs = manifest.inputs
    changed = [k for k in identity if _content(inputs.get(k)) != _content(identity[k])]
    if changed:
        raise ArtifactError(
            f"{candidate} was written by another run: {', '.join(changed)} differ; "
            "use another run.name (run.from_run lets it take this run's segments and factors), "
            "or remove the checkpoints to start over"
        )


def _content(described: Any) -> Any:
    """What identifies an input: not where it stands, if its hash is known."""
    if isinstance(described, dict) and "sha256" in described:
        return {key: value for key, value in described.items() if key != "path"}
    return described


def _tag(steps_done: int) -> str:
    return f"step_{steps_done:08d}"


def _step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())
