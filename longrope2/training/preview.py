"""What a dry run shows on a machine that may lack the model, its segments or its factors.

Missing is told apart from wrong by the place where a thing would stand: nothing there yet is *missing*, and the plan names
it; something there that does not fit is a fault, as in a real run. Nothing is downloaded.
"""

from pathlib import Path

from longrope2.artifacts import MANIFEST_NAME, resolve_model_folder
from longrope2.errors import ArtifactError
from longrope2.gguf_model import GGUF_PREFIX
from longrope2.model import factors_path, resolve_factors, rope_geometry
from longrope2.model.hf_files import CONFIG_FILE
from longrope2.rope import RopeMethod
from longrope2.segments import SegmentStore, check_at_start
from longrope2.training.config import TrainRoot, check_rules
from longrope2.training.forecast import make_forecast
from longrope2.training.plan import (
    check_tokenizer_fits,
    check_windows_fit,
    describe_plan,
    describe_segments,
    make_schedule,
    segments_folder,
)

__all__ = ["preview_plan"]


def preview_plan(config: TrainRoot, world_size: int) -> str:
    """The plan of a run, and below it what a run on this machine would still miss.

    Raises:
        ConfigError: faults in the configuration, all together.
        ArtifactError: something that is there does not fit, or the model is not there and neither is a copy of its
            config.json (``model.config_folder``), without which nothing can be planned.
    """
    missing: dict[str, str] = {}
    folder, is_model = _find_model(config, missing)
    check_rules(config, folder, world_size)
    segments, total_steps = _preview_segments(config, folder if is_model else None, missing)
    method = _preview_factors(config, folder, missing)
    model = str(folder) if is_model else f"{config.model.path} (planned from {folder / CONFIG_FILE})"
    lines = [describe_plan(config, world_size, model=model, segments=segments, method=method, total_steps=total_steps)]
    total_tokens = None if total_steps is None else total_steps * config.training.global_batch_tokens
    lines.append(make_forecast(config, folder, world_size, total_tokens=total_tokens, long_share=None).line())
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
    if not (Path(description) / CONFIG_FILE).is_file():
        raise ArtifactError(f"model.config_folder={description} holds no {CONFIG_FILE}")
    missing["model"] = f"{path}: give model.path=FOLDER, or log in with `hf auth login` where the hub can be reached"
    return Path(description), False


def _local_model_folder(path: str) -> Path | None:
    """The model's folder if it is on this machine: given as a folder, converted from a package, or in the hub's cache."""
    if path.startswith(GGUF_PREFIX) or Path(path).is_dir():
        return resolve_model_folder(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return folder if (folder / CONFIG_FILE).is_file() else None


def _preview_segments(config: TrainRoot, model: Path | None, missing: dict[str, str]) -> tuple[str, int | None]:
    """The segments in words and the steps; steps without segments follow from the token budget alone."""
    folder, training = segments_folder(config), config.training
    if not (folder / MANIFEST_NAME).is_file():
        missing["segments"] = f"{folder}: run data_prep.pack first, or give segments=FOLDER"
        return f"{folder}: not packed yet", training.tokens // training.global_batch_tokens if training.tokens else None
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
    is_elsewhere = method is RopeMethod.from_hf and rope.factors is not None and not Path(rope.factors).exists()
    path = None if is_elsewhere else factors_path(rope, config.run.folder)
    if is_elsewhere:
        missing["factors"] = f"{rope.factors}: give rope.factors=FOLDER, or a hub id where the hub can be reached"
    elif path is not None and not path.is_file():
        missing["factors"] = f"{path}: run launch.search first, or give rope.factors=FILE"
    else:
        return resolve_factors(rope, geometry, config.target_len, config.run.folder).method
    return method.value
