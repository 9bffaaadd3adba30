"""Load a Hugging Face model folder, its tokenizer and its RoPE geometry."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError, FactorsError
from longrope2.model.filling import Take, fill_at_random, fill_from_safetensors
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
    take: Take | None = None,
    read: bool = True,
) -> WindowedModel:
    """Load the weights (or initialise them, ``from_scratch``) and attach the windowed rotary and attention.

    Args:
        folder: Model folder.
        factors: For the long window.
        device: Where the model goes; with ``take`` that decides.
        dtype: Number format of the weights.
        from_scratch: Random weights from torch's random state, the same with and without ``take``.
        take: Gets each parameter as soon as it is real and may keep a part of it: the model is never whole (ZeRO-3).
        read: With ``take``, False leaves reading the values to another rank.

    Raises:
        ArtifactError: the folder has no weights, the factors do not fit the model's rotary dimension and base, or the
            model cannot be built in shares.
    """
    found = rope_geometry(folder, factors.geometry.original_len)
    if found != factors.geometry:
        raise ArtifactError(f"the factors are for {factors.geometry}, the model in {folder} has {found}")
    transformers_logging.disable_progress_bar()  # its bars would tear ours
    if take is None and not from_scratch:
        if not any(folder.glob("*.safetensors")):
            raise ArtifactError(f"{folder} holds no *.safetensors weights; check model.path or the checkpoint")
        hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return WindowedModel(hf.to(device), factors)
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    model = WindowedModel(hf, factors)
    _refuse_derived_tensors(hf, folder)
    if from_scratch:
        fill_at_random(hf, dtype, take or _keep)
    else:
        fill_from_safetensors(hf, folder, dtype, take or _keep, read=read)
    return model if take else model.to(device)


def _keep(parameter: nn.Parameter) -> None:
    """The whole parameter stays."""


def _refuse_derived_tensors(hf: nn.Module, folder: Path) -> None:
    """Tensors that are neither weights nor our rotary tables would stay without values.

    Raises:
        ArtifactError: there are some.
    """
    names = [name for name, _ in hf.named_buffers()]
    if names:
        raise ArtifactError(
            f"{folder}: {type(hf).__name__} computes tensors of its own ({', '.join(names[:3])}), so it cannot be built in "
            "shares or from scratch; use parallel.zero_stage=2 and trained weights"
        )


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer; text can never produce a special id.

    transformers sets the backend's ``encode_special_tokens`` anew at every call, from ``split_special_tokens``: only the
    latter holds.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    return tokenizer
