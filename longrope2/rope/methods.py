"""Rescaling methods as values: PI, NTK, YaRN and the rest, per cosine index.

Each gives lambda_i so that theta'_i = theta_i / lambda_i, by the formulas of ``frequencies.py``.
NTK scaling holds below a critical dimension, the out-of-distribution bound above it [LongRoPE2,
arXiv 2502.20082, sec. 3.2]. The first freely chosen factor stands AT the critical index c: the
paper's Algorithms 1 and 2 slice one lower; the arrays its authors released do not.

Symbols: s = L / L0, c = critical index.
"""

from enum import StrEnum

from longrope2.errors import FactorsError
from longrope2.rope import frequencies
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry

# Relative: a ramp that ends at s may land one rounding below it.
BOUND_TOLERANCE = 1e-9


class RopeMethod(StrEnum):
    """How the long window's RoPE is rescaled; names equal values, for ``rope.method=yarn``."""

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
    yarn_rcd = "yarn_rcd"
    """YaRN with the real critical dimension that a search found."""
    ntk_rcd = "ntk_rcd"
    """NTK with the real critical dimension that a search found."""
    searched = "searched"
    """Factors that this run's search found; resolved by the loader."""
    from_file = "from_file"
    """Factors read from a JSON or CSV file; resolved by the loader."""
    from_hf = "from_hf"
    """Factors read from a Hugging Face config; resolved by the loader."""


_CLOSED_FORM_NAMES = ("none", "pi", "ntk", "ntk_aware", "dynamic_ntk", "yarn", "llama3")
CLOSED_FORMS = tuple(map(RopeMethod, _CLOSED_FORM_NAMES))
CRITICAL_INDEX_METHODS = (RopeMethod.yarn_rcd, RopeMethod.ntk_rcd)


def closed_form_factors(
    method: RopeMethod, geometry: RopeGeometry, target_len: int
) -> RescaleFactors:
    """Rescale factors of a method that needs no search, for a target window in tokens.

    Raises:
        FactorsError: the method has no closed form, or ``target_len`` is below L0.
    """
    scale = geometry.scale_to(target_len)
    attention_scale = 1.0
    match method:
        case RopeMethod.none:
            factors = (1.0,) * geometry.num_frequencies
        case RopeMethod.pi:
            factors = (scale,) * geometry.num_frequencies
        case RopeMethod.ntk:
            factors = frequencies.base_change(
                geometry, frequencies.ntk_base_ratio(geometry, target_len)
            )
        case RopeMethod.ntk_aware:
            factors = frequencies.ntk_aware(geometry, scale)
        case RopeMethod.dynamic_ntk:
            # transformers: (factor * L / L0 - (factor - 1)) in place of s, here with factor = s
            factors = frequencies.ntk_aware(geometry, scale * scale - (scale - 1))
        case RopeMethod.yarn:
            factors = frequencies.yarn_ramp(geometry, scale)
            attention_scale = frequencies.yarn_attention_scale(scale)
        case RopeMethod.llama3:
            factors = frequencies.llama3_bands(geometry, scale)
        case _:
            allowed = ", ".join(CLOSED_FORMS)
            raise FactorsError(f"rope.method={method} has no closed form; use one of {allowed}")
    return RescaleFactors(
        factors=factors,
        geometry=geometry,
        target_len=target_len,
        method=method.value,
        long_attention_scale=attention_scale,
        provenance={"source": "closed form"},
    )


def critical_index_factors(
    method: RopeMethod, geometry: RopeGeometry, target_len: int, critical_index: int
) -> RescaleFactors:
    """YaRN or NTK with the critical dimension corrected to c  [LongRoPE2 sec. 4.3, Table 5].

    The paper says only that it applies the critical dimension its search found to both methods.
    Chosen here: each method keeps its form and the point it ties to the theoretical critical
    dimension moves to c. NTK's base change gives s at the (real-valued) theoretical index;
    ``ntk_rcd`` gives s at c: lambda_i = s^(i/c). YaRN's ramp ends at the first index with less than
    one turn in L0; ``yarn_rcd`` ends it at c, so lambda_i = s for i >= c. Its beginning, 32 turns
    in L0, is no critical dimension and stays, and so does YaRN's attention scale.

    Raises:
        FactorsError: another method, a critical index out of range, or ``target_len`` below L0.
    """
    scale = geometry.scale_to(target_len)
    geometry.check_critical_index(critical_index)
    if method is RopeMethod.yarn_rcd:
        factors = frequencies.yarn_ramp_to_index(geometry, scale, critical_index)
        attention_scale = frequencies.yarn_attention_scale(scale)
    elif method is RopeMethod.ntk_rcd:
        factors, attention_scale = frequencies.ntk_at_index(geometry, scale, critical_index), 1.0
    else:
        allowed = ", ".join(CRITICAL_INDEX_METHODS)
        raise FactorsError(f"rope.method={method} takes no critical index; use one of {allowed}")
    return RescaleFactors(
        factors=factors,
        geometry=geometry,
        target_len=target_len,
        method=method.value,
        critical_index=critical_index,
        long_attention_scale=attention_scale,
        provenance={"source": f"closed form with critical index {critical_index}"},
    )


def ntk_part(critical_index: int, critical_factor: float) -> tuple[float, ...]:
    """Factors below the critical index: lambda_i = lambda_c^(i/c) for i < c.

    This is a change of base to b_c = b * lambda_c^(d / (2c)), which gives exactly lambda_c at c
    [sec. 3.2].

    Raises:
        FactorsError: c below 0 (0 gives an empty part), or lambda_c not above 0.
    """
    if critical_index < 0:
        raise FactorsError(f"critical_index={critical_index}: a cosine index is 0 or more")
    if not critical_factor > 0:
        fault = f"lambda[{critical_index}]={critical_factor}: a rescale factor must be above 0"
        raise FactorsError(fault)
    return tuple(critical_factor ** (index / critical_index) for index in range(critical_index))


def first_out_of_bound(factors: RescaleFactors, critical_index: int) -> int | None:
    """The first index i >= c with lambda_i < s in the long window; None where the bound holds.

    With lambda_i >= s for every i >= c no angle is beyond those of pre-training [sec. 2].
    """
    least = factors.scale * (1 - BOUND_TOLERANCE)
    indices = range(critical_index, len(factors.factors))
    return next((i for i in indices if factors.factors[i] < least), None)
