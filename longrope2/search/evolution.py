"""The evolutionary search [LongRoPE2, arXiv 2502.20082, Algorithms 1 and 2].

Evaluate a first population; then, round by round, keep the best candidates of all so far and let
each give one mutated candidate. The bound of early termination is the loss of the worst candidate
that would be kept at that moment: what exceeds it can never be kept. Ties are broken by the
candidate itself, and everything random is drawn from (seed, round, number), never from a running
generator: a resumed search, and any number of workers, find the same result.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

import numpy as np

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.search.config import Pruning, SearchConfig, new_candidates
from longrope2.search.evaluator import Evaluator, Race, Score
from longrope2.search.space import SCALE_STEPS_PER_UNIT, Candidate, SearchSpace
from longrope2.search.workers import Workers

# Draws for one new candidate before the space counts as exhausted around its parent.
_MAX_ATTEMPTS = 100
# Spreads of the log of what a run of factors is multiplied by: far, near, and the last digits.
_SIZES = (0.2, 0.07, 0.02)
# The same for the attention scale, in hundredths, and the share of mutations that move it.
_SCALE_SIZES = (10.0, 3.0, 1.0)
_SCALE_SHARE = 0.3


def first_population(
    space: SearchSpace, size: int, mutation_probability: float, seed: int
) -> list[Candidate]:
    """Algorithm 1: ``size`` candidates, for every critical index a flat factor drawn from [s, 2s].

    In laps over the indices after the first the factors rise on a straight line between two draws,
    and what was drawn before is mutated. The closed-form methods that lie in the space come first;
    where nothing is bounded, the others are mutations of those [LongRoPE, sec. 3.2]. Departure: the
    paper does not say what a second candidate of an index looks like.

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
            candidate = _start(space, number, rng)
        else:
            candidate = list(found)[number % len(seeds)]
        if candidate in found:
            candidate = mutate(space, candidate, mutation_probability, rng)
        found.setdefault(candidate)
    if len(found) < size:
        fault = f"search.population={size}: the space holds too few distinct candidates"
        raise FactorsError(f"{fault} ({len(found)} found); lower search.population or search.grid")
    return list(found)


def _start(space: SearchSpace, number: int, rng: random.Random) -> Candidate:
    """A flat candidate in the first lap over the critical indices, then sloped ones."""
    lap, place = divmod(number, len(space.critical_indices))
    first = rng.randint(space.lowest_step, space.highest_step)
    last = rng.randint(space.lowest_step, space.highest_step) if lap > 0 else first
    first, last = sorted((first, last))
    scale_step = rng.randint(SCALE_STEPS_PER_UNIT, space.highest_scale_step)
    return space.line(space.critical_indices[place], first, last, scale_step)


def children(
    space: SearchSpace,
    parents: Sequence[Candidate],
    config: SearchConfig,
    *,
    seed: int,
    iteration: int,
    seen: Collection[Candidate],
) -> list[Candidate]:
    """New candidates of a round, all different, none seen or a parent: mutations, then crossovers.

    Parents are mutated in order of rank, again from the first when there are fewer than
    ``search.mutations`` (``new_candidates``), and crossed in pairs of one critical index. Where
    nothing new is found in ``_MAX_ATTEMPTS`` draws there is none.
    """
    num_mutations, num_crossovers = new_candidates(config, len(parents))
    known = {*seen, *parents}
    fresh: dict[Candidate, None] = {}

    def add_new(kind: str, number: int, draw: Callable[[random.Random], Candidate]) -> None:
        for attempt in range(_MAX_ATTEMPTS):
            child = draw(random.Random(f"{kind}/{seed}/{iteration}/{number}/{attempt}"))
            if child not in known and child not in fresh:
                fresh[child] = None
                return

    for number in range(num_mutations):
        parent = parents[number % len(parents)]
        add_new("mutation", number, lambda rng, parent=parent: _mutated(space, parent, config, rng))
    same = [(a, b) for a, b in combinations(parents, 2) if a.critical_index == b.critical_index]
    for number in range(num_crossovers if same else 0):
        add_new("crossover", number, lambda rng: cross(*rng.choice(same), rng))
    return list(fresh)


def cross(first: Candidate, second: Candidate, rng: random.Random) -> Candidate:
    """Every value from one of two parents with one c, then no factor below the one before."""
    assert first.critical_index == second.critical_index
    chosen = map(rng.choice, zip(first.steps, second.steps, strict=True))
    steps = tuple(accumulate(chosen, max))
    scale_step = rng.choice((first.scale_step, second.scale_step))
    return Candidate(first.critical_index, steps, scale_step)


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
    return replace(candidate, critical_index=critical_index, steps=tuple(map(max, steps, least)))


