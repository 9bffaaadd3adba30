"""What a training run will do, checked before a process is started or a file written."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from longrope2.artifacts import describe_input, model_identity, product_folder
from longrope2.attention import choose_kernel, kernel_fault
from longrope2.config import to_plain
from longrope2.errors import ArtifactError, ConfigError
from longrope2.kernel_choice import KernelChoice
from longrope2.model import choose_norm, factors_path, norm_fault, resolve_factors, rope_geometry
from longrope2.rope import RescaleFactors
from longrope2.segments import SegmentStore, StepSchedule, check_at_start
from longrope2.training.config import TrainRoot, check, compute_dtype
from longrope2.training.forecast import make_forecast

__all__ = ["CHANGEABLE_TRAINING_KEYS", "TrainingPlan", "check_tokenizer_fits", "check_windows_fit", "describe_plan",
           "describe_segments", "make_plan", "make_schedule", "run_identity", "segments_folder"]  # fmt: skip

# Fields of ``training`` that may change between the parts of one run: they change nothing that is computed but its rounding.
CHANGEABLE_TRAINING_KEYS = ("stop_after_step", "checkpoint_steps", "keep_checkpoints", "log_steps", "recompute",
                            "offload_activations", "max_skipped_steps", "peak_tflops", "prefetch_steps",
                            "async_checkpoints", "final_dtype", "selftest", "hang_timeout_s", "norm")  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """Everything a run needs, checked, before a process is started or a file written."""

    model_folder: Path
    segments_folder: Path
    factors: RescaleFactors
    schedule: StepSchedule
    total_steps: int

    def describe(self, config: TrainRoot, world_size: int) -> str:
        """The plan in a few lines, the planner's last."""
        schedule = self.schedule
        num_long = len(schedule.long_ids)
        forecast = make_forecast(
            config,
            self.model_folder,
            world_size,
            total_tokens=self.total_steps * config.training.global_batch_tokens,
            long_share=num_long / (num_long + len(schedule.short_ids)),
        )
        lines = describe_plan(
            config,
            world_size,
            model=str(self.model_folder),
            segments=describe_segments(self.segments_folder, schedule),
            method=self.factors.method,
            total_steps=self.total_steps,
        )
        return f"{lines}\n{forecast.line()}"


def make_plan(config: TrainRoot, world_size: int) -> TrainingPlan:
    """Check the configuration and everything it reads.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: segments, model or factors that are missing or belong to something else.
    """
    model_folder = check(config, world_size)
    store = SegmentStore(segments_folder(config))
    check_windows_fit(store, config)
    check_tokenizer_fits(store, config, model_folder)
    check_at_start(store)
    factors = resolve_factors(
        config.rope, rope_geometry(model_folder, config.model.original_len), config.target_len, config.run.folder
    )
    if not config.training.mixed:
        # A model that never sees the original RoPE in training is read with the rescaled one at every length.
        factors = factors.in_both_windows()
    return TrainingPlan(model_folder, store.folder, factors, *make_schedule(store, config))


def segments_folder(config: TrainRoot) -> Path:
    """Where the packed segments stand, or should."""
    return Path(config.segments) if config.segments else product_folder(config.run.folder, "segments")


def make_schedule(store: SegmentStore, config: TrainRoot) -> tuple[StepSchedule, int]:
    """The order of the segments, and the steps of the run.

    Raises:
        ConfigError: there are too few segments for one step.
    """
    training = config.training
    schedule = StepSchedule(
        tuple(store.short_ids),
        tuple(store.long_ids),
        training.global_batch_tokens // config.target_len,
        training.same_kind_segments,
        config.seed,
    )
    total_steps = training.tokens // training.global_batch_tokens if training.tokens else schedule.steps_per_epoch
    if schedule.groups_per_epoch == 0 or total_steps == 0:
        raise ConfigError([
            f"{store.folder} holds {len(store.short_ids)} short and {len(store.long_ids)} long segments: too few for "
            f"one step of training.global_batch_tokens={training.global_batch_tokens} with "
            f"training.same_kind_segments={training.same_kind_segments}"
        ])  # fmt: skip
    return schedule, total_steps


def describe_plan(
    config: TrainRoot, world_size: int, *, model: str, segments: str, method: str, total_steps: int | None
) -> str:
    """The lines of a plan, of which a dry run may not know all (``total_steps`` is None: one pass over segments to come)."""
    batch = config.training.global_batch_tokens
    steps = "one pass over the segments" if total_steps is None else f"{total_steps}"
    total = "" if total_steps is None else f" = {total_steps * batch} tokens"
    return "\n".join([
        f"model      {config.model.name}: {model}, window {config.model.original_len} -> {config.target_len}",
        f"segments   {segments}",
        f"rope       {method}, mixed windows {'on' if config.training.mixed else 'off'}",
        f"processes  {world_size}: {world_size // config.parallel.sequence} data x {config.parallel.sequence} "
        f"sequence, ZeRO stage {config.parallel.zero_stage}",
        f"attention  {_kernel_line(config, config.attention.kernel, choose_kernel, kernel_fault)}",
        f"norms      {_kernel_line(config, config.training.norm, choose_norm, norm_fault)}",
        f"steps      {steps} of {batch} tokens{total}",
    ])  # fmt: skip


def describe_segments(folder: Path, schedule: StepSchedule) -> str:
    """How many segments of each kind there are."""
    return (
        f"{folder}: {len(schedule.short_ids)} short, {len(schedule.long_ids)} long; "
        f"a pass leaves out {sum(schedule.unused_per_epoch.values())} that fill no group"
    )


def run_identity(config: TrainRoot, plan: TrainingPlan) -> dict[str, Any]:
    """What must not change between the parts of one run; kept in every checkpoint and compared on resume."""
    settings = to_plain(config.training)
    for changeable in CHANGEABLE_TRAINING_KEYS:
        del settings[changeable]
    path = factors_path(config.rope, config.run.folder)
    factors: dict[str, Any] = {**describe_input(path)} if path else {"method": plan.factors.method}
    if config.rope.both_windows:
        factors["both_windows"] = True
    return {
        "model": model_identity(plan.model_folder),
        "segments": describe_input(plan.segments_folder),
        "factors": factors,
        "training": settings,
        "seed": config.seed,
    }


def _kernel_line(
    config: TrainRoot, wanted: Enum, choose: Callable[..., KernelChoice[Any]], fault_of: Callable[..., str | None]
) -> str:
    """A kernel on the machine that plans, without touching its devices."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config.training.precision, device)
    if wanted.value == "auto":
        return str(choose(wanted, device, dtype, run=False))
    fault = fault_of(wanted, device, dtype, run=False)
    return f"{wanted.value}, forced" + (f"; it cannot run on this machine: {fault}" if fault else "")


def check_windows_fit(store: SegmentStore, config: TrainRoot) -> None:
    """Segments of another target or window are refused."""
    wanted = {"target_len": config.target_len, "original_len": config.model.original_len}
    for name, value in wanted.items():
        if getattr(store, name) != value:
            raise ArtifactError(f"{store.folder}: {name} is {getattr(store, name)}, this run has {value}; pack again")


def check_tokenizer_fits(store: SegmentStore, config: TrainRoot, model_folder: Path) -> None:
    """Segments of another tokenizer are refused."""
    packed = store.manifest.inputs["model"]["tokenizer_sha256"]
    if packed != model_identity(model_folder)["tokenizer_sha256"]:
        raise ArtifactError(
            f"{store.folder} was packed with another model's tokenizer than model.path={config.model.path}; pack again"
        )
