"""A model's config.json: where it stands, and what its model class adds to it. No weights are touched."""

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from longrope2.artifacts import resolve_model_folder
from longrope2.errors import ArtifactError

__all__ = ["CONFIG_FILE", "find_config_file", "read_model_config"]

CONFIG_FILE = "config.json"
CLASS_DEFAULTS = ("rope_theta", "partial_rotary_factor")


def find_config_file(path: str, key: str) -> Path:
    """The config.json of a model given as a file, a folder, or a hub id (of which nothing else is downloaded).

    Args:
        path: What the user gave; ``gguf://`` models are converted on first use, as everywhere.
        key: Configuration key it was given with, for messages.

    Raises:
        ArtifactError: there is no config.json, or the hub cannot be reached.
    """
    given = Path(path)
    if given.is_file():
        return given
    if given.is_dir():
        if (given / CONFIG_FILE).is_file():
            return given / CONFIG_FILE
        raise ArtifactError(f"{key}={path} holds no {CONFIG_FILE}; give a Hugging Face model folder")
    if "://" in path:
        return resolve_model_folder(path) / CONFIG_FILE
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(path, CONFIG_FILE))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"{key}={path} is neither a folder, a {CONFIG_FILE}, nor a hub id that can be reached ({reason}); "
            "give a local Hugging Face model folder, or log in with `hf auth login`"
        ) from None


def read_model_config(path: Path) -> dict[str, Any]:
    """A parsed config.json, completed by the RoPE defaults of its model class.

    Published configs leave out what their class knows: Llama-2's has no ``rope_theta``, Phi-2's no
    ``partial_rotary_factor``.

    Raises:
        ArtifactError: not a JSON object, or a model class with a RoPE per layer type.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a Hugging Face config: {error}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} is not a Hugging Face config: it holds no JSON object")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return config
    defaults = getattr(CONFIG_MAPPING[model_type](), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in defaults.values()):
        raise ArtifactError(
            f"{path}: {model_type} models have a RoPE per layer type ({', '.join(sorted(defaults))}); "
            "one RoPE for all layers is supported"
        )
    missing = {name: defaults[name] for name in CLASS_DEFAULTS if name in defaults and config.get(name) is None}
    return {**config, **missing}
