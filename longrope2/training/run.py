"""A training run from configuration to final checkpoint, as every rank executes it."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from longrope2.config import to_plain
from longrope2.files.artifacts import Manifest, product_folder, write_manifest
from longrope2.parallel.processes import Processes, join_processes, leave_processes
from longrope2.segments.format import SegmentStore
from longrope2.training.batch import RankBatch, load_rank_batch, step_batches
from longrope2.training.checkpoint import CheckpointWriter, load_newest
from longrope2.training.config import TrainRoot, final_dtype
from longrope2.training.engine import make_engine
from longrope2.training.final import save_final
from longrope2.training.heartbeat import Heartbeat, StopSignals
from longrope2.training.observer import TrainingObserver
from longrope2.training.optimizer import learning_rate
from longrope2.training.plan import (
    MachineKernels,
    TrainingPlan,
    check_machine,
    make_plan,
    run_identity,
)
from longrope2.training.selftest import check_parity
from longrope2.training.step import SkippedSteps, StepGuard, run_step


class RunEnd(Enum):
    """How a training command ended without an error."""

    complete = "complete"
    """The plan is done and ``final/`` written."""
    stopped = "stopped"
    """``training.stop_after_step`` was reached."""
    interrupted = "interrupted"
    """A stop signal came; everything is saved and the same command goes on
    (``REQUEUE_EXIT_CODE``)."""


def train(config: TrainRoot) -> RunEnd:
    """Train to the end of the plan, to ``stop_after_step`` or to a stop signal, from the newest
    intact checkpoint on.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: segments, model, factors or checkpoints that are missing or belong to
            something else.
        UserError: ``training.max_skipped_steps`` steps in a row could not be applied.
    """
    with StopSignals() as signals:
        processes = join_processes(config.parallel)
        failed = True
        try:
            plan = make_plan(config, processes.dims.world_size)
            heartbeat = Heartbeat(
                product_folder(config.run.folder, "checkpoints"),
                rank=processes.dims.rank,
                world_size=processes.dims.world_size,
                timeout_s=config.training.hang_timeout_s,
            )
            with heartbeat:
                end = _train(config, plan, processes, signals, heartbeat)
            failed = False
            return end
        finally:
            leave_processes(failed=failed)


@dataclass
class _Run:
    """What the parts of one rank's run share."""

    config: TrainRoot
    plan: TrainingPlan
    processes: Processes
    kernels: MachineKernels
    engine: Any
    folder: Path
    identity: dict[str, Any]
    skipped: SkippedSteps
    writer: CheckpointWriter
    heartbeat: Heartbeat
    observer: TrainingObserver | None = None
    """On the main rank."""


def _train(
    config: TrainRoot,
    plan: TrainingPlan,
    processes: Processes,
    signals: StopSignals,
    heartbeat: Heartbeat,
) -> RunEnd:
    """The run on one rank."""
    folder = product_folder(config.run.folder, "checkpoints")
    kernels = check_machine(config, processes.device)
    if config.training.selftest:
        heartbeat.mark("self-test")
        check_parity(config, plan.model_folder, processes, kernels.attention.kernel)
    heartbeat.mark("loading the model")
    engine = make_engine(config, plan, processes)
    heartbeat.mark("loading a checkpoint")
    identity = run_identity(config, plan)
    first, skipped = load_newest(engine, folder, identity)
    writer = CheckpointWriter(
        engine,
        folder,
        identity,
        keep=config.training.keep_checkpoints,
        in_background=config.training.async_checkpoints,
    )
    run = _Run(
        config, plan, processes, kernels, engine, folder, identity, skipped, writer, heartbeat
    )
    last = min(plan.total_steps, config.training.stop_after_step or plan.total_steps)
    with ExitStack() as stack:
        if processes.is_main:
            observer = TrainingObserver(config, plan, folder, first, processes, kernels)
            run.observer = stack.enter_context(observer)
        done = _train_steps(run, first, last, signals)
        if done == plan.total_steps:
            _finish(run)
    if done < last:
        if processes.is_main:
            name = signals.received.name if signals.received else "a stop signal to another rank"
            print(
                f"stopped by {name} after step {done}, all of it saved; the same command goes on from there"
            )
        return RunEnd.interrupted
    return RunEnd.complete if done == plan.total_steps else RunEnd.stopped


def _train_steps(run: _Run, first: int, last: int, signals: StopSignals) -> int:
    """Train from ``first`` finished steps to ``last``, or to a stop signal; returns the finished steps, all saved."""
    training, processes = run.config.training, run.processes
    guard = StepGuard(run.engine, training.skip_grad_norm)
    batches = step_batches(
        _batch_loader(run),
        range(first, last),
        ahead=training.prefetch_steps,
        device=processes.device,
    )
    done = saved = first
    with closing(batches):
        while done < last and not signals.any_rank_asked(processes.device):
            run.heartbeat.mark("reading segments", done + 1)
            rate = learning_rate(done, run.plan.total_steps, training)
            report = run_step(
                run.engine,
                guard,
                next(batches),
                processes.dims,
                zero_stage=run.config.parallel.zero_stage,
                learning_rate=rate,
                gradient_clip=training.gradient_clip,
                step=done + 1,
                mark=run.heartbeat.mark,
            )
            done += 1
            run.skipped.count(report.applied)
            if run.observer is not None:
                run.observer.record(done, rate, report, run.skipped.total)
            run.skipped.stop_if_too_many(
                training.max_skipped_steps, step=done, loss=report.loss, norm=report.gradient_norm
            )
            if done % training.checkpoint_steps == 0 or done == last:
                run.heartbeat.mark("writing a checkpoint")
                run.writer.save(done, run.skipped)
                saved = done
            run.writer.raise_if_failed()
    run.heartbeat.mark("writing the last checkpoint")
    if saved < done:
        run.writer.save(done, run.skipped)
    run.writer.finish()
    return done


def _batch_loader(run: _Run) -> Callable[[int], list[RankBatch]]:
    """A function from an optimizer step to this rank's micro-steps of it."""
    store = SegmentStore(run.plan.segments_folder)
    dims, group = run.processes.dims, run.processes.sequence_group
    mixed, kernel = run.config.training.mixed, run.kernels.attention.kernel

    def load(step: int) -> list[RankBatch]:
        micro_steps = run.plan.schedule.micro_steps(step, dims.data)
        return [
            load_rank_batch(store, micro, dims, group, mixed=mixed, kernel=kernel)
            for micro in micro_steps
        ]

    return load


def _finish(run: _Run) -> None:
    """Write ``final/`` and, last, the manifest that marks the product as complete."""
    run.heartbeat.mark("writing final/")
    steps = run.plan.total_steps
    counts = {
        "steps": steps,
        "tokens": steps * run.config.training.global_batch_tokens,
        "skipped_steps": run.skipped.total,
    }
    manifest = Manifest(
        "checkpoint",
        inputs=run.identity,
        config=to_plain(run.config),
        seeds={"seed": run.config.seed},
        counts=counts,
        details={
            "attention_kernel": str(run.kernels.attention),
            "norm_kernel": str(run.kernels.norm),
        },
    )
    dtype = final_dtype(run.config.training, run.processes.device)
    save_final(run.engine, run.folder, run.plan.model_folder, run.plan.factors, manifest, dtype)
    if run.processes.is_main:
        manifest.kind = "checkpoints"
        manifest.files = {}
        write_manifest(run.folder, manifest)
    if run.observer is not None:
        run.observer.finished()
