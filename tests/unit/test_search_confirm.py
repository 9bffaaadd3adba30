"""The comparison on fresh samples: who takes part, who wins, and what is said of noise."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import CLOSED_FORMS, RopeMethod, closed_form_factors
from longrope2.search.confirm import Confirmation, Confirming, Contestant, Kind, contestants
from longrope2.search.journal import Journal
from longrope2.search.objective import SampleLosses, ScoredSample
from longrope2.search.workers import Workers
from longrope2.statistics import paired_lower_bound

GEOMETRY, TARGET = RopeGeometry(32, 1e4, 128), 2048
PLAIN = closed_form_factors(RopeMethod.none, GEOMETRY, TARGET)
NUM_SCORED = 4


class TableLosses(SampleLosses):
    """Losses by a table: mean nats of each factors (by their last value), and noise per sample."""

    def __init__(self, means: dict[float, float], noise: np.ndarray, batch_size: int = 1) -> None:
        sample = ScoredSample(np.zeros(TARGET, dtype=np.int64), TARGET - NUM_SCORED)
        self.samples, self.num_samples = (sample,) * noise.shape[1], noise.shape[1]
        self.batch_size, self._means, self._noise = batch_size, means, noise
        self.calls: list[tuple[float, int]] = []

    def rows(self, pairs: Sequence[tuple[RescaleFactors, int]]) -> list[float]:
        self.calls += [(factors.factors[-1], number) for factors, number in pairs]
        return [self._loss(factors.factors[-1], number) for factors, number in pairs]

    def _loss(self, last: float, number: int) -> float:
        row = list(self._means).index(last)
        return NUM_SCORED * (self._means[last] + self._noise[row, number])


def entrant(last: float, kind: Kind) -> Contestant:
    factors = replace(PLAIN, factors=(*PLAIN.factors[:-1], last), method="yarn")
    return Contestant(f"{kind.value} {last:g}", kind, factors)


def compare(
    folder: Path,
    found: dict[float, float],
    closed: dict[float, float],
    *,
    noise: float = 0.0,
    num: int = 32,
    seed: int = 0,
    batch_size: int = 1,
) -> tuple[Confirmation, TableLosses]:
    means = found | closed
    drawn = np.random.default_rng(seed).normal(0, noise, (len(means), num))
    losses = TableLosses(means, drawn, batch_size)
    entrants = [entrant(last, Kind.found) for last in found]
    entrants += [entrant(last, Kind.closed_form) for last in closed]
    with Journal(folder, {"model": "table"}, name="fresh") as journal:
        return Confirming(losses, journal, Workers(), entrants).run(), losses


def test_everything_takes_part_once() -> None:
    yarn = closed_form_factors(RopeMethod.yarn, GEOMETRY, TARGET)
    found = [replace(PLAIN, factors=(*PLAIN.factors[:-1], 20.0 + n)) for n in range(12)]
    everybody = contestants([yarn, *found], GEOMETRY, TARGET)
    by_kind = {kind: [c.name for c in everybody if c.kind is kind] for kind in Kind}
    assert by_kind[Kind.found] == [f"found {n}" for n in range(1, 9)]
    closed = by_kind[Kind.closed_form]
    assert closed[:7] == [method.value for method in CLOSED_FORMS]
    assert closed[7:13] == [
        f"{method.value}, scale 1.28" for method in CLOSED_FORMS if method is not RopeMethod.yarn
    ]
    # i_10 = 2 to i_tcd = 6 of the miniature.
    assert closed[13:] == [f"flat s from {index}" for index in range(2, 7)]
    assert by_kind[Kind.preset] == []
    flat = next(c.factors.factors for c in everybody if c.name == "flat s from 4")
    assert flat == pytest.approx([16 ** min(i / 4, 1) for i in range(16)])


def test_shipped_factors_take_part() -> None:
    geometry = RopeGeometry(64, 1e5, 8192)
    names = [c.name for c in contestants([PLAIN], geometry, 16384) if c.kind is Kind.preset]
    assert any(name.startswith("smollm2_135m") for name in names)


def test_a_better_find_is_confirmed(tmp_path: Path) -> None:
    closed = {16.0: 1.0, 17.0: 3.0, 18.0: 2.5}
    result, _ = compare(tmp_path, {21.0: 0.6, 22.0: 0.4}, closed, noise=0.1)
    assert result.winner.name == result.found.name == "found 22"
    assert result.closed_form.name == "closed form 16"
    assert result.is_confirmed and result.interval[0] < result.difference < result.interval[1] < 0
    assert result.difference == pytest.approx(-0.6, abs=0.12)
    assert result.verdict().startswith("confirmed: the found factors beat the best closed form")
    assert "on 16 fresh samples" in result.verdict()


def test_a_find_within_noise_is_not_confirmed(tmp_path: Path) -> None:
    result, _ = compare(tmp_path, {21.0: 0.98}, {16.0: 1.0}, noise=0.5)
    assert not result.is_confirmed
    assert result.verdict().startswith("not confirmed: no found factors beat closed form 16 beyond")
    refuted, _ = compare(tmp_path / "worse", {21.0: 2.0}, {16.0: 1.0}, noise=0.1)
    assert refuted.verdict().startswith("refuted: the found factors are worse than closed form 16,")
    assert result.advice() == "use rope=yarn rope.attention_scale=1, which needs no search"


def test_reported_is_the_half_that_nobody_chose_by(tmp_path: Path) -> None:
    """The winner is lucky on the first half; its reported value is that of the second."""
    noise = np.zeros((2, 8))
    noise[0, :4], noise[0, 4:] = -0.5, 0.5
    losses = TableLosses({21.0: 1.0, 16.0: 1.0}, noise)
    entrants = [entrant(21.0, Kind.found), entrant(16.0, Kind.closed_form)]
    with Journal(tmp_path, {}, name="fresh") as journal:
        result = Confirming(losses, journal, Workers(), entrants).run()
    assert result.winner.name == "found 21"
    assert result.difference == pytest.approx(0.5)
    standing = next(s for s in result.standings if s.contestant.kind is Kind.found)
    assert standing.loss == pytest.approx(1.5) and standing.choosing == (0.5,) * 4


def test_the_hopeless_are_stopped_early_and_the_best_of_both_kinds_is_not(tmp_path: Path) -> None:
    found, closed = {21.0: 5.0, 22.0: 6.0}, {16.0: 0.1, 17.0: 9.0, 18.0: 0.12}
    result, losses = compare(tmp_path, found, closed, noise=0.05, num=32)
    seen = {s.contestant.name: (len(s.choosing), len(s.reported)) for s in result.standings}
    assert seen["closed form 17"] == (4, 0) and seen["found 22"] == (4, 0)
    assert seen["found 21"] == (16, 16) and seen["closed form 16"] == (16, 16)
    assert result.winner.name == "closed form 16" and not result.is_confirmed
    assert result.num_losses == len(losses.calls)
    names = [s.contestant.name for s in result.standings]
    assert set(names[:3]) == {"closed form 16", "closed form 18", "found 21"}, "carried ones first"
    assert names[-1] == "closed form 17"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_stopped_comparison_goes_on(tmp_path: Path, batch_size: int) -> None:
    given = ({21.0: 0.6, 22.0: 0.4}, {16.0: 1.0, 17.0: 3.0})
    whole, losses = compare(tmp_path, *given, noise=0.1, batch_size=batch_size)
    path = tmp_path / "fresh.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    again, rest = compare(tmp_path, *given, noise=0.1, batch_size=batch_size)
    assert again == whole
    assert 0 < len(rest.calls) <= len(losses.calls) // 2 + 2 * batch_size


def test_nothing_found_but_closed_forms(tmp_path: Path) -> None:
    losses = TableLosses({16.0: 1.0}, np.zeros((1, 4)))
    with Journal(tmp_path, {}, name="fresh") as journal:
        confirming = Confirming(losses, journal, Workers(), [entrant(16.0, Kind.closed_form)])
        with pytest.raises(FactorsError, match=r"every candidate .* is a closed form; raise"):
            confirming.run()


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.975])
def test_lower_bound_is_students(count: int, confidence: float) -> None:
    values = np.random.default_rng(count).normal(0.3, 1.0, count)
    error = values.std(ddof=1) / math.sqrt(count)
    quantile = (values.mean() - paired_lower_bound(values.tolist(), confidence)) / error
    assert quantile == pytest.approx(stats.t.ppf(confidence, count - 1), rel=0.01)
