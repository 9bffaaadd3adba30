"""A checkpoint as a Hugging Face folder that plain transformers loads, with one window's RoPE or
both in its config.json.

The factors live in config.json only (RoPE type ``longrope``, both config layouts, attention factor
explicit; see ``to_hf_config`` and ``variants``). The weights are the checkpoint's,
cast to the wanted format.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longrope2.export.model_card import StaticCost, model_card
from longrope2.export.variants import (
    ExportVariant,
    full_attention_keys,
    variant_factors,
    variant_keys,
)
from longrope2.files.artifacts import write_text
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.shape import CONFIG_FILE, read_raw_config
from longrope2.rope.factors import RescaleFactors

COPIED_FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json",
                "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
INDEX_FILE = "model.safetensors.index.json"


def write_hugging_face_folder(
    checkpoint: Path,
    factors: RescaleFactors,
    folder: Path,
    dtype: torch.dtype,
    variant: ExportVariant = ExportVariant.dual,
    cost: StaticCost | None = None,
    weights_from: Path | None = None,
) -> None:
    """Write config, weights, tokenizer and model card into ``folder``.

    Args:
        checkpoint: Folder of a finished checkpoint, with the base model's config.json.
        factors: The checkpoint's factors.
        folder: Where to write; made if missing.
        dtype: Number format of floating-point weights.
        variant: Which windows the folder holds.
        cost: What a static choice costs, for the card; None is said to be unmeasured.
        weights_from: A folder already written from this checkpoint in this format; its weight files
            are shared (hard links where the file system has them).

    Raises:
        FactorsError: the factors cannot be said in a Hugging Face config (two attention scales).
    """
    applied = variant_factors(factors, variant)
    folder.mkdir(parents=True, exist_ok=True)
    base_config = read_raw_config(checkpoint / CONFIG_FILE)
    config = merged_config(base_config, factors, dtype, variant)
    _write_json(folder / CONFIG_FILE, config)
    if weights_from is None:
        _write_weights(checkpoint, folder, dtype)
    else:
        _share_weights(weights_from, folder)
    for name in COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if (checkpoint / TOKENIZER_CONFIG).is_file():
        tokenizer_config = json.loads((checkpoint / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        _write_json(
            folder / TOKENIZER_CONFIG, tokenizer_config | {"model_max_length": applied.target_len}
        )
    if (checkpoint / GENERATION_CONFIG).is_file():
        generation_config = json.loads((checkpoint / GENERATION_CONFIG).read_text(encoding="utf-8"))
        # Llama's says 4,096, with which transformers refuses longer prompts.
        reach = {"max_length": applied.target_len} if "max_length" in generation_config else {}
        _write_json(folder / GENERATION_CONFIG, generation_config | reach)
    write_text(folder / FACTORS_FILE, applied.to_json())
    write_text(folder / "README.md", model_card(base_config, config, factors, variant, cost))


def merged_config(
    config: dict[str, Any],
    factors: RescaleFactors,
    dtype: torch.dtype,
    variant: ExportVariant = ExportVariant.dual,
) -> dict[str, Any]:
    """The base model's config.json with a variant's RoPE keys, full attention, and the weights'
    number format.

    Raises:
        FactorsError: ``dual``, and the attention scales of the two windows differ.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    # Transformers 5 reads "dtype", older versions "torch_dtype".
    # Names of code files beside the base model, which do not come along; transformers and vLLM have
    # the classes themselves.
    config = {key: value for key, value in config.items() if key != "auto_map"}
    return {
        **variant_keys(config, variant_factors(factors, variant), variant),
        **full_attention_keys(config),
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def _write_weights(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Cast and write each weight file under its own name; an index of shards goes along."""
    total_bytes = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors = {name: _cast(tensor, dtype) for name, tensor in load_file(path).items()}
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    if (checkpoint / INDEX_FILE).is_file():
        index = json.loads((checkpoint / INDEX_FILE).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": total_bytes}
        _write_json(folder / INDEX_FILE, index)


def _share_weights(source: Path, folder: Path) -> None:
    """The same weight files and index once more, without their bytes where possible."""
    for path in (*sorted(source.glob("*.safetensors")), source / INDEX_FILE):
        if path.is_file():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point tensors in ``dtype``, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
