"""What is refused about a model, and in which words; what is found about one that is not."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longrope2.attention.windowed import _refuse_options
from longrope2.errors import ArtifactError
from longrope2.model import given, parity
from longrope2.model.given import HeadRule, find_head_rule, find_rotary, look_at
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors
from longrope2.rope.frequencies import RopeGeometry

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FACTORS = RescaleFactors(
    geometry=RopeGeometry(8, 10_000.0, 64), target_len=256, factors=(4.0,) * 4, method="pi"
)


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings)).to(dtype).eval()


def written(tmp_path: Path, **settings: Any) -> Path:
    LlamaConfig(**SIZES, **settings).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layer_types": ["mamba", "full_attention"]}, "has linear_attention: such layers carry"),
        ({"layer_types": ["chunked_attention"] * 2}, "such layers choose the keys"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: training draws no dropout"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"text_config": {"vocab_size": 3}}, "text_config: llama wraps a language model"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
         "its rotary frequencies are not 10000"),
        ({"hidden_size": "much"}, "transformers refuses this config.json"),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    import json

    path = written(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ArtifactError, match=text) as caught:
        look_at(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_layers_and_quantization_are_said_together() -> None:
    config = LlamaConfig(**SIZES)
    config.layer_types = ["conv", "full_attention"]
    config.quantization_config = {"quant_method": "fp8"}
    config.rope_parameters = {"full_attention": {}, "sliding_attention": {}}
    with pytest.raises(ArtifactError, match="conv.*differ by layer type.*fp8"):
        given.refuse_unsupported(config, Path("folder"))


class _Rotary(nn.Module):
    """Gives what a test wants."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.inv_freq = 10_000.0 ** -(torch.arange(4) / 4)

    def forward(self, x: Any, positions_BT: Any) -> Any:
        angles = positions_BT[..., None].float() * self.inv_freq
        return self.give(angles)


@pytest.mark.parametrize(
    ("give", "text"),
    [
        (lambda angles: torch.polar(torch.ones_like(angles), angles), "gives complex numbers"),
        (lambda angles: (angles.sin(), angles.cos()), "gives neither cosines and sines"),
        (lambda angles: [][0], "asks for more than positions"),
    ],
)
def test_a_rotary_of_another_form(give: Any, text: str) -> None:
    hf, kind = llama(), type("Other", (_Rotary,), {"give": staticmethod(give)})
    hf.model.rotary_emb = kind(hf.config)
    with pytest.raises(ArtifactError, match=text):
        find_rotary(hf)


def test_no_rotary_and_one_too_many() -> None:
    hf = llama()
    hf.model.layers[0].own = _Rotary(hf.config)
    with pytest.raises(ArtifactError, match="its class has model.layers.0.own, model.rotary_emb"):
        find_rotary(hf)
    del hf.model.layers[0].own, hf.model.rotary_emb
    with pytest.raises(ArtifactError, match="llama has no rotary module: only RoPE models"):
        find_rotary(hf)


def with_logits(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Llama's class, changing its logits."""
    forward = LlamaForCausalLM.forward

    def changed(self: Any, *args: Any, **options: Any) -> Any:
        return SimpleNamespace(logits=change(forward(self, *args, **options).logits))

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)


