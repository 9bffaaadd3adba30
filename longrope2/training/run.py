"""A training run from configuration to final checkpoint, as every rank executes it."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longrope2.artifacts import Manifest, describe_input, model_identity, product_folder, write_manifest
from longrope2.config import to_plain
from longrope2.errors import ArtifactError, ConfigError
from longrope2.model import WindowedModel, factors_path, load_windowed_model, resolve_factors, rope_geometry
from longrope2.parallel import Processes, join_processes, leave_processes
from longrope2.rope import RescaleFactors
from longrope2.segments import SegmentStore, StepSchedule
from longrope2.tracking import MetricsLog
from longrope2.training import checkpoint
from longrope2.training.batch import RankBatch, load_rank_batch
from longrope2.training.config import Precision, Recompute, TrainRoot, check
from longrope2.training.optimizer import deepspeed_settings, learning_rate, make_optimizer
from longrope2.training.report import step_metrics
from longrope2.training.step import StepReport, run_step

__all__ = ["TrainingPlan", "make_plan", "train"]


@dataclass(frozen=True)
class TrainingPlan:
    """Everything a run needs, checked, before a process is started or a file written."""

    model_folder: Path
    segments_folder: Path
    factors: RescaleFactors
    schedule: StepSchedule
    total_steps: int

    def describe(self, config: TrainRoot, world_size: int) -> str:
        """The plan in a few lines."""
        schedule, batch = self.schedule, config.training.global_batch_tokens
        return "\n".join([
            f"model      {config.model.name}: {self.model_folder}, window {config.model.original_len} -> {config.target_len}",
            f"segments   {self.segments_folder}: {len(schedule.short_ids)} short, {len(schedule.long_ids)} long; "
                f"a pass leaves out {sum(schedule.unused_per_epoch.values())} that fill no group",
            f"rope       {self.factors.method}, mixed windows {'on' if config.training.mixed else 'off'}",
            f"processes  {world_size}: {world_size // config.parallel.sequence} data x {config.parallel.sequence} "
            f"sequence, ZeRO stage {config.parallel.zero_stage}",
            f"steps      {self.total_steps} of {batch} tokens = {self.total_steps * batch} tokens",
        ])  # fmt: skip


def make_plan(config: TrainRoot, world_size: int) -> TrainingPlan:
    """Check the configuration and everything it reads.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: segments, model or factors that are missing or belong to something else.
    """
    model_folder = check(config, world_size)
    segments_folder = Path(config.segments) if config.segments else product_folder(config.run.folder, "segments")
    store = SegmentStore(segments_folder)
    _check_segments_fit(store, config, model_folder)
    factors = resolve_factors(
        config.rope, rope_geometry(model_folder, config.model.original_len), config.target_len, config.run.folder
    )
    schedule = StepSchedule(
        tuple(store.short_ids),
        tuple(store.long_ids),
        config.training.global_batch_tokens // config.target_len,
        config.training.same_kind_segments,
        config.seed,
    )
    budget = config.training.tokens
    total_steps = budget // config.training.global_batch_tokens if budget else schedule.steps_per_epoch
    if schedule.groups_per_epoch == 0 or total_steps == 0:
        raise ConfigError([
            f"{segments_folder} holds {len(store.short_ids)} short and {len(store.long_ids)} long segments: too few for "
            f"one step of training.global_batch_tokens={config.training.global_batch_tokens} with "
            f"training.same_kind_segments={config.training.same_kind_segments}"
        ])  # fmt: skip
    return TrainingPlan(model_folder, segments_folder, factors, schedule, total_steps)


def train(config: TrainRoot) -> None:
    """Train to the end of the plan, or to ``stop_after_step``; resumes from the newest intact checkpoint."""
    processes = join_processes(config.parallel)
    try:
        _train(config, make_plan(config, processes.dims.world_size), processes)
    finally:
        leave_processes()


def _train(config: TrainRoot, plan: TrainingPlan, processes: Processes) -> None:
    """The run on one rank."""
    folder = product_folder(config.run.folder, "checkpoints")
    engine = _make_engine(config, plan, processes)
    identity = _identity(config, plan)
    first = checkpoint.load_newest(engine, folder, identity)
    last = min(plan.total_steps, config.training.stop_after_step or plan.total_steps)
    store = SegmentStore(plan.segments_folder)
    with ExitStack() as stack:
        observer = stack.enter_context(_Observer(config, plan, folder, first)) if processes.is_main else None
        for step in range(first, last):
            batches = list(_batches(step, store, plan, config, processes))
            lr = learning_rate(step, plan.total_steps, config.training)
            report = run_step(
                engine,
                batches,
                processes.dims,
                zero_stage=config.parallel.zero_stage,
                learning_rate=lr,
                gradient_clip=config.training.gradient_clip,
            )
            _stop_on_nan(report, step)
            done = step + 1
            if observer is not None:
                observer.record(done, lr, report, processes)
            if done % config.training.checkpoint_steps == 0 or done == last:
                checkpoint.save(engine, folder, done, config.training.keep_checkpoints, identity)
    if last == plan.total_steps:
        manifest = Manifest("checkpoint", inputs=identity, config=to_plain(config), seeds={"seed": config.seed},
                            counts={"steps": last, "tokens": last * config.training.global_batch_tokens})  # fmt: skip
        checkpoint.save_final(engine, folder, plan.model_folder, plan.factors, manifest)
        if processes.is_main:
            manifest.kind = "checkpoints"
            manifest.files = {}
            write_manifest(folder, manifest)


def _make_engine(config: TrainRoot, plan: TrainingPlan, processes: Processes) -> Any:
    """DeepSpeed engine around the windowed model."""
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    torch.manual_seed(config.seed)
    bf16 = _uses_bf16(config.training.precision, processes.device)
    model: WindowedModel = load_windowed_model(
        plan.model_folder,
        plan.factors,
        device=processes.device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        from_scratch=config.model.from_scratch,
    )
    if config.training.recompute is Recompute.full:
        model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    micro_steps = plan.schedule.segments_per_step // processes.dims.data
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, config.training),  # type: ignore[arg-type]
        config=deepspeed_settings(config.training, config.parallel, micro_steps=micro_steps, bf16=bf16),
        mpu=processes.mpu,
    )
    return engine


def _batches(
    step: int, store: SegmentStore, plan: TrainingPlan, config: TrainRoot, processes: Processes
) -> Iterator[RankBatch]:
    """This rank's micro-steps of one optimizer step."""
    for micro_step in plan.schedule.micro_steps(step, processes.dims.data):
        yield load_rank_batch(
            store,
            micro_step,
            processes.dims,
            processes.sequence_group,
            mixed=config.training.mixed,
            device=processes.device,
        )


