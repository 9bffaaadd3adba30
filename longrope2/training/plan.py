"""The resolved run: what training derives from its configuration, derived once.

The dry run prints it and the run uses it, so both meet the same checks before a process is started
or a file written. Nothing there yet is *missing*, which a dry run lists and a run refuses;
something there that does not fit is a fault in both. A dry run downloads nothing.
"""

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from longrope2.config import find_shipped, to_plain
from longrope2.corpora.tokenizer import load_document_tokenizer, require_packed_alike
from longrope2.errors import ArtifactError, ConfigError
from longrope2.files.artifacts import describe_input, product_folder
from longrope2.kernel_choice import KernelChoice
from longrope2.model.factors_source import factors_path, resolve_factors
from longrope2.model.folder import (
    given_folder,
    local_model_folder,
    merged_config_file,
    model_identity,
    weight_files,
)
from longrope2.model.loading import check_model, find_weights, rope_geometry
from longrope2.model.shape import CONFIG_FILE, ModelShape
from longrope2.parallel.dims import ParallelDims
from longrope2.planning.memory import Recompute
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.methods import RopeMethod
from longrope2.rope.window import Window
from longrope2.segments.format import SegmentStore, check_at_start
from longrope2.segments.schedule import StepSchedule
from longrope2.training.before import is_missing, open_segments, segments_folder, too_few_faults
from longrope2.training.config import (
    AUTO_LAYERS,
    CHANGEABLE_TRAINING_KEYS,
    TrainRoot,
    ZeroConfig,
    check,
    with_room_for_largest,
)
from longrope2.training.machine import (
    MachineSetup,
    configured_layout,
    machine_setup,
    recomputed_layers,
    usable_bytes_of,
)

_FP32_BYTES, _BF16_BYTES = 4, 2
_PACK_MORE = {
    Window.SHORT: "pack with short_overlong=split or more texts of at most {original_len:,} tokens",
    Window.LONG: "pack with more texts of above {original_len:,} tokens",
}
# What is missing where there are no weights that could be checked.
_WITHOUT_WEIGHTS = ("model", "weights")


@dataclass(frozen=True)
class Missing:
    """Something that a run needs and that is not there yet."""

    what: str
    way_out: str
    error: ArtifactError
    """What a run says."""


