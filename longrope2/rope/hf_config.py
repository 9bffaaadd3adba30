"""Rescale factors in a Hugging Face config.json: written for transformers, read as it applies them.

Both layouts are written and read, ``rope_parameters`` (transformers 5) and ``rope_scaling`` with a
top-level ``rope_theta`` (before). Where the versions differ (all read in their source):

* ``rope_scaling`` wins in 5.x where both stand. So both are written, saying the same.
* The original length is read at the top level only (4.x) or inside with the top level winning
  (5.x): both are written.
* ``attention_factor`` defaults to sqrt(1 + ln s / ln L0) in BOTH windows, which changes the short
  window of the pre-trained model: it is always written.
* ``factor`` wins over the ratio of lengths in 5.x and is replaced by it before: both say s.

``longrope`` holds lists; the others the constants of a closed form, computed from the config's own
numbers. ``linear``, ``yarn`` and ``llama3`` are static: transformers applies them at every length,
so the short window is rescaled too and ``short_factors`` says so. ``dynamic`` leaves the short
window alone; beyond it the factors are those of the target length.
"""

from dataclasses import replace
from typing import Any

from longrope2.errors import FactorsError
from longrope2.rope import frequencies
from longrope2.rope.factors import RescaleFactors, Window, is_number, read_factor_list
from longrope2.rope.frequencies import RopeGeometry

# "su" is the first name of the type (Phi-3, April 2024).
LONGROPE_TYPES = ("longrope", "su")
UNSCALED_TYPE = "default"
READABLE_TYPES = (UNSCALED_TYPE, *LONGROPE_TYPES, "linear", "dynamic", "yarn", "llama3")
ORIGINAL_LEN_KEY = "original_max_position_embeddings"
MAX_LEN_KEY = "max_position_embeddings"


def to_hf_config(factors: RescaleFactors, head_dim: int | None = None) -> dict[str, Any]:
    """Keys to merge into a config.json so that plain transformers applies these factors.

    ``head_dim``, the channels of a head, is needed where only a part of them is rotated
    (Phi-4-mini): it makes ``partial_rotary_factor``.

    Raises:
        FactorsError: the attention scale of the two windows differs.
    """
    short_scale, long_scale = factors.short_attention_scale, factors.long_attention_scale
    if short_scale != long_scale:
        raise FactorsError(
            f"attention scale is {short_scale} in the short window and {long_scale} in the long "
            "one; a Hugging Face longrope config holds a single attention_factor for both. Use "
            "factors with one attention scale (longrope2 has 1 in both)"
        )
    geometry = factors.geometry
    scaling = {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": list(factors.window_factors(Window.SHORT)),
        "long_factor": list(factors.factors),
        "factor": factors.scale,
        "attention_factor": long_scale,
        ORIGINAL_LEN_KEY: geometry.original_len,
    }
    partial = {}
    if head_dim is not None and head_dim != geometry.rotary_dim:
        partial = {"partial_rotary_factor": geometry.rotary_dim / head_dim}
    return {
        "rope_theta": geometry.rope_base,
        MAX_LEN_KEY: factors.target_len,
        ORIGINAL_LEN_KEY: geometry.original_len,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": geometry.rope_base, **partial},
        **partial,
    }


