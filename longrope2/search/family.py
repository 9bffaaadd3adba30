"""Rescale factors of six numbers: a family that holds every closed form as one of its points.

lambda_i is 1 up to ``start``, then rises to ``level`` times s at ``end`` and by ``slope`` from
there on; the long window's attention scale belongs to it. The rise has one of three forms, each the
one of a known method: NTK's base change (``power``), YaRN's ramp (``ramp``), Llama 3's bands
(``bands``). Our own extension, not the paper's: its space fixes NTK below the critical index and an
attention scale of 1, and holds neither YaRN nor Llama 3's bands.

Symbols: s = target over original length, i = cosine index, H = number of cosine indices, theta_i =
angle per token.
"""

import math
import random
from dataclasses import dataclass
from enum import StrEnum

from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import (
    RopeGeometry,
    index_with_turns,
    theoretical_critical_index,
    yarn_attention_scale,
    yarn_ends,
)
from longrope2.rope.methods import CLOSED_FORMS, RopeMethod, closed_form_factors

# Turns in L0 between which Llama 3's bands rise.
_BAND_TURNS = (4.0, 1.0)
# Largest level, slope and weight of YaRN's attention scale that are drawn.
_LEVELS, _MOST_SLOPE, _MOST_SCALE_WEIGHT = (0.8, 2.0), 0.6, 2.0
_NARROWEST_RISE = 0.5


class Rise(StrEnum):
    """How lambda_i gets from 1 to its level; p goes from 0 at ``start`` to 1 at ``end``."""

    power = "power"
    """level^p, p linear in i: NTK's base change when it starts at 0."""
    ramp = "ramp"
    """1 / (p / level + 1 - p), p linear in i: YaRN."""
    bands = "bands"
    """The same with p linear in theta_i: Llama 3.1."""


@dataclass(frozen=True, order=True)
class Shape:
    """One point of the family.

    Attributes:
        rise: Form of the rise.
        start: Cosine index up to which lambda is 1; need not be whole, below 0 is allowed.
        end: Cosine index where the level is reached, above ``start``.
        level: lambda at ``end``, over s.
        slope: From ``end`` up lambda_i is the level times 1 + slope (i - end) / H.
        attention_scale: Multiplier on cos and sin in the long window.
    """

    rise: Rise
    start: float
    end: float
    level: float = 1.0
    slope: float = 0.0
    attention_scale: float = 1.0

    def factors(self, geometry: RopeGeometry, target_len: int, method: str) -> RescaleFactors:
        """The rescale factors; FactorsError for a target below L0."""
        level = self.level * geometry.scale_to(target_len)
        half = geometry.num_frequencies
        return RescaleFactors(
            factors=tuple(
                self._risen(self._progress(index, geometry), level)
                * (1 + self.slope * max(index - self.end, 0.0) / half)
                for index in range(half)
            ),
            geometry=geometry,
            target_len=target_len,
            method=method,
            long_attention_scale=self.attention_scale,
        )

    def _progress(self, index: int, geometry: RopeGeometry) -> float:
        """p: 0 up to ``start``, 1 from ``end`` on."""
        if index <= self.start or index >= self.end:
            return float(index >= self.end)
        if self.rise is not Rise.bands:
            return (index - self.start) / (self.end - self.start)
        first, here, last = (
            geometry.rope_base ** (-i / geometry.num_frequencies)
            for i in (self.start, index, self.end)
        )
        return (first - here) / (first - last)

    def _risen(self, part: float, level: float) -> float:
        return level**part if self.rise is Rise.power else 1 / (part / level + 1 - part)


def closed_form_shape(method: RopeMethod, geometry: RopeGeometry, target_len: int) -> Shape:
    """The point of the family with the factors and the attention scale of a closed form.

    Raises:
        FactorsError: the method has no closed form for this geometry.
    """
    exact, half = closed_form_factors(method, geometry, target_len), geometry.num_frequencies
    match method:
        case RopeMethod.none:
            return Shape(Rise.power, 0.0, 1.0, level=1 / exact.scale)
        case RopeMethod.pi:
            return Shape(Rise.power, -1.0, 0.0)
        case RopeMethod.yarn:
            scale = exact.long_attention_scale
            return Shape(Rise.ramp, *yarn_ends(geometry), attention_scale=scale)
        case RopeMethod.llama3:
            start, end = (index_with_turns(geometry, turns) for turns in _BAND_TURNS)
            return Shape(Rise.bands, start, end)
        case _:  # changes of base, which never end: lambda_i = r^(i / H)
            base_ratio = exact.factors[-1] ** (half / (half - 1))
            return Shape(Rise.power, 0.0, float(half), level=base_ratio / exact.scale)
