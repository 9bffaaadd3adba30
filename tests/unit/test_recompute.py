"""Recompute policies: the same numbers, and attention run as often as each promises."""

import re
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from longrope2.attention import windowed
from longrope2.attention.layout import build_layout
from longrope2.errors import ConfigError
from longrope2.model.loss import IGNORED_LABEL
from longrope2.model.windowed import WindowedModel
from longrope2.planning.memory import Recompute
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors
from longrope2.training import engine
from longrope2.training.engine import apply_recompute

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
    policy: Recompute, *, window: Window, family: str = "llama", offload: bool = False
) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and how often attention ran."""
    torch.manual_seed(0)
    model = WindowedModel(FAMILIES[family](), factors())
    apply_recompute(model.hf, policy, offload=offload)
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
