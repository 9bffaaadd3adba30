"""New candidates: the first population and mutation [LongRoPE2, arXiv 2502.20082, Algorithms 1 and 2].

Everything random is drawn from (seed, round, number), never from a running generator, so a resumed search and one with
another number of workers draw the same candidates.
"""

import random
from collections.abc import Collection, Iterator, Sequence

from longrope2.errors import FactorsError
from longrope2.search.space import Candidate, SearchSpace

__all__ = ["children", "first_population", "mutate"]

MAX_ATTEMPTS = 100  # draws for one new candidate before the space counts as exhausted around its parent


def first_population(space: SearchSpace, size: int, mutation_probability: float, seed: int) -> list[Candidate]:
    """Algorithm 1: for every critical index a flat factor drawn from [s, 2s]; again, and mutated, until ``size`` exist.

    The closed-form methods that satisfy the bound come first.

    Raises:
        FactorsError: the space holds too few distinct candidates.
    """
    found = list(dict.fromkeys(space.closed_form_seeds()))[:size]
    seen = set(found)
    for number in range(size * MAX_ATTEMPTS):
        if len(found) == size:
            return found
        rng = random.Random(f"population/{seed}/{number}")
        lap, place = divmod(number, len(space.critical_indices))
        candidate = space.flat(space.critical_indices[place], rng.randint(space.lowest_step, space.highest_step))
        if lap > 0:
            candidate = mutate(space, candidate, mutation_probability, rng)
        if candidate not in seen:
            seen.add(candidate)
            found.append(candidate)
    if len(found) == size:
        return found
    raise FactorsError(
        f"search.population={size}: the space holds too few distinct candidates ({len(found)} found); "
        "lower search.population or search.grid"
    )


def children(
    space: SearchSpace,
    parents: Sequence[Candidate],
    mutation_probability: float,
    seed: int,
    iteration: int,
    seen: Collection[Candidate],
) -> list[Candidate]:
    """One mutated candidate per parent, different from ``seen`` and from each other.

    A parent around which nothing new is found in ``MAX_ATTEMPTS`` draws gives none.
    """
    fresh: dict[Candidate, None] = {}
    for number, parent in enumerate(parents):
        for attempt in range(MAX_ATTEMPTS):
            rng = random.Random(f"mutation/{seed}/{iteration}/{number}/{attempt}")
            child = mutate(space, parent, mutation_probability, rng)
            if child not in seen and child not in fresh:
                fresh[child] = None
                break
    return list(fresh)


def mutate(space: SearchSpace, parent: Candidate, probability: float, rng: random.Random) -> Candidate:
    """Change each free factor with a probability, keeping the factors non-decreasing and in range.

    Neighbouring factors that change together are drawn together, uniformly between the unchanged ones on either side
    and sorted, so no index is favoured by the order of drawing; what then lies below s at or above c becomes s (only
    possible with ``dims=all``). The part below c follows from the new lambda_c when the candidate is turned into
    factors. Departure: the paper does not say how its monotonic constraint is kept.
    """
    changed = [rng.random() < probability for _ in parent.steps]
    first = space.first_free(parent.critical_index)
    steps = list(parent.steps)
    for start, stop in _runs(changed):
        low = steps[start - 1] if start > 0 else space.least_step(first, parent.critical_index)
        high = parent.steps[stop] if stop < len(steps) else space.highest_step
        drawn = sorted(rng.randint(low, high) for _ in range(start, stop))
        for place, step in enumerate(drawn, start=start):
            steps[place] = max(step, space.least_step(first + place, parent.critical_index))
    return Candidate(parent.critical_index, tuple(steps))


def _runs(changed: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Start and stop of each stretch of True."""
    start = None
    for place, is_changed in enumerate([*changed, False]):
        if is_changed and start is None:
            start = place
        elif not is_changed and start is not None:
            yield start, place
            start = None