def from_hf_config(
    config: dict[str, Any],
    original_len: int | None = None,
    target_len: int | None = None,
    rotary: tuple[int, float] | None = None,
) -> RescaleFactors:
    """The factors of a config.json, of one of ``READABLE_TYPES``.

    Lengths in tokens that are None are the config's own: L0, which ``linear`` does not have, and
    ``max_position_embeddings``, or factor times L0 where that is more. ``rotary`` is the rotary
    dimension and base of the model's class; None reads them from the config's keys.

    Raises:
        FactorsError: a key is missing or out of range, or the RoPE type is another one.
    """
    scaling = _scaling(config)
    rope_type = scaling["rope_type"]
    if rope_type == "yarn" and config.get("model_type") == "phi3":
        rope_type = "longrope"  # as Phi3Config does: early Phi-3 configs called it so
    if rope_type not in READABLE_TYPES:
        fault = f"the config's RoPE type is {rope_type!r}"
        raise FactorsError(f"{fault}: factors can be read from {', '.join(READABLE_TYPES)}")
    if original_len is None:
        original_len = _original_len(config, scaling, rope_type)
    if target_len is None:
        target_len = _target_len(config, scaling, rope_type, original_len)
    if rotary is None:
        geometry = config_geometry(config, original_len)
    else:
        geometry = RopeGeometry(*rotary, original_len)
    if rope_type == UNSCALED_TYPE:
        fields: dict[str, Any] = {"factors": (1.0,) * geometry.num_frequencies}
    elif rope_type in LONGROPE_TYPES:
        fields = _longrope_fields(config, scaling)
    else:
        fields = _closed_form_fields(config, rope_type, geometry, target_len)
    return RescaleFactors(
        geometry=geometry,
        target_len=target_len,
        method="none" if rope_type == UNSCALED_TYPE else "from_hf",
        provenance={"source": "Hugging Face config", "rope_type": rope_type},
        **fields,
    )


def config_rope_type(config: dict[str, Any]) -> str:
    """The config's RoPE type, ``default`` for an unscaled one.

    Raises:
        FactorsError: the config holds a RoPE per layer type.
    """
    return _scaling(config)["rope_type"]


def config_geometry(config: dict[str, Any], original_len: int) -> RopeGeometry:
    """Rotary dimension and base of the config, with a pre-trained window of ours.

    The dimension is head_dim (else hidden / heads) times the rotated part.

    Raises:
        FactorsError: a key is missing or out of range, or the config holds a RoPE per layer type.
    """
    keys = {**config, **_scaling(config)}
    # First: its absence says that the model has no RoPE at all.
    rope_base = _number(keys, "rope_theta")
    if keys.get("head_dim") is not None:
        head_dim = int(_number(keys, "head_dim"))
    else:
        head_dim = int(_number(keys, "hidden_size")) // int(_number(keys, "num_attention_heads"))
    if keys.get("partial_rotary_factor") is None:
        return RopeGeometry(head_dim, rope_base, original_len)
    rotary_dim = int(head_dim * _number(keys, "partial_rotary_factor"))
    return RopeGeometry(rotary_dim, rope_base, original_len)


def _closed_form_fields(
    config: dict[str, Any], rope_type: str, geometry: RopeGeometry, target_len: int
) -> dict[str, Any]:
    """Factors and attention scale of a type that stores constants."""
    scaling = _scaling(config)
    if rope_type == "dynamic":
        # transformers counts from max_position_embeddings, in such configs the pre-trained window.
        factor, own_len = _number(scaling, "factor"), int(_number(config, MAX_LEN_KEY))
        last_factor = factor * max(target_len, own_len) / own_len - (factor - 1)
        return {"factors": frequencies.ntk_aware(geometry, last_factor)}
    attention_scale = 1.0
    if rope_type == "linear":
        factors = (_number(scaling, "factor"),) * geometry.num_frequencies
    else:
        # The bands are counted in the config's own window.
        published = replace(geometry, original_len=_original_len(config, scaling, rope_type))
        if rope_type == "llama3":
            bands = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
            factors = frequencies.llama3_bands(published, _number(scaling, "factor"), *bands)
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
    """YaRN by the config's own betas, rounding and attention weights (DeepSeek: two ``mscale``)."""
    scale = _scale(config, scaling, published.original_len)
    betas = _optional(scaling, "beta_fast") or 32.0, _optional(scaling, "beta_slow") or 1.0
    rounded = bool(scaling.get("truncate", True))
    factors = frequencies.yarn_ramp(published, scale, *betas, rounded=rounded)
    if "attention_factor" in scaling:
        return factors, _number(scaling, "attention_factor")
    weight, weight_all_dims = _optional(scaling, "mscale"), _optional(scaling, "mscale_all_dim")
    if weight is None or weight_all_dims is None:
        return factors, frequencies.yarn_attention_scale(scale)
    of_all_dims = frequencies.yarn_attention_scale(scale, weight_all_dims)
    return factors, frequencies.yarn_attention_scale(scale, weight) / of_all_dims


