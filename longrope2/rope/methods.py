"""Rescaling methods as values: PI, NTK, YaRN and the rest, per cosine index.

Each gives lambda_i so that theta'_i = theta_i / lambda_i. The formulas stand in
``closed_forms.py``; here are the methods' names and the constants they are known with.

Symbols: s = L / L0, c = critical index.

What holds on either side of a critical dimension: NTK scaling below it, the out-of-distribution
bound above it.

[LongRoPE2, arXiv 2502.20082, sec. 3.2.] Index convention of this project: the first freely chosen
factor stands AT the critical index c. The paper's Algorithms 1 and 2 slice one lower; the arrays
its authors released do not.
"""

from enum import StrEnum

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import (
    RopeGeometry,
    base_change,
    llama3_bands,
    ntk_at_index,
    ntk_aware,
    ntk_base_ratio,
    yarn_attention_scale,
    yarn_ramp,
    yarn_ramp_to_index,
)

BOUND_TOLERANCE = 1e-9  # relative: a ramp that ends at s may land one rounding below it


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


CLOSED_FORMS = (
    RopeMethod.none,
    RopeMethod.pi,
    RopeMethod.ntk,
    RopeMethod.ntk_aware,
    RopeMethod.dynamic_ntk,
    RopeMethod.yarn,
    RopeMethod.llama3,
)
CRITICAL_INDEX_METHODS = (RopeMethod.yarn_rcd, RopeMethod.ntk_rcd)


def closed_form_factors(
    method: RopeMethod, geometry: RopeGeometry, target_len: int
) -> RescaleFactors:
    """Rescale factors of a method that needs no search.

    Args:
        method: One of ``CLOSED_FORMS``.
        geometry: Rotary geometry of the pre-trained model.
        target_len: L, target window in tokens, at least L0.

    Raises:
        FactorsError: the method has no closed form, or ``target_len`` is below L0.
    """
    scale = _scale(geometry, target_len)
    attention_scale = 1.0
    match method:
        case RopeMethod.none:
            factors = (1.0,) * geometry.num_frequencies
        case RopeMethod.pi:
            factors = (scale,) * geometry.num_frequencies
        case RopeMethod.ntk:
            factors = base_change(geometry, ntk_base_ratio(geometry, target_len))
        case RopeMethod.ntk_aware:
            factors = ntk_aware(geometry, scale)
        case RopeMethod.dynamic_ntk:
            # transformers: (factor * L / L0 - (factor - 1)) in place of s, here with factor = s
            factors = ntk_aware(geometry, scale * scale - (scale - 1))
        case RopeMethod.yarn:
            factors = yarn_ramp(geometry, scale)
            attention_scale = yarn_attention_scale(scale)
        case RopeMethod.llama3:
            factors = llama3_bands(geometry, scale)
        case _:
            allowed = ", ".join(closed_form.value for closed_form in CLOSED_FORMS)
            raise FactorsError(
                f"rope.method={method.value} has no closed form; use one of {allowed}"
            )
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
    """YaRN or NTK with the critical dimension corrected to c, the real one  [LongRoPE2 sec. 4.3,
    Table 5].

    The paper says only that it applies the critical dimension its search found to both methods.
    Chosen here: each method keeps its form and the point it ties to the theoretical critical
    dimension moves to c. NTK's base change gives s at the (real-valued) theoretical index;
    ``ntk_rcd`` gives s at c: lambda_i = s^(i/c). YaRN's ramp ends at the first index with less than
    one turn in L0; ``yarn_rcd`` ends it at c, so lambda_i = s for i >= c. Its beginning, 32 turns
    in L0, is no critical dimension and stays, and so does YaRN's attention scale.

    Args:
        method: ``yarn_rcd`` or ``ntk_rcd``.
        geometry: Rotary geometry of the pre-trained model.
        target_len: L, target window in tokens, at least L0.
        critical_index: c, cosine index; 1 or more for ``ntk_rcd``.

    Raises:
        FactorsError: another method, a critical index outside its range, or ``target_len`` below
            L0.
    """
    scale, last = _scale(geometry, target_len), geometry.num_frequencies - 1
    if not 0 <= critical_index <= last:
        raise FactorsError(f"critical_index={critical_index}: must be a cosine index, 0 .. {last}")
    if method is RopeMethod.yarn_rcd:
        factors, attention_scale = (
            yarn_ramp_to_index(geometry, scale, critical_index),
            yarn_attention_scale(scale),
        )
    elif method is RopeMethod.ntk_rcd:
        factors, attention_scale = ntk_at_index(geometry, scale, critical_index), 1.0
    else:
        allowed = ", ".join(allowed.value for allowed in CRITICAL_INDEX_METHODS)
        raise FactorsError(
            f"rope.method={method.value} takes no critical index; use one of {allowed}"
        )
    return RescaleFactors(
        factors=factors,
        geometry=geometry,
        target_len=target_len,
        method=method.value,
        critical_index=critical_index,
        long_attention_scale=attention_scale,
        provenance={"source": f"closed form with critical index {critical_index}"},
    )


def _scale(geometry: RopeGeometry, target_len: int) -> float:
    """Target length over original length, checked."""
    if target_len < geometry.original_len:
        raise FactorsError(
            f"target_len={target_len} is below original_len={geometry.original_len}; "
            "give a target of at least the pre-trained window"
        )
    return target_len / geometry.original_len


def ntk_part(critical_index: int, critical_factor: float) -> tuple[float, ...]:
    """Factors below the critical index: lambda_i = lambda_c^(i/c) for i < c.

    This is a change of base to b_c = b * lambda_c^(d / (2c)), which gives exactly lambda_c at c
    [sec. 3.2].

    Args:
        critical_index: c, cosine index, >= 0 (0 gives an empty part).
        critical_factor: lambda_c, dimensionless, > 0.

    Returns:
        c factors, the first one 1.

    Raises:
        FactorsError: a value outside its range.
    """
    if critical_index < 0:
        raise FactorsError(f"critical_index={critical_index}: a cosine index is 0 or more")
    if not critical_factor > 0:
        raise FactorsError(
            f"lambda[{critical_index}]={critical_factor}: a rescale factor must be above 0"
        )
    return tuple(critical_factor ** (index / critical_index) for index in range(critical_index))


def satisfies_bound(factors: RescaleFactors, critical_index: int) -> bool:
    """Whether lambda_i >= s for every i >= c: no angle beyond those seen in pre-training [sec. 2,
    OOD bound].

    Args:
        factors: The long window's factors are looked at.
        critical_index: c, the first cosine index the bound applies to.
    """
    return first_out_of_bound(factors, critical_index) is None


def first_out_of_bound(factors: RescaleFactors, critical_index: int) -> int | None:
    """The first index i >= c with lambda_i < s, where the bound of ``satisfies_bound`` is broken; None if it holds."""
    least = factors.scale * (1 - BOUND_TOLERANCE)
    indices = range(critical_index, len(factors.factors))
    return next((i for i in indices if factors.factors[i] < least), None)
