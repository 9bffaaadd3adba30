"""What a training would be refused for and can be known at once: before torch is imported.

Everything is looked at and all faults are told together, each key's and those of what the run
reads. What only the model's class, the tokenizer or the device can tell comes later
(``plan.resolve_run``, which checks all of this again, as every rank does).
"""

from pathlib import Path

from longrope2.errors import ArtifactError
from longrope2.files.artifacts import MANIFEST_NAME
from longrope2.model.factors_source import factors_faults
from longrope2.model.folder import ModelLook
from longrope2.segments.format import SegmentStore
from longrope2.training.config import TrainRoot, settings_faults
from longrope2.training.layouts import in_words, working_settings


def known_faults(config: TrainRoot, look: ModelLook) -> list[str]:
    """All faults of a training that are known without loading anything.

    Args:
        config: What was given.
        look: At the model, by ``look_before``.
    """
    config, world_size = look.with_its_window(config), config.parallel.processes
    faults = [*look.faults, *settings_faults(config, look.shape, world_size)]
    store = None
    try:
        store = open_segments(config)
    except ArtifactError as error:
        if not (config.dry_run and is_missing(segments_folder(config))):
            faults.append(str(error))
    counts = None
    if store is not None:
        counts = len(store.short_ids), len(store.long_ids)
        faults += too_few_faults(config, *counts)
    is_needed = not config.dry_run
    faults += factors_faults(
        config.rope,
        config.run.folder_with("factors"),
        config.target_len,
        missing_is_a_fault=is_needed,
    )
    if is_needed:
        faults += look.missing_files(weights=not config.model.from_scratch)
    options = working_settings(config, world_size, look.shape, counts)
    return [*faults, in_words(options)] if options else faults


def segments_folder(config: TrainRoot) -> Path:
    """Where the run's segments stand."""
    return Path(config.segments or config.run.segments_folder)


def is_missing(folder: Path) -> bool:
    """Whether nothing has been finished there, rather than something that does not fit."""
    return not (folder / MANIFEST_NAME).is_file()


def open_segments(config: TrainRoot) -> SegmentStore:
    """The packed segments, of this run's windows.

    Raises:
        ArtifactError: there are none, or they are damaged or of other windows.
    """
    store = SegmentStore(segments_folder(config))
    wanted = {"target_len": config.target_len, "original_len": config.model.original_len}
    changes = [
        f"{name} is {packed}, this run has {value}"
        for name, value in wanted.items()
        if (packed := getattr(store, name)) != value
    ]
    if changes:
        raise ArtifactError(f"{store.folder}: {'; '.join(changes)}; pack again")
    return store


def too_few_faults(config: TrainRoot, num_short: int, num_long: int) -> list[str]:
    """Why the segments do not fill a step."""
    training = config.training
    alike, step = training.same_kind_segments, training.global_batch_tokens
    if alike < 1 or step < 1 or config.target_len < 1:
        return []
    groups = num_short // alike + num_long // alike
    in_a_pass = groups * alike * config.target_len
    if groups and (training.tokens is not None or in_a_pass >= step):
        return []
    there = f"{num_short} short and {num_long} long segments"
    return [
        f"{segments_folder(config)} holds {there}: too few for one step of "
        f"training.global_batch_tokens={step} with training.same_kind_segments={alike}"
    ]