def test_head_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SIZES)
    assert find_head_rule(config) == HeadRule()
    config.final_logit_softcapping = 0.5
    with monkeypatch.context() as patch:
        with_logits(patch, lambda logits: 0.5 * torch.tanh(logits / 0.5))
        assert find_head_rule(config) == HeadRule(1.0, 0.5, "final_logit_softcapping")
    with monkeypatch.context() as patch:
        with_logits(patch, lambda logits: 3 * logits)
        assert find_head_rule(config).scale == pytest.approx(3)
    with monkeypatch.context() as patch:
        with_logits(patch, lambda logits: logits + 1)
        with pytest.raises(ArtifactError, match=r"no single scale.*final_logit_softcapping=0.5"):
            find_head_rule(config)
    with monkeypatch.context() as patch:
        with_logits(patch, lambda logits: [][0])
        with pytest.raises(ArtifactError, match="after its last hidden states cannot be tried"):
            find_head_rule(config)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"softcap": 0.5}, "attn_logit_softcapping=0.5"),
        ({"s_aux": torch.ones(1)}, "attention sinks"),
        ({"sliding_window": 8}, "sliding_window=8, shorter than 9"),
    ],
)
def test_attention_options(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _refuse_options(9, **option)


@pytest.mark.parametrize("dtype", list(parity.TOLERANCES))
def test_rounding_stays_under_a_fifth_of_the_tolerance(dtype: torch.dtype) -> None:
    hf = llama(dtype)
    plain = parity.run_plain(hf, 64)
    found = parity.compare(WindowedModel(hf, FACTORS), plain)
    assert max(vars(found).values()) < parity.TOLERANCES[dtype] / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_rule_is_beyond_the_tolerance(dtype: torch.dtype) -> None:
    hf = llama(dtype)
    plain = parity.run_plain(hf, 64)
    model = WindowedModel(hf, FACTORS)
    model.head_rule = HeadRule(1.1)
    with pytest.raises(ArtifactError, match="its logits by "):
        parity.compare(model, plain)
    assert model.factors is FACTORS


def test_rescaled_short_windows_are_put_aside() -> None:
    hf = llama()
    plain = parity.run_plain(hf, 64)
    parity.compare(WindowedModel(hf, FACTORS.in_both_windows()), plain)


def test_a_rotation_beside_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that make their own angles agree under identity factors, and would never rescale."""
    hf = llama()
    own = copy.deepcopy(hf.model.rotary_emb)
    plain = parity.run_plain(hf, 64)
    model = WindowedModel(hf, FACTORS)
    monkeypatch.setattr(model.rotary, "forward", lambda x, position_ids: own(x, position_ids))
    with pytest.raises(ArtifactError, match="rescaled positions"):
        parity.compare(model, plain)


def test_noise_in_training_mode() -> None:
    hf = llama()
    hf.model.norm = nn.Sequential(hf.model.norm, nn.Dropout(0.5))
    hf.eval()
    plain = parity.run_plain(hf, 64)
    with pytest.raises(ArtifactError, match="training mode .noise that its class draws"):
        parity.compare(WindowedModel(hf, FACTORS), plain)
    assert not hf.training


def test_lost_layouts() -> None:
    with pytest.raises(ArtifactError, match="does not go through transformers' attention"):
        parity._refuse_lost_layouts("x", [])
    with pytest.raises(ArtifactError, match="do not hand keyword arguments on to attention"):
        parity._refuse_lost_layouts("x", [True, False])
    parity._refuse_lost_layouts("x", [True, True])


def test_a_class_that_cannot_run() -> None:
    hf = llama()
    hf.model.norm = nn.LayerNorm(5)
    with pytest.raises(ArtifactError, match="transformers itself cannot run it"):
        parity.run_plain(hf, 64)


def test_a_cut_is_filled_with_noise_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices as if drawn, vectors as the class makes them, nothing taken from torch's state."""
    tried, drawn = [], []
    uniform, normal = torch.Tensor.uniform_, torch.Tensor.normal_
    for name, draw in (("uniform_", uniform), ("normal_", normal)):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, draw=draw, **k: drawn.append(a) or draw(*a, **k)
        )
    run_plain = parity.run_plain
    monkeypatch.setattr(
        parity, "run_plain", lambda hf, length: tried.append(hf) or run_plain(hf, length)
    )
    config = LlamaConfig(**SIZES | {"hidden_size": 512, "num_attention_heads": 64})
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again = parity.check_cut(config, FACTORS), parity.check_cut(config, FACTORS)
    assert first == again and torch.equal(before, torch.get_rng_state())
    hf, _ = tried
    assert all(tensor.is_meta for tensor, *_ in drawn)  # else twice by every class, for seconds
    assert (hf.model.norm.weight == 1).all()
    for name, value in hf.state_dict().items():
        if value.dim() >= 2:
            assert value.std() * value.shape[-1] ** 0.5 == pytest.approx(1, abs=0.02), name
            rows = torch.nn.functional.normalize(value[:128], dim=-1)
            assert (rows @ rows.T - torch.eye(len(rows))).abs().max() < 0.5, name
