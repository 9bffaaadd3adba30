"""The end of every search: what was found against every closed form, on samples nobody has seen.

A search looks good on the samples it chose by. So its best candidates, the closed forms, flat
factors at every critical index and the shipped factors for the model are scored on fresh samples,
of other texts with other keys, half with the needle at the start and half at spread depths. The
winner is chosen on one half of them; what is reported is its loss on the other half, in pairs with
the best closed form. Those hopelessly behind are stopped early and named so. Our own addition: the
paper reports none of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from longrope2.errors import FactorsError
from longrope2.presets import SHIPPED
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import (
    RopeGeometry,
    ten_period_index,
    theoretical_critical_index,
    yarn_attention_scale,
)
from longrope2.rope.methods import CLOSED_FORMS, RopeMethod, closed_form_factors, ntk_part
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses
from longrope2.search.workers import Workers
from longrope2.statistics import bootstrap_interval, paired_lower_bound

MOST_FOUND = 8
# Samples after which contestants are compared: then twice as many, and so on.
_FIRST_LOOK = 4
# A contestant is stopped when it is behind the best one with this confidence.
_CONFIDENCE = 0.99


class Kind(StrEnum):
    """Where a contestant comes from."""

    found = "found"
    closed_form = "closed form"
    preset = "preset"


@dataclass(frozen=True)
class Contestant:
    """Factors to be compared, under a name."""

    name: str
    kind: Kind
    factors: RescaleFactors


@dataclass(frozen=True)
class Standing:
    """How one contestant did; losses are nats per scored token, one per sample, in order.

    ``choosing`` are those of the half that the winner is chosen on, not all where it was stopped
    early; ``reported`` those of the other half, none where it was not carried so far.
    """

    contestant: Contestant
    choosing: tuple[float, ...]
    reported: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean loss: of the reported half where there is one."""
        return fmean(self.reported or self.choosing)


@dataclass(frozen=True)
class Confirmation:
    """The comparison on fresh samples.

    Attributes:
        standings: All contestants, best first: the carried ones by the reported half.
        winner: Chosen on the first half.
        found: The best found one there.
        closed_form: The best of the others there: what the found one has to beat.
        difference: Mean paired loss of ``found`` minus ``closed_form`` on the reported half.
        interval: Its 95 % interval (Student's t over the samples).
        num_losses: Sample losses looked at.
    """

    standings: tuple[Standing, ...]
    winner: Contestant
    found: Contestant
    closed_form: Contestant
    difference: float
    interval: tuple[float, float]
    num_losses: int

    @property
    def is_confirmed(self) -> bool:
        """Whether what was found is better than the best of the rest beyond noise."""
        return self.interval[1] < 0

    def verdict(self) -> str:
        """One line for people."""
        num, other = len(self.standings[0].reported), self.closed_form.name
        low, high = self.interval
        numbers = (
            f"{self.difference:+.3g} nats per token against {other} on {num} fresh samples "
            f"(95 %: {low:+.3g} to {high:+.3g})"
        )
        if self.is_confirmed:
            return f"confirmed: the found factors beat the best closed form, {numbers}"
        if low > 0:
            return f"refuted: the found factors are worse than {other}, {numbers}"
        return f"not confirmed: no found factors beat {other} beyond noise, {numbers}"

    def advice(self) -> str:
        """What to use instead of factors that were not confirmed."""
        method, factors = self.closed_form.factors.method, self.closed_form.factors
        if method not in CLOSED_FORMS:
            return f"the factors of {self.closed_form.name} are in the search's history.json"
        plain = closed_form_factors(RopeMethod(method), factors.geometry, factors.target_len)
        scale, extra = factors.long_attention_scale, ""
        if scale != plain.long_attention_scale:
            extra = f" rope.attention_scale={scale:.6g}"
        return f"use rope={method}{extra}, which needs no search"


