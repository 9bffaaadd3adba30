"""Evaluate rescale factors: losses from the journal, else computed, stopped where pointless.

Losses are >= 0 and their sum is rounded once, from the exact sum (``math.fsum``), whatever their
order: once a partial sum is above the bound, so is the full one, and stopping there is exact. So
the batch that was hardest for the candidates before comes first.
"""

import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from longrope2.rope.factors import RescaleFactors
from longrope2.search.journal import Journal, factors_key
from longrope2.search.objective import perplexity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """What is known about some factors.

    Attributes:
        loss_sum: Summed loss over the samples looked at; infinite when a loss was not finite.
        is_complete: Whether that is the sum over all samples (an infinite sum always is).
        num_losses: Samples looked at, whether computed or taken from the journal.
        batch_losses: Summed loss of each batch looked at, by its number.
    """

    loss_sum: float
    is_complete: bool
    num_losses: int
    batch_losses: dict[int, float] = field(default_factory=dict)

    def to_numbers(self) -> list[float]:
        """A list that ``from_numbers`` turns back into an equal value."""
        pairs = [number for pair in self.batch_losses.items() for number in pair]
        return [self.loss_sum, self.is_complete, self.num_losses, *pairs]

    @classmethod
    def from_numbers(cls, numbers: list[float]) -> "Score":
        """Read what ``to_numbers`` wrote."""
        loss_sum, is_complete, num_losses, *pairs = numbers
        batches = {int(batch): loss for batch, loss in zip(pairs[::2], pairs[1::2], strict=True)}
        return cls(loss_sum, bool(is_complete), int(num_losses), batches)


class BatchLosses(Protocol):
    """Losses of fixed samples in fixed batches."""

    @property
    def num_batches(self) -> int:
        """Batches that the samples are divided into."""
        ...

    def __call__(self, factors: RescaleFactors, batch: int) -> list[float]:
        """Summed loss of each sample of one batch."""
        ...


@dataclass(frozen=True)
class Race:
    """The inexact rule of ``search.pruning=racing``, one for a round: all workers judge alike.

    Attributes:
        order: Batches in the order they are run.
        limits: Loss after the first 1, 2, ... of them above which a candidate is given up.
    """

    order: tuple[int, ...]
    limits: tuple[float, ...]

    @classmethod
    def against(
        cls, batch_losses: Mapping[int, float], margin: float, least_batches: int
    ) -> "Race":
        """Race against a candidate's losses, hardest batch first, with a relative margin."""
        order = tuple(sorted(batch_losses, key=lambda batch: (-batch_losses[batch], batch)))
        sums = itertools.accumulate(batch_losses[batch] for batch in order)
        limits = [
            total * (1 + margin) if n >= least_batches else math.inf
            for n, total in enumerate(sums, start=1)
        ]
        return cls(order, tuple(limits))

    def is_lost(self, losses: Mapping[int, float]) -> bool:
        """Whether some first batches of a candidate cost more than allowed."""
        total = 0.0
        for batch, limit in zip(self.order, self.limits, strict=True):
            if batch not in losses:
                return False
            total += losses[batch]
            if total > limit:
                return True
        return False


class Evaluator:
    """Computes scores, journalling every loss."""

    def __init__(
        self,
        losses: BatchLosses,
        journal: Journal,
        *,
        num_scored_tokens: int,
        is_pruning: bool = True,
    ) -> None:
        self._losses, self._journal = losses, journal
        self._num_scored_tokens, self._is_pruning = num_scored_tokens, is_pruning
        self._loss_by_batch: defaultdict[int, float] = defaultdict(float)
        self._times_seen: defaultdict[int, int] = defaultdict(int)

    def evaluate(
        self,
        factors: RescaleFactors,
        bound: Callable[[], float] = lambda: math.inf,
        race: Race | None = None,
    ) -> Score:
        """Sum the losses of all samples, or stop once the sum is above the bound or the race lost.

        The bound is asked before every batch: it may fall meanwhile, as other workers finish.
        """
        known = self._journal.losses(factors)
        order = race.order if race else self._hardest_first()
        for batch, batch_losses in known.items():
            self._learn_hardness(batch, batch_losses)
        for batch in order:
            if batch in known:
                continue
            total = _sum_of(known)
            if total == math.inf or (self._is_pruning and total > bound()):
                break
            if race and race.is_lost(_by_batch(known)):
                break
            known[batch] = self._computed(factors, batch)
            self._learn_hardness(batch, known[batch])
        total = _sum_of(known)
        is_complete = total == math.inf or len(known) == self._losses.num_batches
        return Score(total, is_complete, sum(map(len, known.values())), _by_batch(known))

    def value(self, loss_sum: float) -> float:
        """The objective: perplexity over the scored tokens of all samples."""
        return perplexity(loss_sum, self._num_scored_tokens)

    def _computed(self, factors: RescaleFactors, batch: int) -> list[float]:
        """Losses of one batch, journalled before they are used."""
        computed = self._losses(factors, batch)
        losses = [loss if math.isfinite(loss) else math.inf for loss in computed]
        if math.inf in losses:
            text = "factors %s gave a loss that is not finite; they count as worst"
            logger.warning(text, factors_key(factors))
        self._journal.add(factors, batch, losses)
        return losses

    def _learn_hardness(self, batch: int, losses: list[float]) -> None:
        """Count known losses like computed ones, so that a resumed search takes the same order."""
        if math.inf not in losses:
            self._loss_by_batch[batch] += math.fsum(losses)
            self._times_seen[batch] += 1

    def _hardest_first(self) -> list[int]:
        """Batches by their mean loss so far, those never computed first."""

        def ease(batch: int) -> float:
            times = self._times_seen[batch]
            return -self._loss_by_batch[batch] / times if times else -math.inf

        return sorted(range(self._losses.num_batches), key=ease)


def _sum_of(losses: Mapping[int, list[float]]) -> float:
    return math.fsum(loss for batch in losses.values() for loss in batch)


def _by_batch(losses: Mapping[int, list[float]]) -> dict[int, float]:
    return {batch: math.fsum(values) for batch, values in sorted(losses.items())}