@dataclass(frozen=True)
class ResolvedRun:
    """Everything a run needs, checked, before a process is started or a file written."""

    config: TrainRoot
    world_size: int
    machine: MachineSetup
    model_folder: Path
    """The model, or what a dry run plans from where the model is missing."""
    segments_folder: Path
    schedule: StepSchedule
    """Without segments where they are missing."""
    total_steps: int
    """0 where only the missing segments could tell."""
    micro_steps: int
    """Of one rank in one step."""
    found_factors: RescaleFactors | None
    missing: tuple[Missing, ...] = ()
    recompute_layers: int | None = None
    """Layers that are recomputed, from the first on; None is all."""
    notes: tuple[str, ...] = ()
    """What runs otherwise than it was configured."""

    @property
    def factors(self) -> RescaleFactors:
        """The factors of a run that was not refused."""
        assert self.found_factors is not None
        return self.found_factors

    @property
    def folder(self) -> Path:
        """``3_checkpoints`` of the run."""
        return product_folder(self.config.run.folder, "checkpoints")

    @property
    def heldout_folder(self) -> Path:
        """Segments of held-out text that the training is measured on."""
        return self.folder / "heldout"

    def misses(self, what: str) -> bool:
        """Whether something is missing: ``model``, ``weights``, ``segments`` or ``factors``."""
        return any(missing.what == what for missing in self.missing)

    def refuse_what_is_missing(self) -> None:
        """Let a run end here that cannot start.

        Raises:
            ConfigError: the model's weights, the segments or the factors are missing, or a kernel
                or optimizer was asked for that cannot run here; all of it together.
        """
        absent = [str(missing.error) for missing in self.missing]
        if faults := [*absent, *self.machine.faults]:
            raise ConfigError(faults)

    def describe(self) -> str:
        """The run in a few lines."""
        config, machine, schedule = self.config, self.machine, self.schedule
        training, parallel = config.training, config.parallel
        grid = ParallelDims.from_world(self.world_size, parallel.sequence, context=parallel.context)
        absent = {missing.what for missing in self.missing}
        model = str(self.model_folder)
        if "model" in absent:
            model = f"{config.model.path} (planned from {self.model_folder / CONFIG_FILE})"
        segments = "not packed yet"
        if "segments" not in absent:
            unused = sum(schedule.unused_per_epoch.values())
            segments = f"{len(schedule.short_ids)} short, {len(schedule.long_ids)} long; "
            segments += f"a pass leaves out {unused} that fill no group"
            if (share := schedule.long_share) is not None:
                segments += f", {100 * share:.0f} % of it are long"
        method = self.found_factors.method if self.found_factors else config.rope.method.value
        method += " at every length" if config.rope.both_windows else ""
        batch, total_steps = training.global_batch_tokens, self.total_steps
        steps = f"one pass over the segments of {batch} tokens"
        if total_steps:
            steps = f"{total_steps} of {batch} tokens = {total_steps * batch} tokens"
        return "\n".join(
            [
                f"model      {config.model.name}: {model}, "
                f"window {config.model.original_len} -> {config.target_len}",
                f"segments   {self.segments_folder}: {segments}",
                f"rope       {method}, {self._mix_in_words()}",
                *([f"taken from {source}"] if (source := config.run.describe_source()) else []),
                f"processes  {self.world_size}: {grid.describe()}, "
                f"ZeRO stage {parallel.zero_stage}",
                f"machine    {machine.device.type} in {_name(machine.dtype)}, "
                f"final/ in {_name(machine.final_dtype)}, {training.optimizer.value}",
                f"attention  {_kernel_words(config.attention.kernel, machine.attention)}",
                f"norms      {_kernel_words(training.norm, machine.norm)}",
                f"recompute  {self._recompute_words()}",
                f"steps      {steps}, {self.micro_steps} micro-steps each",
                *(f"note: {note}" for note in (*self.notes, *self.untrained_windows())),
                *self._describe_heldout(),
            ]
        )

    def _mix_in_words(self) -> str:
        """Whether windows are mixed; only segments of both kinds make it so."""
        if not self.config.training.mixed:
            return "mixed windows off"
        trained = self.schedule.trained_windows
        if not self.schedule.short_ids and not self.schedule.long_ids:
            return "mixed windows if the segments will be of both kinds"
        if len(trained) == len(Window):
            return "mixed windows on"
        return f"{' and '.join(trained) or 'no'} window only, as the segments have it"

    def untrained_windows(self) -> list[str]:
        """Windows that this run will not train for lack of segments, with the remedy."""
        config, schedule = self.config, self.schedule
        original_len, target_len = config.model.original_len, config.target_len
        if not config.training.mixed or target_len <= original_len or not schedule.trained_windows:
            return []
        ids = {Window.SHORT: schedule.short_ids, Window.LONG: schedule.long_ids}
        reach = {Window.SHORT: original_len, Window.LONG: target_len}
        found = []
        for window in (window for window in Window if window not in schedule.trained_windows):
            if num := len(ids[window]):
                alike = f"training.same_kind_segments={schedule.group_size}"
                why = f"{num} {window} segments fill no group of {alike}"
                way_out = f"use at most {num} there, or pack more"
            else:
                why = f"{self.segments_folder} holds no {window} segments"
                way_out = _PACK_MORE[window].format(original_len=original_len)
            untrained = f"the {window} window, up to {reach[window]:,} tokens, is not trained"
            found.append(f"{why}: {untrained}; {way_out}")
        return found

    def _recompute_words(self) -> str:
        training, layers = self.config.training, self.recompute_layers
        if training.recompute is Recompute.none:
            return "none"
        words = "all layers" if layers is None else f"the first {layers} layers"
        chosen = ", auto" if training.recompute_layers == AUTO_LAYERS else ""
        return f"{training.recompute.value} of {words}{chosen}"

    def _describe_heldout(self) -> list[str]:
        every, number = self.config.training.heldout_every, self.config.training.heldout_segments
        if not every:
            return []
        return [f"held out   loss every {every} steps on up to {number} segments of each window"]

    def describe_missing(self) -> list[str]:
        """Lines of what a run on this machine would be refused for; none when it can start."""
        lines = [f"  {missing.what:<9}{missing.way_out}" for missing in self.missing]
        if lines:
            lines.insert(0, "missing on this machine; training will not start without:")
        if self.machine.faults:
            lines.append("asked for, and not to be had on this machine:")
        return [*lines, *(f"  {fault}" for fault in self.machine.faults)]

    def identity(self) -> dict[str, Any]:
        """What must not change between the parts of one run; compared on resume."""
        config = self.config
        settings = to_plain(config.training)
        for changeable in CHANGEABLE_TRAINING_KEYS:
            del settings[changeable]
        path = factors_path(config.rope, config.run.folder_with("factors"))
        factors: dict[str, Any] = describe_input(path) if path else {"method": self.factors.method}
        if config.rope.both_windows:
            factors["both_windows"] = True
        if config.rope.attention_scale is not None:
            factors["attention_scale"] = config.rope.attention_scale
        return {
            "model": model_identity(self.model_folder),
            "segments": describe_input(self.segments_folder),
            "factors": factors,
            "training": settings,
            "seed": config.seed,
        }


