"""Load a Hugging Face model folder, its tokenizer and its RoPE geometry.

What is loaded is compared with plain transformers before anybody gets it (``parity.py``): a model
that is here whole by itself, one in shares or without weights by a cut of it.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError, FactorsError
from longrope2.files.artifacts import sha256_of_file
from longrope2.model.given import build_without_memory, look_at, read_config
from longrope2.model.parity import Parity, check_cut, compare, run_plain
from longrope2.model.shape import CONFIG_FILE, read_raw_config
from longrope2.model.weights import (
    Take,
    Weights,
    check_weights,
    fill_at_random,
    fill_buffers,
    fill_in_shares,
    read_whole,
)
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import UNSCALED_TYPE, config_rope_type
from longrope2.rope.methods import RopeMethod, closed_form_factors


def rope_geometry(folder: Path, original_len: int) -> RopeGeometry:
    """Rotary dimension and base of a supported model, with the original window of our settings.

    They are those of the rotary module that transformers builds, under whatever names config.json
    has them (``rotary_pct``, ``rotary_emb_base``, ``qk_rope_head_dim``, ...).

    Raises:
        ArtifactError: the model already carries a RoPE scaling, which would be rescaled twice, or
            is not supported (``given.py``).
    """
    path = folder / CONFIG_FILE
    try:
        kind = config_rope_type(read_raw_config(path))
    except FactorsError as error:
        raise ArtifactError(f"{path}: {error}") from None
    if kind != UNSCALED_TYPE:
        raise ArtifactError(
            f"{path} already has RoPE scaling {kind!r}; give model.path of the model before "
            "extension"
        )
    rotary = look_at(folder).rotary
    return RopeGeometry(rotary.rotary_dim, rotary.rope_base, original_len)


def check_model(folder: Path, original_len: int) -> Parity:
    """Whether ours computes what transformers does, by a cut of the model: config.json is enough.

    Stages ask where they check their configuration; a process computes it once for a config.

    Raises:
        ArtifactError: as ``rope_geometry`` and ``check_cut``.
    """
    geometry = rope_geometry(folder, original_len)
    return _check_model(folder, sha256_of_file(folder / CONFIG_FILE), geometry)


@functools.lru_cache(maxsize=16)
def _check_model(folder: Path, _digest: str, geometry: RopeGeometry) -> Parity:
    """A changed file is checked anew."""
    factors = closed_form_factors(RopeMethod.none, geometry, 2 * geometry.original_len)
    return check_cut(look_at(folder).config, factors)


def find_weights(folder: Path) -> Weights:
    """The weights of a folder, checked against its class by their headers: nothing is loaded.

    Stages ask before they begin; whoever reads weights by themselves (exports, GGUF) asks here too.

    Raises:
        ArtifactError: as ``check_weights``; or transformers cannot build the class.
    """
    return check_weights(build_without_memory(read_config(folder)), folder)


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
    """Load or initialise the weights; attach the windowed rotary and attention.

    Args:
        folder: Model folder.
        factors: For the long window.
        device: Where the model goes; with ``take`` that decides.
        dtype: Number format of the weights.
        from_scratch: Random weights from torch's random state, the same with and without ``take``.
        take: Gets each parameter as soon as it is real and may keep a part of it (ZeRO-3).
        read: False gives memory without values: another rank reads them, or a checkpoint follows.

    Raises:
        ArtifactError: the folder has no weights, the factors do not fit the model's rotary
            dimension and base, or the model cannot be built in shares.
    """
    found = rope_geometry(folder, factors.geometry.original_len)
    if found != factors.geometry:
        raise ArtifactError(
            f"the factors are for {factors.geometry}, the model in {folder} has {found}"
        )
    transformers_logging.disable_progress_bar()  # its bars would tear ours
    config = look_at(folder).config
    hf: Any = build_without_memory(config, dtype)
    if take is None and not from_scratch and read:
        weights = check_weights(hf, folder)
        del hf.base_model.rotary_emb  # which is replaced
        fill_buffers(hf, weights)  # refuses what transformers would leave unset
        hf = read_whole(weights, dtype)
        hf.to(device)
        plain = run_plain(hf, factors.geometry.original_len)
        model = WindowedModel(hf, factors)
        compare(model, plain)
        return model
    check_model(folder, factors.geometry.original_len)
    model = WindowedModel(hf, factors)
    weights = None if from_scratch else check_weights(hf, folder)
    fill_buffers(hf, weights)
    if weights is None:
        fill_at_random(hf, dtype, take or _keep)
    else:
        fill_in_shares(hf, weights, dtype, take or _keep, read=read)
    return model if take else model.to(device)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """GPU in bf16, else CPU in fp32: bf16 products on a CPU are some hundred times slower."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def load_to_run(folder: Path, factors: RescaleFactors) -> WindowedModel:
    """``load_windowed_model`` for all but training: ``device_and_dtype``, evaluation mode."""
    device, dtype = device_and_dtype()
    return load_windowed_model(folder, factors, device=device, dtype=dtype).eval()


def _keep(parameter: nn.Parameter) -> None:
    """The whole parameter stays."""


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer; text can never produce a special id.

    transformers sets the backend's ``encode_special_tokens`` anew at every call, from
    ``split_special_tokens``: only the latter holds.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    return tokenizer
