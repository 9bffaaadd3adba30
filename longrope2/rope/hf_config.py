"""Rescale factors written into a Hugging Face config.json, in the layout before transformers 5 and
the one since.

Where the versions differ (all read in their source):

* 4.x reads ``rope_scaling`` and a top-level ``rope_theta``; 5.x reads ``rope_parameters``, but
  ``rope_scaling`` wins where both stand. So both are written, saying the same.
* The original length is read at the top level only (4.x) or inside with the top level winning
  (5.x): both are written.
* ``attention_factor`` defaults to sqrt(1 + ln s / ln L0) in BOTH windows, which changes the short
  window of the pre-trained model: it is always written.
* ``factor`` wins over the ratio of lengths in 5.x and is replaced by it before: both say s.

Rescale factors read from a published Hugging Face config.json, as transformers would apply them.

``longrope`` holds lists; ``linear``, ``dynamic``, ``yarn`` and ``llama3`` hold the constants of a
closed form, which is computed from the config's own numbers, whatever lengths the caller has in
mind. Three of them are static: transformers applies them at every length, so the short window is
rescaled too and ``short_factors`` says so. ``dynamic`` leaves the short window alone and, beyond
it, depends on the length: the factors are those of the target length.

Both layouts are read, ``rope_parameters`` (transformers 5) and ``rope_scaling`` (before); where
both stand, ``rope_scaling`` wins, as it does there.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import (
    RopeGeometry,
    llama3_bands,
    longrope_attention_scale,
    ntk_aware,
    yarn_attention_scale,
    yarn_ramp,
)

LONGROPE_TYPES = ("longrope", "su")  # "su" is the first name of the type (Phi-3, April 2024)
UNSCALED_TYPE = "default"
READABLE_TYPES = (UNSCALED_TYPE, *LONGROPE_TYPES, "linear", "dynamic", "yarn", "llama3")
ORIGINAL_LEN_KEY = "original_max_position_embeddings"
Default = TypeVar("Default", float, None)


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


def config_rope_type(config: dict[str, Any]) -> str:
    """The config's RoPE type, ``default`` for an unscaled one.

    Raises:
        FactorsError: the config holds a RoPE per layer type.
    """
    return _scaling(config)["rope_type"]


def config_geometry(config: dict[str, Any], original_len: int) -> RopeGeometry:
    """Rotary dimension (``head_dim`` and the rotated part respected) and base, with a pre-trained
    window of ours.

    Raises:
        FactorsError: a key is missing or out of range, or the config holds a RoPE per layer type.
    """
    scaling = _scaling(config)
    rope_base = _rope_base(
        config, scaling
    )  # first: its absence says that the model has no RoPE at all
    return RopeGeometry(_rotary_dim(config, scaling), rope_base, original_len)


def read_factor_fields(
    config: dict[str, Any], original_len: int | None, target_len: int | None
) -> dict[str, Any]:
    """The fields of ``RescaleFactors`` that a config.json holds.

    Args:
        config: Parsed config.json.
        original_len: L0 in tokens; None takes the config's own.
        target_len: L in tokens; None takes the config's own.

    Raises:
        FactorsError: a key is missing or out of range, or the RoPE type is none of
            ``READABLE_TYPES``.
    """
    scaling = _scaling(config)
    rope_type = scaling["rope_type"]
    if rope_type == "yarn" and config.get("model_type") == "phi3":
        rope_type = "longrope"  # as Phi3Config does: early Phi-3 configs called it so
    if rope_type not in READABLE_TYPES:
        raise FactorsError(
            f"the config's RoPE type is {rope_type!r}: factors can be read from {', '.join(READABLE_TYPES)}"
        )
    if original_len is None:
        original_len = _original_len(config, scaling, rope_type)
    if target_len is None:
        target_len = _target_len(config, scaling, rope_type, original_len)
    geometry = RopeGeometry(_rotary_dim(config, scaling), _rope_base(config, scaling), original_len)
    provenance = {"source": "Hugging Face config", "rope_type": rope_type}
    fields = {
        "geometry": geometry,
        "target_len": target_len,
        "method": "from_hf",
        "provenance": provenance,
    }
    if rope_type == UNSCALED_TYPE:
        return {**fields, "factors": (1.0,) * geometry.num_frequencies, "method": "none"}
    if rope_type in LONGROPE_TYPES:
        return {**fields, **_longrope_fields(config, scaling)}
    return {**fields, **_closed_form_fields(config, scaling, rope_type, geometry, target_len)}


def _closed_form_fields(
    config: dict[str, Any],
    scaling: dict[str, Any],
    rope_type: str,
    geometry: RopeGeometry,
    target_len: int,
) -> dict[str, Any]:
    """Factors and attention scale of a type that stores constants."""
    if rope_type == "dynamic":
        # transformers counts from max_position_embeddings, which is the pre-trained window in such
        # configs
        factor, own_len = (
            _number(scaling, "factor"),
            int(_number(config, "max_position_embeddings")),
        )
        return {
            "factors": ntk_aware(
                geometry, factor * max(target_len, own_len) / own_len - (factor - 1)
            )
        }
    attention_scale = 1.0
    if rope_type == "linear":
        factors = (_number(scaling, "factor"),) * geometry.num_frequencies
    else:
        published = RopeGeometry(
            geometry.rotary_dim, geometry.rope_base, _original_len(config, scaling, rope_type)
        )  # the bands are counted in the config's own window
        if rope_type == "llama3":
            bands = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
            factors = llama3_bands(published, _number(scaling, "factor"), *bands)
        else:
            factors, attention_scale = _yarn(config, scaling, published)
    return {
        "factors": factors,
        "short_factors": factors,
        "short_attention_scale": attention_scale,
        "long_attention_scale": attention_scale,
    }


def _yarn(
    config: dict[str, Any], scaling: dict[str, Any], published: RopeGeometry
) -> tuple[tuple[float, ...], float]:
    """YaRN with the config's own betas, rounding and attention weights (DeepSeek has ``mscale`` twice)."""
    if scaling.get("factor") is None:
        scale = _number(config, "max_position_embeddings") / published.original_len
    else:
        scale = _number(scaling, "factor")
    betas = _number_or(scaling, "beta_fast", 32.0), _number_or(scaling, "beta_slow", 1.0)
    truncate = scaling.get("truncate")
    factors = yarn_ramp(
        published, scale, *betas, rounded=True if truncate is None else bool(truncate)
    )
    if scaling.get("attention_factor") is not None:
        return factors, _number(scaling, "attention_factor")
    weight, weight_all_dims = (
        _number_or(scaling, "mscale", None),
        _number_or(scaling, "mscale_all_dim", None),
    )
    if weight is not None and weight_all_dims is not None:
        return factors, yarn_attention_scale(scale, weight) / yarn_attention_scale(
            scale, weight_all_dims
        )
    return factors, yarn_attention_scale(scale)


