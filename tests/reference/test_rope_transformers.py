"""Our rescaling against transformers' own, across the settings of real models."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.hf_config import from_hf_config, to_hf_config
from longrope2.rope.methods import RopeMethod, closed_form_factors


@dataclass(frozen=True)
class Model:
    """Rotary settings of a real model and a target for it."""

    name: str
    head_dim: int
    rotated_part: float
    rope_base: float
    original_len: int
    target_len: int

    @property
    def geometry(self) -> RopeGeometry:
        return RopeGeometry(
            round(self.head_dim * self.rotated_part), self.rope_base, self.original_len
        )


MODELS = [
    Model("llama2_7b", 128, 1.0, 1e4, 4096, 131072),
    Model("llama3_8b", 128, 1.0, 5e5, 8192, 131072),
    Model("phi3_mini", 96, 1.0, 1e4, 2048, 131072),
    Model("phi4_mini", 128, 0.75, 1e4, 4096, 131072),
    Model("qwen2_7b", 128, 1.0, 1e6, 32768, 131072),
    Model("smollm2_135m", 64, 1.0, 1e5, 8192, 65536),
    Model("tiny", 32, 1.0, 1e4, 128, 2048),
    Model(
        "every_dimension_trained", 128, 1.0, 1e4, 131072, 262144
    ),  # YaRN's ramp is clipped at both ends
]
RELATIVE = 1e-6


def config_of(model: Model, scaling: dict[str, Any], max_position_embeddings: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * model.head_dim,
        num_attention_heads=4,
        head_dim=model.head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={
            "rope_theta": model.rope_base,
            "partial_rotary_factor": model.rotated_part,
            **scaling,
        },
    )


def theirs(
    model: Model, rope_type: str, seq_len: int | None = None, **keys: Any
) -> tuple[torch.Tensor, float]:
    scale = model.target_len / model.original_len
    scaling = {"rope_type": rope_type, "factor": scale, **keys}
    window = model.original_len if rope_type == "dynamic" else model.target_len
    config = config_of(model, scaling, window)
    if rope_type != "dynamic" and rope_type != "linear":
        config.rope_parameters["original_max_position_embeddings"] = model.original_len
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)


def assert_same(ours: RescaleFactors, expected: tuple[torch.Tensor, float]) -> None:
    inverse_frequencies, attention_scale = expected
    torch.testing.assert_close(
        ours.inverse_frequencies(Window.LONG), inverse_frequencies, rtol=RELATIVE, atol=0
    )
    assert ours.attention_scale(Window.LONG) == pytest.approx(attention_scale, rel=RELATIVE)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("method", "rope_type", "keys"),
    [
        (RopeMethod.pi, "linear", {}),
        (RopeMethod.dynamic_ntk, "dynamic", {}),
        (RopeMethod.yarn, "yarn", {"original_max_position_embeddings": 0}),
        (
            RopeMethod.llama3,
            "llama3",
            {
                "original_max_position_embeddings": 0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_closed_forms(
    model: Model, method: RopeMethod, rope_type: str, keys: dict[str, Any]
) -> None:
    if "original_max_position_embeddings" in keys:
        keys = {**keys, "original_max_position_embeddings": model.original_len}
    ours = closed_form_factors(method, model.geometry, model.target_len)
    assert_same(ours, theirs(model, rope_type, seq_len=model.target_len, **keys))


def searched_like(model: Model, attention_scale: float) -> RescaleFactors:
    scale = model.target_len / model.original_len
    half = model.geometry.num_frequencies
    factors = tuple(1.0 + (1.3 * scale - 1.0) * (i / (half - 1)) ** 2 for i in range(half))
    return RescaleFactors(
        factors=factors,
        geometry=model.geometry,
        target_len=model.target_len,
        method="test",
        short_attention_scale=attention_scale,
        long_attention_scale=attention_scale,
    )


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("attention_scale", [1.0, 1.19])
def test_longrope_config_gives_our_tables_bit_for_bit(model: Model, attention_scale: float) -> None:
    ours = searched_like(model, attention_scale)
    keys = to_hf_config(ours, head_dim=model.head_dim)
    config = LlamaConfig(
        hidden_size=4 * model.head_dim, num_attention_heads=4, head_dim=model.head_dim, **keys
    )
    for window, seq_len in (
        (Window.SHORT, model.original_len),
        (Window.LONG, model.original_len + 1),
    ):
        inverse_frequencies, scale = ROPE_INIT_FUNCTIONS["longrope"](
            config, torch.device("cpu"), seq_len=seq_len
        )
        assert torch.equal(ours.inverse_frequencies(window), inverse_frequencies)
        assert ours.attention_scale(window) == scale


@pytest.mark.parametrize(
    "model", [m for m in MODELS if m.rotated_part == 1.0], ids=lambda m: m.name
)
def test_short_window_is_the_default_rope_bit_for_bit(model: Model) -> None:
    config = config_of(model, {"rope_type": "default"}, model.original_len)
    default = LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(searched_like(model, 1.0).inverse_frequencies(Window.SHORT), default)


def test_default_attention_factor_of_an_imported_config() -> None:
    model = MODELS[1]
    lists = {"short_factor": [1.0] * 64, "long_factor": [16.0] * 64}
    _, attention_factor = theirs(
        model, "longrope", original_max_position_embeddings=model.original_len, **lists
    )
    config = {
        "head_dim": 128,
        "rope_theta": model.rope_base,
        "max_position_embeddings": model.target_len,
        "original_max_position_embeddings": model.original_len,
        "rope_scaling": {"type": "longrope", **lists},
    }
    imported = from_hf_config(config)
    assert (
        imported.long_attention_scale
        == imported.short_attention_scale
        == pytest.approx(attention_factor, rel=1e-12)
    )
    assert attention_factor == pytest.approx(math.sqrt(1 + math.log(16) / math.log(8192)))


def test_rotary_module_switches_between_our_two_tables() -> None:
    model = MODELS[6]
    ours = searched_like(model, 1.0)
    config = LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=32, **to_hf_config(ours))
    rotary = LlamaRotaryEmbedding(config)
    for length, window in ((128, Window.SHORT), (129, Window.LONG)):
        positions = torch.arange(length)[None]
        cos, _ = rotary(torch.zeros(1), positions)
        expected = (positions[0, :, None].float() * ours.inverse_frequencies(window)).cos()
        assert torch.equal(cos[0, :, :16], expected)
