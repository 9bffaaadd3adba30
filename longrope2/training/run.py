"""A training run from configuration to final checkpoint, as every rank executes it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch.distributed as dist

from longrope2.config import to_plain
from longrope2.errors import ArtifactError
from longrope2.files.artifacts import Manifest, product_folder, write_manifest
from longrope2.files.lease import only_writer
from longrope2.model.folder import model_source
from longrope2.parallel.flight_record import keep_flight_record
from longrope2.parallel.processes import (
    Processes,
    join_processes,
    leave_processes,
    world_size_from_environment,
)
from longrope2.segments.format import SegmentStore
from longrope2.training.batch import RankBatch, load_rank_batch, step_batches
from longrope2.training.checkpoint import CheckpointWriter, find_newest, load, refuse_open_folder
from longrope2.training.config import TrainRoot
from longrope2.training.engine import make_engine
from longrope2.training.final import save_final
from longrope2.training.heartbeat import FOLDER as HEARTBEATS
from longrope2.training.heartbeat import Heartbeat, StopSignals
from longrope2.training.heldout import HeldoutLoss
from longrope2.training.observer import TrainingObserver
from longrope2.training.optimizer import learning_rate
from longrope2.training.plan import ResolvedRun, resolve_run
from longrope2.training.selftest import check_parity
from longrope2.training.step import SkippedSteps, StepAbandoned, StepGuard, run_step


class RunEnd(Enum):
    """How a training command ended without an error."""

    complete = "complete"
    """All steps are done and ``final/`` written."""
    stopped = "stopped"
    """``training.stop_after_step`` was reached."""
    interrupted = "interrupted"
    """A stop signal came; all is saved and the same command goes on (``REQUEUE_EXIT_CODE``)."""


def train(config: TrainRoot) -> RunEnd:
    """Train from the newest intact checkpoint to the last step or ``stop_after_step`` or a signal.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: segments, model, factors or checkpoints that are missing or belong to
            something else; or another process trains this run.
        UserError: ``training.max_skipped_steps`` steps in a row could not be applied.
    """
    keep_flight_record(product_folder(config.run.folder, "checkpoints") / HEARTBEATS)
    alone = world_size_from_environment() is None
    with StopSignals(says_so=alone) as signals:
        processes = join_processes(config.parallel)
        failed = True
        try:
            run = resolve_run(config, processes.dims.world_size, processes.device)
            run.refuse_what_is_missing()
            rank, timeout_s = processes.dims.rank, config.training.hang_timeout_s
            beats = {"rank": rank, "world_size": run.world_size, "timeout_s": timeout_s}
            with _lease(run, processes), Heartbeat(run.folder, **beats) as heartbeat:
                end = _train(run, processes, signals, heartbeat)
            failed = False
            return end
        finally:
            leave_processes(failed=failed)


@contextmanager
def _lease(run: ResolvedRun, processes: Processes) -> Iterator[None]:
    """The main rank holds the run for all; where another process does, all ranks say so."""
    refused: list[ArtifactError | None] = [None]
    with ExitStack() as held:
        if processes.is_main:
            try:
                held.enter_context(only_writer(run.config.run.folder, run.folder.name))
            except ArtifactError as error:
                refused = [error]
        dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
        yield


@dataclass(frozen=True)
class _Rank:
    """What the parts of one rank's training share."""

    run: ResolvedRun
    processes: Processes
    guard: StepGuard
    writer: CheckpointWriter
    heartbeat: Heartbeat
    observer: TrainingObserver | None
    """On the main rank."""
    heldout: HeldoutLoss | None
    """Where the loss on held-out text is measured."""


def _train(
    run: ResolvedRun, processes: Processes, signals: StopSignals, heartbeat: Heartbeat
) -> RunEnd:
    training = run.config.training
    if training.selftest:
        heartbeat.mark("self-test")
        check_parity(run, processes)
    identity = run.identity()
    if not training.trust_folder and run.folder.is_dir():
        refuse_open_folder(run.folder)
    found = find_newest(run.folder, identity, heartbeat.mark)
    heartbeat.mark("loading the model", moves_bytes=True)
    engine = make_engine(run, processes, values=found is None)
    first, skipped = 0, SkippedSteps()
    if found is not None:
        load(engine, found, heartbeat.mark)
        first, skipped = found.steps, found.skipped
    keep, in_background = training.keep_checkpoints, training.async_checkpoints
    writer = CheckpointWriter(engine, run.folder, identity, keep=keep, in_background=in_background)
    guard = StepGuard(engine, training.skip_grad_norm, clip=training.gradient_clip, skipped=skipped)
    last = min(run.total_steps, training.stop_after_step or run.total_steps)
    with TrainingObserver(run, first) if processes.is_main else nullcontext() as observer:
        rank = _Rank(
            run,
            processes=processes,
            guard=guard,
            writer=writer,
            heartbeat=heartbeat,
            observer=observer,
            heldout=HeldoutLoss(run) if training.heldout_every else None,
        )
        done = _train_steps(rank, first, last, signals)
        if done == run.total_steps:
            _finish(rank, identity)
    if done < last:
        if processes.is_main:
            name = signals.received.name if signals.received else "a stop signal to another rank"
            text = f"stopped by {name} after step {done}, all of it saved"
            print(f"{text}; the same command goes on from there", flush=True)
        return RunEnd.interrupted
    return RunEnd.complete if done == run.total_steps else RunEnd.stopped


