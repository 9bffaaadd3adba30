"""Intervals of scores: against scipy, their coverage, and how often a verdict on them is false."""

import math

import numpy as np
import pytest
from scipy import stats

from longrope2.statistics import (
    bounded_interval,
    difference_interval,
    exact_interval,
    paired_test,
    score_interval,
)


@pytest.mark.parametrize(
    ("num_correct", "num_samples"),
    [(0, 1), (1, 1), (0, 20), (1, 20), (19, 20), (50, 100), (499, 500), (9_300, 14_042)],
)
def test_the_exact_interval_is_scipys(num_correct, num_samples):
    expected = stats.binomtest(num_correct, num_samples).proportion_ci(0.95, "exact")
    assert exact_interval(num_correct, num_samples) == pytest.approx(
        (expected.low, expected.high), abs=1e-9
    )


def test_the_exact_interval_of_a_graded_mean_is_that_of_the_counts_around_it():
    assert exact_interval(97.75, 100) == (exact_interval(97, 100)[0], exact_interval(98, 100)[1])


def capital(values, mean, stakes):
    """What bets on a greater mean won: a product over the values, one by one."""
    won = 1.0
    for value, stake in zip(values, stakes, strict=True):
        won *= 1 + min(stake, 0.5 / mean) * (value - mean)
    return won


def test_the_ends_of_the_betting_interval_are_where_the_capital_reaches_40():
    values = np.random.default_rng(5).choice([0, 0.25, 0.5, 1.0], 80)
    drawn = np.random.default_rng(0).permutation(values)
    for end, seen in ((0, drawn), (1, 1 - drawn)):
        stakes, sum_seen, squares = [], 0.5, 0.25
        for number, value in enumerate(seen, start=1):
            stakes.append(math.sqrt(2 * math.log(40) / (80 * squares / number)))
            sum_seen += value
            squares += (value - sum_seen / (number + 1)) ** 2
        found = bounded_interval(values)[end]
        bound = found if end == 0 else 1 - found
        assert capital(seen, bound, stakes) == pytest.approx(40, rel=1e-6)
    low, high = bounded_interval(values)
    assert low < values.mean() < high and high - low < 0.25
    scaled = bounded_interval(2 * values - 1, -1.0, 1.0)
    assert scaled == pytest.approx((2 * low - 1, 2 * high - 1))


@pytest.mark.parametrize("scores", [[0.4], [0.8] * 2, [0.8] * 500, [1.0], [0.0] * 3, [0.5, 0.7]])
def test_no_interval_has_width_zero(scores):
    """One graded sample, or samples that are all alike, leave the mean unknown."""
    low, high = score_interval(scores)
    assert 0 <= low <= np.mean(scores) <= high <= 1 and high - low > 0.01
    low, high = paired_test(scores, scores).interval
    assert low < 0 < high


def graded(rng):
    """Scores as tasks give them: parts of answers found, similarities, rare misses. And means."""
    return {
        "quarters": (lambda size: rng.binomial(4, 0.9, size) / 4, 0.9),
        "tenths": (lambda size: rng.binomial(10, 0.09, size) / 10, 0.09),
        "rare miss": (lambda size: 1 - 0.8 * (rng.random(size) < 0.03), 1 - 0.8 * 0.03),
        "two": (lambda size: np.where(rng.random(size) < 0.5, 0.2, 0.9), 0.55),
        "similar": (lambda size: rng.beta(3, 2, size), 0.6),
        "extreme": (lambda size: rng.beta(0.1, 0.2, size), 1 / 3),
    }


@pytest.mark.parametrize("num_samples", [1, 2, 5, 20, 100])
def test_graded_means_are_covered_at_any_number_of_samples(num_samples):
    """The bootstrap covered 77 % at two samples."""
    for draw, mean in graded(np.random.default_rng(num_samples)).values():
        found = [bounded_interval(draw(num_samples)) for _ in range(100)]
        assert sum(low <= mean <= high for low, high in found) >= 95


def test_differences_join_the_gaps_in_squares():
    found = difference_interval(0.5, (0.4, 0.62), 0.3, (0.25, 0.33))
    assert found == pytest.approx((0.2 - math.hypot(0.1, 0.03), 0.2 + math.hypot(0.12, 0.05)))