def contestants(
    found: Sequence[RescaleFactors], geometry: RopeGeometry, target_len: int
) -> list[Contestant]:
    """Everything that is compared: the found ones first; equal factors once, by their first name.

    Found factors that are a closed form's go under the closed form's name.
    """
    closed: list[Contestant] = []
    for method in CLOSED_FORMS:
        if geometry.rotary_dim > 2 or method not in (RopeMethod.ntk_aware, RopeMethod.dynamic_ntk):
            factors = closed_form_factors(method, geometry, target_len)
            closed.append(Contestant(method.value, Kind.closed_form, factors))
    plain, scale = closed[0].factors, geometry.scale_to(target_len)
    stretched = yarn_attention_scale(scale)
    for contestant in list(closed):
        if contestant.factors.long_attention_scale == 1.0 != stretched:
            scaled = replace(contestant.factors, long_attention_scale=stretched)
            name = f"{contestant.name}, scale {stretched:.2f}"
            closed.append(replace(contestant, name=name, factors=scaled))
    last = min(theoretical_critical_index(geometry), geometry.num_frequencies - 1)
    for index in range(ten_period_index(geometry), last + 1):
        tail = (scale,) * (geometry.num_frequencies - index)
        flat = replace(plain, factors=ntk_part(index, scale) + tail, method="flat")
        closed.append(Contestant(f"flat s from {index}", Kind.closed_form, flat))
    others = [*closed, *_presets(geometry, target_len)]
    taken = {_applied(contestant.factors) for contestant in others}
    new = [factors for factors in found if _applied(factors) not in taken][:MOST_FOUND]
    best = [Contestant(f"found {n}", Kind.found, f) for n, f in enumerate(new, start=1)]
    unique = {_applied(c.factors): c for c in reversed([*best, *others])}
    return [c for c in [*best, *others] if unique[_applied(c.factors)] is c]


def _presets(geometry: RopeGeometry, target_len: int) -> list[Contestant]:
    """Shipped factors for this geometry and target."""
    paths = sorted((SHIPPED / "conf" / "factors").glob("*.json"))
    read = [(p.stem, RescaleFactors.from_json(p.read_text(encoding="utf-8"))) for p in paths]
    return [
        Contestant(name, Kind.preset, factors)
        for name, factors in read
        if factors.geometry == geometry and factors.target_len == target_len
    ]


def _applied(factors: RescaleFactors) -> tuple[float, ...]:
    """What a forward in the long window depends on, apart from rounding."""
    return tuple(round(x, 9) for x in (*factors.factors, factors.long_attention_scale))


