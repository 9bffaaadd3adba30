"""Successive halving finds a planted shape; stopping, resuming and rows never change its result."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.search.config import Algorithm, SearchConfig
from longrope2.search.family import Rise, Shape
from longrope2.search.halving import Halving, most_halving_forwards, rungs_of_samples
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses, ScoredSample

GEOMETRY, TARGET = RopeGeometry(32, 1e4, 128), 2048
PLANTED = Shape(Rise.ramp, 1.3, 5.2, level=1.4, slope=0.2, attention_scale=1.31)
NUM_SCORED = 3


class PlantedLosses(SampleLosses):
    """Losses that grow with the distance from planted factors, harder for longer samples."""

    def __init__(
        self, num: int, lengths: Sequence[int], batch_size: int = 1, broken: bool = False
    ) -> None:
        samples = [
            ScoredSample(np.zeros(length, dtype=np.int64), length - NUM_SCORED)
            for length in lengths
            for _ in range(num)
        ]
        self.samples, self.num_samples = tuple(samples), len(samples)
        self.batch_size, self.broken = batch_size, broken
        self.calls: list[tuple[tuple[float, ...], int]] = []
        self.sizes: list[int] = []
        self.best = PLANTED.factors(GEOMETRY, TARGET, "planted")

    def rows(self, pairs: Sequence[tuple[RescaleFactors, int]]) -> list[float]:
        assert len({len(self.samples[number].tokens) for _, number in pairs}) == 1
        self.sizes.append(len(pairs))
        self.calls += [(f.factors, f.long_attention_scale, n) for f, n in pairs]  # type: ignore[misc]
        return [self._loss(factors, number) for factors, number in pairs]

    def _loss(self, factors: RescaleFactors, number: int) -> float:
        if self.broken:
            return math.nan
        distance = sum(
            abs(math.log(a / b)) for a, b in zip(factors.factors, self.best.factors, strict=True)
        )
        distance += 10 * abs(factors.long_attention_scale - self.best.long_attention_scale)
        hardness = 1 + len(self.samples[number].tokens) / TARGET + (number % 4) / 10
        return NUM_SCORED * hardness * distance + 0.001 * number


def config_of(**changes: object) -> SearchConfig:
    settings = {
        "algorithm": Algorithm.halving,
        "population": 64,
        "iterations": 4,
        "parents": 4,
        "mutations": 40,
        "num_samples": 8,
        "lengths": [0.25, 1.0],
        "highest_attention_scale": None,
    }
    return SearchConfig(**{**settings, **changes})  # type: ignore[arg-type]


def search(
    folder: Path, config: SearchConfig, losses: PlantedLosses, stop_after: int | None = None
) -> Halving:
    with Journal(folder, {"model": "synthetic"}) as journal:
        halving = Halving(GEOMETRY, TARGET, config, losses=losses, journal=journal, seed=1)
        for number, _ in enumerate(halving.steps(), start=1):
            if number == stop_after:
                break
    return halving


def outcome(halving: Halving) -> list[tuple[Shape, float]]:
    return [(shape, halving.value(shape)) for shape in halving.kept]


@pytest.mark.parametrize("num_rows", [1, 5])
def test_finds_a_planted_shape(tmp_path: Path, num_rows: int) -> None:
    losses = PlantedLosses(8, (512, 2048), batch_size=num_rows)
    halving = search(tmp_path, config_of(iterations=8), losses)
    best = halving.kept[0]
    assert best.attention_scale == pytest.approx(PLANTED.attention_scale, abs=0.04)
    found = halving.factors(best).factors
    rms = math.sqrt(
        sum(math.log(a / b) ** 2 for a, b in zip(found, losses.best.factors, strict=True)) / 16
    )
    assert rms < 0.12
    values = [r.best_value for r in halving.rounds if r.rung == 3]
    assert len(values) == 9 and values[-1] < values[0] / 2
    assert max(losses.sizes) == num_rows


def test_rows_do_not_change_the_result(tmp_path: Path) -> None:
    one = search(tmp_path / "one", config_of(), PlantedLosses(8, (512, 2048)))
    many = search(tmp_path / "many", config_of(), PlantedLosses(8, (512, 2048), batch_size=7))
    assert outcome(one) == outcome(many)


@pytest.mark.parametrize("stop_after", [1, 3, 6, 13])
def test_stopped_search_goes_on(tmp_path: Path, stop_after: int) -> None:
    whole = PlantedLosses(8, (512, 2048), batch_size=3)
    straight = search(tmp_path / "straight", config_of(), whole)
    first, second = (PlantedLosses(8, (512, 2048), batch_size=3) for _ in range(2))
    search(tmp_path / "stopped", config_of(), first, stop_after=stop_after)
    resumed = search(tmp_path / "stopped", config_of(), second)
    assert outcome(resumed) == outcome(straight)
    assert resumed.rounds == straight.rounds
    assert first.calls + second.calls == whole.calls, "nothing twice, the same forwards"


def test_the_worse_half_and_those_behind_are_dropped(tmp_path: Path) -> None:
    losses = PlantedLosses(8, (512, 2048))
    halving = search(tmp_path, config_of(iterations=0), losses)
    judged = [finished.num_judged for finished in halving.rounds]
    assert judged[0] == 64 and judged[1] == 32
    assert all(after <= max(-(-before // 2), 4) for before, after in pairwise(judged))
    # Behind by the same share on every sample: certain, so that few are left for the last rung.
    assert judged[-1] < 8
    assert halving.num_losses == len(losses.calls) == halving.rounds[-1].num_losses
    assert halving.num_terminated == 64 - judged[-1]


def test_value_counts_lengths_alike(tmp_path: Path) -> None:
    losses = PlantedLosses(8, (512, 2048))
    halving = search(tmp_path, config_of(), losses)
    best = halving.factors(halving.kept[0])
    by_length = [
        sum(losses._loss(best, n) / NUM_SCORED for n in numbers) / len(numbers)
        for numbers in (range(8), range(8, 16))
    ]
    assert halving.value(halving.kept[0]) == pytest.approx(math.exp(sum(by_length) / 2))


def test_rungs_double_and_longer_samples_come_later() -> None:
    config = config_of(population=48, parents=4, num_samples=8)
    plan = rungs_of_samples([512] * 8 + [1024] * 8 + [2048] * 8, config)
    assert [len(rung) for rung in plan] == [1, 4, 12, 24]
    assert plan[1] == [0, 1, 8, 9]
    assert all(set(a) <= set(b) for a, b in pairwise(plan))
    single = rungs_of_samples([2048] * 6, config_of(population=4, parents=4, num_samples=6))
    assert single == [list(range(6))]


def test_most_forwards_are_those_of_a_search_that_drops_by_halves_alone(tmp_path: Path) -> None:
    config = config_of(confidence=1 - 1e-12)
    losses = PlantedLosses(8, (512, 2048))
    halving = search(tmp_path, config, losses)
    most = most_halving_forwards(config, [512, 2048])
    assert sum(most.values()) >= halving.num_losses
    # By hand: 64 x 1, 32 x (1 + 2), 16 x (2 + 2), 8 x (4 + 4); four rounds of 40, 20, 10, 5.
    by_hand = (64 + 32 * 3 + 16 * 4 + 8 * 8) + 4 * (40 + 20 * 3 + 10 * 4 + 5 * 8)
    assert sum(most.values()) == by_hand


def test_nothing_finite(tmp_path: Path) -> None:
    with pytest.raises(FactorsError, match="none of 64 candidates gave a finite loss"):
        search(tmp_path, config_of(), PlantedLosses(8, (512, 2048), broken=True))
