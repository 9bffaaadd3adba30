"""Factors of published configs against the tables transformers computes from them.

Every RoPE type that can be read, in both layouts, with the settings of real models; and models with
a partly rotated or explicit head dimension from config.json to logits.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope2.model.loading import rope_geometry
from longrope2.model.shape import read_model_config
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.hf_config import from_hf_config, to_hf_config

LLAMA2 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
}  # no rope_theta, as published
LLAMA3 = {**LLAMA2, "rope_theta": 500000.0}
PHI3 = {"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32, "rope_theta": 10000.0}
PHI4 = {"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24, "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75}  # fmt: skip
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rope_theta": 1000000,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "rope_theta": 100000,
}
ORIGINAL = "original_max_position_embeddings"
RISING_64 = [1.0 + 0.37 * i for i in range(64)]
WILD_48 = [0.9978, *[3.23] * 3, *[1.5 + 1.3 * i for i in range(44)]]  # below 1, ties
SHORT_48 = [1.0 + 0.04 * i for i in range(48)]

# (name, config, pre-trained window, target)
CONFIGS: list[tuple[str, dict[str, Any], int, int]] = [
    (
        "llama2 linear",
        {
            **LLAMA2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
        4096,
        32768,
    ),
    (
        "llama2 dynamic",
        {
            **LLAMA2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "dynamic", "factor": 4.0},
        },
        4096,
        16384,
    ),
    (
        "llama2 yarn",
        {
            **LLAMA2,
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "yarn", "factor": 32.0, ORIGINAL: 4096, "finetuned": True},
        },
        4096,
        131072,
    ),
    (
        "llama3 llama3",
        {
            **LLAMA3,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                ORIGINAL: 8192,
            },
        },
        8192,
        131072,
    ),
    (
        "llama3 llama3 x32",
        {
            **LLAMA3,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                ORIGINAL: 8192,
            },
        },
        8192,
        131072,
    ),
    (
        "llama3 longrope",
        {
            **LLAMA3,
            "max_position_embeddings": 131072,
            ORIGINAL: 8192,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 64,
                "long_factor": RISING_64,
            },
        },
        8192,
        131072,
    ),
    (
        "phi3 longrope",
        {
            **PHI3,
            "max_position_embeddings": 131072,
            ORIGINAL: 4096,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT_48, "long_factor": WILD_48},
        },
        4096,
        131072,
    ),
    (
        "phi4 longrope",
        {
            **PHI4,
            "max_position_embeddings": 131072,
            ORIGINAL: 4096,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": WILD_48,
            },
        },
        4096,
        131072,
    ),
    (
        "qwen yarn",
        {
            **QWEN,
            "max_position_embeddings": 40960,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768},
        },
        32768,
        131072,
    ),
    (
        "qwen linear",
        {
            **QWEN,
            "max_position_embeddings": 32768,
            "rope_scaling": {"rope_type": "linear", "factor": 4},
        },
        32768,
        131072,
    ),
    (
        "smollm2 yarn, betas and attention given",
        {
            **SMOLLM2,
            "max_position_embeddings": 8192,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                ORIGINAL: 8192,
                "beta_fast": 64,
                "beta_slow": 2,
                "attention_factor": 1.1,
            },
        },
        8192,
        65536,
    ),
    (
        "smollm2 yarn, ends not rounded",
        {
            **SMOLLM2,
            "max_position_embeddings": 8192,
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 8192, "truncate": False},
        },
        8192,
        65536,
    ),
    (
        "smollm2 yarn, two attention weights",
        {
            **SMOLLM2,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                ORIGINAL: 8192,
                "mscale": 0.707,
                "mscale_all_dim": 1.2,
            },
        },
        8192,
        65536,
    ),
    (
        "smollm2 yarn, ratio for factor",
        {
            **SMOLLM2,
            "max_position_embeddings": 65536,
            "rope_scaling": {"rope_type": "yarn", "factor": None, ORIGINAL: 8192},
        },
        8192,
        65536,
    ),
    (
        "smollm2 longrope, factor and attention given",
        {
            **SMOLLM2,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 6.0,
                "attention_factor": 1.25,
                ORIGINAL: 8192,
                "short_factor": [1.0] * 32,
                "long_factor": RISING_64[:32],
            },
        },
        8192,
        65536,
    ),
    (
        "smollm2 longrope, factor given",
        {
            **SMOLLM2,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 6.0,
                ORIGINAL: 8192,
                "short_factor": [1.0] * 32,
                "long_factor": RISING_64[:32],
            },
        },
        8192,
        65536,
    ),
    ("smollm2 default", {**SMOLLM2, "max_position_embeddings": 8192}, 8192, 65536),
]


def new_layout(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it: everything about RoPE inside ``rope_parameters``."""
    moved = {
        name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config
    }
    kept = {name: value for name, value in config.items() if name not in ("rope_scaling", *moved)}
    scaling = dict(config.get("rope_scaling", {"rope_type": "default"}))
    scaling.setdefault("rope_type", scaling.pop("type", None))
    return {**kept, "rope_parameters": {**scaling, **moved}}


def theirs(folder: Path, seq_len: int) -> tuple[torch.Tensor, float]:
    config = AutoConfig.from_pretrained(folder)
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        linear = {**config.rope_parameters, "rope_type": "linear", "factor": 1.0}
        config.rope_parameters, rope_type = linear, "linear"
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)


@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("name", "config", "original_len", "target_len"), CONFIGS, ids=[c[0] for c in CONFIGS]
)
def test_tables_of_published_configs(
    tmp_path: Path,
    name: str,
    config: dict[str, Any],
    original_len: int,
    target_len: int,
    layout: str,
) -> None:
    if layout == "rope_parameters":
        config = new_layout(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = from_hf_config(read_model_config(tmp_path / "config.json"), original_len, target_len)
    for window, seq_len in ((Window.SHORT, original_len), (Window.LONG, target_len)):
        inverse_frequencies, attention_scale = theirs(tmp_path, seq_len)
        torch.testing.assert_close(
            ours.inverse_frequencies(window), inverse_frequencies, rtol=1e-6, atol=0
        )
        assert ours.attention_scale(window) == pytest.approx(attention_scale, rel=1e-12)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "phi3, three quarters rotated": {
        **SIZES,
        "model_type": "phi3",
        "hidden_size": 128,
        "partial_rotary_factor": 0.75,
    },
    "qwen3, heads wider than hidden / heads": {**SIZES, "model_type": "qwen3", "head_dim": 32},
}


def build(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_from_config_to_logits_and_back(tmp_path: Path, config: dict[str, Any]) -> None:
    plain = build(tmp_path / "base", config)
    geometry = rope_geometry(tmp_path / "base", 32)
    factors = RescaleFactors(
        tuple(1.0 + 0.5 * i for i in range(geometry.num_frequencies)), geometry, 192, "from_hf"
    )
    exported = {**config, **to_hf_config(factors, head_dim=32)}
    extended = build(tmp_path / "extended", exported)
    windowed = WindowedModel(plain, factors)
    for length, window in ((32, Window.SHORT), (33, Window.LONG), (192, Window.LONG)):
        tokens = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, found = extended(tokens).logits, windowed.logits(tokens, window)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    read = from_hf_config(read_model_config(tmp_path / "extended" / "config.json"))
    assert (read.factors, read.geometry, read.target_len) == (factors.factors, geometry, 192)
    assert read.long_attention_scale == read.short_attention_scale == 1.0
