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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import (
    RopeGeometry,
    index_with_turns,
    theoretical_critical_index,
    yarn_attention_scale,
    yarn_ends,
)
from longrope2.rope.methods import CLOSED_FORMS, RopeMethod, closed_form_factors
from longrope2.search.space import allowed_attention_scale

# Turns in L0 between which Llama 3's bands rise.
_BAND_TURNS = (4.0, 1.0)
# Levels over s, and the largest slope, that are drawn.
_LEVELS, _MOST_SLOPE = (0.8, 2.0), 0.6
_NARROWEST_RISE = 0.5
_OTHER_RISE = 0.2  # chance of a draw around a shape to change its form


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


def closed_form_shapes(geometry: RopeGeometry, target_len: int) -> list[Shape]:
    """Where a search starts: every closed form, as it is and with YaRN's attention scale."""
    scale = yarn_attention_scale(geometry.scale_to(target_len))
    own = [closed_form_shape(method, geometry, target_len) for method in CLOSED_FORMS]
    return list(dict.fromkeys([*own, *(replace(s, attention_scale=scale) for s in own)]))


@dataclass(frozen=True)
class Limits:
    """Where shapes are drawn for a geometry and a target.

    Attributes:
        last_index: Largest ``start`` and, but for one, ``end``: the theoretical critical index.
        highest_attention_scale: From 1 up to there; 1 is not searched.
    """

    last_index: int
    highest_attention_scale: float

    @classmethod
    def of(
        cls, geometry: RopeGeometry, target_len: int, highest_attention_scale: float | None
    ) -> "Limits":
        """Limits for a model and a target, with ``search.highest_attention_scale``."""
        last = max(theoretical_critical_index(geometry), 1)
        given = (highest_attention_scale, geometry.scale_to(target_len))
        return cls(last, allowed_attention_scale(*given))

    def draw(self, rise: Rise, unit_5: Sequence[float]) -> Shape:
        """The shape at a point of the unit cube."""
        last, (a, b, c, d, e) = self.last_index, unit_5
        start = a * (last - _NARROWEST_RISE)
        first_end = start + _NARROWEST_RISE
        lowest, highest = _LEVELS
        return _rounded(
            rise,
            start=start,
            end=first_end + b * (last + 1 - first_end),
            level=lowest + c * (highest - lowest),
            slope=d * _MOST_SLOPE,
            attention_scale=1 + e * (self.highest_attention_scale - 1),
        )

    def near(self, shape: Shape, width: float, rng: random.Random) -> Shape:
        """A shape around another: every number moves by a normal draw of ``width`` of its range.

        One in five takes another rise.
        """

        def moved(value: float, span: float, low: float, high: float) -> float:
            return min(max(value + rng.gauss(0, 1) * width * span, low), high)

        last, highest = self.last_index, self.highest_attention_scale
        start = moved(shape.start, last, -1.0, last)
        return _rounded(
            rng.choice(list(Rise)) if rng.random() < _OTHER_RISE else shape.rise,
            start=start,
            end=max(moved(shape.end, last, 0.0, 2.0 * last), start + _NARROWEST_RISE),
            level=shape.level * math.exp(rng.gauss(0, 1) * width * math.log(_LEVELS[1])),
            slope=moved(shape.slope, _MOST_SLOPE, 0.0, 2 * _MOST_SLOPE),
            attention_scale=moved(shape.attention_scale, highest - 1, 1.0, highest),
        )


def draw_shapes(limits: Limits, num: int, seed: int) -> list[Shape]:
    """Shapes spread evenly over the limits (scrambled Sobol points), rises in turn."""
    points = torch.quasirandom.SobolEngine(5, scramble=True, seed=seed).draw(num)
    rises = list(Rise)
    return [limits.draw(rises[n % len(rises)], row) for n, row in enumerate(points.tolist())]


def _rounded(rise: Rise, **numbers: float) -> Shape:
    """A shape whose numbers have four digits: they are read and compared by people."""
    return Shape(rise, **{name: round(number, 4) for name, number in numbers.items()})
