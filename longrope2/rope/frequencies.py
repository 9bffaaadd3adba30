"""Rotary frequencies, their periods in tokens, and the two critical dimensions [LongRoPE2, arXiv 2502.20082, sec. 2-3].

Symbols: d = rotary dimension of a head, i = cosine index 0 .. d/2-1, b = RoPE base, theta_i = b^(-2i/d) radians per
token, T_i = 2 pi / theta_i tokens, L0 = pre-trained window in tokens. Dimensions are counted as cosine indices
throughout (the paper's "dimension index" of its figures); two channels of a head share one.

Shape letters: I = cosine indices.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longrope2.errors import FactorsError

__all__ = ["RopeGeometry", "inverse_frequencies", "periods", "ten_period_index", "theoretical_critical_index"]

SHORTEST_ORIGINAL_LEN = 7  # the smallest window beyond one radian-period, 2 pi tokens; below it logarithms change sign


@dataclass(frozen=True)
class RopeGeometry:
    """What decides the rotary frequencies of a pre-trained model.

    Attributes:
        rotary_dim: Rotated channels of a head (head dimension times the rotated part), even.
        rope_base: Base of the frequencies (``rope_theta`` of a Hugging Face config), dimensionless, > 1.
        original_len: L0, pre-trained window in tokens.

    Raises:
        FactorsError: a value outside its range.
    """

    rotary_dim: int
    rope_base: float
    original_len: int

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise FactorsError(f"rotary_dim={self.rotary_dim}: the rotated channels of a head must be even, 2 or more")
        if not (math.isfinite(self.rope_base) and self.rope_base > 1):
            raise FactorsError(f"rope_base={self.rope_base}: the RoPE base must be a finite number above 1")
        if self.original_len < SHORTEST_ORIGINAL_LEN:
            raise FactorsError(
                f"original_len={self.original_len}: the pre-trained window must be at least {SHORTEST_ORIGINAL_LEN} "
                "tokens; set model.original_len"
            )

    @property
    def num_frequencies(self) -> int:
        """Cosine indices of a head, d/2."""
        return self.rotary_dim // 2


def inverse_frequencies(geometry: RopeGeometry) -> Tensor:
    """theta_i = b^(-2i/d) of the unscaled model, shape [I], float64, radians per token."""
    exponents_I = torch.arange(0, geometry.rotary_dim, 2, dtype=torch.float64) / geometry.rotary_dim
    return geometry.rope_base ** (-exponents_I)


def periods(geometry: RopeGeometry) -> Tensor:
    """T_i = 2 pi / theta_i: tokens for one full turn, shape [I], float64."""
    return 2 * math.pi / inverse_frequencies(geometry)


def theoretical_critical_index(geometry: RopeGeometry) -> int:
    """First cosine index that never completes a turn inside L0: ceil((d/2) log_b(L0 / 2 pi))  [sec. 2, TCD].

    Returns:
        An index in [0, d/2]; d/2 means that every dimension completes a turn, so none is out of distribution.
    """
    return _index_with_turns(geometry, turns=1)


def ten_period_index(geometry: RopeGeometry) -> int:
    """First cosine index with fewer than ten turns inside L0: the lower end of the critical-dimension search.

    ceil((d/2) log_b(L0 / (10 * 2 pi)))  [sec. 3.2, Algorithm 1]; in [0, d/2].
    """
    return _index_with_turns(geometry, turns=10)


def _index_with_turns(geometry: RopeGeometry, turns: int) -> int:
    """First index whose period exceeds L0 / turns, clipped to the existing indices."""
    window_ratio = geometry.original_len / (turns * 2 * math.pi)
    index = math.ceil(geometry.num_frequencies * math.log(window_ratio) / math.log(geometry.rope_base))
    return min(max(index, 0), geometry.num_frequencies)
