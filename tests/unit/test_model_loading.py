"""What a model folder must hold, and how its RoPE geometry is read."""

import json
from pathlib import Path

import pytest

from longrope2.errors import ArtifactError
from longrope2.model.loading import load_tokenizer, load_windowed_model, rope_geometry
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

ROOT = Path(__file__).parents[2]

BASE = {
    "model_type": "llama",
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "rope_theta": 5e5,
}
KEYS_OF_5 = {key: value for key, value in BASE.items() if key != "rope_theta"}


def folder(tmp_path: Path, config: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "rotary_dim", "rope_base"),
    [
        (BASE, 24, 5e5),
        ({**BASE, "head_dim": 32}, 32, 5e5),
        (
            BASE | {"model_type": "stablelm", "partial_rotary_factor": 0.75, "hidden_size": 512},
            96,
            5e5,
        ),
        (
            KEYS_OF_5
            | {"head_dim": 16, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            16,
            1e4,
        ),
        (
            KEYS_OF_5
            | {
                "model_type": "glm",
                "pad_token_id": None,
                "head_dim": 16,
                "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
            },
            4,
            1e4,
        ),
    ],
)
def test_geometry(tmp_path: Path, config: dict, rotary_dim: int, rope_base: float) -> None:
    assert rope_geometry(folder(tmp_path, config), 64) == RopeGeometry(rotary_dim, rope_base, 64)


def test_a_model_without_rope(tmp_path: Path) -> None:
    config = {**KEYS_OF_5, "model_type": "gpt2", "n_embd": 96, "n_head": 4, "n_layer": 2}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0)
    message = "gpt2 has no rotary module: only RoPE models can be extended"
    with pytest.raises(ArtifactError, match=message):
        rope_geometry(folder(tmp_path, config), 64)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "longrope"}},
    ],
)
def test_a_model_that_is_already_scaled(tmp_path: Path, scaling: dict) -> None:
    with pytest.raises(ArtifactError, match="already has RoPE scaling '(yarn|llama3|longrope)'"):
        rope_geometry(folder(tmp_path, {**BASE, **scaling}), 64)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    factors = closed_form_factors(RopeMethod.pi, RopeGeometry(24, 5e5, 64), 128)
    with pytest.raises(
        ArtifactError,
        match=r"holds no \*\.safetensors weights; check model\.path or the checkpoint",
    ):
        load_windowed_model(folder(tmp_path, BASE), factors)


def test_factors_of_another_geometry(tmp_path: Path) -> None:
    factors = closed_form_factors(RopeMethod.pi, RopeGeometry(32, 5e5, 64), 128)
    with pytest.raises(
        ArtifactError, match=r"the factors are for RopeGeometry\(rotary_dim=32.*has RopeGeometry\("
    ):
        load_windowed_model(folder(tmp_path, BASE), factors)


def test_text_never_becomes_a_special_id() -> None:
    """At every call: transformers resets the backend's own switch each time."""
    tokenizer = load_tokenizer(ROOT / "models" / "tiny")
    for special_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        text = f"before {tokenizer.convert_ids_to_tokens(special_id)} after"
        for _ in range(3):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert special_id not in ids
            assert tokenizer.decode(ids) == text
            assert special_id not in tokenizer.encode(text, add_special_tokens=False)
