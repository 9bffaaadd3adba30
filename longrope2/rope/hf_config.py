"""Rescale factors in a Hugging Face config.json, in the layout before transformers 5 and the one since.

Where the versions differ (all read in their source):

* 4.x reads ``rope_scaling`` and a top-level ``rope_theta``; 5.x reads ``rope_parameters``, but ``rope_scaling`` wins
  where both stand. So both are written, saying the same.
* The original length is read at the top level only (4.x) or inside with the top level winning (5.x): both are written.
* ``attention_factor`` defaults to sqrt(1 + ln s / ln L0) in BOTH windows, which changes the short window of the
  pre-trained model: it is always written.
* ``factor`` wins over the ratio of lengths in 5.x and is replaced by it before: both say s.
"""

import math
from collections.abc import Sequence
from typing import Any

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import RopeGeometry

__all__ = ["longrope_keys", "read_longrope_keys"]

LONGROPE_TYPES = ("longrope", "su")  # "su" is the first name of the type (Phi-3, April 2024)
UNSCALED_TYPES = ("default", None)


def longrope_keys(
    *,
    short_factors: Sequence[float],
    long_factors: Sequence[float],
    geometry: RopeGeometry,
    target_len: int,
    attention_scale: float,
    head_dim: int | None,
) -> dict[str, Any]:
    """Top-level keys of a config.json whose RoPE is Hugging Face's ``longrope`` with these factors."""
    scaling = {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": list(short_factors),
        "long_factor": list(long_factors),
        "factor": target_len / geometry.original_len,
        "attention_factor": attention_scale,
        "original_max_position_embeddings": geometry.original_len,
    }
    partial = {}
    if head_dim is not None and head_dim != geometry.rotary_dim:
        partial = {"partial_rotary_factor": geometry.rotary_dim / head_dim}
    return {
        "rope_theta": geometry.rope_base,
        "max_position_embeddings": target_len,
        "original_max_position_embeddings": geometry.original_len,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": geometry.rope_base, **partial},
        **partial,
    }


def read_longrope_keys(config: dict[str, Any], original_len: int | None, target_len: int | None) -> dict[str, Any]:
    """The fields of ``RescaleFactors`` that a config.json holds.

    Raises:
        FactorsError: a key is missing, or the RoPE type is neither longrope nor unscaled.
    """
    scaling = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    rope_type = scaling.get("rope_type", scaling.get("type"))
    if rope_type not in (*LONGROPE_TYPES, *UNSCALED_TYPES):
        raise FactorsError(
            f"the config's RoPE type is {rope_type!r}: factors can be read from longrope, su or an unscaled RoPE; "
            "for a closed-form method set rope.method instead"
        )
    if original_len is None:
        original_len = _original_len(config, scaling, rope_type)
    geometry = RopeGeometry(_rotary_dim(config, scaling), _rope_base(config, scaling), original_len)
    fields = {
        "geometry": geometry,
        "target_len": _required(config, "max_position_embeddings") if target_len is None else target_len,
        "provenance": {"source": "Hugging Face config", "rope_type": str(rope_type)},
    }
    if rope_type in UNSCALED_TYPES:
        return {**fields, "factors": (1.0,) * geometry.num_frequencies, "method": "none"}
    return {**fields, **_longrope_fields(config, scaling, geometry)}


def _longrope_fields(config: dict[str, Any], scaling: dict[str, Any], geometry: RopeGeometry) -> dict[str, Any]:
    """Factor lists and attention scales of a longrope config."""
    short_factors = tuple(float(value) for value in _required(scaling, "short_factor"))
    return {
        "factors": tuple(float(value) for value in _required(scaling, "long_factor")),
        "short_factors": None if set(short_factors) == {1.0} else short_factors,
        "short_attention_scale": _attention_scale(config, scaling, geometry, "short_mscale"),
        "long_attention_scale": _attention_scale(config, scaling, geometry, "long_mscale"),
        "method": "from_hf",
    }


def _attention_scale(config: dict[str, Any], scaling: dict[str, Any], geometry: RopeGeometry, own_key: str) -> float:
    """Multiplier on cos and sin: the window's own key (Phi-3.5-MoE), else the common one, else transformers' default.

    The default follows the model's own lengths, not the target asked for: it belongs to the model as published.
    """
    for key in (own_key, "attention_factor"):
        if scaling.get(key) is not None:
            return float(scaling[key])
    published_original_len = _original_len(config, scaling, "longrope")
    scale = scaling.get("factor") or _required(config, "max_position_embeddings") / published_original_len
    if scale <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scale) / math.log(published_original_len))


def _original_len(config: dict[str, Any], scaling: dict[str, Any], rope_type: str | None) -> int:
    """L0 as transformers 5 finds it: top level first, then inside; an unscaled RoPE has its whole window."""
    if rope_type in UNSCALED_TYPES:
        return _required(config, "max_position_embeddings")
    key = "original_max_position_embeddings"
    return int(config[key]) if config.get(key) is not None else int(_required(scaling, key))


def _rope_base(config: dict[str, Any], scaling: dict[str, Any]) -> float:
    """rope_theta, inside (transformers 5) or at the top level."""
    return float(scaling["rope_theta"] if scaling.get("rope_theta") is not None else _required(config, "rope_theta"))


def _rotary_dim(config: dict[str, Any], scaling: dict[str, Any]) -> int:
    """Rotated channels of a head: head_dim (else hidden / heads) times the rotated part."""
    head_dim = config.get("head_dim")
    if head_dim is None:
        head_dim = _required(config, "hidden_size") // _required(config, "num_attention_heads")
    rotated_part = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return int(head_dim * (1.0 if rotated_part is None else rotated_part))


def _required(values: dict[str, Any], key: str) -> Any:
    """A value that must stand in the config."""
    if values.get(key) is None:
        raise FactorsError(f"the Hugging Face config has no {key}; add it to config.json")
    return values[key]
