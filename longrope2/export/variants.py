"""Three ways to say an extended model in a config.json, for engines that switch the RoPE and for those that cannot.

``dual`` holds the RoPE of both windows; whoever loads it must switch at L0. An engine that chooses once at load gets what
it can serve without a switch: ``long_only`` applies the rescaled RoPE at every length, ``short_only`` is the model inside
its original window.

vLLM and SGLang do not read ``attention_factor``: they multiply cosine and sine by sqrt(1 + ln s / ln L0) in both windows
unless ``short_mscale`` and ``long_mscale`` stand in the RoPE keys. transformers warns about the two and ignores them. So
all three are written and say the same.
"""

from dataclasses import replace
from enum import Enum
from typing import Any

from transformers import AutoConfig

from longrope2.errors import FactorsError
from longrope2.rope import UNSCALED_TYPE, RescaleFactors, Window

__all__ = ["ExportVariant", "full_attention_keys", "variant_factors", "variant_keys"]

RESCALING_KEYS = ("rope_scaling", "original_max_position_embeddings")


class ExportVariant(Enum):
    """Which windows' RoPE an exported folder holds."""

    dual = "dual"
    """Both; the engine switches at L0 (transformers does)."""
    long_only = "long_only"
    """The rescaled RoPE at every length, for engines that choose once."""
    short_only = "short_only"
    """The original RoPE and window, for engines that choose once."""

    @property
    def folder_name(self) -> str:
        """Folder inside ``5_exports``."""
        return "hugging_face" if self is ExportVariant.dual else f"hugging_face_{self.value}"


def variant_factors(factors: RescaleFactors, variant: ExportVariant) -> RescaleFactors:
    """What a folder of this variant applies in either window.

    Raises:
        FactorsError: ``dual`` with two attention scales, which no Hugging Face config can say.
    """
    if variant is ExportVariant.long_only:
        return factors.in_both_windows()
    if variant is ExportVariant.short_only:
        return replace(
            factors, factors=factors.window_factors(Window.SHORT), long_attention_scale=factors.short_attention_scale,
            target_len=factors.geometry.original_len, critical_index=None,
            method="none" if factors.short_factors is None else factors.method,
        )  # fmt: skip
    if factors.short_attention_scale != factors.long_attention_scale:
        raise FactorsError(
            f"attention scale is {factors.short_attention_scale} in the short window and "
            f"{factors.long_attention_scale} in the long one ({factors.method}); a Hugging Face longrope config holds a "
            "single attention_factor for both windows. Set export.variants=[long_only,short_only], which hold one window "
            "each, or use factors with one attention scale (longrope2 has 1 in both)"
        )
    return factors


def variant_keys(config: dict[str, Any], factors: RescaleFactors, variant: ExportVariant) -> dict[str, Any]:
    """``config`` with the RoPE keys of a variant; the rest as it is.

    Args:
        config: The base model's config.json.
        factors: What ``variant_factors`` gave.
        variant: The variant.
    """
    kept = {key: value for key, value in config.items() if key not in RESCALING_KEYS}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    keys = factors.to_hf_config(head_dim)
    if variant is ExportVariant.short_only and factors.method == "none" and factors.long_attention_scale == 1:
        # The model as it was: no engine needs to know any rescaling to read it.
        unscaled = {"rope_type": UNSCALED_TYPE, "rope_theta": factors.geometry.rope_base}
        partial = {key: value for key, value in keys.items() if key == "partial_rotary_factor"}
        own = {"max_position_embeddings": factors.target_len, "rope_theta": factors.geometry.rope_base}
        return {**kept, **own, **partial, "rope_parameters": {**unscaled, **partial}}
    magnitudes = {"short_mscale": factors.short_attention_scale, "long_mscale": factors.long_attention_scale}
    for layout in ("rope_scaling", "rope_parameters"):
        keys[layout] = {**keys[layout], **magnitudes}
    return {**kept, **keys}


def full_attention_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Changes to a config.json whose sliding window contradicts the full attention that the model was trained with.

    Asked of the model class, whose default may be a window that config.json does not mention (Mistral).
    """
    if not getattr(AutoConfig.for_model(**config), "sliding_window", None):
        return {}
    changes: dict[str, Any] = {"sliding_window": None}
    if "use_sliding_window" in config:
        changes["use_sliding_window"] = False
    if "layer_types" in config:
        changes["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    return changes
