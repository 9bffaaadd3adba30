"""An exported folder of a Llama class as one GGUF file with both factor tensors, for llama.cpp.

llama.cpp divides the angle of each cosine index by ``rope_factors_long`` when the size of the
context, once, is above ``rope.scaling.original_context_length``, else by ``rope_factors_short``,
and multiplies cosine and sine by ``rope.scaling.attn_factor`` in both cases. Left out:
``rope.scaling.factor``, which would divide all angles once more. Its own converter writes no factor
tensors for Llama classes. Query and key rows are reordered: GGUF's Llama pairs neighbouring
channels where Hugging Face pairs the two halves of a head.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope2.errors import ArtifactError
from longrope2.export.card_engines import GGUF_CLASSES
from longrope2.export.gguf_vocabulary import check_read_back, tokenizer_keys
from longrope2.export.progress import say
from longrope2.model.loading import find_weights
from longrope2.model.shape import CONFIG_FILE, read_raw_config
from longrope2.rope.factors import RescaleFactors, Window

GGUF_FILE = "model.gguf"
_FACTOR_TENSORS = {
    Window.LONG: "rope_factors_long.weight",
    Window.SHORT: "rope_factors_short.weight",
}


def check_gguf(folder: Path, pretokenizer: str | None) -> None:
    """Refuse a checkpoint or exported folder that cannot become a GGUF file, before any work.

    Raises:
        ArtifactError: not a Llama class, a part of the channels rotated, biases, or a tokenizer
            whose tokens llama.cpp would not make (``tokenizer_keys``).
    """
    tokenizer_keys(folder, _check_class(folder)["vocab_size"], pretokenizer)


def _check_class(folder: Path) -> dict[str, Any]:
    """The config.json of a folder whose class GGUF's Llama computes."""
    config = read_raw_config(folder / CONFIG_FILE)
    if config["model_type"] not in GGUF_CLASSES:
        fault = f"export.gguf=true: {config['model_type']} models are not supported"
        raise ArtifactError(f"{fault}, {', '.join(GGUF_CLASSES)} are")
    has_bias = config.get("attention_bias") or config.get("mlp_bias")
    if has_bias or config.get("partial_rotary_factor", 1) != 1:
        raise ArtifactError("export.gguf=true: biases and partly rotated heads are not supported")
    return config


def write_gguf(
    folder: Path, factors: RescaleFactors, path: Path, *, name: str, pretokenizer: str | None = None
) -> list[str]:
    """Write config, factors, tokenizer and weights of an exported folder, then read the file back.

    Args:
        folder: The exported folder.
        factors: What its variant applies.
        path: The file to write.
        name: ``general.name``, what programs show.
        pretokenizer: llama.cpp's name for the splitting rule of a byte-level BPE tokenizer; None
            finds it.

    Returns:
        Notes for the user on the tokenizer (``check_read_back``).

    Raises:
        ArtifactError: see ``check_gguf`` and ``find_weights``; or what was read back is not what
            was meant.
    """
    import gguf

    config = _check_class(folder)
    keys = tokenizer_keys(folder, config["vocab_size"], pretokenizer)
    _check_name(name)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    _add_config(writer, config, factors)
    _add_keys(writer, keys)
    for window, name in _FACTOR_TENSORS.items():
        writer.add_tensor(name, _float32(factors, window))
    bf16 = config["dtype"] == "bfloat16"
    for name, values in _renamed_tensors(folder, config):
        if bf16 and values.ndim > 1:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check_read_back(path, factors, config)
    return check_read_back(_fields(path, "tokenizer."), folder, path)


def _add_config(writer: Any, config: dict[str, Any], factors: RescaleFactors) -> None:
    import gguf

    writer.add_context_length(factors.target_len)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(factors.geometry.rotary_dim)
    writer.add_value_length(factors.geometry.rotary_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    bf16 = config["dtype"] == "bfloat16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if bf16 else gguf.LlamaFileType.ALL_F32)
    writer.add_rope_dimension_count(factors.geometry.rotary_dim)
    writer.add_rope_freq_base(factors.geometry.rope_base)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(factors.geometry.original_len)
    if factors.short_attention_scale != factors.long_attention_scale:
        raise ArtifactError("export.gguf=true: GGUF has one attention factor for both windows")
    writer.add_rope_scaling_attn_factors(factors.long_attention_scale)


def _check_name(name: str) -> None:
    """llama.cpp strips blanks behind the special tokens of models of this name."""
    if any(part in name.lower() for part in ("phi-3", "phi3")):
        raise ArtifactError(
            f"export.gguf=true: llama.cpp reads the tokenizer of a model named {name} by the rules "
            "of Phi-3, which this class does not have; set model.name to another name"
        )


def _add_keys(writer: Any, keys: Mapping[str, Any]) -> None:
    """Values under their keys, in GGUF's types for Python's."""
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _float32(factors: RescaleFactors, window: Window) -> np.ndarray:
    return np.array(factors.window_factors(window), dtype=np.float32)


def _renamed_tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Weights under their GGUF names, float32, query and key rows in GGUF's order."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    num_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = find_weights(folder)
    num_files = len(set(weights.places.values()))
    for number, (file, tensors) in enumerate(weights.by_file(), 1):
        if num_files > 1:
            say("converting", f"{file}, {number} of {num_files}")
        for name, tensor in tensors.items():
            renamed = names.get_name(name, try_suffixes=(".weight",))
            if renamed is None:
                fault = f"export.gguf=true: GGUF's Llama has no place for the weight {name}"
                raise ArtifactError(fault)
            values = tensor.float().numpy()
            for part, heads in num_heads.items():
                if f".{part}." in name:
                    rows, columns = tensor.shape
                    halves = values.reshape(heads, 2, -1, columns)
                    values = halves.swapaxes(1, 2).reshape(rows, columns)
            yield renamed, np.ascontiguousarray(values)


def _fields(path: Path, prefix: str) -> dict[str, Any]:
    """Keys of a file that begin so, as plain values."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(prefix)}


def _check_read_back(path: Path, factors: RescaleFactors, config: dict[str, Any]) -> None:
    """The factors and lengths as a reader finds them, and a plausible number of tensors."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for window, name in _FACTOR_TENSORS.items():
        if not np.array_equal(tensors[name], _float32(factors, window)):
            raise ArtifactError(f"{path}: {name} reads back as other factors")
    expected = {
        "llama.context_length": factors.target_len,
        "llama.rope.scaling.original_context_length": factors.geometry.original_len,
        "llama.rope.scaling.attn_factor": np.float32(factors.long_attention_scale),
        "llama.block_count": config["num_hidden_layers"],
    }
    found = {key: reader.fields[key].contents() for key in expected}
    if found != expected:
        raise ArtifactError(f"{path}: reads back as {found}, not {expected}")
