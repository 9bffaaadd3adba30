"""The evolutionary search [LongRoPE2, arXiv 2502.20082, Algorithms 1 and 2].

Evaluate a first population; then, round by round, keep the best candidates of all so far and let
each give one mutated candidate. The bound of early termination is the loss of the worst candidate
that would be kept at that moment: what exceeds it can never be kept. Ties are broken by the
candidate itself, and everything random is drawn from (seed, round, number), never from a running
generator: a resumed search, and any number of workers, find the same result.
"""

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.search.config import Pruning, SearchConfig
from longrope2.search.evaluator import Evaluator, Race, Score
from longrope2.search.space import Candidate, SearchSpace
from longrope2.search.workers import Workers

# Draws for one new candidate before the space counts as exhausted around its parent.
_MAX_ATTEMPTS = 100


def first_population(
    space: SearchSpace, size: int, mutation_probability: float, seed: int
) -> list[Candidate]:
    """Algorithm 1: ``size`` candidates, for every critical index a flat factor drawn from [s, 2s].

    Laps over the indices after the first are mutated. The closed-form methods that lie in the space
    come first; where nothing is bounded, the others are mutations of those [LongRoPE, sec. 3.2].

    Raises:
        FactorsError: the space holds too few distinct candidates.
    """
    seeds = space.closed_form_seeds()
    found = dict.fromkeys(list(dict.fromkeys(seeds))[:size])
    for number in range(size * _MAX_ATTEMPTS):
        if len(found) == size:
            break
        rng = random.Random(f"population/{seed}/{number}")
        if space.is_bounded:
            lap, place = divmod(number, len(space.critical_indices))
            step = rng.randint(space.lowest_step, space.highest_step)
            candidate = space.flat(space.critical_indices[place], step)
        else:
            lap, candidate = 1, list(found)[number % len(seeds)]
        if lap > 0:
            candidate = mutate(space, candidate, mutation_probability, rng)
        found.setdefault(candidate)
    if len(found) < size:
        fault = f"search.population={size}: the space holds too few distinct candidates"
        raise FactorsError(f"{fault} ({len(found)} found); lower search.population or search.grid")
    return list(found)


def children(
    space: SearchSpace,
    parents: Sequence[Candidate],
    config: SearchConfig,
    *,
    seed: int,
    iteration: int,
    seen: Collection[Candidate],
) -> list[Candidate]:
    """New candidates of a round, none of ``seen`` and all different: mutations, then crossovers.

    Parents are mutated in order of rank, again from the first when there are fewer than
    ``search.mutations`` (null: one per parent), and crossed in pairs of one critical index. Where
    nothing new is found in ``_MAX_ATTEMPTS`` draws there is none.
    """
    num_mutations = len(parents) if config.mutations is None else config.mutations
    fresh: dict[Candidate, None] = {}

    def add_new(kind: str, number: int, draw: Callable[[random.Random], Candidate]) -> None:
        for attempt in range(_MAX_ATTEMPTS):
            child = draw(random.Random(f"{kind}/{seed}/{iteration}/{number}/{attempt}"))
            if child not in seen and child not in fresh:
                fresh[child] = None
                return

    for number in range(num_mutations):
        parent = parents[number % len(parents)]
        add_new("mutation", number, lambda rng, parent=parent: _mutated(space, parent, config, rng))
    same = [(a, b) for a, b in combinations(parents, 2) if a.critical_index == b.critical_index]
    for number in range(config.crossovers if same else 0):
        add_new("crossover", number, lambda rng: cross(*rng.choice(same), rng))
    return list(fresh)


def cross(first: Candidate, second: Candidate, rng: random.Random) -> Candidate:
    """Each free factor from one of two parents with one c, then none below the one before."""
    assert first.critical_index == second.critical_index
    chosen = map(rng.choice, zip(first.steps, second.steps, strict=True))
    return Candidate(first.critical_index, tuple(accumulate(chosen, max)))


def _mutated(
    space: SearchSpace, parent: Candidate, config: SearchConfig, rng: random.Random
) -> Candidate:
    """A mutation, of a parent whose critical index may have moved by one."""
    if config.critical_move_probability and rng.random() < config.critical_move_probability:
        parent = moved(space, parent, rng.choice((-1, 1)))
    return mutate(space, parent, config.mutation_probability, rng)


def moved(space: SearchSpace, candidate: Candidate, step: int) -> Candidate:
    """The candidate with its critical index moved by -1 or 1, or itself at the end of the range.

    The factors at and above the new index stay; one that becomes free, or comes under the bound,
    takes the value of the one above it, the least change that keeps every rule.
    """
    critical_index = candidate.critical_index + step
    if critical_index not in space.critical_indices:
        return candidate
    first, old_first = space.first_free(critical_index), space.first_free(candidate.critical_index)
    steps = list(candidate.steps[max(first - old_first, 0) :])
    steps = [steps[0]] * max(old_first - first, 0) + steps
    least = (space.least_step(first + n, critical_index) for n in range(len(steps)))
    return Candidate(critical_index, tuple(map(max, steps, least)))


