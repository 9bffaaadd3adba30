"""Every closed form is a point of the family; draws keep its rules."""

import math
import random

import pytest

from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import CLOSED_FORMS, RopeMethod, closed_form_factors
from longrope2.search.family import (
    Limits,
    Rise,
    Shape,
    closed_form_shape,
    closed_form_shapes,
    draw_shapes,
)

MINIATURE = (RopeGeometry(32, 1e4, 128), 2048)
LLAMA3_8B = (RopeGeometry(128, 5e5, 8192), 131072)
PHI4_MINI = (RopeGeometry(96, 1e4, 4096), 131072)
SMOLLM2 = (RopeGeometry(64, 1e5, 8192), 16384)


@pytest.mark.parametrize("given", [MINIATURE, LLAMA3_8B, PHI4_MINI, SMOLLM2])
@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_closed_forms_are_points(method: RopeMethod, given: tuple[RopeGeometry, int]) -> None:
    exact = closed_form_factors(method, *given)
    shape = closed_form_shape(method, *given)
    made = shape.factors(*given, "halving")
    assert made.factors == pytest.approx(exact.factors, rel=1e-12)
    assert made.long_attention_scale == exact.long_attention_scale


def test_flat_candidates_of_the_paper_are_points() -> None:
    geometry, target = MINIATURE
    made = Shape(Rise.power, 0.0, 5.0, level=1.25).factors(geometry, target, "halving").factors
    assert made == pytest.approx([20 ** min(i / 5, 1) for i in range(16)], rel=1e-12)


def test_values_by_hand() -> None:
    """Ramp from 1 to 5, level 1.5 x 16 = 24, slope 0.32: closed form worked out on paper."""
    geometry, target = MINIATURE
    shape = Shape(Rise.ramp, 1.0, 5.0, level=1.5, slope=0.32, attention_scale=1.28)
    made = shape.factors(geometry, target, "halving")
    assert made.factors[:2] == (1.0, 1.0)
    # p = 1/4, 1/2, 3/4: 1 / (p / 24 + 1 - p)
    assert made.factors[2:5] == pytest.approx([96 / 73, 48 / 25, 96 / 27])
    assert made.factors[5] == pytest.approx(24)
    assert made.factors[15] == pytest.approx(24 * (1 + 0.32 * 10 / 16))
    assert (made.long_attention_scale, made.short_attention_scale) == (1.28, 1.0)
    assert made.window_factors is not None and made.method == "halving"


def test_bands_are_linear_in_frequency() -> None:
    geometry, target = MINIATURE
    made = Shape(Rise.bands, 2.0, 6.0).factors(geometry, target, "halving").factors
    theta = [1e4 ** (-i / 16) for i in range(16)]
    part = (theta[2] - theta[3]) / (theta[2] - theta[6])
    assert made[3] == pytest.approx(1 / (part / 16 + 1 - part))


def test_starts_hold_every_closed_form_with_both_scales() -> None:
    starts = closed_form_shapes(*MINIATURE)
    scales = {shape.attention_scale for shape in starts}
    assert scales == {1.0, 0.1 * math.log(16) + 1}
    # YaRN has its own scale already: 7 forms, 6 of them with another one.
    assert len(starts) == len(set(starts)) == 13


def test_draws_are_spread_over_the_limits() -> None:
    limits = Limits.of(*MINIATURE, None)
    assert limits.last_index == 6
    assert limits.highest_attention_scale == pytest.approx(1 + 0.2 * math.log(16))
    shapes = draw_shapes(limits, 300, seed=3)
    assert draw_shapes(limits, 300, seed=3) == shapes != draw_shapes(limits, 300, seed=4)
    assert draw_shapes(limits, 20, seed=3) == shapes[:20]
    assert [sum(s.rise is rise for s in shapes) for rise in Rise] == [100, 100, 100]
    for name, low, high in (
        ("start", 0, 5.5),
        ("level", 0.8, 2.0),
        ("slope", 0, 0.6),
        ("attention_scale", 1, limits.highest_attention_scale),
    ):
        values = sorted(getattr(shape, name) for shape in shapes)
        span = high - low
        assert low <= values[0] < low + 0.02 * span and high - 0.02 * span < values[-1] <= high
        # Evenly: every tenth of the range has its tenth of the draws, give or take a third.
        counts = [sum(low + n * span / 10 <= v < low + (n + 1) * span / 10 for v in values)
                  for n in range(10)]  # fmt: skip
        assert all(20 <= count <= 41 for count in counts), (name, counts)
    assert all(0.5 <= shape.end - shape.start and shape.end <= 7 for shape in shapes)


def test_attention_scale_is_fixed_at_one_on_request() -> None:
    limits = Limits.of(*MINIATURE, 1.0)
    rng = random.Random(0)
    drawn = draw_shapes(limits, 20, seed=0)
    assert {shape.attention_scale for shape in drawn} == {1.0}
    assert {limits.near(shape, 0.25, rng).attention_scale for shape in drawn} == {1.0}


def test_shapes_around_another_have_the_given_width() -> None:
    limits = Limits.of(*MINIATURE, None)
    middle = Shape(Rise.ramp, 2.5, 5.5, level=1.2, slope=0.3, attention_scale=1.25)
    rng = random.Random(7)
    around = [limits.near(middle, 0.1, rng) for _ in range(2000)]

    def deviation(values: list[float]) -> float:
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))

    assert deviation([s.start for s in around]) == pytest.approx(0.6, rel=0.1)
    assert deviation([math.log(s.level) for s in around]) == pytest.approx(
        0.1 * math.log(2), rel=0.1
    )
    span = limits.highest_attention_scale - 1
    assert deviation([s.attention_scale for s in around]) == pytest.approx(0.1 * span, rel=0.1)
    changed = sum(s.rise is not Rise.ramp for s in around) / len(around)
    assert changed == pytest.approx(
        0.2 * 2 / 3, abs=0.03
    )  # one in five draws a form, maybe its own
    assert all(s.end - s.start >= 0.4999 for s in around)


def test_numbers_have_four_digits() -> None:
    shapes = draw_shapes(Limits.of(*LLAMA3_8B, None), 10, seed=0)
    assert all(round(shape.start, 4) == shape.start for shape in shapes)
