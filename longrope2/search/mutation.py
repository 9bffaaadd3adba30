"""New candidates: the first population, mutation and crossover [LongRoPE2, arXiv 2502.20082, Algorithms 1 and 2].

Everything random is drawn from (seed, round, number), never from a running generator, so a resumed search and one with
another number of workers draw the same candidates.
"""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations

from longrope2.errors import FactorsError
from longrope2.search.config import SearchConfig
from longrope2.search.space import Candidate, SearchSpace

__all__ = ["children", "cross", "first_population", "moved", "mutate"]

MAX_ATTEMPTS = 100  # draws for one new candidate before the space counts as exhausted around its parent


def first_population(space: SearchSpace, size: int, mutation_probability: float, seed: int) -> list[Candidate]:
    """Algorithm 1: for every critical index a flat factor drawn from [s, 2s]; again, and mutated, until ``size`` exist.

    The closed-form methods that lie in the space come first. Where nothing is bounded, the others are mutations of
    those [LongRoPE, sec. 3.2: PI, NTK, YaRN].

    Raises:
        FactorsError: the space holds too few distinct candidates.
    """
    found = list(dict.fromkeys(space.closed_form_seeds()))[:size]
    seen = set(found)
    for number in range(size * MAX_ATTEMPTS):
        if len(found) == size:
            return found
        rng = random.Random(f"population/{seed}/{number}")
        if space.is_bounded:
            lap, place = divmod(number, len(space.critical_indices))
            candidate = space.flat(space.critical_indices[place], rng.randint(space.lowest_step, space.highest_step))
        else:
            lap, candidate = 1, found[number % len(space.closed_form_seeds())]
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
    config: SearchConfig,
    seed: int,
    iteration: int,
    seen: Collection[Candidate],
) -> list[Candidate]:
    """New candidates of a round, different from ``seen`` and from each other: mutations, then crossovers.

    ``search.mutations`` mutated candidates, their parents taken in order of rank, again from the first when there are
    fewer (null: one per parent), and ``search.crossovers`` of two parents with the same critical index. Where nothing
    new is found in ``MAX_ATTEMPTS`` draws there is none.
    """
    num_mutations = len(parents) if config.mutations is None else config.mutations
    fresh: dict[Candidate, None] = {}

    def add_new(kind: str, number: int, draw: Callable[[random.Random], Candidate]) -> None:
        for attempt in range(MAX_ATTEMPTS):
            child = draw(random.Random(f"{kind}/{seed}/{iteration}/{number}/{attempt}"))
            if child not in seen and child not in fresh:
                fresh[child] = None
                return

    for number in range(num_mutations):
        parent = parents[number % len(parents)]
        add_new("mutation", number, lambda rng, parent=parent: _mutated(space, parent, config, rng))
    pairs = _mates(parents)
    for number in range(config.crossovers if pairs else 0):
        add_new("crossover", number, lambda rng: cross(*rng.choice(pairs), rng))
    return list(fresh)


def cross(first: Candidate, second: Candidate, rng: random.Random) -> Candidate:
    """Each free factor from one of two parents with the same critical index; then none may lie below the one before."""
    assert first.critical_index == second.critical_index
    steps: list[int] = []
    for pair in zip(first.steps, second.steps, strict=True):
        steps.append(max(rng.choice(pair), steps[-1] if steps else 0))
    return Candidate(first.critical_index, tuple(steps))


def _mates(parents: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Pairs of parents that can be crossed."""
    return [(a, b) for a, b in combinations(parents, 2) if a.critical_index == b.critical_index]


def _mutated(space: SearchSpace, parent: Candidate, config: SearchConfig, rng: random.Random) -> Candidate:
    """A mutation, of a parent whose critical index may have moved by one."""
    if config.critical_move_probability and rng.random() < config.critical_move_probability:
        parent = moved(space, parent, rng.choice((-1, 1)))
    return mutate(space, parent, config.mutation_probability, rng)


def moved(space: SearchSpace, candidate: Candidate, step: int) -> Candidate:
    """The candidate with its critical index moved by ``step`` (-1 or 1), or itself at the end of the range.

    The factors at and above the new index stay; one that becomes free, or comes under the bound, takes the value of
    the one above it, the least change that keeps every rule.
    """
    critical_index = candidate.critical_index + step
    if critical_index not in space.critical_indices:
        return candidate
    first, old_first = space.first_free(critical_index), space.first_free(candidate.critical_index)
    steps = list(candidate.steps[max(first - old_first, 0) :])
    steps = [steps[0]] * max(old_first - first, 0) + steps
    steps = [max(value, space.least_step(first + n, critical_index)) for n, value in enumerate(steps)]
    return Candidate(critical_index, tuple(steps))


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
