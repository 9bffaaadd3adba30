"""What holds on either side of a critical dimension: NTK scaling below it, the out-of-distribution bound above it.

[LongRoPE2, arXiv 2502.20082, sec. 3.2.] Index convention of this project: the first freely chosen factor stands AT the
critical index c. The paper's Algorithms 1 and 2 slice one lower; the arrays its authors released do not.
"""

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors

__all__ = ["first_out_of_bound", "ntk_part", "satisfies_bound"]

BOUND_TOLERANCE = 1e-9  # relative: a ramp that ends at s may land one rounding below it


def ntk_part(critical_index: int, critical_factor: float) -> tuple[float, ...]:
    """Factors below the critical index: lambda_i = lambda_c^(i/c) for i < c.

    This is a change of base to b_c = b * lambda_c^(d / (2c)), which gives exactly lambda_c at c [sec. 3.2].

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
        raise FactorsError(f"lambda[{critical_index}]={critical_factor}: a rescale factor must be above 0")
    return tuple(critical_factor ** (index / critical_index) for index in range(critical_index))


def satisfies_bound(factors: RescaleFactors, critical_index: int) -> bool:
    """Whether lambda_i >= s for every i >= c: no angle beyond those seen in pre-training [sec. 2, OOD bound].

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