class Confirming:
    """One comparison; every process of a search calls ``run``."""

    def __init__(
        self, losses: SampleLosses, journal: Journal, workers: Workers, entrants: list[Contestant]
    ) -> None:
        self._losses, self._journal, self._workers = losses, journal, workers
        self._entrants = entrants
        self._known: dict[int, list[float]] = {n: [] for n in range(len(entrants))}
        self._half = losses.num_samples // 2

    def run(self) -> Confirmation:
        """Choose on the first half, report on the second.

        Raises:
            FactorsError: the search found nothing that is not a closed form.
        """
        kinds = [entrant.kind for entrant in self._entrants]
        if Kind.found not in kinds:
            raise FactorsError(
                "every candidate that the search kept is a closed form; raise search.population or "
                "search.iterations"
            )
        going = self._choose()
        leaders = [min(self._of(is_found), key=self._mean) for is_found in (True, False)]
        winner = min(range(len(kinds)), key=self._mean)
        carried = sorted({*going, *leaders})
        self._score(carried, range(self._half, self._losses.num_samples), "reported")
        return self._summed_up(carried, winner, leaders)

    def _choose(self) -> list[int]:
        """Score the first half, stopping who is behind; returns who saw all of it."""
        going, seen, look = list(self._known), 0, _FIRST_LOOK
        while seen < self._half:
            upto = min(look, self._half)
            self._score(going, range(seen, upto), f"choosing/{seen}")
            best = min(going, key=self._mean)
            # The best of either kind always goes on: they are what the verdict compares.
            safe = {min(self._of(is_found), key=self._mean) for is_found in (True, False)}
            going = [n for n in going if n in safe or not self._is_behind(n, best)]
            seen, look = upto, 2 * upto
        return going

    def _of(self, is_found: bool) -> list[int]:
        """The entrants of one kind that are furthest on."""
        kind = [n for n, e in enumerate(self._entrants) if (e.kind is Kind.found) == is_found]
        most = max(len(self._known[n]) for n in kind)
        return [n for n in kind if len(self._known[n]) == most]

    def _mean(self, number: int) -> float:
        losses = self._known[number]
        furthest = max(map(len, self._known.values()))
        return fmean(losses[: self._half]) if len(losses) == furthest else math.inf

    def _is_behind(self, number: int, best: int) -> bool:
        own, other = self._known[number], self._known[best]
        differences = [a - b for a, b in zip(own, other, strict=True)]
        if math.inf in differences or len(differences) < 2:
            return math.inf in differences
        return paired_lower_bound(differences, _CONFIDENCE) > 0

    def _score(self, entrants: Sequence[int], samples: range, label: str) -> None:
        """Losses of entrants on samples, shared with the other workers."""
        size = self._losses.batch_size
        chunks = [
            [(n, s) for s in samples[i : i + size]]
            for n in entrants
            for i in range(0, len(samples), size)
        ]
        queue = self._workers.queue(f"confirm/{label}", len(chunks))
        results: dict[tuple[int, int], float] = {}
        while (task := queue.claim()) is not None:
            queue.publish(task, self._computed(chunks[task]))
        for task, losses in queue.remaining():
            results |= dict(zip(chunks[task], losses, strict=True))
        for n, s in sorted(results):
            self._known[n].append(results[n, s] / self._losses.samples[s].num_scored)

    def _computed(self, chunk: list[tuple[int, int]]) -> list[float]:
        factors = self._entrants[chunk[0][0]].factors
        known = [self._journal.losses(factors).get(sample) for _, sample in chunk]
        if all(known):
            return list(chain.from_iterable(losses for losses in known if losses))
        computed = self._losses.rows([(factors, sample) for _, sample in chunk])
        losses = [loss if math.isfinite(loss) else math.inf for loss in computed]
        for (_, sample), loss in zip(chunk, losses, strict=True):
            self._journal.add(factors, sample, [loss])
        return losses

    def _summed_up(self, carried: list[int], winner: int, leaders: list[int]) -> Confirmation:
        standings = [
            Standing(
                self._entrants[n],
                choosing=tuple(losses[: self._half]),
                reported=tuple(losses[self._half :]) if n in carried else (),
            )
            for n, losses in self._known.items()
        ]
        found, closed = (standings[n] for n in leaders)
        differences = np.subtract(found.reported, closed.reported)
        return Confirmation(
            standings=tuple(sorted(standings, key=lambda s: (not s.reported, s.loss))),
            winner=self._entrants[winner],
            found=found.contestant,
            closed_form=closed.contestant,
            difference=float(differences.mean()),
            interval=_paired_interval(differences.tolist()),
            num_losses=sum(map(len, self._known.values())),
        )


def _paired_interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval of a mean difference."""
    low = paired_lower_bound(differences, 0.975)
    return low, -paired_lower_bound([-difference for difference in differences], 0.975)


def as_plain(confirmation: Confirmation) -> dict[str, Any]:
    """Plain JSON values for the history: the verdict and every contestant."""
    return {
        "verdict": confirmation.verdict(),
        "is_confirmed": confirmation.is_confirmed,
        "winner": confirmation.winner.name,
        "found": confirmation.found.name,
        "closed_form": confirmation.closed_form.name,
        "difference": confirmation.difference,
        "interval": list(confirmation.interval),
        "contestants": [
            {
                "name": standing.contestant.name,
                "kind": standing.contestant.kind.value,
                "value": math.exp(min(standing.loss, 700.0)),
                "num_choosing": len(standing.choosing),
                "num_reported": len(standing.reported),
                "interval": [math.exp(min(x, 700.0)) for x in _interval(standing)],
                "factors": list(standing.contestant.factors.factors),
                "attention_scale": standing.contestant.factors.long_attention_scale,
            }
            for standing in confirmation.standings
        ],
    }


def _interval(standing: Standing) -> tuple[float, float]:
    """95 % interval of the mean loss."""
    losses = standing.reported or standing.choosing
    return bootstrap_interval([min(loss, 700.0) for loss in losses])
