"""A training run from configuration to final checkpoint, as every rank executes it."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from enum import Enum
from pathlib import Path
from typing import Any

from longrope2.artifacts import Manifest, product_folder, write_manifest
from longrope2.attention import AttentionKernel
from longrope2.config import to_plain
from longrope2.parallel import Processes, join_processes, leave_processes
from longrope2.segments import SegmentStore
from longrope2.training import checkpoint
from longrope2.training.batch import RankBatch, load_rank_batch
from longrope2.training.config import TrainRoot
from longrope2.training.engine import make_engine
from longrope2.training.guard import StepGuard
from longrope2.training.machine import check_machine
from longrope2.training.observer import TrainingObserver
from longrope2.training.optimizer import learning_rate
from longrope2.training.plan import TrainingPlan, make_plan, run_identity
from longrope2.training.prefetch import step_batches
from longrope2.training.step import run_step
from longrope2.training.stopping import StopSignals

__all__ = ["RunEnd", "train"]


class RunEnd(Enum):
    """How a training command ended without an error."""

    complete = "complete"
    """The plan is done and ``final/`` written."""
    stopped = "stopped"
    """``training.stop_after_step`` was reached."""
    interrupted = "interrupted"
    """A stop signal came; everything is saved and the same command goes on (``REQUEUE_EXIT_CODE``)."""


def train(config: TrainRoot) -> RunEnd:
    """Train to the end of the plan, to ``stop_after_step`` or to a stop signal, from the newest intact checkpoint on.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: segments, model, factors or checkpoints that are missing or belong to something else.
        UserError: ``training.max_skipped_steps`` steps in a row could not be applied.
    """
    with StopSignals() as signals:
        processes = join_processes(config.parallel)
        try:
            return _train(config, make_plan(config, processes.dims.world_size), processes, signals)
        finally:
            leave_processes()


def _train(config: TrainRoot, plan: TrainingPlan, processes: Processes, signals: StopSignals) -> RunEnd:
    """The run on one rank."""
    folder = product_folder(config.run.folder, "checkpoints")
    kernel = check_machine(config, processes.device)
    engine = make_engine(config, plan, processes)
    identity = run_identity(config, plan)
    first, skipped = checkpoint.load_newest(engine, folder, identity)
    guard = StepGuard(engine, config.training.skip_grad_norm)
    last = min(plan.total_steps, config.training.stop_after_step or plan.total_steps)
    load = _batch_loader(config, plan, processes, kernel.kernel)
    ahead = config.training.prefetch_steps
    batches = step_batches(load, range(first, last), ahead=ahead, device=processes.device)
    done = saved = first
    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        observer = None
        if processes.is_main:
            observer = stack.enter_context(TrainingObserver(config, plan, folder, first, processes, kernel))
        while done < last and not signals.any_rank_asked(processes.device):
            lr = learning_rate(done, plan.total_steps, config.training)
            report = run_step(
                engine,
                guard,
                next(batches),
                processes.dims,
                zero_stage=config.parallel.zero_stage,
                learning_rate=lr,
                gradient_clip=config.training.gradient_clip,
            )
            done += 1
            skipped.count(report.applied)
            if observer is not None:
                observer.record(done, lr, report, skipped.total)
            skipped.stop_if_too_many(
                config.training.max_skipped_steps, step=done, loss=report.loss, norm=report.gradient_norm
            )
            if done % config.training.checkpoint_steps == 0 or done == last:
                checkpoint.save(engine, folder, done, skipped, config.training.keep_checkpoints, identity)
                saved = done
    if done < last:
        if saved < done:
            checkpoint.save(engine, folder, done, skipped, config.training.keep_checkpoints, identity)
        _say_interrupted(done, signals, processes)
        return RunEnd.interrupted
    if last < plan.total_steps:
        return RunEnd.stopped
    manifest = Manifest("checkpoint", inputs=identity, config=to_plain(config), seeds={"seed": config.seed},
                        counts={"steps": last, "tokens": last * config.training.global_batch_tokens,
                                "skipped_steps": skipped.total},
                        details={"attention_kernel": str(kernel)})  # fmt: skip
    _finish(engine, plan, folder, manifest, processes)
    return RunEnd.complete


def _batch_loader(
    config: TrainRoot, plan: TrainingPlan, processes: Processes, kernel: AttentionKernel
) -> Callable[[int], list[RankBatch]]:
    """A function from an optimizer step to this rank's micro-steps of it."""
    store = SegmentStore(plan.segments_folder)

    def load(step: int) -> list[RankBatch]:
        return [
            load_rank_batch(
                store,
                micro_step,
                processes.dims,
                processes.sequence_group,
                mixed=config.training.mixed,
                kernel=kernel,
            )
            for micro_step in plan.schedule.micro_steps(step, processes.dims.data)
        ]

    return load


def _finish(engine: Any, plan: TrainingPlan, folder: Path, manifest: Manifest, processes: Processes) -> None:
    """Write ``final/`` and, last, the manifest that marks the product as complete."""
    checkpoint.save_final(engine, folder, plan.model_folder, plan.factors, manifest)
    if processes.is_main:
        manifest.kind = "checkpoints"
        manifest.files = {}
        write_manifest(folder, manifest)


def _say_interrupted(steps_done: int, signals: StopSignals, processes: Processes) -> None:
    """Tell the user what was kept, once."""
    if processes.is_main:
        name = signals.received.name if signals.received else "a stop signal to another rank"
        print(f"stopped by {name} after step {steps_done}, all of it saved; the same command goes on from there")
