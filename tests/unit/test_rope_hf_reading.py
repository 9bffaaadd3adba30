"""Published configs: whose value wins, what a config's own lengths are, and every error text.

The tables themselves are compared with transformers in tests/reference/test_rope_hf_configs.py.
"""

import math
from typing import Any

import pytest

from longrope2.errors import FactorsError
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import config_geometry, config_rope_type, from_hf_config

BASE = {"head_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 5.0],
            "original_max_position_embeddings": 32}  # fmt: skip


def read(scaling: dict[str, Any], *lengths: int | None, **top: Any) -> RescaleFactors:
    return from_hf_config({**BASE, **top, "rope_scaling": scaling}, *lengths)


@pytest.mark.parametrize(
    ("scaling", "top", "original_len", "target_len"),
    [
        (YARN, {}, 32, 128),  # the factor says more than max_position_embeddings (Qwen2.5)
        (LLAMA3, {"max_position_embeddings": 512}, 32, 512),  # and here less (Llama 3.1)
        (
            {"rope_type": "yarn", "factor": 4.0},
            {},
            64,
            256,
        ),  # no original length anywhere: all of it, as transformers
        ({"type": "dynamic", "factor": 2.0}, {}, 64, 128),
        (LONGROPE, {}, 32, 64),
        (LONGROPE, {"original_max_position_embeddings": 16}, 16, 64),  # the top level wins
    ],
)
def test_lengths_a_config_states(
    scaling: dict, top: dict, original_len: int, target_len: int
) -> None:
    found = read(scaling, **top)
    assert (found.geometry.original_len, found.target_len) == (original_len, target_len)


def test_lengths_of_ours_do_not_change_the_published_table() -> None:
    own, ours = read(YARN), read(YARN, 16, 64)
    assert (ours.geometry.original_len, ours.target_len) == (16, 64)
    assert (ours.factors, ours.long_attention_scale) == (own.factors, own.long_attention_scale)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, YARN, LLAMA3])
def test_static_types_rescale_the_short_window_too(scaling: dict) -> None:
    found = read(scaling, 32)
    assert found.short_factors == found.factors != (1.0,) * 4
    assert found.short_attention_scale == found.long_attention_scale


def test_dynamic_leaves_the_short_window_alone() -> None:
    found = read({"type": "dynamic", "factor": 2.0}, 64, 256)
    assert found.short_factors is None
    assert found.factors == pytest.approx([(2.0 * 4 - 1) ** (i / 3) for i in range(4)], rel=1e-12)
    assert read({"type": "dynamic", "factor": 2.0}, 64, 64).factors == (1.0,) * 4


def test_longrope_with_equal_factors_of_one_has_no_short_factors() -> None:
    assert read(LONGROPE).short_factors is None
    assert read({**LONGROPE, "short_factor": [1.0, 1.02, 1.03, 1.03]}).short_factors == (
        1.0,
        1.02,
        1.03,
        1.03,
    )


def test_early_phi3_configs_call_longrope_su_or_yarn() -> None:
    expected, su = read(LONGROPE), read({**LONGROPE, "rope_type": "su"})
    yarn = read({**LONGROPE, "rope_type": "yarn"}, model_type="phi3")
    assert expected.factors == su.factors == yarn.factors == (1.0, 2.0, 4.0, 5.0)
    assert expected.long_attention_scale == su.long_attention_scale == yarn.long_attention_scale


def test_deepseek_attention_weights() -> None:
    found = read({**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5})
    assert found.long_attention_scale == pytest.approx(
        (0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1), rel=1e-12
    )
    assert read({**YARN, "mscale": 0.7}).long_attention_scale == pytest.approx(
        0.1 * math.log(4) + 1, rel=1e-12
    )


@pytest.mark.parametrize(
    ("config", "rope_type"),
    [
        ({}, "default"),
        ({"rope_scaling": None}, "default"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "type": "yarn"}}, "llama3"),
        # rope_scaling wins although transformers 5 wrote a default beside it
        (
            {
                "rope_scaling": {"type": "linear"},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "linear",
        ),
    ],
)
def test_rope_type(config: dict[str, Any], rope_type: str) -> None:
    assert config_rope_type(config) == rope_type


def test_geometry_of_either_layout() -> None:
    inside = {"head_dim": 16, "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.75}}
    top = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "rope_theta": 500000,
        "partial_rotary_factor": 0.75,
    }
    assert config_geometry(inside, 64) == config_geometry(top, 64) == RopeGeometry(12, 5e5, 64)


@pytest.mark.parametrize(
    ("scaling", "top", "text"),
    [
        (
            {"type": "linear", "factor": 4.0},
            {},
            "linear RoPE scaling does not say its pre-trained window; set original_",
        ),
        ({"type": "linear"}, {}, "linear RoPE scaling does not say"),
        ({"type": "dynamic"}, {}, "the Hugging Face config has no factor"),
        ({**YARN, "factor": "4"}, {}, "has factor='4'; it must be a number above 0"),
        ({**YARN, "factor": 0}, {}, "has factor=0; it must be a number above 0"),
        ({**YARN, "beta_fast": -1}, {}, "has beta_fast=-1; it must be a number above 0"),
        (
            {**LLAMA3, "high_freq_factor": 1.0},
            {},
            "high_freq_factor=1.0 must be above low_freq_factor=1.0",
        ),
        ({**LLAMA3, "low_freq_factor": None}, {}, "has no low_freq_factor; add it to config.json"),
        ({**LONGROPE, "long_factor": 3.0}, {}, "has long_factor=3.0; it must be a list of numbers"),
        (
            {**LONGROPE, "long_factor": ["1", 2, 3, 4]},
            {},
            "has long_factor=.*; it must be a list of numbers",
        ),
        ({**LONGROPE, "long_factor": [1.0, 2.0]}, {}, "factors has 2 values; rotary_dim=8 needs 4"),
        (
            YARN,
            {"max_position_embeddings": True},
            "has max_position_embeddings=True; it must be a number above 0",
        ),
        (
            {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}},
            {},
            r"a RoPE per layer type \(full_attention, sliding_attention\); "
            "one RoPE for all layers is supported",
        ),
    ],
)
def test_errors(scaling: dict[str, Any], top: dict[str, Any], text: str) -> None:
    with pytest.raises(FactorsError, match=text):
        read(scaling, **top)
