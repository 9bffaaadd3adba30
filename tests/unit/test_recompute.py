"""Recompute policies: the same numbers, and attention run as often as each promises."""

import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from longrope2.attention import windowed
from longrope2.attention.layout import build_layout
from longrope2.config import ModelConfig
from longrope2.errors import ConfigError
from longrope2.kernel_choice import NormKernel
from longrope2.model.loss import IGNORED_LABEL
from longrope2.model.shape import ModelShape, Workload
from longrope2.model.windowed import WindowedModel
from longrope2.parallel.dims import ParallelConfig
from longrope2.parallel.processes import smallest_gpu_bytes
from longrope2.planning.memory import Layout, Recompute, predict_memory
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.training import engine
from longrope2.training.config import TrainingConfig, TrainRoot, recompute_faults
from longrope2.training.engine import apply_recompute
from longrope2.training.machine import configured_layout, recomputed_layers

LENGTH, LAYERS = 160, 3
DOC_ENDS = [20, 30, 150, LENGTH]
SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0)),
}


def factors() -> RescaleFactors:
    return closed_form_factors(
        RopeMethod.yarn, RopeGeometry(rotary_dim=16, rope_base=1e4, original_len=40), LENGTH
    )


def one_pass(
    policy: Recompute,
    *,
    window: Window,
    family: str = "llama",
    layers: int | None = None,
    offload: bool = False,
) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and how often attention ran."""
    torch.manual_seed(0)
    model = WindowedModel(FAMILIES[family](), factors())
    apply_recompute(model.hf, policy, layers=layers, offload=offload)
    model.train()
    tokens = torch.randint(50, (1, LENGTH))
    labels = torch.cat([tokens[:, 1:], torch.full((1, 1), IGNORED_LABEL)], dim=1)
    with patch.object(
        windowed, "document_attention", wraps=windowed.document_attention
    ) as attention:
        loss = model(tokens, labels, window, build_layout(window, DOC_ENDS))
        loss.backward()
    return (
        loss.detach(),
        [p.grad for p in model.parameters() if p.grad is not None],
        attention.call_count,
    )


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("policy", "runs"), [(Recompute.dense, 1), (Recompute.full, 2)])
def test_same_numbers_and_runs_of_attention(
    policy: Recompute, runs: int, window: Window, family: str
) -> None:
    loss, gradients, once = one_pass(Recompute.none, window=window, family=family)
    assert once == LAYERS
    found_loss, found_gradients, found_runs = one_pass(policy, window=window, family=family)
    assert found_runs == runs * LAYERS
    assert torch.equal(found_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found_gradients, gradients, strict=True))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("policy", [Recompute.dense, Recompute.full])
def test_only_the_first_layers_are_recomputed(policy: Recompute, layers: int) -> None:
    """Same numbers; attention runs again where ``full`` recomputes a layer."""
    loss, gradients, _ = one_pass(Recompute.none, window=Window.SHORT)
    found_loss, found, runs = one_pass(policy, window=Window.SHORT, layers=layers)
    assert runs == LAYERS + (layers if policy is Recompute.full else 0)
    assert torch.equal(found_loss, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    hf = FAMILIES["llama"]()
    apply_recompute(hf, policy, layers=layers)
    found_layers = [layer.gradient_checkpointing for layer in hf.model.layers]
    assert found_layers == [number < layers for number in range(LAYERS)]


@pytest.mark.parametrize("policy", [Recompute.dense, Recompute.full])
def test_offloaded_activations(policy: Recompute) -> None:
    """Every tensor kept between layers goes to CPU memory and comes back unchanged."""
    moved: list[torch.Size] = []

    class Counting(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            def pack(tensor: Tensor) -> Tensor:
                moved.append(tensor.shape)
                return tensor.clone()

            super().__init__(pack, lambda tensor: tensor)

    _, gradients, _ = one_pass(Recompute.none, window=Window.LONG)
    with (
        patch.object(engine, "save_on_cpu", Counting),
        patch.object(windowed, "save_on_cpu", Counting),
    ):
        _, found, _ = one_pass(policy, window=Window.LONG, offload=True)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))
    inputs = [shape for shape in moved if shape == (1, LENGTH, SIZES["hidden_size"])]
    of_attention = [shape for shape in moved if len(shape) == 4]
    assert len(inputs) == LAYERS
    assert (len(of_attention) >= 4 * LAYERS) == (policy is Recompute.dense)
    assert bool(of_attention) == (policy is Recompute.dense)


def test_a_class_without_layers_to_recompute() -> None:
    class Plain(nn.Module):
        def _set_gradient_checkpointing(self, **unused: object) -> None:
            raise ValueError

    with pytest.raises(
        ConfigError,
        match=re.escape("training.recompute=full: Plain has no layers that can be recomputed"),
    ):
        apply_recompute(Plain(), Recompute.full)


def test_a_class_whose_layers_cannot_be_chosen() -> None:
    class Whole(nn.Module):
        config = LlamaConfig(**SIZES)

        def _set_gradient_checkpointing(self, **unused: object) -> None:
            pass

    text = "training.recompute_layers=1: Whole does not checkpoint its layers one by one; use all"
    with pytest.raises(ConfigError, match=re.escape(text)):
        apply_recompute(Whole(), Recompute.full, layers=1)


@pytest.mark.parametrize(
    ("given", "policy", "fault"),
    [
        ("all", Recompute.none, None),
        ("auto", Recompute.full, None),
        ("3", Recompute.full, None),
        ("4", Recompute.full, "=4 must be all, auto or a number from 1 to 3 (the model's layers)"),
        ("0", Recompute.full, "=0 must be all, auto or a number from 1 to 3 (the model's layers)"),
        ("some", Recompute.dense, "=some must be all, auto or a number from 1 to 3"),
        ("2", Recompute.none, "=2 needs training.recompute=full or dense; with none no layer is"),
    ],
)
def test_numbers_of_layers_that_are_none(given: str, policy: Recompute, fault: str | None) -> None:
    faults = recompute_faults(TrainingConfig(recompute=policy, recompute_layers=given), LAYERS)
    assert faults == [] if fault is None else f"training.recompute_layers{fault}" in faults[0]


def test_as_few_layers_as_the_memory_asks_for() -> None:
    """``auto`` against the planner's own count, and what a number or ``all`` mean."""
    shape = ModelShape.from_folder(Path(__file__).parents[2] / "models" / "llama3_8b")
    config = TrainRoot(
        model=ModelConfig(name="llama3_8b", original_len=8192),
        target_len=131_072,
        parallel=ParallelConfig(processes=64, sequence=8),
    )

    def layers(given: str, usable_gib: float | None = 73.6) -> int | None:
        training = TrainingConfig(recompute=Recompute.dense, recompute_layers=given)
        root = replace(config, training=training)
        layout = configured_layout(root, 64, bf16=True, norm=NormKernel.auto)
        usable = None if usable_gib is None else usable_gib * 2**30
        return recomputed_layers(root, shape, layout, usable_bytes=usable)

    assert (layers("all"), layers("32"), layers("5"), layers("auto", None)) == (None, None, 5, None)
    work = Workload(131_072, 131_072, 0, 1.0, 131_072)
    layout = Layout(8, 8, Recompute.dense, fused_norms=True)
    peaks = [
        predict_memory(shape, work, replace(layout, recompute_layers=number)).peak / 2**30
        for number in range(33)
    ]
    for usable in (40.0, 73.6, 90.0):
        fewest = next(number for number in range(33) if peaks[number] <= usable)
        assert layers("auto", usable) == fewest > 0
    assert layers("auto", 200.0) == 0 and layers("auto", 10.0) is None
    assert smallest_gpu_bytes(torch.device("cpu")) is None
