"""A checkpoint as a Hugging Face folder that plain transformers loads, with both windows in its config.json.

The factors live in config.json only (RoPE type ``longrope``, both config layouts, attention factor explicit; see
``RescaleFactors.to_hf_config``). The weights are the checkpoint's, cast to the wanted format.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longrope2.artifacts import write_text
from longrope2.export.model_card import model_card
from longrope2.model import FACTORS_FILE
from longrope2.rope import RescaleFactors

__all__ = ["merged_config", "write_hugging_face_folder"]

COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json",
                "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
TOKENIZER_CONFIG = "tokenizer_config.json"
INDEX_FILE = "model.safetensors.index.json"


def write_hugging_face_folder(checkpoint: Path, factors: RescaleFactors, folder: Path, dtype: torch.dtype) -> None:
    """Write config, weights, tokenizer and model card into ``folder``.

    Args:
        checkpoint: Folder of a finished checkpoint, with the base model's config.json.
        factors: The checkpoint's factors.
        folder: Where to write; made if missing.
        dtype: Number format of floating-point weights.

    Raises:
        FactorsError: the factors cannot be said in a Hugging Face config (two attention scales).
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = merged_config(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")), factors, dtype)
    _write_json(folder / "config.json", config)
    _write_weights(checkpoint, folder, dtype)
    for name in COPIED_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if (checkpoint / TOKENIZER_CONFIG).is_file():
        tokenizer_config = json.loads((checkpoint / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        _write_json(folder / TOKENIZER_CONFIG, tokenizer_config | {"model_max_length": factors.target_len})
    write_text(folder / FACTORS_FILE, factors.to_json())
    write_text(folder / "README.md", model_card(config, factors))


def merged_config(config: dict[str, Any], factors: RescaleFactors, dtype: torch.dtype) -> dict[str, Any]:
    """The base model's config.json with the RoPE keys of ``factors`` and the weights' number format.

    Raises:
        FactorsError: the attention scales of the two windows differ.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dtype_name = str(dtype).removeprefix("torch.")
    # Transformers 5 reads "dtype", older versions "torch_dtype".
    return {**config, **factors.to_hf_config(head_dim), "dtype": dtype_name, "torch_dtype": dtype_name}


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


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point tensors in ``dtype``, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