def mutate(
    space: SearchSpace, parent: Candidate, probability: float, rng: random.Random
) -> Candidate:
    """Change each free factor with a probability, keeping the factors non-decreasing and in range.

    Neighbouring factors that change together are drawn together, uniformly between the unchanged
    ones on either side and sorted, so no index is favoured by the order of drawing; what then lies
    below s at or above c becomes s (only possible with ``dims=all``). Departure: the paper does not
    say how its monotonic constraint is kept.
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


@dataclass(frozen=True, order=True)
class Ranked:
    """A completely evaluated candidate; sorts from best to worst, equal losses by the candidate."""

    loss_sum: float
    candidate: Candidate


@dataclass(frozen=True)
class Round:
    """Account of the search up to the end of one round; 0 is the first population.

    ``num_losses`` counts sample losses looked at, computed or known: with several workers, where an
    evaluation stops depends on what the others have finished.
    """

    iteration: int
    best_value: float
    best_critical_index: int
    worst_kept_value: float
    num_candidates: int
    num_terminated: int
    num_losses: int


class Evolution:
    """One search. Iterate over ``steps`` to run it; the state can be read between steps.

    Attributes:
        kept: Best candidates so far, best first, at most ``search.parents``.
        rounds: Account of every finished round.
        num_candidates: Distinct candidates evaluated so far.
        num_terminated: Those of them stopped early.
        num_losses: Sample losses looked at for them.
        best_start: The best of the first population; None while that is evaluated.
    """

    def __init__(
        self,
        space: SearchSpace,
        config: SearchConfig,
        evaluator: Evaluator,
        seed: int,
        workers: Workers | None = None,
    ) -> None:
        self.kept: list[Ranked] = []
        self.rounds: list[Round] = []
        self.num_candidates = self.num_terminated = self.num_losses = 0
        self.best_start: RescaleFactors | None = None
        self.space, self.config, self.evaluator = space, config, evaluator
        self._seed, self._workers = seed, workers or Workers()
        self._batch_losses: dict[Candidate, dict[int, float]] = {}

    @property
    def best(self) -> Ranked:
        """The best candidate so far.

        Raises:
            FactorsError: no candidate gave a finite loss.
        """
        if not self.kept:
            raise FactorsError(
                f"none of {self.num_candidates} candidates gave a finite loss: the model cannot be "
                "evaluated at the target length; check the weights and the number format"
            )
        return self.kept[0]

    def steps(self) -> Iterator[Candidate]:
        """Run the search; yields each candidate after its evaluation."""
        config, size = self.config, self.config.population
        population = first_population(self.space, size, config.mutation_probability, self._seed)
        seen: set[Candidate] = set()
        for iteration in range(config.iterations + 1):
            yield from self._evaluate_all(population, f"round/{iteration}")
            seen.update(population)
            self._close_round(iteration)
            self.best_start = self.best_start or self.space.to_factors(self.best.candidate)
            if iteration == config.iterations:
                return
            parents = [ranked.candidate for ranked in self.kept]
            population = children(
                self.space, parents, config, seed=self._seed, iteration=iteration + 1, seen=seen
            )

    def _evaluate_all(self, population: Sequence[Candidate], label: str) -> Iterator[Candidate]:
        """Evaluate with the other workers, each candidate against the bound of that moment."""
        queue = self._workers.queue(label, len(population))
        race = self._race()
        waiting: list[Candidate] = []  # evaluated, not yet yielded

        def bound() -> float:
            waiting.extend(self._take(population[task], result) for task, result in queue.news())
            full = len(self.kept) == self.config.parents
            return self.kept[-1].loss_sum if full else math.inf

        while (task := queue.claim()) is not None:
            factors = self.space.to_factors(population[task])
            queue.publish(task, self.evaluator.evaluate(factors, bound, race).to_numbers())
            bound()
            yield from waiting
            waiting.clear()
        yield from (self._take(population[task], result) for task, result in queue.remaining())

    def _race(self) -> Race | None:
        """The race of a round, against the worst candidate kept; none while there is room."""
        config = self.config
        if config.pruning is not Pruning.racing or len(self.kept) < config.parents:
            return None
        least_batches = -(-config.racing_samples // (config.batch_size or 1))
        worst = self._batch_losses[self.kept[-1].candidate]
        return Race.against(worst, config.racing_margin, least_batches)

    def _take(self, candidate: Candidate, result: list[float]) -> Candidate:
        """Account for an evaluated candidate, and keep it if it is among the best."""
        score = Score.from_numbers(result)
        if score.is_complete and score.loss_sum < math.inf:
            self.kept.append(Ranked(score.loss_sum, candidate))
            self.kept = sorted(self.kept)[: self.config.parents]
            self._batch_losses[candidate] = score.batch_losses
        self.num_candidates += 1
        self.num_terminated += not score.is_complete
        self.num_losses += score.num_losses
        return candidate

    def _close_round(self, iteration: int) -> None:
        finished = Round(
            iteration=iteration,
            best_value=self.evaluator.value(self.best.loss_sum),
            best_critical_index=self.best.candidate.critical_index,
            worst_kept_value=self.evaluator.value(self.kept[-1].loss_sum),
            num_candidates=self.num_candidates,
            num_terminated=self.num_terminated,
            num_losses=self.num_losses,
        )
        self.rounds.append(finished)
