"""Tiny random models of many families, and the broken or unusual folders that people publish.

One entry is a model class with the settings that make it small, and what is particular about it.
``old`` rewrites config.json as checkpoints published before transformers 5 have it: rotary keys at
the top level, under the family's own names.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

MINIATURE = Path(__file__).parent.parent.parent / "models" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
ORIGINAL_LEN = 128
# Longer than any segment of a test.
FAR = 1_000_000
COMMON: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": ORIGINAL_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model class, made small."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    old: dict[str, Any] | None = None
    """Keys that config.json has in the layout before transformers 5; None keeps today's layout."""


def _of(model_type: str, old: dict[str, Any] | None = None, **settings: Any) -> Family:
    return Family(model_type, settings, old)


FAMILIES: dict[str, Family] = {
    # plain: RoPE over the whole head, untouched logits
    "llama": _of("llama"),
    "llama (layout before 5)": _of("llama", old={"rope_theta": 10000.0}),
    "llama (biases)": _of("llama", attention_bias=True, mlp_bias=True),
    "llama (wide heads)": _of("llama", head_dim=32),
    "mistral": _of("mistral", sliding_window=None),
    "qwen2 (tied)": _of("qwen2", tie_word_embeddings=True),
    "qwen3": _of("qwen3", head_dim=32),
    "gemma": _of("gemma", head_dim=16, tie_word_embeddings=True),
    "olmo (clipped qkv)": _of("olmo", clip_qkv=0.5),
    "olmo2": _of("olmo2"),
    "arcee": _of("arcee"),
    "bitnet": _of("bitnet"),
    "diffllama": _of("diffllama"),
    "ernie4_5": _of("ernie4_5", head_dim=16),
    "helium": _of("helium", head_dim=16),
    "hunyuan_v1_dense": _of("hunyuan_v1_dense", head_dim=16),
    "starcoder2": _of("starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    "seed_oss": _of("seed_oss", head_dim=16, attention_dropout=0.0, residual_dropout=0.0),
    "cwm": _of(
        "cwm",
        head_dim=16,
        sliding_window=4096,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "mistral (layout before 5)": _of("mistral", old={"rope_theta": 1e6}, sliding_window=None),
    "ministral": _of("ministral", head_dim=16),
    "flex_olmo": _of("flex_olmo", num_experts=4, num_experts_per_tok=2),
    "internlm3": _of("internlm3", head_dim=16),
    "hyperclovax": _of("hyperclovax", head_dim=16),
    "iquestcoder": _of("iquestcoder"),
    "jais2": _of("jais2"),
    "apertus": _of("apertus", rope_parameters={"rope_type": "default", "rope_theta": 12e6}),
    "smollm3 (a layer without RoPE)": _of("smollm3", no_rope_layers=[1, 0]),
    # a part of the head rotated, under every name
    "phi3 (partial)": _of("phi3", partial_rotary_factor=0.75),
    "phi (bias of the head)": _of("phi", partial_rotary_factor=0.5, hidden_dropout=0.0),
    "phi (layout before 5)": _of("phi", old={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "gpt_neox": _of("gpt_neox", rotary_pct=0.25),
    "gpt_neox (layout before 5)": _of(
        "gpt_neox", old={"rotary_pct": 0.25, "rotary_emb_base": 50000}
    ),
    "persimmon": _of("persimmon", partial_rotary_factor=0.5, hidden_dropout=0.0),
    "glm (interleaved)": _of("glm", head_dim=16, partial_rotary_factor=0.5, attention_dropout=0.0),
    "glm (class default)": _of("glm", old={"rope_theta": 10000.0}, head_dim=16),
    "glm4": _of("glm4", head_dim=16, partial_rotary_factor=0.5),
    "minimax_m2 (rotary_dim)": _of(
        "minimax_m2", old={"rope_theta": 10000.0, "rotary_dim": 8}, head_dim=16, **EXPERTS
    ),
    "stablelm": _of("stablelm", partial_rotary_factor=0.25, use_qkv_bias=True),
    "nemotron": _of("nemotron", partial_rotary_factor=0.5),
    "gpt_neox_japanese": _of(
        "gpt_neox_japanese", rotary_pct=0.5, attention_dropout=0.0, hidden_dropout=0.0
    ),
    "solar_open": _of("solar_open", head_dim=16, **ROUTED),
    # latent attention
    "deepseek_v3": _of("deepseek_v3", **LATENT, **ROUTED),
    "deepseek_v3 (layout before 5)": _of(
        "deepseek_v3", old={"rope_theta": 10000.0}, **{**LATENT, "qk_rope_head_dim": 8}, **ROUTED
    ),
    "deepseek_v2": _of("deepseek_v2", **LATENT, **{**ROUTED, "topk_method": "greedy"}),
    "minicpm3": _of("minicpm3", **LATENT, qk_head_dim=32),
    "minicpm3 (layout before 5)": _of(
        "minicpm3", old={"rope_theta": 10000.0}, **LATENT, dim_model_base=16, scale_emb=12
    ),
    "glm4_moe_lite": _of("glm4_moe_lite", **LATENT, **ROUTED, n_shared_experts=1),
    "youtu": _of("youtu", **LATENT),
    "longcat_flash": _of(
        "longcat_flash",
        head_dim=16,
        **LATENT,
        ffn_hidden_size=64,
        num_layers=1,
        n_routed_experts=4,
        moe_topk=2,
        expert_ffn_hidden_size=32,
        zero_expert_num=1,
    ),
    # scaled, multiplied or capped logits
    "granite": _of(
        "granite",
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0625,
        tie_word_embeddings=True,
    ),
    "granitemoe": _of("granitemoe", logits_scaling=6.0, **EXPERTS),
    "granitemoeshared": _of(
        "granitemoeshared", logits_scaling=6.0, shared_intermediate_size=32, **EXPERTS
    ),
    "cohere (interleaved)": _of("cohere", tie_word_embeddings=True, logit_scale=0.0625),
    "cohere2": _of("cohere2", tie_word_embeddings=True, logit_scale=0.25, sliding_window=32),
    "cohere2_moe": _of("cohere2_moe", num_experts=4, num_experts_per_tok=2, head_dim=16),
    "cohere (layout before 5)": _of(
        "cohere", old={"rope_theta": 10000.0}, logit_scale=0.25, tie_word_embeddings=True
    ),
    "granite (layout before 5)": _of("granite", old={"rope_theta": 10000.0}, logits_scaling=8.0),
    "nanochat": _of("nanochat", final_logit_softcapping=0.5),
    "gemma2": _of(
        "gemma2",
        head_dim=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=0.5,
        sliding_window=32,
    ),
    # mixtures of experts
    "mixtral": _of("mixtral", **EXPERTS),
    "qwen2_moe": _of(
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "qwen3_moe": _of(
        "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "olmoe": _of("olmoe", num_experts=4, num_experts_per_tok=2),
    "phimoe": _of("phimoe", sliding_window=None, **EXPERTS),
    "ernie4_5_moe": _of(
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
    ),
    "dots1": _of("dots1", **ROUTED, n_shared_experts=1, sliding_window=None, max_window_layers=2),
    "glm4_moe": _of(
        "glm4_moe", head_dim=16, **ROUTED, n_shared_experts=1, partial_rotary_factor=0.5
    ),
    "hunyuan_v1_moe": _of(
        "hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2, moe_intermediate_size=32
    ),
    "hy_v3": _of(
        "hy_v3", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "exaone_moe": _of(
        "exaone_moe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
        sliding_window=FAR,
    ),
    "afmoe": _of(
        "afmoe",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        sliding_window=FAR,
    ),
    "aria_text": _of("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "jetmoe": _of("jetmoe", kv_channels=16, **EXPERTS),
    # windows that say nothing: longer than any segment, as model.sliding_window=drop merges them
    "gemma2 (dropped window, final cap)": _of(
        "gemma2",
        head_dim=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=0.5,
        sliding_window=FAR,
    ),
    "cohere2 (dropped window)": _of(
        "cohere2",
        tie_word_embeddings=True,
        logit_scale=0.25,
        sliding_window=FAR,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "exaone4 (dropped window)": _of(
        "exaone4",
        sliding_window=FAR,
        sliding_window_pattern=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3 (dropped window)": _of("phi3", sliding_window=FAR),
    # windows inside L0
    "mistral (sliding window)": _of("mistral", sliding_window=32),
    "phi3 (sliding window)": _of("phi3", sliding_window=47),
    "qwen2 (sliding window)": _of(
        "qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=1
    ),
    "exaone4 (windowed layers have the RoPE)": _of(
        "exaone4", sliding_window=32, sliding_window_pattern=2
    ),
    # not supported
    "gemma2 (attention cap)": _of(
        "gemma2", head_dim=16, attn_logit_softcapping=0.5, sliding_window=32
    ),
    "gpt_oss (sinks)": _of(
        "gpt_oss",
        head_dim=16,
        sliding_window=32,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
        **EXPERTS,
    ),
    "gemma3_text": _of("gemma3_text", head_dim=16, sliding_window=32),
    "olmo3": _of("olmo3", sliding_window=32),
    "lfm2": _of("lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3),
    "qwen3_next": _of(
        "qwen3_next",
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_experts=0,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        partial_rotary_factor=0.25,
    ),
    "falcon_h1": _of(
        "falcon_h1",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=16,
    ),
    "bamba": _of(
        "bamba",
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        attn_layer_indices=[1],
    ),
    "jamba": _of(
        "jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False
    ),
    "mamba": _of("mamba"),
    "recurrent_gemma": _of("recurrent_gemma", head_dim=16, num_hidden_layers=3),
    "falcon": _of("falcon", alibi=False, new_decoder_architecture=False, multi_query=True),
    "llama4_text": _of(
        "llama4_text",
        head_dim=16,
        num_local_experts=2,
        intermediate_size_mlp=64,
        attention_chunk_size=64,
        moe_layers=[],
    ),
    "gpt2": _of("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=ORIGINAL_LEN),
    "opt": _of("opt", ffn_dim=128, word_embed_proj_dim=64),
    "bloom": _of("bloom"),
    "gptj": _of("gptj", rotary_dim=8, n_embd=64, n_layer=2, n_head=4),
    "falcon (layout before 5)": _of("falcon", old={"rope_theta": 10000.0}, alibi=False),
    "doge": _of("doge", head_dim=16),
    "vaultgemma": _of("vaultgemma", head_dim=16, sliding_window=FAR),
    "granite_swa": _of("granite_swa", head_dim=16),
    "hrm_text": _of("hrm_text", head_dim=16),
    "deepseek_v32": _of("deepseek_v32", **LATENT, **ROUTED),
    "glm_moe_dsa": _of("glm_moe_dsa", **LATENT, **ROUTED),
    "moshi": _of("moshi", head_dim=16),
    "roformer": _of("roformer", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
    "rwkv": _of("rwkv"),
    "granite (dropout)": _of("granite", attention_dropout=0.1),
    "llama (extended already)": _of(
        "llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
}


def make_model(
    name: str, folder: Path, edit: Callable[[dict[str, Any]], None] | None = None
) -> Path:
    """Write a tiny random model of a family, with the miniature's tokenizer, into ``folder``."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.model_type, **{**COMMON, **family.settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0.0, 0.08)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for file in TOKENIZER_FILES:
        shutil.copyfile(MINIATURE / file, folder / file)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    if family.old is not None:
        written = _before_5(written) | family.old
    if edit is not None:
        edit(written)
    path.write_text(json.dumps(written, indent=1))
    return folder


def _before_5(config: dict[str, Any]) -> dict[str, Any]:
    """Without what only transformers 5 writes about the rotary module."""
    return {
        key: value
        for key, value in config.items()
        if key not in ("rope_parameters", "partial_rotary_factor", "rope_theta", "head_dim")
        or (key == "head_dim" and value and config["model_type"] != "deepseek_v3")
    }