def _train_steps(rank: _Rank, first: int, last: int, signals: StopSignals) -> int:
    """Train from ``first`` finished steps to ``last`` or a stop signal; returns those saved."""
    training, device = rank.run.config.training, rank.processes.device
    stop_asked = partial(signals.any_rank_asked, device)
    skipped, writer, mark = rank.guard.skipped, rank.writer, rank.heartbeat.mark
    load, ahead = _batch_loader(rank), training.prefetch_steps
    batches = step_batches(load, range(first, last), ahead=ahead, device=device)
    done = saved = first
    if first == 0 and (heldout := _heldout_losses(rank, 0)) and rank.observer is not None:
        rank.observer.record_before(heldout)
    with closing(batches):
        while done < last and not stop_asked():
            mark("reading segments", done + 1)
            try:
                report = run_step(
                    rank.guard,
                    next(batches),
                    rank.processes.dims,
                    learning_rate=learning_rate(done, rank.run.total_steps, training),
                    step=done + 1,
                    mark=mark,
                    stop_asked=stop_asked,
                )
            except StepAbandoned:
                break
            done += 1
            heldout = _heldout_losses(rank, done)
            if rank.observer is not None:
                rank.observer.record(report, heldout)
            skipped.stop_if_too_many(
                training.max_skipped_steps, step=done, loss=report.loss, norm=report.gradient_norm
            )
            if done % training.checkpoint_steps == 0 or done == last:
                mark("writing a checkpoint", moves_bytes=True)
                writer.save(done, skipped)
                saved = done
            writer.raise_if_failed()
    mark("writing the last checkpoint", moves_bytes=True)
    if saved < done:
        writer.save(done, skipped)
    writer.finish()
    return done


def _heldout_losses(rank: _Rank, done: int) -> dict[str, float]:
    """Held-out losses where they are due after ``done`` steps; every rank calls this."""
    every, total_steps = rank.run.config.training.heldout_every, rank.run.total_steps
    if rank.heldout is None or not every or (done % every and done != total_steps):
        return {}
    return rank.heldout.losses(rank.guard.engine, rank.processes, rank.heartbeat.mark)


def _batch_loader(rank: _Rank) -> Callable[[int], list[RankBatch]]:
    """A function from an optimizer step to this rank's micro-steps of it."""
    run, processes = rank.run, rank.processes
    store = SegmentStore(run.segments_folder)
    mixed, kernel = run.config.training.mixed, run.machine.attention.kernel

    def load(step: int) -> list[RankBatch]:
        return [
            load_rank_batch(
                store,
                micro,
                processes.dims,
                processes.sequence_group,
                context_group=processes.context_group,
                mixed=mixed,
                kernel=kernel,
            )
            for micro in run.schedule.micro_steps(step, processes.dims.data)
        ]

    return load


def _finish(rank: _Rank, identity: dict[str, Any]) -> None:
    """Write ``final/`` and, last, the manifest that marks the product as complete."""
    rank.heartbeat.mark("writing final/", moves_bytes=True)
    run, config, steps = rank.run, rank.run.config, rank.run.total_steps
    counts = {"steps": steps, "tokens": steps * config.training.global_batch_tokens}
    counts["skipped_steps"] = rank.guard.skipped.total
    manifest = Manifest(
        "checkpoint",
        inputs=identity,
        config=to_plain(config),
        seeds={"seed": config.seed},
        counts=counts,
        details={**run.machine.kernels(), **model_source(config.model, run.model_folder)},
    )
    written = (run.folder, run.model_folder, run.factors)
    save_final(rank.guard.engine, *written, manifest, dtype=run.machine.final_dtype)
    if rank.processes.is_main:
        manifest.kind = "checkpoints"
        manifest.files = {}
        write_manifest(run.folder, manifest)
    if rank.observer is not None:
        rank.observer.finished()
