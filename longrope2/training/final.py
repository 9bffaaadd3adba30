"""``final/``: the result of a run, a Hugging Face folder that plain transformers loads.

Parameters are gathered one by one and given to the disk shard by shard: no rank ever holds more of
the model than one file and one parameter, beside its own part.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longrope2.files import artifacts
from longrope2.files.artifacts import Manifest
from longrope2.model.factors_source import FACTORS_FILE
from longrope2.model.shape import CONFIG_FILE, read_raw_config
from longrope2.model.weights import saved_buffers, write_weights
from longrope2.rope.factors import RescaleFactors

_FINAL_FOLDER = "final"
_FINAL_KIND = "checkpoint"
_WEIGHTS_FILE = "model.safetensors"
_MAX_SHARD_BYTES = 5_000_000_000
_MODEL_FILES = ("generation_config.json", "tokenizer.json", "tokenizer.model",
               "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip


def save_final(
    engine: Any,
    folder: Path,
    model_folder: Path,
    factors: RescaleFactors,
    manifest: Manifest,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Write ``final/``: config and tokenizer of the base model, weights, factors.

    Every rank calls this. ``manifest`` is completed with kind and files, and written last; a
    ``dtype`` of float32 gives the master weights of a bf16 run; weights of more than
    ``max_shard_bytes`` become shards with an index.
    """
    final = folder / _FINAL_FOLDER
    is_main = dist.get_rank() == 0
    if is_main:
        final.mkdir(parents=True, exist_ok=True)
        for old in [final / "manifest.json", *final.glob("*.safetensors*")]:
            old.unlink(missing_ok=True)
        _copy_model_files(model_folder, final, dtype)
        artifacts.write_text(final / FACTORS_FILE, factors.to_json())
    _write_weights(engine, final, dtype, max_shard_bytes, is_main=is_main)
    if is_main:
        manifest.kind = _FINAL_KIND
        manifest.files = artifacts.hashes_of(final)
        artifacts.write_manifest(final, manifest)
    dist.barrier()


def _copy_model_files(model_folder: Path, final: Path, dtype: torch.dtype) -> None:
    """The base model's tokenizer, and its config with the number format under the key it uses."""
    for name in _MODEL_FILES:
        if (model_folder / name).is_file():
            with artifacts.atomic_path(final / name) as temporary:
                shutil.copyfile(model_folder / name, temporary)
    config, keys = read_raw_config(model_folder / CONFIG_FILE), ("dtype", "torch_dtype")
    used = [key for key in keys if key in config] or keys
    config |= dict.fromkeys(used, str(dtype).removeprefix("torch."))
    artifacts.write_text(final / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _write_weights(
    engine: Any, final: Path, dtype: torch.dtype, max_shard_bytes: int, *, is_main: bool
) -> None:
    """One file, or shards with an index; all ranks gather, the main rank keeps and writes."""
    hf = engine.module.hf
    parameters = dict(hf.named_parameters()) | saved_buffers(hf)
    sizes = {}
    for name, parameter in parameters.items():
        # Where ZeRO-3 leaves an empty tensor, the whole one's size is ds_numel.
        sizes[name] = int(getattr(parameter, "ds_numel", parameter.numel())) * dtype.itemsize
    shards = _shard_names(sizes, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        numbered = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = numbered if len(shards) > 1 else _WEIGHTS_FILE
        tensors = {}
        for name in names:
            with _whole(parameters[name], dtype) as whole:
                if is_main:
                    form = dtype if whole.is_floating_point() else whole.dtype
                    tensors[name] = whole.detach().to("cpu", form, copy=True).contiguous()
            weight_map[name] = file
        if is_main:
            write_weights(tensors, final / file)
    if is_main and len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        artifacts.write_text(final / f"{_WEIGHTS_FILE}.index.json", text)


def _shard_names(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would grow beyond the limit; one tensor is never cut."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


@contextlib.contextmanager
def _whole(parameter: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A parameter gathered from all ranks; in float32 the master weights of a bf16 model."""
    import deepspeed  # by now loaded with DS_ACCELERATOR set (processes.py)

    if dtype is torch.float32 and parameter.dtype is not dtype:
        master = deepspeed.utils.safe_get_full_fp32_param(parameter)
        # None: no master weights apart from the parameter.
        yield parameter if master is None else master
        return
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        yield parameter
