"""Periods and critical dimensions: spot values of paper and models, every error text."""

import math

import pytest

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import (
    RopeGeometry,
    periods,
    ten_period_index,
    theoretical_critical_index,
)
from longrope2.rope.methods import first_out_of_bound, ntk_part

PHI3_MINI = RopeGeometry(96, 1e4, 2048)
LLAMA3_8B = RopeGeometry(128, 5e5, 8192)
PHI4_MINI = RopeGeometry(96, 1e4, 4096)
LLAMA2_7B = RopeGeometry(128, 1e4, 4096)
QWEN3_8B = RopeGeometry(128, 1e6, 32768)
SMOLLM2 = RopeGeometry(64, 1e5, 8192)
TINY = RopeGeometry(32, 1e4, 128)


@pytest.mark.parametrize(
    ("geometry", "theoretical", "ten_periods"),
    [
        (PHI3_MINI, 31, 19),
        (LLAMA3_8B, 35, 24),
        (PHI4_MINI, 34, 22),
        (LLAMA2_7B, 46, 30),
        (QWEN3_8B, 40, 29),
        (SMOLLM2, 20, 14),
        (TINY, 6, 2),
    ],
)
def test_critical_indices(geometry: RopeGeometry, theoretical: int, ten_periods: int) -> None:
    assert theoretical_critical_index(geometry) == theoretical
    assert ten_period_index(geometry) == ten_periods


@pytest.mark.parametrize(
    "geometry", [PHI3_MINI, LLAMA3_8B, PHI4_MINI, LLAMA2_7B, QWEN3_8B, SMOLLM2, TINY]
)
def test_critical_indices_by_counting_turns(geometry: RopeGeometry) -> None:
    turns = [geometry.original_len / period for period in periods(geometry).tolist()]
    assert theoretical_critical_index(geometry) == sum(turn > 1 for turn in turns)
    assert ten_period_index(geometry) == sum(turn > 10 for turn in turns)


@pytest.mark.parametrize(
    ("geometry", "fraction"),
    [(PHI3_MINI, 30.16), (LLAMA3_8B, 34.98), (PHI4_MINI, 33.77), (LLAMA2_7B, 45.03)],
)
def test_a_dimension_at_the_fractional_critical_index_turns_once(
    geometry: RopeGeometry, fraction: float
) -> None:
    period = 2 * math.pi * geometry.rope_base ** (2 * fraction / geometry.rotary_dim)
    assert period == pytest.approx(
        geometry.original_len, rel=2e-3
    )  # the fraction is given to two places
    assert theoretical_critical_index(geometry) == math.ceil(fraction)


def test_period_of_the_paper() -> None:
    period = periods(PHI3_MINI)[47].item()
    assert period == pytest.approx(51_861, abs=1)
    assert PHI3_MINI.original_len / period < 0.04


def test_periods_closed_form() -> None:
    expected = [math.exp(-2 * i / 128 * math.log(5e5)) for i in range(64)]
    found = (2 * math.pi / periods(LLAMA3_8B)).tolist()
    assert found == pytest.approx(expected, rel=1e-14)


def test_every_dimension_trained_clips_to_their_count() -> None:
    assert theoretical_critical_index(RopeGeometry(8, 10.0, 8192)) == 4
    assert ten_period_index(RopeGeometry(8, 1e4, 32)) == 0


def test_ntk_part_is_a_change_of_base() -> None:
    critical_index, critical_factor = 30, 21.5
    base = LLAMA3_8B.rope_base * critical_factor ** (128 / (2 * critical_index))
    changed = [
        base ** (2 * i / 128) / LLAMA3_8B.rope_base ** (2 * i / 128) for i in range(critical_index)
    ]
    assert ntk_part(critical_index, critical_factor) == pytest.approx(changed, rel=1e-13)
    assert ntk_part(0, 20.0) == ()


def test_bound_looks_from_the_critical_index_on() -> None:
    geometry = RopeGeometry(8, 1e4, 32)
    factors = RescaleFactors(
        factors=(1.0, 3.9, 4.0, 5.0), geometry=geometry, target_len=128, method="x"
    )
    assert first_out_of_bound(factors, 2) is None
    assert first_out_of_bound(factors, 1) is not None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((7, 1e4, 128), "rotary_dim=7: the rotated channels of a head must be even"),
        ((0, 1e4, 128), "rotary_dim=0"),
        ((8, 1.0, 128), "rope_base=1.0: the RoPE base must be a finite number above 1"),
        ((8, math.nan, 128), "rope_base=nan"),
        (
            (8, 1e4, 6),
            "original_len=6: the pre-trained window must be at least 7 tokens; "
            "set model.original_len",
        ),
    ],
)
def test_geometry_errors(arguments: tuple[int, float, int], text: str) -> None:
    with pytest.raises(FactorsError, match=text):
        RopeGeometry(*arguments)


def test_ntk_part_errors() -> None:
    with pytest.raises(FactorsError, match="critical_index=-1: a cosine index is 0 or more"):
        ntk_part(-1, 2.0)
    with pytest.raises(FactorsError, match=r"lambda\[3\]=0.0: a rescale factor must be above 0"):
        ntk_part(3, 0.0)
