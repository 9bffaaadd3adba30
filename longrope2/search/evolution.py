"""The evolutionary search [LongRoPE2, arXiv 2502.20082, Algorithms 1 and 2].

Evaluate a first population; then, round by round, keep the best candidates of all so far and let each give one mutated
candidate. The bound of early termination is the loss of the worst candidate that would be kept at that moment: what
exceeds it can never be kept, so the result is the same with and without termination. Ties are broken by the candidate
itself, never by the order of evaluation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longrope2.errors import FactorsError
from longrope2.search.config import SearchConfig
from longrope2.search.evaluator import Evaluator
from longrope2.search.mutation import children, first_population
from longrope2.search.space import Candidate, SearchSpace

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
        num_losses: Sample losses looked at so far, whether computed or taken from the journal.
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
    """

    def __init__(self, space: SearchSpace, config: SearchConfig, evaluator: Evaluator, seed: int) -> None:
        self.kept: list[Ranked] = []
        self.rounds: list[Round] = []
        self.num_candidates = 0
        self._space = space
        self._config = config
        self._evaluator = evaluator
        self._seed = seed
        self._losses_before = evaluator.num_losses_used
        self._terminated_before = evaluator.num_terminated

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
            yield from self._evaluate_all(population)
            seen.update(population)
            self._close_round(iteration)
            if iteration == config.iterations:
                return
            parents = [ranked.candidate for ranked in self.kept]
            population = children(self._space, parents, config.mutation_probability, self._seed, iteration + 1, seen)

    def _evaluate_all(self, population: Sequence[Candidate]) -> Iterator[Candidate]:
        """Evaluate candidates one after the other, each against the bound of that moment."""
        for candidate in population:
            full = len(self.kept) == self._config.parents
            bound = self.kept[-1].loss_sum if full else math.inf
            score = self._evaluator.evaluate(self._space.to_factors(candidate), bound)
            if score.is_complete and score.loss_sum < math.inf:
                self.kept.append(Ranked(score.loss_sum, candidate.critical_index, candidate.steps))
                self.kept = sorted(self.kept)[: self._config.parents]
            self.num_candidates += 1
            yield candidate

    def _close_round(self, iteration: int) -> None:
        """Add the account of a round that has just ended."""
        evaluator = self._evaluator
        self.rounds.append(Round(
            iteration=iteration,
            best_value=evaluator.value(self.best.loss_sum),
            best_critical_index=self.best.critical_index,
            worst_kept_value=evaluator.value(self.kept[-1].loss_sum),
            num_candidates=self.num_candidates,
            num_terminated=evaluator.num_terminated - self._terminated_before,
            num_losses=evaluator.num_losses_used - self._losses_before,
        ))  # fmt: skip