class _Observer:
    """What the main rank shows and records while training."""

    def __init__(self, config: TrainRoot, plan: TrainingPlan, folder: Path, first: int) -> None:
        self._config = config
        self._metrics = MetricsLog(folder, config.tracking, config.run.name, "train", to_plain(config))
        columns = (TextColumn("train"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                   TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=plan.total_steps, completed=first)

    def __enter__(self) -> "_Observer":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()
        self._metrics.close()

    def record(self, steps_done: int, lr: float, report: StepReport, processes: Processes) -> None:
        """One metrics record and the progress line."""
        parts = [f"{w.value} {loss:.3f}" for w, loss in report.loss_by_window.items() if not math.isnan(loss)]
        self._progress.update(self._task, completed=steps_done, description="loss " + ", ".join(parts))
        if steps_done % self._config.training.log_steps == 0:
            tokens = steps_done * self._config.training.global_batch_tokens
            self._metrics.log(step_metrics(report, lr, tokens, self._config, processes), step=steps_done)


def _identity(config: TrainRoot, plan: TrainingPlan) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    settings = to_plain(config.training)
    for changeable in ("stop_after_step", "checkpoint_steps", "keep_checkpoints", "log_steps", "recompute"):
        del settings[changeable]
    path = factors_path(config.rope, config.run.folder)
    return {
        "model": model_identity(plan.model_folder),
        "segments": describe_input(plan.segments_folder),
        "factors": describe_input(path) if path else {"method": plan.factors.method},
        "training": settings,
        "seed": config.seed,
    }


def _check_segments_fit(store: SegmentStore, config: TrainRoot, model_folder: Path) -> None:
    """Segments of another tokenizer, target or window are refused."""
    wanted = {"target_len": config.target_len, "original_len": config.model.original_len}
    for name, value in wanted.items():
        if getattr(store, name) != value:
            raise ArtifactError(f"{store.folder}: {name} is {getattr(store, name)}, this run has {value}; pack again")
    packed = store.manifest.inputs["model"]["tokenizer_sha256"]
    if packed != model_identity(model_folder)["tokenizer_sha256"]:
        raise ArtifactError(
            f"{store.folder} was packed with another model's tokenizer than model.path={config.model.path}; pack again"
        )


def _stop_on_nan(report: StepReport, step: int) -> None:
    """A loss that is not finite never recovers; stop before it is saved."""
    if not math.isfinite(report.loss) or not math.isfinite(report.gradient_norm):
        raise ArtifactError(
            f"step {step + 1}: loss {report.loss}, gradient norm {report.gradient_norm}; the last checkpoint is intact; "
            "lower training.learning_rate or look at the segments of this step"
        )


def _uses_bf16(precision: Precision, device: torch.device) -> bool:
    """``auto``: bf16 where the hardware is made for it."""
    return precision is Precision.bf16 or (precision is Precision.auto and device.type == "cuda")
