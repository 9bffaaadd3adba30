"""What is said of a model, compared with its own config.json: the one owner of the rule.

A preset states facts of the model at its own path. Under another ``model.path`` they may be wrong,
so each is compared with the config.json there: one that differs is refused, unless the user gives
the key itself. The window is the user's to say (public configs may state more than a model was
trained with), up to what config.json holds.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longrope2.config import ModelConfig, find_shipped
from longrope2.errors import UserError
from longrope2.model.shape import CONFIG_FILE, is_size, read_raw_config

ANY_MODEL = "custom"
"""``model.name`` of the preset that stands for any model."""
_GGUF_ENDING = re.compile(r"([.-](i?q\d\w*|b?f16|f32))?\.gguf$", re.IGNORECASE)
MAX_LEN_KEY, ORIGINAL_LEN_KEY = "max_position_embeddings", "original_max_position_embeddings"
# RoPE is what the project changes, the others are bookkeeping; the rest of config.json says which
# model it is.
NOT_ARCHITECTURE = (
    "rope_scaling", "rope_parameters", "rope_theta", MAX_LEN_KEY, ORIGINAL_LEN_KEY,
    "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache",
    "initializer_range",
)  # fmt: skip
# What tells models apart in a message.
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "vocab_size")  # fmt: skip


def model_name(model: ModelConfig) -> str:
    """What to call a model: ``model.name``, or for any model (``custom``) what its path ends in.

    Of a GGUF file without the ending and what it says of the quantization: ``gguf://`` models are
    dequantized.
    """
    if model.name != ANY_MODEL:
        return model.name
    named = _GGUF_ENDING.sub("", Path(model.path).name)
    return re.sub(r"[^A-Za-z0-9.-]+", "_", named).strip("_")


def architecture(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that says which model it is."""
    return {key: value for key, value in raw.items() if key not in NOT_ARCHITECTURE}


def stated_window(raw: dict[str, Any]) -> tuple[str, int] | None:
    """Key and tokens of the window before any extension, as a config.json states it; or None.

    An extended model states it beside its RoPE scaling, or at the top.
    """
    for layout in ("rope_scaling", "rope_parameters"):
        if is_size(stated := (raw.get(layout) or {}).get(ORIGINAL_LEN_KEY)):
            return f"{layout}.{ORIGINAL_LEN_KEY}", stated
    for key in (ORIGINAL_LEN_KEY, MAX_LEN_KEY):
        if is_size(stated := raw.get(key)):
            return key, stated
    return None


def fact_faults(raw: dict[str, Any], file: Path, model: ModelConfig) -> list[str]:
    """What is said of a model and its config.json contradicts; each with both values and the key.

    Args:
        raw: config.json with the user's ``model.config`` in it.
        file: Where it stands.
        model: What is said.
    """
    window = window_fault(raw, file, model)
    return [*([window] if window else []), *_foreign_faults(raw, file, model)]


def window_fault(raw: dict[str, Any], file: Path, model: ModelConfig) -> str | None:
    """Why ``model.original_len`` cannot be this model's; None where it may."""
    foreign, said = model.foreign, f"model.original_len={model.original_len}"
    found, limit = stated_window(raw), raw.get(MAX_LEN_KEY)
    if "original_len" in foreign and not _is_preset_model(raw, model):
        if found is not None and found[1] == model.original_len:
            return None
        window = f"says {found[0]}={found[1]}" if found else "states no window"
        return (
            f"{said} is the window of {foreign['path']}, but config.json of "
            f"model.path={model.path} {window}; give the window that this model was trained with: "
            f"model.original_len={found[1] if found else 'TOKENS'}"
        )
    if is_size(limit) and model.original_len > limit:
        return (
            f"{said} is above {MAX_LEN_KEY}={limit} of {file}: give the window that the model was "
            "trained with; if config.json is wrong, correct it with "
            f"'model.config={{{MAX_LEN_KEY}: {model.original_len}}}'"
        )
    return None


def _foreign_faults(raw: dict[str, Any], file: Path, model: ModelConfig) -> Iterator[str]:
    """What else a preset says of its own model and this one contradicts."""
    foreign = model.foreign
    if not foreign or _is_preset_model(raw, model):
        return
    if "sliding_window" in foreign and raw.get("sliding_window"):
        yield (
            f"model.sliding_window={foreign['sliding_window']} is said of {foreign['path']}, but "
            f"config.json of model.path={model.path} says sliding_window={raw['sliding_window']}; "
            "give model.sliding_window=keep or drop for this model"
        )
    other = _preset_config(model) or raw
    stated = [key for key in _SIZES if raw.get(key) is not None and other.get(key) is not None]
    differing = [key for key in stated if raw[key] != other[key]]
    if "name" in foreign and differing:
        shown = ", ".join(
            f"{key}={json.dumps(raw.get(key))}, there {json.dumps(other.get(key))}"
            for key in differing[:3]
        )
        yield (
            f"model.name={model.name} names the model of {foreign['path']}, but {file} is another "
            f"({shown}); give model=custom for this one, or model.name=NAME"
        )


def fact_notes(raw: dict[str, Any], model: ModelConfig) -> list[str]:
    """What is taken although config.json says something else."""
    found = stated_window(raw)
    if found is None or model.original_len == found[1]:
        return []
    said = f"model.original_len={model.original_len} is taken"
    return [f"{said}, though {model.path}'s config.json says {found[0]}={found[1]}"]


def _is_preset_model(raw: dict[str, Any], model: ModelConfig) -> bool:
    """Whether another path holds the preset's own model, as a local copy of it does."""
    other = _preset_config(model)
    return other is not None and architecture(other) == architecture(raw)


def _preset_config(model: ModelConfig) -> dict[str, Any] | None:
    """The config.json of the preset's own model, where this machine has it."""
    for path in (model.config_folder, model.foreign.get("path")):
        file = find_shipped(path) / CONFIG_FILE if path else None
        try:
            if file is not None and file.is_file():
                return read_raw_config(file)
        except UserError:
            continue
    return None
