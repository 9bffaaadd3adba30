"""Evaluate rescale factors: losses from the journal where known, computed where not, stopped where pointless.

Losses are >= 0 and are added in the order of the samples, so a partial sum never exceeds the full one, in floating
point too. Once a partial sum is above the bound, the full sum is above it for certain: stopping there is exact.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longrope2.rope import RescaleFactors
from longrope2.search.journal import Journal, factors_key
from longrope2.search.objective import perplexity

__all__ = ["Evaluator", "LossesOfSamples", "Score"]

LossesOfSamples = Callable[[RescaleFactors, int], Iterator[list[float]]]
"""Factors and the number of samples to leave out -> losses of the following ones, batch by batch, computed lazily."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """What is known about some factors.

    Attributes:
        loss_sum: Summed loss over the samples looked at; infinite when a loss was not finite.
        is_complete: Whether that is the sum over all samples (an infinite sum always is).
    """

    loss_sum: float
    is_complete: bool


class Evaluator:
    """Computes scores and keeps the account of what they cost.

    Attributes:
        num_losses_used: Sample losses looked at, from the journal or not: the same however often a search was resumed.
        num_losses_computed: Sample losses computed by this process.
        num_terminated: Evaluations stopped early.
    """

    def __init__(
        self,
        losses_of_samples: LossesOfSamples,
        journal: Journal,
        *,
        num_samples: int,
        num_scored_tokens: int,
        early_termination: bool = True,
    ) -> None:
        self._losses_of_samples = losses_of_samples
        self._journal = journal
        self._num_samples = num_samples
        self._num_scored_tokens = num_scored_tokens
        self._early_termination = early_termination
        self.num_losses_used = 0
        self.num_losses_computed = 0
        self.num_terminated = 0

    def evaluate(self, factors: RescaleFactors, bound: float = math.inf) -> Score:
        """Sum the losses of all samples, or stop as soon as the sum is above ``bound``."""
        total, looked_at = 0.0, 0
        for loss in self._known_then_computed(factors):
            total += loss
            looked_at += 1
            if total == math.inf or (self._early_termination and total > bound):
                break
        complete = looked_at == self._num_samples or total == math.inf
        self.num_losses_used += looked_at
        self.num_terminated += not complete
        return Score(total, complete)

    def value(self, loss_sum: float) -> float:
        """The objective: perplexity over the scored tokens of all samples."""
        return perplexity(loss_sum, self._num_scored_tokens)

    def _known_then_computed(self, factors: RescaleFactors) -> Iterator[float]:
        """Losses in the order of the samples; new ones are journalled before they are used."""
        known = self._journal.losses(factors)
        yield from known
        if len(known) == self._num_samples:
            return
        for batch in self._losses_of_samples(factors, len(known)):
            losses = [loss if math.isfinite(loss) else math.inf for loss in batch]
            if math.inf in losses:
                logger.warning("factors %s gave a loss that is not finite; they count as worst", factors_key(factors))
            self._journal.add(factors, losses)
            self.num_losses_computed += len(losses)
            yield from losses
