"""Load a Hugging Face model folder, its tokenizer and its RoPE geometry."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError, FactorsError
from longrope2.model.hf_files import CONFIG_FILE, read_model_config
from longrope2.model.windowed import WindowedModel
from longrope2.rope import UNSCALED_TYPE, RescaleFactors, RopeGeometry, config_geometry, config_rope_type

__all__ = ["load_tokenizer", "load_windowed_model", "rope_geometry"]


def rope_geometry(folder: Path, original_len: int) -> RopeGeometry:
    """Rotary dimension and base from config.json, with the original window from our own settings.

    Honours ``head_dim`` and ``partial_rotary_factor``, reads either config layout, and takes what config.json leaves out
    from the model class.

    Raises:
        ArtifactError: the model has no RoPE base, or already carries a RoPE scaling that would be rescaled twice.
    """
    path = folder / CONFIG_FILE
    config = read_model_config(path)
    try:
        kind = config_rope_type(config)
        if kind != UNSCALED_TYPE:
            raise ArtifactError(
                f"{path} already has RoPE scaling {kind!r}; give model.path of the model before extension"
            )
        if not (config.get("rope_parameters") or {}).get("rope_theta") and not config.get("rope_theta"):
            raise ArtifactError(f"{path} has no rope_theta: only RoPE models can be extended")
        return config_geometry(config, original_len)
    except FactorsError as error:
        raise ArtifactError(f"{path}: {error}") from None


def load_windowed_model(
    folder: Path,
    factors: RescaleFactors,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    from_scratch: bool = False,
) -> WindowedModel:
    """Load the weights (or initialise them, ``from_scratch``) and attach the windowed rotary and attention.

    Raises:
        ArtifactError: the folder has no weights, or the factors do not fit the model's rotary dimension and base.
    """
    found = rope_geometry(folder, factors.geometry.original_len)
    if found != factors.geometry:
        raise ArtifactError(f"the factors are for {factors.geometry}, the model in {folder} has {found}")
    transformers_logging.disable_progress_bar()  # its bars would tear ours
    if from_scratch:
        hf: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    else:
        if not any(folder.glob("*.safetensors")):
            raise ArtifactError(f"{folder} holds no *.safetensors weights; check model.path or the checkpoint")
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return WindowedModel(hf.to(device), factors)


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer; text can never produce a special id.

    transformers sets the backend's ``encode_special_tokens`` anew at every call, from ``split_special_tokens``: only the
    latter holds.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    return tokenizer
