"""Successive halving over the family of ``family.py``: better factors for fewer forward passes.

A round judges its candidates on few short samples, drops what is behind, and gives what is left
twice as many samples and longer ones, until few candidates have seen all (Jamieson and Talwalkar,
arXiv 1502.07943). The first round is spread over the family and holds the closed forms; each later
one draws around the best so far, closer every time. A candidate is dropped when it is in the worse
half, or when its paired difference from the best on the same samples lies above zero with
confidence. Lengths count alike, so that factors must be good at all of them.

Everything random is drawn from (seed, round, number), and what is computed together depends on the
candidates alone: a resumed search, and any number of workers, find the same result.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.search.config import SearchConfig
from longrope2.search.family import Limits, Shape, closed_form_shapes, draw_shapes
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses
from longrope2.search.workers import Workers
from longrope2.statistics import paired_lower_bound

# Samples that a paired difference needs before it can drop a candidate.
_LEAST_PAIRS = 4
# Width of the draws around the best candidates, as a share of each number's range, by round.
_WIDTHS = (0.25, 0.12, 0.06)


@dataclass(frozen=True)
class Rung:
    """Account of one rung: how many candidates it judged, and the best of them.

    Values are exp(mean loss per scored token, lengths alike) over the samples of the rung;
    ``num_candidates`` and ``num_losses`` count from the start of the search. No candidate has a
    critical index.
    """

    iteration: int
    rung: int
    num_judged: int
    best_value: float
    worst_kept_value: float
    num_candidates: int
    num_losses: int
    best_critical_index: None = None


class Halving:
    """One search. Iterate over ``steps`` to run it; the state can be read between steps.

    Attributes:
        kept: Candidates that have seen every sample, best first.
        rounds: Account of every finished rung.
        num_losses: Sample losses looked at so far.
        best_start: The best of the first round; None while that goes on.
    """

    def __init__(
        self,
        geometry: RopeGeometry,
        target_len: int,
        config: SearchConfig,
        *,
        losses: SampleLosses,
        journal: Journal,
        seed: int,
        workers: Workers | None = None,
    ) -> None:
        self.kept: list[Shape] = []
        self.rounds: list[Rung] = []
        self.num_losses = 0
        self.best_start: RescaleFactors | None = None
        self._geometry, self._target_len, self._config = geometry, target_len, config
        self._losses, self._journal, self._seed = losses, journal, seed
        self._workers = workers or Workers()
        self._known: dict[Shape, dict[int, float]] = {}  # nats per scored token, by sample
        highest = config.highest_attention_scale
        self._limits = Limits.of(geometry, target_len, highest)
        self._plan = rungs_of_samples([len(s.tokens) for s in losses.samples], config)

    @property
    def num_candidates(self) -> int:
        """Distinct candidates judged so far."""
        return len(self._known)

    @property
    def num_terminated(self) -> int:
        """Those of them that have not seen every sample."""
        return sum(len(known) < self._losses.num_samples for known in self._known.values())

    def factors(self, shape: Shape) -> RescaleFactors:
        """The rescale factors of a candidate."""
        return shape.factors(self._geometry, self._target_len, "halving")

    def value(self, shape: Shape) -> float:
        """exp(mean loss per scored token) over all samples, every length counted alike."""
        return math.exp(self._mean(shape, self._plan[-1]))

    def steps(self) -> Iterator[int]:
        """Run the search; yields the number of the round after each of its rungs."""
        for iteration in range(self._config.iterations + 1):
            judged = self._drawn(iteration)
            for number, samples in enumerate(self._plan):
                self._judge(judged, samples, f"halving/{iteration}/{number}")
                judged = self._close(judged, iteration, number)
                if number == len(self._plan) - 1:
                    ranked = {*self.kept, *judged}
                    self.kept = sorted(ranked, key=lambda s: (self._mean(s, self._plan[-1]), s))
                    self.best_start = self.best_start or self.factors(self.kept[0])
                yield iteration

    def _drawn(self, iteration: int) -> list[Shape]:
        """Candidates of a round: the first spread over the family, later ones around the best."""
        config = self._config
        if iteration == 0:
            closed = closed_form_shapes(self._geometry, self._target_len)
            drawn = draw_shapes(self._limits, num=config.population, seed=self._seed)
            return list(dict.fromkeys([*closed, *drawn]))[: config.population]
        parents, width = self.kept[: config.parents], _WIDTHS[min(iteration, len(_WIDTHS)) - 1]
        num = config.parents if config.mutations is None else config.mutations
        rngs = [random.Random(f"near/{self._seed}/{iteration}/{n}") for n in range(num)]
        children = [
            self._limits.near(parents[n % len(parents)], width, rng) for n, rng in enumerate(rngs)
        ]
        return list(dict.fromkeys([*parents, *children]))

    def _judge(self, shapes: Sequence[Shape], samples: Sequence[int], label: str) -> None:
        """Losses of all shapes on all these samples, shared with the other workers."""
        factors = {shape: self.factors(shape) for shape in shapes}
        chunks: list[list[tuple[Shape, int]]] = []
        for number in samples:
            new = [(s, number) for s in shapes if number not in self._known.get(s, ())]
            size = self._losses.batch_size
            chunks += [new[i : i + size] for i in range(0, len(new), size)]
        queue = self._workers.queue(label, len(chunks))
        while (task := queue.claim()) is not None:
            rows = [(factors[shape], number) for shape, number in chunks[task]]
            queue.publish(task, self._computed(rows))
        for task, losses in queue.remaining():
            for (shape, number), loss in zip(chunks[task], losses, strict=True):
                mean = loss / self._losses.samples[number].num_scored
                self._known.setdefault(shape, {})[number] = mean
                self.num_losses += 1

    def _computed(self, rows: list[tuple[RescaleFactors, int]]) -> list[float]:
        """Losses from the journal, or computed together and journalled."""
        known = [self._journal.losses(factors).get(number) for factors, number in rows]
        if all(known):
            return [losses[0] for losses in known if losses]
        losses = [x if math.isfinite(x) else math.inf for x in self._losses.rows(rows)]
        for (factors, number), loss in zip(rows, losses, strict=True):
            self._journal.add(factors, number, [loss])
        return losses

    def _close(self, judged: Sequence[Shape], iteration: int, number: int) -> list[Shape]:
        """Account for a rung and return who goes on, best first."""
        samples = self._plan[number]
        ranked = sorted(judged, key=lambda s: (self._mean(s, samples), s))
        if math.isinf(best := self._mean(ranked[0], samples)):
            raise FactorsError(
                f"none of {len(judged)} candidates gave a finite loss: the model cannot be "
                "evaluated at these lengths; check the weights and the number format"
            )
        going = ranked
        if number < len(self._plan) - 1:
            half = ranked[: max(-(-len(ranked) // 2), min(self._config.parents, len(ranked)))]
            least = self._config.parents
            going = [s for n, s in enumerate(half) if n < least or not self._is_behind(s, ranked)]
        worst = self._mean(going[-1], samples)
        self.rounds.append(
            Rung(
                iteration=iteration,
                rung=number,
                num_judged=len(judged),
                best_value=math.exp(best),
                worst_kept_value=math.exp(worst) if worst < 700 else math.inf,
                num_candidates=self.num_candidates,
                num_losses=self.num_losses,
            )
        )
        return going

    def _is_behind(self, shape: Shape, ranked: Sequence[Shape]) -> bool:
        """Whether a candidate is worse than the best on the same samples, with confidence."""
        best, own = self._known[ranked[0]], self._known[shape]
        differences = [own[number] - best[number] for number in own if number in best]
        if len(differences) < _LEAST_PAIRS or math.inf in differences:
            return math.inf in differences
        return paired_lower_bound(differences, self._config.confidence) > 0

    def _mean(self, shape: Shape, samples: Sequence[int]) -> float:
        """Mean loss per scored token, nats: over the samples of each length, then over lengths."""
        by_length: dict[int, list[float]] = {}
        for number in samples:
            length = len(self._losses.samples[number].tokens)
            by_length.setdefault(length, []).append(self._known[shape][number])
        return fmean(map(fmean, by_length.values()))


def rungs_of_samples(lengths: Sequence[int], config: SearchConfig) -> list[list[int]]:
    """Which samples each rung of a round is judged by.

    There are as many rungs as halvings from the larger of ``population`` and the later rounds'
    candidates to ``parents``. The last one takes all samples, every one before it half as many of
    each length, and the longer lengths come in one rung after the other.

    Args:
        lengths: Tokens of every sample.
        config: Of the search.

    Returns:
        Sample numbers by rung; each rung holds those of the one before.
    """
    num_rungs = max(1, math.ceil(math.log2(config.population / config.parents)))
    by_length: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        by_length.setdefault(length, []).append(number)
    plan = []
    for rung in range(num_rungs):
        samples: list[int] = []
        for order, length in enumerate(sorted(by_length)):
            enters = min(order, num_rungs - 1)
            count = -(-len(by_length[length]) // 2 ** (num_rungs - 1 - rung))
            samples += by_length[length][: count if rung >= enters else 0]
        plan.append(samples)
    return plan


def most_halving_forwards(config: SearchConfig, lengths: Sequence[int]) -> dict[int, int]:
    """Forward passes by length of a search that drops nobody with confidence."""
    numbered = [length for length in lengths for _ in range(config.num_samples)]
    plan, forwards = rungs_of_samples(numbered, config), dict.fromkeys(lengths, 0)
    later = config.parents if config.mutations is None else config.mutations
    for iteration in range(config.iterations + 1):
        judged = later if iteration else config.population
        done: set[int] = set()
        for samples in plan:
            for number in set(samples) - done:
                forwards[numbered[number]] += judged
            done = set(samples)
            judged = max(-(-judged // 2), min(config.parents, judged))
    return forwards