def _longrope_fields(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Factor lists and attention scales of a longrope config."""
    short_factors = _numbers(scaling, "short_factor")
    return {
        "factors": _numbers(scaling, "long_factor"),
        "short_factors": None if set(short_factors) == {1.0} else short_factors,
        "short_attention_scale": _longrope_scale(config, scaling, "short_mscale"),
        "long_attention_scale": _longrope_scale(config, scaling, "long_mscale"),
    }


def _longrope_scale(config: dict[str, Any], scaling: dict[str, Any], own_key: str) -> float:
    """Multiplier on cos and sin: the window's own key (Phi-3.5-MoE), else the common one, else
    transformers' default.

    The default follows the model's own lengths, not the target asked for: it belongs to the model
    as published.
    """
    for key in (own_key, "attention_factor"):
        if scaling.get(key) is not None:
            return _number(scaling, key)
    own_len = _original_len(config, scaling, "longrope")
    if scaling.get("factor") is None:
        return longrope_attention_scale(
            _number(config, "max_position_embeddings") / own_len, own_len
        )
    return longrope_attention_scale(_number(scaling, "factor"), own_len)


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE keys of either layout, with ``rope_type`` always present."""
    merged: dict[str, Any] = {"rope_type": UNSCALED_TYPE}
    for layout in ("rope_parameters", "rope_scaling"):
        keys = {
            name: value for name, value in (config.get(layout) or {}).items() if value is not None
        }
        nested = sorted(name for name, value in keys.items() if isinstance(value, dict))
        if nested:
            raise FactorsError(
                f"the config has a RoPE per layer type ({', '.join(nested)}); one RoPE for all layers is supported"
            )
        if "type" in keys:
            keys.setdefault("rope_type", keys["type"])
        merged |= keys
    return merged


def _original_len(config: dict[str, Any], scaling: dict[str, Any], rope_type: str) -> int:
    """L0 as transformers 5 finds it: top level first, then inside; an unscaled or dynamic RoPE has its whole window."""
    for place in (config, scaling):
        if (
            rope_type not in (UNSCALED_TYPE, "dynamic", "linear")
            and place.get(ORIGINAL_LEN_KEY) is not None
        ):
            return int(_number(place, ORIGINAL_LEN_KEY))
    if rope_type == "linear":
        raise FactorsError(
            "a config with linear RoPE scaling does not say its pre-trained window; set original_len"
        )
    if rope_type in LONGROPE_TYPES:
        return int(_number(scaling, ORIGINAL_LEN_KEY))
    return int(_number(config, "max_position_embeddings"))


def _target_len(
    config: dict[str, Any], scaling: dict[str, Any], rope_type: str, original_len: int
) -> int:
    """L as published: ``max_position_embeddings``, or what the factor reaches where that says more.

    Qwen's yarn configs leave ``max_position_embeddings`` at L0; Llama 3.1's says 16 times L0 with a
    factor of 8.
    """
    stated = int(_number(config, "max_position_embeddings"))
    if rope_type in (UNSCALED_TYPE, *LONGROPE_TYPES) or scaling.get("factor") is None:
        return stated
    return max(stated, round(_number(scaling, "factor") * original_len))


def _rope_base(config: dict[str, Any], scaling: dict[str, Any]) -> float:
    """rope_theta, inside (transformers 5) or at the top level."""
    return _number(scaling if scaling.get("rope_theta") is not None else config, "rope_theta")


def _rotary_dim(config: dict[str, Any], scaling: dict[str, Any]) -> int:
    """Rotated channels of a head: head_dim (else hidden / heads) times the rotated part."""
    if config.get("head_dim") is not None:
        head_dim = int(_number(config, "head_dim"))
    else:
        head_dim = int(_number(config, "hidden_size")) // int(
            _number(config, "num_attention_heads")
        )
    place = scaling if scaling.get("partial_rotary_factor") is not None else config
    if place.get("partial_rotary_factor") is None:
        return head_dim
    return int(head_dim * _number(place, "partial_rotary_factor"))


def _required(values: dict[str, Any], key: str) -> Any:
    """A value that must stand in the config."""
    if values.get(key) is None:
        raise FactorsError(f"the Hugging Face config has no {key}; add it to config.json")
    return values[key]


def _number(values: dict[str, Any], key: str) -> float:
    """A number above 0 that must stand in the config."""
    value = _required(values, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise FactorsError(
            f"the Hugging Face config has {key}={value!r}; it must be a number above 0"
        )
    return float(value)


def _number_or(values: dict[str, Any], key: str, default: Default) -> float | Default:
    """A number above 0, or the default where it is absent, null or 0 (transformers takes 0 for absent)."""
    return _number(values, key) if values.get(key) else default


def _numbers(values: dict[str, Any], key: str) -> tuple[float, ...]:
    """A list of numbers that must stand in the config; their range is checked by ``RescaleFactors``."""
    given = _required(values, key)
    if not isinstance(given, list) or any(
        isinstance(v, bool) or not isinstance(v, int | float) for v in given
    ):
        raise FactorsError(
            f"the Hugging Face config has {key}={str(given)[:60]}; it must be a list of numbers"
        )
    return tuple(float(value) for value in given)
