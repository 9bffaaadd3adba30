"""Rotary frequencies, critical dimensions, and the formulas that rescale them.

[LongRoPE2, arXiv 2502.20082, sec. 2-3.] Each formula takes a geometry and gives lambda_i, one per
cosine index. Methods choose their usual constants (``methods.py``), a published config brings its
own (``hf_config.py``). Where ``transformers`` has the method, it is the reference
(tests/reference): well-known codebases disagree, most of all on YaRN's ramp.

Symbols: d = rotary dimension of a head, i = cosine index 0 .. d/2-1, b = RoPE base, theta_i =
b^(-2i/d) radians per token, T_i = 2 pi / theta_i tokens, L0 = pre-trained window in tokens, s =
scale, c = critical index, turns_i = L0 / T_i. Dimensions are counted as cosine indices throughout
(the paper's "dimension index" of its figures); two channels of a head share one.

Shape letters: I = cosine indices.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrope2.errors import FactorsError

if TYPE_CHECKING:
    from torch import Tensor

# The smallest window beyond one radian-period, 2 pi tokens; below it logarithms change sign.
SHORTEST_ORIGINAL_LEN = 7
# Turns in L0 above which YaRN leaves a dimension alone.
YARN_BETA_FAST = 32.0


@dataclass(frozen=True)
class RopeGeometry:
    """What decides the rotary frequencies of a pre-trained model.

    Attributes:
        rotary_dim: Rotated channels of a head (head dimension times the rotated part), even.
        rope_base: Base of the frequencies (``rope_theta`` of a Hugging Face config), > 1.
        original_len: L0, pre-trained window in tokens.

    Raises:
        FactorsError: a value outside its range.
    """

    rotary_dim: int
    rope_base: float
    original_len: int

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            fault = f"rotary_dim={self.rotary_dim}"
            raise FactorsError(f"{fault}: the rotated channels of a head must be even, 2 or more")
        if not (math.isfinite(self.rope_base) and self.rope_base > 1):
            fault = f"rope_base={self.rope_base}: the RoPE base must be a finite number above 1"
            raise FactorsError(fault)
        if self.original_len < SHORTEST_ORIGINAL_LEN:
            fault = f"original_len={self.original_len}: the pre-trained window must be at least"
            raise FactorsError(f"{fault} {SHORTEST_ORIGINAL_LEN} tokens; set model.original_len")

    @property
    def num_frequencies(self) -> int:
        """Cosine indices of a head, d/2."""
        return self.rotary_dim // 2

    def scale_to(self, target_len: int) -> float:
        """Scale L / L0 of a target window in tokens; FactorsError when it is below 1."""
        if target_len < self.original_len:
            fault = f"target_len={target_len} is below original_len={self.original_len}"
            raise FactorsError(f"{fault}; give a target of at least the pre-trained window")
        return target_len / self.original_len

    def check_critical_index(self, index: int) -> None:
        """Raise FactorsError unless ``index`` is a cosine index."""
        if not 0 <= index < self.num_frequencies:
            last = self.num_frequencies - 1
            raise FactorsError(f"critical_index={index}: must be a cosine index, 0 .. {last}")


def periods(geometry: RopeGeometry) -> "Tensor":
    """T_i = 2 pi b^(2i/d): tokens for one full turn, unscaled, shape [I], float64."""
    import torch  # loads for seconds; a configuration is checked without it

    exponents_I = torch.arange(0, geometry.rotary_dim, 2, dtype=torch.float64) / geometry.rotary_dim
    return 2 * math.pi / geometry.rope_base ** (-exponents_I)


def theoretical_critical_index(geometry: RopeGeometry) -> int:
    """First index that never completes a turn inside L0: ceil((d/2) log_b(L0 / 2 pi))  [sec. 2].

    In [0, d/2]; d/2 means that every dimension completes a turn, so none is out of distribution.
    """
    return _first_below(geometry, turns=1)


def ten_period_index(geometry: RopeGeometry) -> int:
    """First index with fewer than ten turns inside L0, where the search for c begins.

    ceil((d/2) log_b(L0 / (10 * 2 pi)))  [sec. 3.2, Algorithm 1]; in [0, d/2].
    """
    return _first_below(geometry, turns=10)


def _first_below(geometry: RopeGeometry, turns: int) -> int:
    """First index whose period exceeds L0 / turns, clipped to the existing indices."""
    return min(max(math.ceil(index_with_turns(geometry, turns)), 0), geometry.num_frequencies)


def index_with_turns(geometry: RopeGeometry, turns: float) -> float:
    """The real-valued cosine index that completes ``turns`` turns inside L0."""
    window_ratio = geometry.original_len / (turns * 2 * math.pi)
    return geometry.num_frequencies * math.log(window_ratio) / math.log(geometry.rope_base)


def base_change(geometry: RopeGeometry, base_ratio: float) -> tuple[float, ...]:
    """lambda_i = (b'/b)^(2i/d) of a change of base by ``base_ratio`` = b'/b."""
    indices = range(geometry.num_frequencies)
    return tuple(base_ratio ** (2 * i / geometry.rotary_dim) for i in indices)


def ntk_base_ratio(geometry: RopeGeometry, target_len: int) -> float:
    """b'/b of the paper's NTK: b' = b^(ln(L / 2 pi) / ln(L0 / 2 pi))  [sec. 2.3, Liu et al.]."""
    log_target, log_original = (
        math.log(length / (2 * math.pi)) for length in (target_len, geometry.original_len)
    )
    return geometry.rope_base ** (log_target / log_original - 1)


def ntk_aware(geometry: RopeGeometry, last_factor: float) -> tuple[float, ...]:
    """Base change b' = b * x^(d / (d - 2)), which gives the last dimension exactly the factor x.

    Raises:
        FactorsError: two rotated channels, for which the exponent does not exist.
    """
    if geometry.rotary_dim == 2:
        fault = "rotary_dim=2: NTK-aware scaling divides by rotary_dim - 2; use another rope.method"
        raise FactorsError(fault)
    return base_change(geometry, last_factor ** (geometry.rotary_dim / (geometry.rotary_dim - 2)))


def ntk_at_index(geometry: RopeGeometry, scale: float, critical_index: int) -> tuple[float, ...]:
    """Base change that meets the bound exactly at c: lambda_i = s^(i/c), above s beyond it.

    Raises:
        FactorsError: c is 0, where no change of base gives a factor other than 1.
    """
    if critical_index < 1:
        fault = f"critical_index={critical_index}: a change of base leaves index 0 alone"
        raise FactorsError(f"{fault}; give 1 or more")
    return tuple(scale ** (i / critical_index) for i in range(geometry.num_frequencies))


def yarn_ramp(
    geometry: RopeGeometry,
    scale: float,
    beta_fast: float = YARN_BETA_FAST,
    beta_slow: float = 1.0,
    rounded: bool = True,
) -> tuple[float, ...]:
    """YaRN's ramp [arXiv 2309.00071, sec. 3.2]: 1 above ``beta_fast`` turns, s below ``beta_slow``.

    Turns are counted in the geometry's original length. ``rounded`` rounds both ends outward to
    whole indices (``truncate`` of transformers).
    """
    low, high = yarn_ends(geometry, beta_fast, beta_slow, rounded)
    return _ramp(low, high - low, scale, geometry.num_frequencies)


def yarn_ends(
    geometry: RopeGeometry,
    beta_fast: float = YARN_BETA_FAST,
    beta_slow: float = 1.0,
    rounded: bool = True,
) -> tuple[float, float]:
    """Cosine indices where YaRN's ramp begins and ends; see ``yarn_ramp``."""
    low, high = (index_with_turns(geometry, turns) for turns in (beta_fast, beta_slow))
    if rounded:
        low, high = math.floor(low), math.ceil(high)
    # The upper clip is transformers' own, twice too far.
    low, high = max(low, 0), min(high, geometry.rotary_dim - 1)
    return low, high if high != low else low + 0.001


def yarn_ramp_to_index(geometry: RopeGeometry, scale: float, end: int) -> tuple[float, ...]:
    """YaRN's ramp ending at index c instead of at one turn: s for every i >= c.

    Where c lies at or below that beginning nothing is left of the ramp: 1 below c, s from it on.
    """
    low = max(math.floor(index_with_turns(geometry, YARN_BETA_FAST)), 0)
    below = _ramp(low, max(end - low, 1), scale, end)
    return (*below, *[scale] * (geometry.num_frequencies - end))


def _ramp(low: float, width: float, scale: float, num_indices: int) -> tuple[float, ...]:
    """Factors of the first indices: 1 up to ``low``, s from ``low + width`` on."""
    parts = (min(max((i - low) / width, 0.0), 1.0) for i in range(num_indices))
    return tuple(_blend(part, scale) for part in parts)


def llama3_bands(
    geometry: RopeGeometry, scale: float, low_turns: float = 1.0, high_turns: float = 4.0
) -> tuple[float, ...]:
    """Llama 3.1: s below ``low_turns`` in L0, 1 above ``high_turns``, between a ramp in frequency.

    Raises:
        FactorsError: the bands overlap.
    """
    if not high_turns > low_turns:
        fault = f"high_freq_factor={high_turns} must be above low_freq_factor={low_turns}"
        raise FactorsError(fault)
    factors = []
    for i in range(geometry.num_frequencies):
        period = 2 * math.pi * geometry.rope_base ** (2 * i / geometry.rotary_dim)
        turns = geometry.original_len / period
        kept = min(max((turns - low_turns) / (high_turns - low_turns), 0.0), 1.0)
        factors.append(_blend(1.0 - kept, scale))
    return tuple(factors)


def yarn_attention_scale(scale: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln s + 1 on cos and sin [YaRN, sec. 3.4]; 1 where nothing is stretched."""
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def longrope_attention_scale(scale: float, original_len: int) -> float:
    """sqrt(1 + ln s / ln L0) on cos and sin, transformers' default for longrope; 1 for s <= 1."""
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original_len))


def _blend(interpolated: float, scale: float) -> float:
    """Factor of a frequency that is ``interpolated`` parts theta / s and the rest theta."""
    return 1.0 / (interpolated / scale + (1.0 - interpolated))
