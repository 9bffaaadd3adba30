"""The search space: a critical index and the factors from it upwards [LongRoPE2, sec. 3.2].

Every factor at or above the critical index c lies in [s, 2s] (out-of-distribution bound), factors
never decrease with the index, and those below c follow from the one at c by NTK scaling. With
``dims=all`` the factors below c are chosen freely too, between 1 and the next one.

The first-generation search [LongRoPE, arXiv 2402.13753] has neither: every factor is free between 1
and 1.25 s. Its count of leading tokens kept unscaled is left out: no published model uses one. Free
factors are held as whole grid steps, so that equal candidates are equal whatever the rounding.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry, ten_period_index, theoretical_critical_index
from longrope2.rope.methods import RopeMethod, closed_form_factors, ntk_part
from longrope2.search.config import Algorithm, SearchConfig, SearchedDims

_SEED_METHODS = [RopeMethod(name) for name in ("pi", "ntk", "ntk_aware", "yarn", "llama3")]


@dataclass(frozen=True, order=True)
class Candidate:
    """One point of the space: c (the number of cosine indices where nothing is bounded) and steps.

    Steps are the freely chosen factors on the grid, non-decreasing: from c up, or all.
    """

    critical_index: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Bounds of a search and the translation of its candidates into rescale factors.

    ``critical_indices`` are ascending; ``steps_per_unit`` are the grid steps in a factor of 1;
    ``highest_ratio`` is the largest factor over s.
    """

    geometry: RopeGeometry
    target_len: int
    critical_indices: tuple[int, ...]
    dims: SearchedDims
    steps_per_unit: int
    highest_ratio: float = 2.0

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
        return cls(
            geometry=geometry,
            target_len=target_len,
            critical_indices=indices,
            dims=config.dims,
            steps_per_unit=round(1 / config.grid),
            highest_ratio=config.highest_ratio,
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

    def candidate(self, critical_index: int, factors: tuple[float, ...]) -> Candidate | None:
        """The candidate on the grid with these factors (all of them); None outside the space."""
        free = factors[self.first_free(critical_index) :]
        steps = tuple(round(factor * self.steps_per_unit) for factor in free)
        candidate = Candidate(critical_index, steps)
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
        )

    def flat(self, critical_index: int, step: int) -> Candidate:
        """One factor from c upwards and NTK scaling below, the form of Algorithm 1's candidates."""
        factor = step / self.steps_per_unit
        tail = (factor,) * (self.geometry.num_frequencies - critical_index)
        candidate = self.candidate(critical_index, ntk_part(critical_index, factor) + tail)
        assert candidate is not None
        return candidate

    def closed_form_seeds(self) -> list[Candidate]:
        """Closed-form methods that lie in the space, at the largest critical index."""
        critical_index = self.critical_indices[-1]
        closed = (closed_form_factors(m, self.geometry, self.target_len) for m in _SEED_METHODS)
        seeds = (self.candidate(critical_index, factors.factors) for factors in closed)
        return [seed for seed in seeds if seed is not None]

    def to_factors(
        self, candidate: Candidate, method: str = "longrope2", **provenance: str
    ) -> RescaleFactors:
        """The rescale factors of a candidate; attention scale 1 in both windows."""
        free = tuple(step / self.steps_per_unit for step in candidate.steps)
        below = ntk_part(self.first_free(candidate.critical_index), free[0])
        return RescaleFactors(
            factors=below + free,
            geometry=self.geometry,
            target_len=self.target_len,
            method=method,
            critical_index=candidate.critical_index if self.is_bounded else None,
            provenance=provenance,
        )