def resolve_run(
    config: TrainRoot, world_size: int, device: torch.device | None = None
) -> ResolvedRun:
    """Check the configuration and everything it reads.

    Kernels are tried on this rank's ``device``; None looks at the machine without touching one.

    Raises:
        ConfigError: faults in the configuration, all together, or too few segments for one step.
        ArtifactError: something that is there does not fit, or there is no model at all.
    """
    training, missing = config.training, list[Missing]()
    model_folder = _find_model(config, missing)
    check(config, model_folder, world_size)
    shape = ModelShape.from_folder(model_folder)
    zero = with_room_for_largest(config.zero, shape)
    notes = _raised_bucket(config, zero)
    config = replace(config, zero=zero)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segments = segments_folder(config)
    store = _open_segments(segments, config, model_folder, missing)
    if store is not None and device is None and not config.dry_run:
        store.require_unchanged()  # once, before there are ranks
    schedule = StepSchedule(
        short_ids=tuple(store.short_ids) if store else (),
        long_ids=tuple(store.long_ids) if store else (),
        segments_per_step=training.global_batch_tokens // config.target_len,
        group_size=training.same_kind_segments,
        seed=config.seed,
    )
    total_steps = schedule.steps_per_epoch
    if training.tokens:
        total_steps = training.tokens // training.global_batch_tokens
    factors = _find_factors(config, model_folder, missing)
    if device is None:  # ranks compare what they load
        check_model(model_folder, config.model.original_len)
        if not config.model.from_scratch and not any(m.what in _WITHOUT_WEIGHTS for m in missing):
            find_weights(model_folder)
    counts = len(schedule.short_ids), len(schedule.long_ids)
    if store is not None and (faults := too_few_faults(config, *counts)):
        raise ConfigError(faults)
    machine = machine_setup(config, place, run=device is not None)
    layout = configured_layout(config, world_size, bf16=machine.bf16, norm=machine.norm.kernel)
    return ResolvedRun(
        config=config,
        world_size=world_size,
        machine=machine,
        model_folder=model_folder,
        segments_folder=segments,
        schedule=schedule,
        total_steps=total_steps,
        micro_steps=schedule.segments_per_step * config.parallel.segment_ranks // world_size,
        found_factors=factors,
        missing=tuple(missing),
        recompute_layers=recomputed_layers(
            config, shape, layout, usable_bytes=usable_bytes_of(place)
        ),
        notes=notes,
    )


