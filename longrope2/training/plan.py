"""What a training run will do, checked before a process is started or a file written.

What a run asks of the machine it runs on, beyond the configuration: its kernels and its optimizer.

What a dry run shows on a machine that may lack the model, its segments or its factors.

Missing is told apart from wrong by the place where a thing would stand: nothing there yet is
*missing*, and the plan names it; something there that does not fit is a fault, as in a real run.
Nothing is downloaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from longrope2.attention.kernels import AttentionKernel, choose_kernel, kernel_fault
from longrope2.config import find_shipped, to_plain
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import MANIFEST_NAME, describe_input, product_folder
from longrope2.kernel_choice import KernelChoice
from longrope2.model.factors_source import factors_path, resolve_factors
from longrope2.model.folder import GGUF_PREFIX, model_identity, resolve_model_folder
from longrope2.model.loading import rope_geometry
from longrope2.model.norms import NormKernel, choose_norm, norm_fault
from longrope2.model.shape import CONFIG_FILE
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.methods import RopeMethod
from longrope2.segments.format import SegmentStore, check_at_start
from longrope2.segments.schedule import StepSchedule
from longrope2.training.config import TrainRoot, check, check_rules, compute_dtype
from longrope2.training.forecast import make_forecast
from longrope2.training.optimizer import optimizer_fault

# Fields of ``training`` that may change between the parts of one run: they change nothing that is
# computed but its rounding.
CHANGEABLE_TRAINING_KEYS = ("stop_after_step", "checkpoint_steps", "keep_checkpoints", "log_steps", "recompute",
                            "offload_activations", "max_skipped_steps", "peak_tflops", "prefetch_steps",
                            "async_checkpoints", "final_dtype", "selftest", "hang_timeout_s", "norm")  # fmt: skip


@dataclass(frozen=True)
class MachineKernels:
    """The kernels of a run."""

    attention: KernelChoice[AttentionKernel]
    norm: KernelChoice[NormKernel]


def check_machine(config: TrainRoot, device: torch.device | None = None) -> MachineKernels:
    """Check that the machine can do what is configured, and choose the kernels.

    Args:
        config: The run.
        device: Device of this rank, on which kernels are tried; None looks at the machine without
            touching its devices.

    Raises:
        ConfigError: a kernel or optimizer was asked for that cannot run here; all faults together.
    """
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, run = compute_dtype(config.training.precision, place), device is not None
    attention = norm = None
    faults: list[str] = []
    try:
        attention = choose_kernel(config.attention.kernel, place, dtype, run=run)
    except ConfigError as error:
        faults += error.faults
    try:
        norm = choose_norm(config.training.norm, place, dtype, run=run)
    except ConfigError as error:
        faults += error.faults
    fault = optimizer_fault(config.training.optimizer, place)
    faults += [fault] if fault else []
    if attention is None or norm is None or faults:
        raise ConfigError(faults)
    return MachineKernels(attention, norm)


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
        config.rope,
        rope_geometry(model_folder, config.model.original_len),
        config.target_len,
        config.run.folder,
    )
    if not config.training.mixed:
        # A model that never sees the original RoPE in training is read with the rescaled one at
        # every length.
        factors = factors.in_both_windows()
    return TrainingPlan(model_folder, store.folder, factors, *make_schedule(store, config))


def segments_folder(config: TrainRoot) -> Path:
    """Where the packed segments stand, or should."""
    return (
        Path(config.segments) if config.segments else product_folder(config.run.folder, "segments")
    )


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
    total_steps = (
        training.tokens // training.global_batch_tokens
        if training.tokens
        else schedule.steps_per_epoch
    )
    if schedule.groups_per_epoch == 0 or total_steps == 0:
        raise ConfigError(
            [
                f"{store.folder} holds {len(store.short_ids)} short and {len(store.long_ids)} long segments: too few for "
                f"one step of training.global_batch_tokens={training.global_batch_tokens} with "
                f"training.same_kind_segments={training.same_kind_segments}"
            ]
        )
    return schedule, total_steps


def describe_plan(
    config: TrainRoot,
    world_size: int,
    *,
    model: str,
    segments: str,
    method: str,
    total_steps: int | None,
) -> str:
    """The lines of a plan, of which a dry run may not know all (``total_steps`` is None: one pass over segments to come)."""
    batch = config.training.global_batch_tokens
    steps = "one pass over the segments" if total_steps is None else f"{total_steps}"
    total = "" if total_steps is None else f" = {total_steps * batch} tokens"
    return "\n".join(
        [
            f"model      {config.model.name}: {model}, window {config.model.original_len} -> {config.target_len}",
            f"segments   {segments}",
            f"rope       {method}, mixed windows {'on' if config.training.mixed else 'off'}",
            f"processes  {world_size}: {world_size // config.parallel.sequence} data x {config.parallel.sequence} "
            f"sequence, ZeRO stage {config.parallel.zero_stage}",
            f"attention  {_kernel_line(config, config.attention.kernel, choose_kernel, kernel_fault)}",
            f"norms      {_kernel_line(config, config.training.norm, choose_norm, norm_fault)}",
            f"steps      {steps} of {batch} tokens{total}",
        ]
    )


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
    config: TrainRoot,
    wanted: Enum,
    choose: Callable[..., KernelChoice[Any]],
    fault_of: Callable[..., str | None],
) -> str:
    """A kernel on the machine that plans, without touching its devices."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config.training.precision, device)
    if wanted.value == "auto":
        return str(choose(wanted, device, dtype, run=False))
    fault = fault_of(wanted, device, dtype, run=False)
    return f"{wanted.value}, forced" + (
        f"; it cannot run on this machine: {fault}" if fault else ""
    )


