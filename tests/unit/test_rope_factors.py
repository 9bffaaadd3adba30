"""RescaleFactors: published arrays, round trips, windows, closed forms, every error text."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import from_hf_config, to_hf_config
from longrope2.rope.methods import (
    CLOSED_FORMS,
    RopeMethod,
    closed_form_factors,
    first_out_of_bound,
    ntk_part,
)

FIXTURES = Path(__file__).parent.parent / "fixtures"
PUBLISHED = ["llama3_8b_128k_longrope2.json", "phi4_mini_128k_longrope2.json"]
GEOMETRY = RopeGeometry(8, 1e4, 32)


FLAT = {
    "factors": [1, 2, 4, 5],
    "rotary_dim": 8,
    "rope_base": 1e4,
    "original_len": 32,
    "target_len": 128,
    "method": "test",
}


def published(name: str) -> tuple[RescaleFactors, dict[str, Any]]:
    text = (FIXTURES / name).read_text()
    return RescaleFactors.from_json(text), json.loads(text)


def small(**changes: Any) -> RescaleFactors:
    base = RescaleFactors(
        factors=(1.0, 2.0, 4.0, 5.0), geometry=GEOMETRY, target_len=128, method="test"
    )
    return replace(base, **changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_arrays_follow_the_ntk_part(name: str) -> None:
    factors, fields = published(name)
    critical = fields["critical_index"]
    assert factors.factors == tuple(fields["factors"])
    assert factors.critical_index == critical
    assert factors.geometry == RopeGeometry(
        fields["rotary_dim"], fields["rope_base"], fields["original_len"]
    )
    assert (
        factors.long_attention_scale
        == factors.short_attention_scale
        == fields.get("attention_scale", 1.0)
    )
    assert factors.provenance == {"model": fields["model"], "source": fields["source"]}
    assert factors.factors[:critical] == pytest.approx(
        ntk_part(critical, factors.factors[critical]), abs=1e-8
    )
    assert first_out_of_bound(factors, critical) is None
    assert first_out_of_bound(factors, critical - 5) is not None


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_round_trip(name: str) -> None:
    factors, _ = published(name)
    assert RescaleFactors.from_json(factors.to_json()) == factors


def test_json_round_trip_of_every_field() -> None:
    factors = small(
        critical_index=2,
        short_factors=(0.99, 1.0, 1.0, 1.1),
        short_attention_scale=1.1,
        provenance={"note": "x"},
    )
    assert RescaleFactors.from_json(factors.to_json()) == factors


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_hf_config_round_trip_in_each_layout(name: str, layout: str) -> None:
    factors, fields = published(name)
    head_dim = round(factors.geometry.rotary_dim / fields.get("partial_rotary_factor", 1.0))
    keys = to_hf_config(factors, head_dim=head_dim)
    other = "rope_parameters" if layout == "rope_scaling" else "rope_scaling"
    keys.pop(other)
    if layout == "rope_parameters":  # the layout since transformers 5 keeps these inside only
        keys.pop("rope_theta")
        keys.pop("partial_rotary_factor", None)
    read = from_hf_config({"head_dim": head_dim, **keys})
    assert read == replace(
        factors, method="from_hf", critical_index=None, provenance=read.provenance
    )


def test_hf_config_states_everything_in_both_layouts() -> None:
    keys = to_hf_config(small())
    assert keys["max_position_embeddings"] == 128
    assert keys["original_max_position_embeddings"] == 32
    assert keys["rope_theta"] == 1e4
    for layout in ("rope_scaling", "rope_parameters"):
        scaling = keys[layout]
        assert scaling["type"] == scaling["rope_type"] == "longrope"
        assert scaling["short_factor"] == [1.0] * 4
        assert scaling["long_factor"] == [1.0, 2.0, 4.0, 5.0]
        assert scaling["attention_factor"] == 1.0
        assert scaling["factor"] == 4.0
        assert scaling["original_max_position_embeddings"] == 32
    assert keys["rope_parameters"]["rope_theta"] == 1e4
    assert "partial_rotary_factor" not in keys


def test_hf_config_with_an_unscaled_rope() -> None:
    config = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
    }
    read = from_hf_config(config, original_len=32)
    assert (read.factors, read.geometry, read.target_len, read.method) == (
        (1.0,) * 4,
        GEOMETRY,
        64,
        "none",
    )
    assert from_hf_config(config, None, 128).geometry.original_len == 64


def test_hf_config_original_length_top_level_wins_over_inside() -> None:
    keys = to_hf_config(small())
    keys["rope_scaling"]["original_max_position_embeddings"] = 16
    keys["rope_parameters"]["original_max_position_embeddings"] = 16
    assert from_hf_config({"head_dim": 8, **keys}).geometry.original_len == 32
    del keys["original_max_position_embeddings"]
    assert from_hf_config({"head_dim": 8, **keys}).geometry.original_len == 16


def test_hf_config_default_attention_factor_is_in_both_windows() -> None:
    keys = {"head_dim": 8, **to_hf_config(small(target_len=512))}
    del keys["rope_scaling"], keys["rope_parameters"]["attention_factor"]
    read = from_hf_config(keys)
    expected = math.sqrt(1 + math.log(16) / math.log(32))
    assert (
        read.attention_scale(Window.SHORT)
        == read.attention_scale(Window.LONG)
        == pytest.approx(expected, rel=1e-15)
    )
    keys["rope_parameters"]["factor"] = 1.0
    assert from_hf_config(keys).attention_scale(Window.LONG) == 1.0


def test_hf_config_attention_scale_per_window() -> None:
    keys = {"head_dim": 8, **to_hf_config(small())}
    keys["rope_scaling"] |= {"short_mscale": 1.25, "long_mscale": 1.5}
    read = from_hf_config(keys)
    assert (read.short_attention_scale, read.long_attention_scale) == (1.25, 1.5)


def test_imports_what_exists_in_the_wild() -> None:
    factors = small(factors=(0.9978, 3.23, 3.23, 121.0), short_factors=(1.0, 1.02, 1.03, 1.03))
    assert RescaleFactors.from_json(factors.to_json()) == factors


def test_windows_have_their_own_table_and_scale() -> None:
    factors = small(long_attention_scale=1.2)
    theta = [1e4 ** (-2 * i / 8) for i in range(4)]
    long = [t / f for t, f in zip(theta, factors.factors, strict=True)]
    assert factors.inverse_frequencies(Window.SHORT).tolist() == pytest.approx(theta, rel=3e-7)
    assert factors.inverse_frequencies(Window.LONG).tolist() == pytest.approx(long, rel=3e-7)
    assert factors.inverse_frequencies(Window.LONG).dtype == torch.float32
    assert (factors.attention_scale(Window.SHORT), factors.attention_scale(Window.LONG)) == (
        1.0,
        1.2,
    )
    own_short = small(short_factors=(2.0, 2.0, 2.0, 2.0)).inverse_frequencies(Window.SHORT)
    assert own_short.tolist() == pytest.approx([t / 2 for t in theta], rel=3e-7)


def test_in_both_windows_the_short_one_is_the_long_one() -> None:
    static = small(long_attention_scale=1.2).in_both_windows()
    assert torch.equal(
        static.inverse_frequencies(Window.SHORT), static.inverse_frequencies(Window.LONG)
    )
    assert static.inverse_frequencies(Window.LONG).equal(small().inverse_frequencies(Window.LONG))
    assert (static.attention_scale(Window.SHORT), static.attention_scale(Window.LONG)) == (1.2, 1.2)
    assert RescaleFactors.from_json(static.to_json()) == static


def test_closed_forms_in_float64() -> None:
    geometry, target_len, scale = RopeGeometry(128, 5e5, 8192), 131072, 16.0
    methods = {method: closed_form_factors(method, geometry, target_len) for method in CLOSED_FORMS}
    assert methods[RopeMethod.none].factors == (1.0,) * 64
    assert methods[RopeMethod.pi].factors == (scale,) * 64
    base = 5e5 ** (math.log(131072 / (2 * math.pi)) / math.log(8192 / (2 * math.pi)))
    assert base == pytest.approx(7.98e7, rel=1e-3)  # the paper's NTK for LLaMA3-8B
    turning_once = (
        64 * math.log(8192 / (2 * math.pi)) / math.log(5e5)
    )  # un-ceiled critical index: lambda is s there
    expected = [scale ** (i / turning_once) for i in range(64)]
    assert methods[RopeMethod.ntk].factors == pytest.approx(expected, rel=1e-12)
    assert methods[RopeMethod.ntk_aware].factors == pytest.approx(
        [scale ** (i / 63) for i in range(64)], rel=1e-12
    )
    assert methods[RopeMethod.dynamic_ntk].factors == pytest.approx(
        [241 ** (i / 63) for i in range(64)], rel=1e-12
    )
    yarn = methods[RopeMethod.yarn]  # ramp from floor(18.08) = 18 to ceil(34.98) = 35
    assert yarn.factors[18] == 1.0
    assert yarn.factors[35:] == (scale,) * 29
    assert yarn.factors[26] == pytest.approx(1 / ((8 / 17) / 16 + 9 / 17), rel=1e-12)
    assert yarn.long_attention_scale == pytest.approx(1.2772588722239782, rel=1e-12)
    assert yarn.short_attention_scale == 1.0
    llama3 = methods[
        RopeMethod.llama3
    ]  # index 27 turns 5.14 times, 28 4.19, 29 3.41, 34 1.22, 35 0.996
    assert llama3.factors[28] == 1.0
    turns = 8192 / (2 * math.pi * 5e5 ** (29 / 64))
    assert llama3.factors[29] == pytest.approx(
        1 / ((4 - turns) / 3 / 16 + (turns - 1) / 3), rel=1e-12
    )
    assert llama3.factors[35] == scale


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_scale_one_changes_nothing(method: RopeMethod) -> None:
    factors = closed_form_factors(method, RopeGeometry(64, 1e5, 8192), 8192)
    assert factors.factors == pytest.approx([1.0] * 32, rel=1e-12)
    assert factors.long_attention_scale == 1.0


def test_methods_are_named_by_their_value() -> None:
    assert all(method.name == method.value for method in RopeMethod)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"factors": (1.0, 2.0)}, "factors has 2 values; rotary_dim=8 needs 4"),
        (
            {"factors": (1.0, -2.0, 4.0, 5.0)},
            r"factors\[1\]=-2.0: a rescale factor must be a finite number above 0",
        ),
        ({"factors": (1.0, 2.0, math.nan, 5.0)}, r"factors\[2\]=nan"),
        ({"short_factors": (1.0,)}, "short_factors has 1 values; rotary_dim=8 needs 4"),
        ({"short_factors": (1.0, 1.0, 1.0, 0.0)}, r"short_factors\[3\]=0.0"),
        ({"target_len": 31}, "target_len=31 is below original_len=32"),
        ({"critical_index": 4}, "critical_index=4: must be a cosine index, 0 .. 3"),
        (
            {"long_attention_scale": 0.0},
            "long_attention_scale=0.0: must be a finite number above 0",
        ),
        ({"short_attention_scale": math.inf}, "short_attention_scale=inf"),
    ],
)
def test_validation_errors(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(FactorsError, match=text):
        small(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a factors file: "),
        ("[]", "not a factors file: its kind is not 'rescale_factors'"),
        ('{"kind": "manifest"}', "not a factors file: its kind is not 'rescale_factors'"),
        (
            '{"kind": "rescale_factors", "version": 9}',
            "has version 9, this program reads 1; make it again",
        ),
        (
            '{"kind": "rescale_factors", "version": 1}',
            "missing, unknown or ill-typed field: 'geometry'",
        ),
        (
            small().to_json().replace('"method"', '"way"'),
            "missing, unknown or ill-typed field: .*'way'",
        ),
        (
            small().to_json().replace("4.0", '"four"'),
            "missing, unknown or ill-typed field: .*'four'",
        ),
        (
            small().to_json().replace("4.0", "true"),
            r"ill-typed field: factors=.*True.*; it must be a list of numbers",
        ),
        (small().to_json().replace("4.0", "-4.0"), r"factors\[2\]=-4.0"),
        (
            '{"factors": [1, 2], "rope_base": 1e4}',
            "the published array has no rotary_dim, original_len; its setting must",
        ),
        (json.dumps(FLAT | {"colour": 1}), "missing, unknown or ill-typed field: .*'colour'"),
        (json.dumps(FLAT | {"attention_scale": "x"}), "missing, unknown or ill-typed field"),
    ],
)
def test_json_errors(text: str, message: str) -> None:
    with pytest.raises(FactorsError, match=message):
        RescaleFactors.from_json(text)


def test_hf_config_holds_one_attention_scale_only() -> None:
    yarn = closed_form_factors(RopeMethod.yarn, GEOMETRY, 128)
    text = "attention scale is 1.0 in the short window and 1.13.* single attention_factor"
    with pytest.raises(FactorsError, match=text):
        to_hf_config(yarn)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"rope_scaling": {"type": "mrope"}},
            "RoPE type is 'mrope'.*from default, longrope, su, linear, dynamic, yarn,",
        ),
        ({"rope_theta": 1e4}, "the Hugging Face config has no max_position_embeddings"),
        (
            {"max_position_embeddings": 64, "head_dim": 8},
            "the Hugging Face config has no rope_theta",
        ),
        (
            {"max_position_embeddings": 64, "rope_theta": 1e4},
            "the Hugging Face config has no hidden_size",
        ),
        (
            {"rope_scaling": {"type": "longrope"}},
            "the Hugging Face config has no original_max_position_embeddings",
        ),
        (
            {
                "rope_scaling": {"type": "su", "original_max_position_embeddings": 32},
                "head_dim": 8,
                "rope_theta": 1e4,
                "max_position_embeddings": 128,
            },
            "the Hugging Face config has no short_factor",
        ),
    ],
)
def test_hf_config_errors(config: dict[str, Any], text: str) -> None:
    with pytest.raises(FactorsError, match=text):
        from_hf_config(config)


def test_closed_form_errors() -> None:
    with pytest.raises(
        FactorsError, match="rope.method=searched has no closed form; use one of none, pi, ntk,"
    ):
        closed_form_factors(RopeMethod.searched, GEOMETRY, 128)
    with pytest.raises(FactorsError, match="target_len=16 is below original_len=32"):
        closed_form_factors(RopeMethod.ntk, GEOMETRY, 16)
    with pytest.raises(
        FactorsError, match="rotary_dim=2: NTK-aware scaling divides by rotary_dim - 2"
    ):
        closed_form_factors(RopeMethod.ntk_aware, RopeGeometry(2, 1e4, 32), 128)
