"""Fused norms: the model's own outputs and gradients, what is replaced, how a kernel is chosen."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from longrope2.errors import ConfigError
from longrope2.kernel_choice import NormKernel
from longrope2.model.norms import choose_norm, norm_fault, use_norm
from longrope2.training.config import OptimizerKind, TrainRoot
from longrope2.training.machine import machine_setup

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "pad_token_id": 0}  # fmt: skip
# Two norms a layer and one at the end; Qwen3 also norms the queries and keys of each layer.
MODELS = [
    (LlamaForCausalLM, LlamaConfig, 5), (MistralForCausalLM, MistralConfig, 5),
    (Phi3ForCausalLM, Phi3Config, 5),
    (Qwen3ForCausalLM, Qwen3Config, 9),
]  # fmt: skip


def built(model_class: type, config_class: type) -> nn.Module:
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize(("model_class", "config_class", "count"), MODELS)
def test_the_fused_norm_is_the_models_own(
    model_class: type, config_class: type, count: int
) -> None:
    model, plain = built(model_class, config_class), built(model_class, config_class)
    names = list(model.state_dict())
    assert use_norm(model, NormKernel.torch) == count
    assert list(model.state_dict()) == names
    found, expected = loss_and_gradients(model), loss_and_gradients(plain)
    assert found.keys() == expected.keys() and len(found) > count
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_kernel_is_called_for_every_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = built(LlamaForCausalLM, LlamaConfig)
    calls: list[float] = []
    rms_norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(
        "torch.nn.functional.rms_norm", lambda *args: calls.append(args[3]) or rms_norm(*args)
    )
    use_norm(model, NormKernel.torch)
    loss_and_gradients(model)
    assert calls == [model.config.rms_norm_eps] * 5


def test_the_models_own_norms_are_left_alone() -> None:
    model = built(LlamaForCausalLM, LlamaConfig)
    assert use_norm(model, NormKernel.model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


class ShiftedRMSNorm(nn.Module):
    """Looks like Llama's, and adds 1 to its weight as Gemma's does."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            * (1 + self.weight)
        )


@pytest.mark.parametrize("norm", [ShiftedRMSNorm(8, 1e-5), GemmaRMSNorm(8), nn.LayerNorm(8)])
def test_norms_of_another_formula_are_left_alone(norm: nn.Module) -> None:
    assert use_norm(nn.Sequential(norm), NormKernel.torch) == 0


def test_looking_for_plain_norms_draws_nothing_from_the_random_state() -> None:
    model = built(LlamaForCausalLM, LlamaConfig)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    use_norm(model, NormKernel.torch)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kernel", [NormKernel.liger, NormKernel.apex])
def test_forcing_an_absent_kernel_is_one_clear_error(kernel: NormKernel) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_norm(kernel, CPU, torch.float32)
    why = "it needs a CUDA device, this is cpu; use auto or model"
    words = f"training.norm={kernel.value} cannot run here: {why}"
    assert refused.value.faults == (words,)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert norm_fault(NormKernel.liger, CUDA, torch.bfloat16) == (
        "the liger-kernel package is not installed (pip install liger-kernel)"
    )
    assert norm_fault(NormKernel.apex, CUDA, torch.bfloat16) == "NVIDIA apex is not installed"
    choice = choose_norm(NormKernel.auto, CUDA, torch.bfloat16, run=False)
    assert str(choice) == (
        "torch (auto; no liger: the liger-kernel package is not installed (pip install "
        "liger-kernel); no apex: NVIDIA apex is not installed)"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the probe succeeds on a GPU")
def test_a_kernel_that_fails_when_run_is_passed_over() -> None:
    choice = choose_norm(NormKernel.auto, CUDA, torch.bfloat16)
    assert choice.kernel is NormKernel.model
    assert re.search(
        "no torch: (AssertionError: Torch not compiled with CUDA|RuntimeError: Found no NVIDIA)",
        choice.reason,
    )


def test_a_cpu_keeps_transformers_norms_unless_told() -> None:
    assert str(choose_norm(NormKernel.auto, CPU, torch.float32)) == "model (auto, no GPU)"
    assert (
        str(choose_norm(NormKernel.torch, CPU, torch.float32)) == "torch (forced by training.norm)"
    )


def test_the_machine_names_the_norm_among_its_faults() -> None:
    config = TrainRoot()
    config.training.norm, config.training.optimizer = (
        NormKernel.liger,
        OptimizerKind.deepspeed_fused_adam,
    )
    config.attention.kernel = type(config.attention.kernel).flash_attn
    faults = machine_setup(config, CPU, run=True).faults
    assert [fault.split(" ")[0] for fault in faults] == [
        "attention.kernel=flash_attn",
        "training.norm=liger",
        "training.optimizer=deepspeed_fused_adam",
    ]


def test_a_look_alike_of_apex_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(
        "raise AssertionError('looking must not import')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    fault = norm_fault(NormKernel.apex, CUDA, torch.bfloat16, run=False)
    assert fault is not None and "is not NVIDIA's" in fault