def _scale(config: dict[str, Any], scaling: dict[str, Any], own_len: int) -> float:
    """The config's own s: its ``factor``, else the ratio of its lengths."""
    if "factor" in scaling:
        return _number(scaling, "factor")
    return _number(config, MAX_LEN_KEY) / own_len


def _longrope_fields(config: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    short_factors, long_factors = (
        read_factor_list(_required(scaling, key), key, "the Hugging Face config has")
        for key in ("short_factor", "long_factor")
    )
    return {
        "factors": long_factors,
        "short_factors": None if set(short_factors) == {1.0} else short_factors,
        "short_attention_scale": _longrope_scale(config, scaling, "short_mscale"),
        "long_attention_scale": _longrope_scale(config, scaling, "long_mscale"),
    }


def _longrope_scale(config: dict[str, Any], scaling: dict[str, Any], own_key: str) -> float:
    """Multiplier on cos and sin: the window's own key (Phi-3.5-MoE), the common one, the default.

    transformers' default follows the model's own lengths, not the target asked for: it belongs to
    the model as published.
    """
    for key in (own_key, "attention_factor"):
        if key in scaling:
            return _number(scaling, key)
    own_len = _original_len(config, scaling, "longrope")
    return frequencies.longrope_attention_scale(_scale(config, scaling, own_len), own_len)


def _scaling(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE keys of either layout that are not null, ``rope_type`` always among them."""
    merged: dict[str, Any] = {"rope_type": UNSCALED_TYPE}
    for layout in ("rope_parameters", "rope_scaling"):
        given = {} if config.get(layout) is None else config[layout]
        if not isinstance(given, dict):
            raise FactorsError(f"the config has {layout}={given!r}; it must be an object")
        keys = {name: value for name, value in given.items() if value is not None}
        if nested := sorted(name for name, value in keys.items() if isinstance(value, dict)):
            fault = f"the config has a RoPE per layer type ({', '.join(nested)})"
            raise FactorsError(f"{fault}; one RoPE for all layers is supported")
        if "type" in keys:
            keys.setdefault("rope_type", keys["type"])
        merged |= keys
    return merged


def _original_len(config: dict[str, Any], scaling: dict[str, Any], rope_type: str) -> int:
    """L0 as transformers 5 finds it: top level first, then inside."""
    if rope_type == "linear":
        fault = "a config with linear RoPE scaling does not say its pre-trained window"
        raise FactorsError(f"{fault}; set original_len")
    if rope_type not in (UNSCALED_TYPE, "dynamic"):  # these two have their whole window
        for place in (config, scaling):
            if place.get(ORIGINAL_LEN_KEY) is not None:
                return int(_number(place, ORIGINAL_LEN_KEY))
    if rope_type in LONGROPE_TYPES:
        return int(_number(scaling, ORIGINAL_LEN_KEY))
    return int(_number(config, MAX_LEN_KEY))


def _target_len(
    config: dict[str, Any], scaling: dict[str, Any], rope_type: str, original_len: int
) -> int:
    """L as published: ``max_position_embeddings``, or what the factor reaches where that says more.

    Qwen's yarn configs leave ``max_position_embeddings`` at L0; Llama 3.1's says 16 times L0 with a
    factor of 8.
    """
    stated = int(_number(config, MAX_LEN_KEY))
    if rope_type in (UNSCALED_TYPE, *LONGROPE_TYPES) or "factor" not in scaling:
        return stated
    return max(stated, round(_number(scaling, "factor") * original_len))


def _required(values: dict[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise FactorsError(f"the Hugging Face config has no {key}; add it to config.json")
    return values[key]


def _number(values: dict[str, Any], key: str) -> float:
    """A number above 0 that must stand in the config."""
    value = _required(values, key)
    if not is_number(value) or not value > 0:
        fault = f"the Hugging Face config has {key}={value!r}; it must be a number above 0"
        raise FactorsError(fault)
    return float(value)


def _optional(values: dict[str, Any], key: str) -> float | None:
    """A number above 0, or None for none, null and 0, which transformers takes for none."""
    return _number(values, key) if values.get(key) else None
