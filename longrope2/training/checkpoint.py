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
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrope2.errors import ArtifactError
from longrope2.files import artifacts
from longrope2.files.artifacts import Manifest
from longrope2.parallel.processes import done_by_main
from longrope2.training.step import SkippedSteps
from longrope2.training.universal import ShardLayout, load_converted, optimizer_record

_LATEST_FILE = "latest"
_STEP_KIND = "training_state"
_POLL_SECONDS = 0.05
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
            raise ArtifactError(
                f"a checkpoint in {self._folder} could not be written: {self._failure}; the one "
                "before is intact. Free space or repair the disk; the same command goes on from "
                "there"
            ) from self._failure

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


def load_newest(
    engine: Any,
    folder: Path,
    identity: dict[str, Any],
    mark: Callable[..., None] = lambda phase, moves_bytes=False: None,
) -> tuple[int, SkippedSteps]:
    """Load the newest undamaged checkpoint; a damaged one is skipped with a warning.

    One that another number of ranks wrote is converted first. ``mark`` is told what the rank does
    (``Heartbeat.mark``): all of it may take long, and moves bytes meanwhile.

    Returns:
        Finished optimizer steps, and how many of them were skipped; zeros when there is no
        checkpoint.

    Raises:
        ArtifactError: there are checkpoints and all are damaged, they belong to another run, or the
            newest cannot be converted.
    """
    mark("verifying checkpoints", moves_bytes=True)
    found = done_by_main(partial(_clean_and_verify, folder, identity), mark)
    if isinstance(found, ArtifactError):
        raise found
    if found is None:
        return 0, SkippedSteps()
    tag, manifest = found
    counts, written_as = manifest.counts, manifest.details.get("shards")
    skipped = SkippedSteps(counts.get("skipped_steps", 0), counts.get("skipped_in_a_row", 0))
    if written_as and not ShardLayout(**written_as).fits(ShardLayout.of(engine)):
        optimizer = manifest.details["optimizer"]
        load_converted(engine, folder / tag, ShardLayout(**written_as), optimizer, mark)
        return counts["steps"], skipped
    mark("loading a checkpoint", moves_bytes=True)
    if engine.load_checkpoint(str(folder), tag=tag)[0] is None:
        text = f"DeepSpeed could not load {folder / tag}"
        raise ArtifactError(f"{text}; remove it to go on from the one before")
    return counts["steps"], skipped


def _clean_and_verify(
    folder: Path, identity: dict[str, Any]
) -> tuple[str, Manifest] | ArtifactError | None:
    """As ``_newest_intact``, when what a killed run left unfinished is gone."""
    for unfinished in folder.glob(".step_*"):
        shutil.rmtree(unfinished)
    return _newest_intact(folder, identity)


def _newest_intact(
    folder: Path, identity: dict[str, Any]
) -> tuple[str, Manifest] | ArtifactError | None:
    """Name and manifest of the newest intact checkpoint; an error is returned to be raised."""
    candidates = _step_folders(folder)
    if not candidates:
        return None
    for candidate in reversed(candidates):
        try:
            manifest = artifacts.read_manifest(candidate, _STEP_KIND)
            _verify(candidate, manifest)
        except (ArtifactError, OSError) as error:  # OSError: a disk that cannot read what it holds
            _log.warning("skipping a damaged checkpoint: %s", error)
            continue
        inputs = manifest.inputs
        changed = [k for k in identity if _content(inputs.get(k)) != _content(identity[k])]
        if changed:
            return ArtifactError(
                f"{candidate} was written by another run: {', '.join(changed)} differ; "
                "use another run.name (run.from_run lets it take this run's segments and factors), "
                "or remove the checkpoints to start over"
            )
        return candidate.name, manifest
    text = f"no checkpoint in {folder} is intact ({len(candidates)} damaged)"
    return ArtifactError(f"{text}; remove them to start over")


def _verify(folder: Path, manifest: Manifest) -> None:
    """Compare files with their hashes, and the cursor, which no hash covers, with the name."""
    steps = manifest.counts.get("steps")
    if not isinstance(steps, int) or folder.name != _tag(steps):
        text = f"{folder / artifacts.MANIFEST_NAME} says counts.steps={steps}"
        raise ArtifactError(f"{text}, its folder another number")
    paths = [folder / name for name in manifest.files]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ArtifactError(f"{missing[0]} is missing")
    # Hashing leaves Python's lock: 100 GB of an 8B model should not take minutes.
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(artifacts.sha256_of_file, paths))
    for path, found, expected in zip(paths, hashes, manifest.files.values(), strict=True):
        if found != expected:
            raise ArtifactError(f"{path} does not match its SHA-256")


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
