"""Load a Hugging Face model folder, its tokenizer and its RoPE geometry."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError
from longrope2.model.windowed import WindowedModel
from longrope2.rope import RescaleFactors, RopeGeometry

__all__ = ["load_tokenizer", "load_windowed_model", "rope_geometry"]


def rope_geometry(folder: Path, original_len: int) -> RopeGeometry:
    """Rotary dimension and base from config.json, with the original window from our own settings.

    Honours ``head_dim`` and ``partial_rotary_factor``, and reads the base from either config layout.

    Raises:
        ArtifactError: the model has no RoPE base, or already carries a RoPE scaling that would be rescaled twice.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parameters = config.get("rope_parameters") or {}
    rope_base = parameters.get("rope_theta", config.get("rope_theta"))
    if rope_base is None:
        raise ArtifactError(f"{folder}/config.json has no rope_theta: only RoPE models can be extended")
    scaling = config.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise ArtifactError(
            f"{folder}/config.json already has RoPE scaling {kind!r}; give model.path of the model before extension"
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return RopeGeometry(rotary_dim=int(head_dim * partial), rope_base=float(rope_base), original_len=original_len)


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
    """The model's own tokenizer; text can never produce a special id (``encode_special_tokens``)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer
