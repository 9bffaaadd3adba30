"""The windowed model against plain transformers: logits, gradients of the loss, rotary tables."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from longrope2.attention.layout import build_layout
from longrope2.model.loss import IGNORED_LABEL, token_loss_sum
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.frequencies import RopeGeometry
from longrope2.rope.methods import RopeMethod, closed_form_factors

LENGTH, ORIGINAL = 192, 32
SIZES = {
    "vocab_size": 71, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": ORIGINAL, "pad_token_id": 0,
}  # fmt: skip
GEOMETRY = RopeGeometry(rotary_dim=16, rope_base=10_000.0, original_len=ORIGINAL)


def build(family: str, rope: dict | None = None) -> PreTrainedModel:
    torch.manual_seed(1)
    extra = {"rope_parameters": rope} if rope else {}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16, **extra)).eval()
    # Phi3Config's own top-level default (4096) would override the one inside rope_parameters.
    return Phi3ForCausalLM(
        Phi3Config(**SIZES, original_max_position_embeddings=ORIGINAL, **extra)
    ).eval()


def searched_like() -> RescaleFactors:
    factors = closed_form_factors(RopeMethod.ntk, GEOMETRY, LENGTH)
    return RescaleFactors(factors.factors, GEOMETRY, LENGTH, "longrope2")


def as_transformers(family: str) -> PreTrainedModel:
    """The same weights with transformers' own longrope."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "long_factor": list(searched_like().factors),
        "short_factor": [1.0] * 8,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.0,
        "factor": 6.0,
    }
    return build(family, rope)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, LENGTH])
def test_logits_equal_transformers_longrope(family: str, length: int) -> None:
    tokens = torch.randint(1, 71, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = as_transformers(family)(tokens).logits
        window = Window.SHORT if length <= ORIGINAL else Window.LONG
        found = WindowedModel(build(family), searched_like()).logits(tokens, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_short_rotary_table_is_the_base_models_bit_for_bit(family: str) -> None:
    positions = torch.arange(ORIGINAL)[None]
    x = torch.zeros(1, ORIGINAL, 16)
    expected = build(family).base_model.rotary_emb(x, positions)
    model = WindowedModel(build(family), searched_like())
    model.use_window(Window.SHORT)
    found = model.rotary(x, positions)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tables_stay_float32_when_the_model_is_cast() -> None:
    model = WindowedModel(build("llama"), searched_like()).bfloat16()
    model.use_window(Window.LONG)
    positions = torch.tensor([[100_000]])
    cos, _ = model.rotary(torch.zeros(1, 1, 16), positions)
    expected = torch.cos(100_000 * searched_like().inverse_frequencies(Window.LONG))
    torch.testing.assert_close(cos[0, 0, :8], expected)


def test_packed_short_documents_equal_the_documents_alone() -> None:
    model = WindowedModel(build("llama"), searched_like()).eval()
    ends = [7, 8, 40, 64]
    tokens = torch.randint(1, 71, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = model.logits(tokens, Window.SHORT, build_layout(Window.SHORT, ends))
        alone = [
            build("llama")(tokens[:, a:b]).logits for a, b in zip([0, *ends], ends, strict=False)
        ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_tokens", [5, 48, 2500])
def test_loss_and_gradients_equal_plain_cross_entropy(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, 48, generator=generator, requires_grad=True)
    head = torch.randn(71, 48, generator=generator, requires_grad=True)
    labels = torch.randint(0, 71, (num_tokens,), generator=generator)
    labels[::3] = IGNORED_LABEL
    found = 0.25 * token_loss_sum(hidden, head, labels)
    expected = 0.25 * F.cross_entropy(hidden.double() @ head.double().T, labels, reduction="sum")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(found, [hidden, head]),
        torch.autograd.grad(expected, [hidden, head]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_loss_in_bf16_is_summed_and_scaled_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5000, 48, generator=generator).bfloat16().requires_grad_()
    head = (0.3 * torch.randn(71, 48, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(0, 71, (5000,), generator=generator)
    scale = 1 / 2999  # a bf16 number is 1e-3 away
    found = token_loss_sum(hidden, head, labels)
    expected = F.cross_entropy(hidden.double() @ head.double().T, labels, reduction="sum")
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    gradients = zip(
        torch.autograd.grad(scale * found, [hidden, head]),
        torch.autograd.grad(scale * expected, [hidden, head]),
        strict=True,
    )
    for ours, theirs in gradients:
        projection = (ours.double() * theirs.double()).sum() / theirs.double().square().sum()
        assert projection.item() == pytest.approx(1, abs=3e-4)


def test_the_heads_gradient_in_bf16_adds_up_chunks_in_float32() -> None:
    """64 chunks: as far from float64 as one rounding, 2^-9; added up in bf16 it is 0.8 %."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(65_536, 48, generator=generator).bfloat16()
    head = (0.3 * torch.randn(71, 48, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(0, 71, (65_536,), generator=generator)
    (found,) = torch.autograd.grad(token_loss_sum(hidden, head, labels), [head])
    loss = F.cross_entropy(hidden.double() @ head.double().T, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, [head])
    assert (found.double() - expected.double()).norm() < 2**-9 * expected.double().norm()


@pytest.mark.parametrize("num_tokens", [5, 2500])
def test_no_target_means_zero_loss_and_zero_gradient(num_tokens: int) -> None:
    hidden = torch.randn(num_tokens, 48, requires_grad=True)
    head = torch.randn(71, 48, requires_grad=True)
    loss = token_loss_sum(hidden, head, torch.full((num_tokens,), IGNORED_LABEL))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [hidden, head]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_another_model_that_shares_the_config_cannot_take_the_layout_away() -> None:
    hf = build("llama")
    model = WindowedModel(hf, searched_like())
    type(hf)(hf.config).set_attn_implementation("sdpa")
    with pytest.raises(
        RuntimeError, match="was changed to sdpa; does another model share its config"
    ):
        model.logits(
            torch.ones(1, 4, dtype=torch.int64), Window.SHORT, build_layout(Window.SHORT, [2, 4])
        )
    with pytest.raises(RuntimeError, match="was changed to sdpa"):
        model.use_window(Window.LONG)  # before cached decoding


def test_set_factors_changes_only_the_long_window() -> None:
    tokens = torch.randint(1, 71, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    model = WindowedModel(build("llama"), searched_like())
    with torch.no_grad():
        short = model.logits(tokens, Window.SHORT)
        model.set_factors(closed_form_factors(RopeMethod.pi, GEOMETRY, LENGTH))
        assert torch.equal(model.logits(tokens, Window.SHORT), short)
        pi = build("llama", {"rope_type": "linear", "factor": 6.0, "rope_theta": 10_000.0})(
            tokens
        ).logits
        torch.testing.assert_close(model.logits(tokens, Window.LONG), pi, rtol=0, atol=2e-6)