def mutate(space: SearchSpace, parent: Candidate, share: float, rng: random.Random) -> Candidate:
    """Raise or lower a run of neighbouring factors, in order and in range; never the parent.

    The run is multiplied by e^x, x from a normal distribution of one of several sizes, and moves by
    a grid step at least. Then the order is restored, by a running maximum after a raise, a minimum
    after a lowering: either what stands in the way moves along, or the run ends there. Where each
    factor is drawn between unchanged neighbours instead, flat candidates hardly change: one factor
    of 31. Departure: the paper does not say how its monotonic constraint is kept.

    With ``highest_attention_scale`` above 1, a share of the mutations moves that scale instead.

    Args:
        space: Bounds.
        parent: Candidate in the space; itself returned only where nothing can change.
        share: Expected share of its factors that change, in (0, 1], where they are flat and the run
            can go both ways; at least one factor does. See ``_drawn_run``.
        rng: What all is drawn from.
    """
    if space.highest_scale_step > SCALE_STEPS_PER_UNIT and rng.random() < _SCALE_SHARE:
        return _rescaled(space, parent, rng)
    length, is_pushing = _drawn_run(len(parent.steps), share, rng)
    moves = _possible_moves(space, parent, length, is_pushing)
    if not moves:
        return parent
    move = rng.choice(moves)
    ratio = math.exp(move.direction * abs(rng.gauss(0.0, rng.choice(_SIZES))))
    steps, least = list(parent.steps), _least_steps(space, parent)
    for place in range(move.start, move.start + length):
        step = round(steps[place] * ratio)
        step = step if step != steps[place] else step + move.direction
        steps[place] = min(max(step, move.low, least[place]), move.high)
    if move.direction > 0:
        return replace(parent, steps=tuple(accumulate(steps, max)))
    lowered = reversed(list(accumulate(reversed(steps), min)))
    return replace(parent, steps=tuple(map(max, lowered, least)))


@dataclass(frozen=True)
class _Move:
    """Where a run of factors starts, whether it is raised (1) or lowered (-1), and its range."""

    start: int
    direction: int
    low: int
    high: int


def _possible_moves(
    space: SearchSpace, parent: Candidate, length: int, is_pushing: bool
) -> list[_Move]:
    """The moves of a run of some length that change a candidate."""
    steps, least = parent.steps, _least_steps(space, parent)
    moves = []
    for start in range(len(steps) - length + 1):
        stop = start + length
        low = steps[start - 1] if start > 0 and not is_pushing else 0
        high = steps[stop] if stop < len(steps) and not is_pushing else space.highest_step
        if steps[start] < high:
            moves.append(_Move(start, 1, low, high))
        if any(steps[place] > max(low, least[place]) for place in range(start, stop)):
            moves.append(_Move(start, -1, low, high))
    return moves


def _least_steps(space: SearchSpace, candidate: Candidate) -> list[int]:
    first, critical_index = space.first_free(candidate.critical_index), candidate.critical_index
    return [space.least_step(first + n, critical_index) for n in range(len(candidate.steps))]


def _drawn_run(num_factors: int, share: float, rng: random.Random) -> tuple[int, bool]:
    """Length of the run of a mutation, and whether it moves along what stands in its way.

    In flat factors a run that ends at what stands in its way changes itself alone; one that moves
    it along changes all to one side, on average over its places the share (1 + q) / 2, where q is
    the mean length over ``num_factors``. With a chance P of the latter the share that changes is
    q + P (1 - q) / 2, which is p for q = p / (2 - p) and P = p. Runs have one factor at least:
    where that q is too small, it is 1 / ``num_factors``, and P what the formula leaves.

    The length less 1 over its maximum is U^((1 - m) / m), U uniform, which has the mean m; it is
    rounded up or down by chance, so that its mean stays.
    """
    mean = max(share / (2 - share), 1 / num_factors)
    is_pushing = mean < 1 and rng.random() < 2 * (share - mean) / (1 - mean)
    most = num_factors - 1
    middle = (num_factors * mean - 1) / most if most else 0.0
    longer = most * rng.random() ** ((1 - middle) / middle) if middle > 0 else 0.0
    return min(1 + math.floor(longer + rng.random()), num_factors), is_pushing


def _rescaled(space: SearchSpace, parent: Candidate, rng: random.Random) -> Candidate:
    """The parent with its attention scale moved, within the space."""
    lowest, highest = SCALE_STEPS_PER_UNIT, space.highest_scale_step
    directions = [1] * (parent.scale_step < highest) + [-1] * (parent.scale_step > lowest)
    distance = max(1, round(abs(rng.gauss(0.0, rng.choice(_SCALE_SIZES)))))
    scale_step = parent.scale_step + rng.choice(directions) * distance
    return replace(parent, scale_step=min(max(scale_step, lowest), highest))


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
        completed: Completely evaluated candidates that were kept at the end of some round, with
            the summed loss of each batch of samples. Which others were evaluated to their end
            depends on the workers, so they are left out.
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
        self.completed: dict[Candidate, dict[int, float]] = {}
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
        for ranked in self.kept:
            self.completed[ranked.candidate] = self._batch_losses[ranked.candidate]


def critical_index_shares(
    losses_NS: Sequence[Sequence[float]], critical_N: Sequence[int], num_resamples: int, seed: int
) -> dict[int, float]:
    """How sure a search is of c: the share of bootstrap resamples whose best candidate has it.

    Samples are drawn with replacement, the same ones for all candidates; of equal sums the first
    candidate is best. Only the noise of the samples is in it, not what the search never tried.

    Args:
        losses_NS: Losses of N candidates on the same S samples (or batches of them).
        critical_N: Their critical indices.
        num_resamples: At least 1.
        seed: Of the draws.

    Returns:
        Shares by ascending critical index, those above 0; they sum to 1.
    """
    losses = np.asarray(losses_NS, dtype=np.float64)
    assert losses.ndim == 2 and losses.shape[0] == len(critical_N) and losses.size > 0
    assert num_resamples >= 1
    rng, num_samples = np.random.default_rng(seed), losses.shape[1]
    wins: Counter[int] = Counter()
    for _ in range(num_resamples):
        drawn = rng.integers(num_samples, size=num_samples)
        wins[critical_N[int(losses[:, drawn].sum(axis=1).argmin())]] += 1
    return {index: wins[index] / num_resamples for index in sorted(wins)}
