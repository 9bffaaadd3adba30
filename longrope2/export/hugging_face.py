"""A checkpoint (or an untrained base model) as a Hugging Face folder that transformers loads.

The factors live in config.json only (see ``to_hf_config`` and ``variants``), one window's or both;
the weights are the checkpoint's, cast to the wanted format.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from longrope2.errors import ArtifactError
from longrope2.export import variants
from longrope2.export.model_card import StaticCost, model_card
from longrope2.export.progress import say
from longrope2.export.tokenizer import settings_for_all_readers
from longrope2.export.variants import ExportVariant, ExportVerify
from longrope2.files.artifacts import write_text
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.given import build_without_memory, cut_layers
from longrope2.model.loading import find_weights, rope_geometry
from longrope2.model.shape import CONFIG_FILE, read_raw_config
from longrope2.model.weights import write_weights
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

_COPIED_FILES = """
    tokenizer.json tokenizer.model special_tokens_map.json added_tokens.json vocab.json merges.txt
    chat_template.jinja
    """.split()
_TOKENIZER_CONFIG, _GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
_INDEX_FILE = "model.safetensors.index.json"


def write_hugging_face_folder(
    checkpoint: Path,
    factors: RescaleFactors,
    folder: Path,
    dtype: torch.dtype,
    variant: ExportVariant = ExportVariant.dual,
    cost: StaticCost | None = None,
    weights_from: Path | None = None,
    origin: str | None = None,
    verify: ExportVerify = ExportVerify.full,
) -> None:
    """Write config, weights, tokenizer and model card of a finished checkpoint into ``folder``.

    Floating-point weights are cast to ``dtype``, or shared with ``weights_from``, a folder already
    written from this checkpoint in this format (hard links where the file system has them). A
    ``cost`` of None is said to be unmeasured in the card; ``origin``, for a ``checkpoint`` that is
    the untrained base model, says there what the factors come from, and ``verify`` what the folder
    will have been checked by.

    Raises:
        FactorsError: the factors cannot be said in a Hugging Face config (two attention scales).
        ArtifactError: the checkpoint's weights are not those of its class (``find_weights``).
    """
    applied = variants.variant_factors(factors, variant)
    folder.mkdir(parents=True, exist_ok=True)
    base_config = read_raw_config(checkpoint / CONFIG_FILE)
    config = merged_config(base_config, factors, dtype, variant)
    _write_json(folder / CONFIG_FILE, config)
    if weights_from is None:
        _write_weights(checkpoint, folder, dtype)
    else:
        _share_weights(weights_from, folder)
    for name in _COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if (checkpoint / _TOKENIZER_CONFIG).is_file():
        settings = settings_for_all_readers(_read_json(checkpoint / _TOKENIZER_CONFIG))
        reach = {"model_max_length": applied.target_len}
        _write_json(folder / _TOKENIZER_CONFIG, settings | reach)
    if (checkpoint / _GENERATION_CONFIG).is_file():
        generation = _read_json(checkpoint / _GENERATION_CONFIG)
        # Llama's says 4,096, with which transformers refuses longer prompts.
        reach = {"max_length": applied.target_len} if "max_length" in generation else {}
        _write_json(folder / _GENERATION_CONFIG, generation | reach)
    write_text(folder / FACTORS_FILE, applied.to_json())
    card = model_card(
        base_config, config, factors, variant=variant, cost=cost, origin=origin, verify=verify
    )
    write_text(folder / "README.md", card)


def merged_config(
    config: dict[str, Any],
    factors: RescaleFactors,
    dtype: torch.dtype,
    variant: ExportVariant = ExportVariant.dual,
) -> dict[str, Any]:
    """The base model's config.json with a variant's RoPE keys, full attention and number format.

    Raises:
        FactorsError: ``dual``, and the attention scales of the two windows differ.
    """
    # Names of code files beside the base model, which do not come along; transformers and vLLM have
    # the classes themselves.
    config = {key: value for key, value in config.items() if key != "auto_map"}
    # Transformers 5 reads "dtype", older versions "torch_dtype".
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    rope = variants.variant_keys(config, variants.variant_factors(factors, variant), variant)
    return rope | variants.full_attention_keys(config, factors.target_len) | dtypes


def check_exportable(model_folder: Path, original_len: int, target_len: int) -> None:
    """Whether an export of this model can be loaded: asked before the work, of config.json alone.

    transformers validates the config that an export would write, builds the class, and its rotary
    table is compared with the factors. Which factors they are makes no difference to that.

    Raises:
        ArtifactError: it does not accept the config, or reads other frequencies from it.
    """
    geometry = rope_geometry(model_folder, original_len)
    base_config = read_raw_config(model_folder / CONFIG_FILE)
    _check_exportable(json.dumps(base_config), geometry, target_len)


@functools.lru_cache(maxsize=16)
def _check_exportable(base_config: str, geometry: RopeGeometry, target_len: int) -> None:
    """Several stages of a process ask."""
    factors = closed_form_factors(RopeMethod.ntk, geometry, target_len)
    config = merged_config(json.loads(base_config), factors, torch.float32)
    kind = f"{config['model_type']} is not supported: an export of it"
    transformers_logging.set_verbosity_error()  # it warns of keys that other engines read
    try:
        accepted = AutoConfig.for_model(**config)
    except Exception as error:  # validation raises whatever the field's rule raises
        raise ArtifactError(f"{kind} would be refused by transformers: {_brief(error)}") from None
    hf = build_without_memory(cut_layers(accepted))
    for window in Window:
        if fault := rotary_fault(hf, factors, window):
            beyond = " beyond the original window" if window is Window.LONG else ""
            raise ArtifactError(f"{kind} would have {fault}{beyond}")


def rotary_fault(hf: Any, factors: RescaleFactors, window: Window) -> str | None:
    """How the rotary table of a transformers model differs from the factors of a window."""
    rotary = hf.base_model.rotary_emb
    if rotary.inv_freq.is_meta:
        rotary = type(rotary)(hf.config)
        if window is Window.LONG:  # transformers switches by the last position
            rotary(torch.zeros(1, 1, 1), torch.tensor([[factors.geometry.original_len]]))
    found_I, wanted_I = rotary.inv_freq.cpu().float(), factors.inverse_frequencies(window).cpu()
    if found_I.shape != wanted_I.shape:
        return f"{2 * len(found_I)} rotated channels, not {2 * len(wanted_I)} (rope_parameters)"
    if not torch.allclose(found_I, wanted_I.float(), rtol=1e-5, atol=0):
        index = int((found_I / wanted_I.float() - 1).abs().argmax())
        return (
            f"the rotary frequency {found_I[index]:.6g} at cosine index {index}, not "
            f"{wanted_I[index]:.6g} (rope_parameters)"
        )
    scale, wanted = float(rotary.attention_scaling), factors.attention_scale(window)
    if abs(scale - wanted) > 1e-6 * wanted:
        return f"the attention factor {scale:g}, not {wanted:g} (attention_factor)"
    return None


def _brief(error: Exception) -> str:
    """One line of what transformers says."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _write_weights(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Cast and write what the model reads, each file under its own name; an index goes along."""
    total_bytes, weights = 0, find_weights(checkpoint)
    num_files = len(set(weights.places.values()))
    for number, (file, tensors) in enumerate(weights.by_file(), 1):
        if num_files > 1:
            say("writing", f"{file}, {number} of {num_files}")
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        write_weights(tensors, folder / file)
    if (checkpoint / _INDEX_FILE).is_file():
        index = _read_json(checkpoint / _INDEX_FILE)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total_bytes}
        index["weight_map"] = {name: path.name for name, path in weights.places.items()}
        _write_json(folder / _INDEX_FILE, index)


def _share_weights(source: Path, folder: Path) -> None:
    """The same weight files and index once more, without their bytes where possible."""
    for path in (*sorted(source.glob("*.safetensors")), source / _INDEX_FILE):
        if path.is_file():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
