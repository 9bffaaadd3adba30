"""The search space: a critical index and the factors from it upwards [LongRoPE2, sec. 3.2].

Every factor at or above the critical index c lies in [s, 2s] (out-of-distribution bound), factors
never decrease with the index, and those below c follow from the one at c by NTK scaling. With
``dims=all`` the factors below c are chosen freely too, between 1 and the next one.

The first-generation search [LongRoPE, arXiv 2402.13753] has neither: every factor is free between 1
and 1.25 s. Its count of leading tokens kept unscaled is left out: no published model uses one. Free
factors are held as whole grid steps, so that equal candidates are equal whatever the rounding.

Departure, off by default: the attention scale of the long window can be searched too.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import (
    RopeGeometry,
    ten_period_index,
    theoretical_critical_index,
    yarn_attention_scale,
)
from longrope2.rope.methods import RopeMethod, closed_form_factors, ntk_part
from longrope2.search.config import Algorithm, SearchConfig, SearchedDims

# Grid of the attention scale, which is searched in steps of 0.01.
SCALE_STEPS_PER_UNIT = 100
_YARN_TWICE = 2.0
_SEED_METHODS = [RopeMethod(name) for name in ("pi", "ntk", "ntk_aware", "yarn", "llama3")]


@dataclass(frozen=True, order=True)
class Candidate:
    """One point of the space: c (the number of cosine indices where nothing is bounded) and steps.

    Steps are the freely chosen factors on the grid, non-decreasing: from c up, or all.
    ``scale_step`` is the long window's attention scale in hundredths.
    """

    critical_index: int
    steps: tuple[int, ...]
    scale_step: int = SCALE_STEPS_PER_UNIT


@dataclass(frozen=True)
class SearchSpace:
    """Bounds of a search and the translation of its candidates into rescale factors.

    ``critical_indices`` are ascending; ``steps_per_unit`` are the grid steps in a factor of 1;
    ``highest_ratio`` is the largest factor over s; ``highest_scale_step`` the largest attention
    scale in hundredths, 100 where it is not searched.
    """

    geometry: RopeGeometry
    target_len: int
    critical_indices: tuple[int, ...]
    dims: SearchedDims
    steps_per_unit: int
    highest_ratio: float = 2.0
    highest_scale_step: int = SCALE_STEPS_PER_UNIT

    @classmethod
    def from_config(
        cls, config: SearchConfig, geometry: RopeGeometry, target_len: int
    ) -> "SearchSpace":
        """The space that the settings ask for.

        Raises:
            FactorsError: ``search.critical`` is no cosine index of the model, or every dimension
                turns ten times in the pre-trained window.
        """
        last, critical = geometry.num_frequencies - 1, config.critical
        if config.algorithm is Algorithm.longrope:
            indices = (geometry.num_frequencies,)
        elif critical is not None:
            if not 0 <= critical <= last:
                allowed = f"must be null or a cosine index, 0 .. {last}"
                raise FactorsError(f"search.critical={critical}: {allowed}")
            indices = (critical,)
        else:
            highest = min(theoretical_critical_index(geometry), last)
            indices = tuple(range(ten_period_index(geometry), highest + 1))
        if not indices:
            turns = (
                f"every dimension turns ten times or more in original_len={geometry.original_len}"
            )
            ways_out = (
                f"check model.original_len, or set search.critical to a cosine index, 0 .. {last}"
            )
            raise FactorsError(f"{turns}: no critical dimension to search; {ways_out}")
        allowed, scale = config.highest_attention_scale, geometry.scale_to(target_len)
        highest_scale = allowed_attention_scale(allowed, scale)
        return cls(
            geometry=geometry,
            target_len=target_len,
            critical_indices=indices,
            dims=config.dims,
            steps_per_unit=round(1 / config.grid),
            highest_ratio=config.highest_ratio,
            # A hundredth of rounding slack: 1.29 * 100 is 129.00000000000003, 1.15 * 100 below 115.
            highest_scale_step=math.floor(highest_scale * SCALE_STEPS_PER_UNIT + 0.01),
        )

    @property
    def lowest_step(self) -> int:
        """s, rounded up to the grid."""
        return math.ceil(self.target_len * self.steps_per_unit / self.geometry.original_len)

    @property
    def highest_step(self) -> int:
        """``highest_ratio`` times s, rounded down to the grid, but never below s rounded up."""
        steps = self.highest_ratio * self.target_len * self.steps_per_unit
        return max(math.floor(steps / self.geometry.original_len), self.lowest_step)

    @property
    def is_bounded(self) -> bool:
        """Whether candidates have a critical index, from which factors must reach s."""
        return self.critical_indices[-1] < self.geometry.num_frequencies

    def first_free(self, critical_index: int) -> int:
        """Cosine index of the first freely chosen factor."""
        return critical_index if self.dims is SearchedDims.tail else 0

    def least_step(self, index: int, critical_index: int) -> int:
        """Smallest value of the factor at a cosine index: s from the critical index up, 1 below."""
        return self.lowest_step if index >= critical_index else self.steps_per_unit

    def candidate(
        self,
        critical_index: int,
        factors: tuple[float, ...],
        scale_step: int = SCALE_STEPS_PER_UNIT,
    ) -> Candidate | None:
        """The candidate on the grid with these factors (all of them); None outside the space."""
        free = factors[self.first_free(critical_index) :]
        steps = tuple(round(factor * self.steps_per_unit) for factor in free)
        candidate = Candidate(critical_index, steps, scale_step)
        return candidate if self.contains(candidate) else None

    def contains(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps every rule of the space."""
        critical, steps = candidate.critical_index, candidate.steps
        first = self.first_free(critical)
        return (
            critical in self.critical_indices
            and len(steps) == self.geometry.num_frequencies - first
            and all(a <= b for a, b in pairwise(steps))
            and all(s >= self.least_step(first + n, critical) for n, s in enumerate(steps))
            and steps[-1] <= self.highest_step
            and SCALE_STEPS_PER_UNIT <= candidate.scale_step <= self.highest_scale_step
        )

    def line(
        self, critical_index: int, first: int, last: int, scale_step: int = SCALE_STEPS_PER_UNIT
    ) -> Candidate:
        """Factors from c upwards on a straight line between two steps, NTK scaling below.

        With equal steps, the form of Algorithm 1's candidates.
        """
        num_above = self.geometry.num_frequencies - critical_index
        rise = (last - first) / max(num_above - 1, 1)
        tail = (round(first + rise * place) / self.steps_per_unit for place in range(num_above))
        below = ntk_part(critical_index, first / self.steps_per_unit)
        candidate = self.candidate(critical_index, (*below, *tail), scale_step)
        assert candidate is not None
        return candidate

    def closed_form_seeds(self) -> list[Candidate]:
        """Closed-form methods that lie in the space, at the largest critical index.

        With their attention scale, as far as the space has it.
        """
        critical_index = self.critical_indices[-1]
        seeds = []
        for method in _SEED_METHODS:
            closed = closed_form_factors(method, self.geometry, self.target_len)
            scale_step = round(closed.long_attention_scale * SCALE_STEPS_PER_UNIT)
            scale_step = min(scale_step, self.highest_scale_step)
            seeds.append(self.candidate(critical_index, closed.factors, scale_step))
        return [seed for seed in seeds if seed is not None]

    def to_factors(
        self, candidate: Candidate, method: str = "longrope2", **provenance: str
    ) -> RescaleFactors:
        """The rescale factors of a candidate; attention scale 1 in the short window."""
        free = tuple(step / self.steps_per_unit for step in candidate.steps)
        below = ntk_part(self.first_free(candidate.critical_index), free[0])
        return RescaleFactors(
            factors=below + free,
            geometry=self.geometry,
            target_len=self.target_len,
            method=method,
            critical_index=candidate.critical_index if self.is_bounded else None,
            long_attention_scale=candidate.scale_step / SCALE_STEPS_PER_UNIT,
            provenance=provenance,
        )


def allowed_attention_scale(highest: float | None, scale: float) -> float:
    """The largest attention scale that is tried, of ``search.highest_attention_scale`` and s.

    None allows twice what YaRN adds to 1: published models have less, the best of the miniature a
    little more than YaRN's (LAB_NOTES.md, section 11).
    """
    return yarn_attention_scale(scale, _YARN_TWICE) if highest is None else highest
