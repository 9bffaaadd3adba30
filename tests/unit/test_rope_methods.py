"""YaRN and NTK with the real critical dimension, beside the plain methods, and errors."""

import math

import pytest

from longrope2.errors import FactorsError
from longrope2.rope.frequencies import RopeGeometry, theoretical_critical_index
from longrope2.rope.methods import (
    CLOSED_FORMS,
    CRITICAL_INDEX_METHODS,
    RopeMethod,
    closed_form_factors,
    critical_index_factors,
    first_out_of_bound,
)

LLAMA3_8B = RopeGeometry(128, 5e5, 8192)
PHI3_MINI = RopeGeometry(96, 1e4, 2048)
PAPER = [(LLAMA3_8B, 30), (PHI3_MINI, 25)]  # real critical dimensions of the paper, sec. 3.2


def test_every_method_is_of_one_kind() -> None:
    read_from_somewhere = {RopeMethod.searched, RopeMethod.from_file, RopeMethod.from_hf}
    assert {*CLOSED_FORMS, *CRITICAL_INDEX_METHODS} == set(RopeMethod) - read_from_somewhere


@pytest.mark.parametrize(("geometry", "critical"), PAPER)
def test_ntk_rcd_is_a_change_of_base_that_gives_the_scale_at_the_critical_index(
    geometry: RopeGeometry, critical: int
) -> None:
    factors = critical_index_factors(RopeMethod.ntk_rcd, geometry, 131072, critical)
    scale, half = 131072 / geometry.original_len, geometry.num_frequencies
    base = geometry.rope_base * scale ** (half / critical)
    assert factors.factors == pytest.approx(
        [(base / geometry.rope_base) ** (i / half) for i in range(half)], rel=1e-12
    )
    assert factors.factors[critical] == pytest.approx(scale, rel=1e-12)
    assert (factors.method, factors.critical_index, factors.long_attention_scale) == (
        "ntk_rcd",
        critical,
        1.0,
    )


@pytest.mark.parametrize(
    ("geometry", "critical", "start"), [(LLAMA3_8B, 30, 18), (PHI3_MINI, 25, 12)]
)
def test_yarn_rcd_ramps_from_32_turns_to_the_critical_index(
    geometry: RopeGeometry, critical: int, start: int
) -> None:
    turns = [
        geometry.original_len / (2 * math.pi) * geometry.rope_base ** (-2 * i / geometry.rotary_dim)
        for i in (start, start + 1)
    ]
    assert turns[0] > 32 > turns[1]
    factors = critical_index_factors(RopeMethod.yarn_rcd, geometry, 131072, critical)
    scale = 131072 / geometry.original_len
    assert factors.factors[: start + 1] == (1.0,) * (start + 1)
    assert factors.factors[critical:] == (scale,) * (geometry.num_frequencies - critical)
    middle = start + 4
    part = 4 / (critical - start)
    assert factors.factors[middle] == pytest.approx(1 / (part / scale + 1 - part), rel=1e-12)
    assert factors.long_attention_scale == pytest.approx(0.1 * math.log(scale) + 1, rel=1e-12)
    assert (factors.method, factors.critical_index, factors.short_attention_scale) == (
        "yarn_rcd",
        critical,
        1.0,
    )


@pytest.mark.parametrize(("geometry", "critical"), PAPER)
@pytest.mark.parametrize(
    ("method", "plain"),
    [(RopeMethod.yarn_rcd, RopeMethod.yarn), (RopeMethod.ntk_rcd, RopeMethod.ntk)],
)
def test_the_bound_holds_from_the_real_critical_index_where_the_plain_method_breaks_it(
    geometry: RopeGeometry, critical: int, method: RopeMethod, plain: RopeMethod
) -> None:
    corrected = critical_index_factors(method, geometry, 131072, critical)
    assert first_out_of_bound(corrected, critical) is None
    assert first_out_of_bound(corrected, critical - 1) == critical - 1
    assert first_out_of_bound(closed_form_factors(plain, geometry, 131072), critical) == critical


@pytest.mark.parametrize(("geometry", "_"), PAPER)
def test_yarn_rcd_at_the_theoretical_index_is_yarn(geometry: RopeGeometry, _: int) -> None:
    theoretical = theoretical_critical_index(geometry)
    corrected = critical_index_factors(RopeMethod.yarn_rcd, geometry, 131072, theoretical)
    assert corrected.factors == pytest.approx(
        closed_form_factors(RopeMethod.yarn, geometry, 131072).factors, rel=1e-12
    )


def test_yarn_rcd_below_the_ramp_is_a_step() -> None:
    factors = critical_index_factors(RopeMethod.yarn_rcd, LLAMA3_8B, 131072, 7).factors
    assert factors == (1.0,) * 7 + (16.0,) * 57
    assert critical_index_factors(RopeMethod.yarn_rcd, LLAMA3_8B, 131072, 0).factors == (16.0,) * 64


@pytest.mark.parametrize(
    ("method", "target_len", "critical", "text"),
    [
        (
            RopeMethod.yarn,
            131072,
            30,
            "rope.method=yarn takes no critical index; use one of yarn_rcd, ntk_rcd",
        ),
        (
            RopeMethod.ntk_rcd,
            131072,
            0,
            "critical_index=0: a change of base leaves index 0 alone; give 1 or more",
        ),
        (RopeMethod.ntk_rcd, 131072, 64, "critical_index=64: must be a cosine index, 0 .. 63"),
        (RopeMethod.yarn_rcd, 131072, 64, "critical_index=64: must be a cosine index, 0 .. 63"),
        (RopeMethod.yarn_rcd, 131072, -1, "critical_index=-1: must be a cosine index, 0 .. 63"),
        (RopeMethod.yarn_rcd, 4096, 30, "target_len=4096 is below original_len=8192"),
    ],
)
def test_errors(method: RopeMethod, target_len: int, critical: int, text: str) -> None:
    with pytest.raises(FactorsError, match=text):
        critical_index_factors(method, LLAMA3_8B, target_len, critical)


@pytest.mark.parametrize("method", [*CRITICAL_INDEX_METHODS, RopeMethod.from_hf])
def test_they_have_no_closed_form(method: RopeMethod) -> None:
    with pytest.raises(
        FactorsError, match=f"rope.method={method} has no closed form; use one of none, pi,"
    ):
        closed_form_factors(method, LLAMA3_8B, 131072)