def check_windows_fit(store: SegmentStore, config: TrainRoot) -> None:
    """Segments of another target or window are refused."""
    wanted = {"target_len": config.target_len, "original_len": config.model.original_len}
    for name, value in wanted.items():
        if getattr(store, name) != value:
            raise ArtifactError(
                f"{store.folder}: {name} is {getattr(store, name)}, this run has {value}; pack again"
            )


def check_tokenizer_fits(store: SegmentStore, config: TrainRoot, model_folder: Path) -> None:
    """Segments of another tokenizer are refused."""
    packed = store.manifest.inputs["model"]["tokenizer_sha256"]
    if packed != model_identity(model_folder)["tokenizer_sha256"]:
        raise ArtifactError(
            f"{store.folder} was packed with another model's tokenizer than model.path={config.model.path}; pack again"
        )


def preview_plan(config: TrainRoot, world_size: int) -> str:
    """The plan of a run, and below it what a run on this machine would still miss.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: something that is there does not fit, or the model is not there and neither
            is a copy of its config.json (``model.config_folder``), without which nothing can be
            planned.
    """
    missing: dict[str, str] = {}
    folder, is_model = _find_model(config, missing)
    check_rules(config, folder, world_size)
    segments, total_steps = _preview_segments(config, folder if is_model else None, missing)
    method = _preview_factors(config, folder, missing)
    model = (
        str(folder) if is_model else f"{config.model.path} (planned from {folder / CONFIG_FILE})"
    )
    lines = [
        describe_plan(
            config,
            world_size,
            model=model,
            segments=segments,
            method=method,
            total_steps=total_steps,
        )
    ]
    total_tokens = (
        None if total_steps is None else total_steps * config.training.global_batch_tokens
    )
    lines.append(
        make_forecast(config, folder, world_size, total_tokens=total_tokens, long_share=None).line()
    )
    if missing:
        lines.append("missing on this machine; training will not start without:")
        lines += [f"  {name:<9}{what}" for name, what in missing.items()]
    return "\n".join(lines)


def _find_model(config: TrainRoot, missing: dict[str, str]) -> tuple[Path, bool]:
    """A folder with the model's config.json, and whether it is the model itself."""
    path = config.model.path
    folder = _local_model_folder(path)
    if folder is not None:
        if not config.model.from_scratch and not any(folder.glob("*.safetensors")):
            missing["weights"] = f"{folder} holds no *.safetensors"
        return folder, True
    description = config.model.config_folder
    if description is None:
        raise ArtifactError(
            f"model.path={path} is not on this machine; a dry run can do without it when model.config_folder names a "
            "folder with a copy of its config.json"
        )
    if not (find_shipped(description) / CONFIG_FILE).is_file():
        raise ArtifactError(f"model.config_folder={description} holds no {CONFIG_FILE}")
    missing["model"] = (
        f"{path}: give model.path=FOLDER, or log in with `hf auth login` where the hub can be reached"
    )
    return find_shipped(description), False


def _local_model_folder(path: str) -> Path | None:
    """The model's folder if it is on this machine: given as a folder, converted from a package, or in the hub's cache."""
    if path.startswith(GGUF_PREFIX) or find_shipped(path).is_dir():
        return resolve_model_folder(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return folder if (folder / CONFIG_FILE).is_file() else None


def _preview_segments(
    config: TrainRoot, model: Path | None, missing: dict[str, str]
) -> tuple[str, int | None]:
    """The segments in words and the steps; steps without segments follow from the token budget alone."""
    folder, training = segments_folder(config), config.training
    if not (folder / MANIFEST_NAME).is_file():
        missing["segments"] = f"{folder}: run data_prep.pack first, or give segments=FOLDER"
        return (
            f"{folder}: not packed yet",
            training.tokens // training.global_batch_tokens if training.tokens else None,
        )
    store = SegmentStore(folder)
    check_windows_fit(store, config)
    if model is not None:
        check_tokenizer_fits(store, config, model)
    check_at_start(store)
    schedule, total_steps = make_schedule(store, config)
    return describe_segments(folder, schedule), total_steps


def _preview_factors(config: TrainRoot, folder: Path, missing: dict[str, str]) -> str:
    """The method of the factors, checked as far as they are there."""
    rope, method = config.rope, config.rope.method
    geometry = rope_geometry(folder, config.model.original_len)
    is_elsewhere = (
        method is RopeMethod.from_hf
        and rope.factors is not None
        and not Path(rope.factors).exists()
    )
    path = None if is_elsewhere else factors_path(rope, config.run.folder)
    if is_elsewhere:
        missing["factors"] = (
            f"{rope.factors}: give rope.factors=FOLDER, or a hub id where the hub can be reached"
        )
    elif path is not None and not path.is_file():
        missing["factors"] = f"{path}: run launch.search first, or give rope.factors=FILE"
    else:
        return resolve_factors(rope, geometry, config.target_len, config.run.folder).method
    return method.value
