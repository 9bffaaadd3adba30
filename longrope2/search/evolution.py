"""The evolutionary search [LongRoPE2, arXiv 2502.20082, Algorithms 1 and 2].

Evaluate a first population; then, round by round, keep the best candidates of all so far and let each give one mutated
candidate. The bound of early termination is the loss of the worst candidate that would be kept at that moment: what
exceeds it can never be kept, so the result is the same with and without termination. Ties are broken by the candidate
itself, never by the order of evaluation, and every worker draws the same candidates: the result is the same for any
number of workers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longrope2.errors import FactorsError
from longrope2.search.config import Pruning, SearchConfig
from longrope2.search.evaluator import Evaluator, Race
from longrope2.search.mutation import children, first_population
from longrope2.search.space import Candidate, SearchSpace
from longrope2.search.workers import Score, Workers

__all__ = ["Evolution", "Ranked", "Round"]


@dataclass(frozen=True, order=True)
class Ranked:
    """A completely evaluated candidate; sorts from best to worst, equal losses by the candidate."""

    loss_sum: float
    critical_index: int
    steps: tuple[int, ...]

    @property
    def candidate(self) -> Candidate:
        """The candidate without its loss."""
        return Candidate(self.critical_index, self.steps)


@dataclass(frozen=True)
class Round:
    """Account of one round, cumulative where it counts.

    Attributes:
        iteration: 0 for the first population.
        best_value: Objective of the best candidate so far.
        best_critical_index: Its critical index.
        worst_kept_value: Objective of the worst kept candidate.
        num_candidates: Distinct candidates evaluated so far.
        num_terminated: Those of them stopped early.
        num_losses: Sample losses looked at so far, whether computed or taken from the journal. With several workers, where
            an evaluation stops depends on what the others have finished.
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
    """

    def __init__(
        self, space: SearchSpace, config: SearchConfig, evaluator: Evaluator, seed: int, workers: Workers | None = None
    ) -> None:
        self.kept: list[Ranked] = []
        self.rounds: list[Round] = []
        self.num_candidates = 0
        self.num_terminated = 0
        self.num_losses = 0
        self._space = space
        self._config = config
        self._evaluator = evaluator
        self._seed = seed
        self._workers = workers or Workers()
        self._batch_losses: dict[Candidate, dict[int, float]] = {}

    @property
    def best(self) -> Ranked:
        """The best candidate so far.

        Raises:
            FactorsError: no candidate gave a finite loss.
        """
        if not self.kept:
            raise FactorsError(
                f"none of {self.num_candidates} candidates gave a finite loss: the model cannot be evaluated at the "
                "target length; check the weights and the number format"
            )
        return self.kept[0]

    def steps(self) -> Iterator[Candidate]:
        """Run the search; yields each candidate after its evaluation."""
        config = self._config
        population = first_population(self._space, config.population, config.mutation_probability, self._seed)
        seen: set[Candidate] = set()
        for iteration in range(config.iterations + 1):
            yield from self._evaluate_all(population, f"round/{iteration}")
            seen.update(population)
            self._close_round(iteration)
            if iteration == config.iterations:
                return
            parents = [ranked.candidate for ranked in self.kept]
            population = children(self._space, parents, config, self._seed, iteration + 1, seen)

    def _evaluate_all(self, population: Sequence[Candidate], label: str) -> Iterator[Candidate]:
        """Evaluate candidates together with the other workers, each against the bound of that moment."""
        queue = self._workers.queue(label, len(population))
        race = self._race()
        waiting: list[Candidate] = []  # evaluated, not yet yielded

        def bound() -> float:
            waiting.extend(self._take(population[task], score) for task, score in queue.news())
            full = len(self.kept) == self._config.parents
            return self.kept[-1].loss_sum if full else math.inf

        while (task := queue.claim()) is not None:
            queue.publish(task, self._evaluator.evaluate(self._space.to_factors(population[task]), bound, race))
            bound()
            yield from waiting
            waiting.clear()
        yield from (self._take(population[task], score) for task, score in queue.remaining())

    def _race(self) -> Race | None:
        """The race of a round, against the worst candidate kept before it; none while there is room for more."""
        config = self._config
        if config.pruning is not Pruning.racing or len(self.kept) < config.parents:
            return None
        least_batches = -(-config.racing_samples // config.batch_size)
        return Race.against(self._batch_losses[self.kept[-1].candidate], config.racing_margin, least_batches)

    def _take(self, candidate: Candidate, score: Score) -> Candidate:
        """Account for an evaluated candidate, and keep it if it is among the best."""
        if score.is_complete and score.loss_sum < math.inf:
            self.kept.append(Ranked(score.loss_sum, candidate.critical_index, candidate.steps))
            self.kept = sorted(self.kept)[: self._config.parents]
            self._batch_losses[candidate] = score.batch_losses
        self.num_candidates += 1
        self.num_terminated += not score.is_complete
        self.num_losses += score.num_losses
        return candidate

    def _close_round(self, iteration: int) -> None:
        """Add the account of a round that has just ended."""
        evaluator = self._evaluator
        self.rounds.append(Round(
            iteration=iteration,
            best_value=evaluator.value(self.best.loss_sum),
            best_critical_index=self.best.critical_index,
            worst_kept_value=evaluator.value(self.kept[-1].loss_sum),
            num_candidates=self.num_candidates,
            num_terminated=self.num_terminated,
            num_losses=self.num_losses,
        ))  # fmt: skip