def _raised_bucket(config: TrainRoot, zero: ZeroConfig) -> tuple[str, ...]:
    """What is said when the reduce bucket is larger than configured."""
    given, raised = config.zero.reduce_bucket_elements, zero.reduce_bucket_elements
    if config.parallel.zero_stage == 0 or given == raised:
        return ()
    largest = f"less than the model's largest matrix has: raised to {raised}"
    return (f"zero.reduce_bucket_elements={given} is {largest}",)


def _kernel_words(wanted: Enum, choice: KernelChoice[Any]) -> str:
    if wanted.value == "auto":
        return str(choice)
    fault = f"; it cannot run on this machine: {choice.fault}" if choice.fault else ""
    return f"{wanted.value}, forced{fault}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _find_model(config: TrainRoot, missing: list[Missing]) -> Path:
    """The model's folder; in a dry run without the model, one with a copy of its config.json."""
    path, description = config.model.path, config.model.config_folder
    if not config.dry_run:
        folder = given_folder(config.model, config.target_len)
    elif (folder := local_model_folder(path)) is not None:
        merged = merged_config_file(folder / CONFIG_FILE, config.model, config.target_len)
        folder = merged.parent
    if folder is not None:
        try:
            if not config.model.from_scratch:
                weight_files(folder)
        except ArtifactError as error:
            missing.append(Missing("weights", str(error), error))
        return folder
    way_out = "model.config_folder names a folder with a copy of its config.json"
    here = f"model.path={path} is not on this machine"
    absent = ArtifactError(f"{here}; a dry run can do without it when {way_out}")
    if description is None:
        raise absent
    folder = find_shipped(description)
    if not (folder / CONFIG_FILE).is_file():
        raise ArtifactError(f"model.config_folder={description} holds no {CONFIG_FILE}")
    way_out = "give model.path=FOLDER, or log in with `hf auth login` where the hub can be reached"
    missing.append(Missing("model", f"{path}: {way_out}", absent))
    return merged_config_file(folder / CONFIG_FILE, config.model, config.target_len).parent


def _open_segments(
    folder: Path, config: TrainRoot, model_folder: Path, missing: list[Missing]
) -> SegmentStore | None:
    """The packed segments, of this run's windows and tokenizer."""
    model_is_here = all(found.what != "model" for found in missing)
    start = config.model.document_start
    encoder = load_document_tokenizer(model_folder, start) if model_is_here else None
    try:
        store = open_segments(config)
    except ArtifactError as error:
        if not is_missing(folder):
            raise
        way_out = f"{folder}: run data_prep.pack first, or give segments=FOLDER"
        missing.append(Missing("segments", way_out, error))
        return None
    packed = store.manifest.inputs["model"]["tokenizer_sha256"]
    if encoder is not None and packed != model_identity(model_folder)["tokenizer_sha256"]:
        fault = f"{folder} was packed with another model's tokenizer than"
        raise ArtifactError(f"{fault} model.path={config.model.path}; pack again")
    if encoder is not None:
        require_packed_alike(folder, store.rules, encoder, start)
    check_at_start(store)
    return store


def _find_factors(
    config: TrainRoot, model_folder: Path, missing: list[Missing]
) -> RescaleFactors | None:
    rope, run_folder = config.rope, config.run.folder_with("factors")
    geometry = rope_geometry(model_folder, config.model.original_len)
    given = rope.factors if rope.method is RopeMethod.from_hf else None
    if config.dry_run and given and not Path(given).exists():
        way_out = f"{given}: give rope.factors=FOLDER, or a hub id where the hub can be reached"
        missing.append(Missing("factors", way_out, ArtifactError(way_out)))
        return None
    path = factors_path(rope, run_folder)
    try:
        factors = resolve_factors(rope, geometry, config.target_len, run_folder)
    except ArtifactError as error:
        if path is None or path.is_file():
            raise
        way_out = f"{path}: run launch.search first, or give rope.factors=FILE"
        missing.append(Missing("factors", way_out, error))
        return None
    # A model that never sees the original RoPE in training is read with the rescaled one at every
    # length.
    return factors if config.training.mixed else factors.in_both_windows()
