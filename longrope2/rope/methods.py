"""Closed-form rescaling methods as values: PI, NTK, YaRN and the rest, per cosine index.

Each is written as lambda_i so that theta'_i = theta_i / lambda_i; the reference for every one that exists there is
``transformers`` (tests/reference), since well-known codebases disagree, most of all on YaRN's ramp.

Symbols: s = L / L0, d = rotary dimension, b = RoPE base, turns_i = L0 / T_i (turns of dimension i inside L0).
"""

import math
from enum import StrEnum

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry

__all__ = ["RopeMethod", "closed_form_factors"]

YARN_BETA_FAST = 32  # turns in L0 above which YaRN leaves a dimension alone
YARN_BETA_SLOW = 1  # turns in L0 below which YaRN interpolates fully
LLAMA3_LOW_FREQUENCY_TURNS = 1  # Llama 3.1: fewer turns in L0 are interpolated fully
LLAMA3_HIGH_FREQUENCY_TURNS = 4  # Llama 3.1: more turns in L0 are left alone


class RopeMethod(StrEnum):
    """How the long window's RoPE is rescaled. Names equal values, so ``rope.method=yarn`` works in Hydra."""

    none = "none"
    """Unscaled: lambda_i = 1."""
    pi = "pi"
    """Position interpolation: lambda_i = s."""
    ntk = "ntk"
    """The paper's NTK: base b^(ln(L / 2 pi) / ln(L0 / 2 pi)) (Liu et al., scaling laws of RoPE)."""
    ntk_aware = "ntk_aware"
    """The original NTK-aware formula: base b * s^(d / (d - 2))."""
    dynamic_ntk = "dynamic_ntk"
    """``dynamic`` of transformers with factor s, at sequence length L."""
    yarn = "yarn"
    """Ramp by turns between 1 and s, attention scale 0.1 ln s + 1 in the long window."""
    llama3 = "llama3"
    """Wavelength bands of Llama 3.1 with factor s."""
    searched = "searched"
    """Factors that this run's search found; resolved by the loader."""
    from_file = "from_file"
    """Factors read from a file; resolved by the loader."""


def closed_form_factors(method: RopeMethod, geometry: RopeGeometry, target_len: int) -> RescaleFactors:
    """Rescale factors of a method that needs no search.

    Args:
        method: Any method but ``searched`` and ``from_file``.
        geometry: Rotary geometry of the pre-trained model.
        target_len: L, target window in tokens, at least L0.

    Raises:
        FactorsError: the method has no closed form, or ``target_len`` is below L0.
    """
    if target_len < geometry.original_len:
        raise FactorsError(
            f"target_len={target_len} is below original_len={geometry.original_len}; "
            "give a target of at least the pre-trained window"
        )
    scale = target_len / geometry.original_len
    attention_scale = 1.0
    match method:
        case RopeMethod.none:
            factors = (1.0,) * geometry.num_frequencies
        case RopeMethod.pi:
            factors = (scale,) * geometry.num_frequencies
        case RopeMethod.ntk:
            factors = _base_change(geometry, _ntk_base_ratio(geometry, target_len))
        case RopeMethod.ntk_aware:
            factors = _base_change(geometry, scale ** _ntk_aware_exponent(geometry))
        case RopeMethod.dynamic_ntk:
            # transformers: (factor * L / L0 - (factor - 1)) in place of s, here with factor = s
            factors = _base_change(geometry, (scale * scale - (scale - 1)) ** _ntk_aware_exponent(geometry))
        case RopeMethod.yarn:
            factors = _yarn(geometry, scale)
            attention_scale = 0.1 * math.log(scale) + 1.0
        case RopeMethod.llama3:
            factors = _llama3(geometry, scale)
        case _:
            closed_form = [m.value for m in RopeMethod if m not in (RopeMethod.searched, RopeMethod.from_file)]
            raise FactorsError(f"rope.method={method.value} has no closed form; use one of {', '.join(closed_form)}")
    return RescaleFactors(
        factors=factors,
        geometry=geometry,
        target_len=target_len,
        method=method.value,
        long_attention_scale=attention_scale,
        provenance={"source": "closed form"},
    )


def _base_change(geometry: RopeGeometry, base_ratio: float) -> tuple[float, ...]:
    """lambda_i = (b'/b)^(2i/d) of a change of base by ``base_ratio``."""
    return tuple(base_ratio ** (2 * i / geometry.rotary_dim) for i in range(geometry.num_frequencies))


def _ntk_base_ratio(geometry: RopeGeometry, target_len: int) -> float:
    """b'/b of the paper's NTK baseline."""
    exponent = math.log(target_len / (2 * math.pi)) / math.log(geometry.original_len / (2 * math.pi))
    return geometry.rope_base ** (exponent - 1)


def _ntk_aware_exponent(geometry: RopeGeometry) -> float:
    """Exponent d / (d - 2); the last dimension then gets exactly the factor it is raised from."""
    if geometry.rotary_dim == 2:
        raise FactorsError("rotary_dim=2: NTK-aware scaling divides by rotary_dim - 2; use another rope.method")
    return geometry.rotary_dim / (geometry.rotary_dim - 2)


def _yarn(geometry: RopeGeometry, scale: float) -> tuple[float, ...]:
    """YaRN's ramp [arXiv 2309.00071, sec. 3.2], bounds rounded outward and clipped as transformers does."""
    low = max(math.floor(_fractional_index(geometry, YARN_BETA_FAST)), 0)
    high = min(math.ceil(_fractional_index(geometry, YARN_BETA_SLOW)), geometry.rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(geometry.num_frequencies)]
    return tuple(1.0 / (part / scale + (1.0 - part)) for part in ramp)


def _fractional_index(geometry: RopeGeometry, turns: float) -> float:
    """The real-valued cosine index that completes ``turns`` turns inside L0."""
    window_ratio = geometry.original_len / (turns * 2 * math.pi)
    return geometry.num_frequencies * math.log(window_ratio) / math.log(geometry.rope_base)


def _llama3(geometry: RopeGeometry, scale: float) -> tuple[float, ...]:
    """Llama 3.1: s below one turn in L0, 1 above four, in between a ramp in the frequency (not in lambda)."""
    low, high = LLAMA3_LOW_FREQUENCY_TURNS, LLAMA3_HIGH_FREQUENCY_TURNS
    factors = []
    for i in range(geometry.num_frequencies):
        turns = geometry.original_len / (2 * math.pi * geometry.rope_base ** (2 * i / geometry.rotary_dim))
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - kept) / scale + kept))
    return tuple(factors)
