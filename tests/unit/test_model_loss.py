"""The loss with a head's bias, scale and cap against autograd in float64, over several chunks."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope2.model.given import HeadRule
from longrope2.model.loss import CHUNK_TOKENS, IGNORED_LABEL, token_loss_sum
from longrope2.training.meter import LiveStorages

HIDDEN, VOCABULARY = 24, 53
RULES = {
    "plain": HeadRule(),
    "scale": HeadRule(0.125, None, "logits_scaling"),
    "cap": HeadRule(1.0, 2.0, "final_logit_softcapping"),
    "scale and cap": HeadRule(0.5, 3.0, "both"),
}
CASES = list(product(RULES, (False, True), (7, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 5)))


def inputs(num_tokens: int, with_bias: bool) -> tuple[list[Tensor], Tensor]:
    """Hidden states, head and bias, float32; labels."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = [(num_tokens, HIDDEN), (VOCABULARY, HIDDEN), *([(VOCABULARY,)] * with_bias)]
    tensors = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    labels_T = torch.randint(0, VOCABULARY, (num_tokens,), generator=generator)
    labels_T[::3] = IGNORED_LABEL
    return tensors, labels_T


def in_float64(tensors: list[Tensor], labels_T: Tensor, rule: HeadRule) -> Tensor:
    """The definition, without anything of ours."""
    hidden, head, *bias = (tensor.double() for tensor in tensors)
    logits = hidden @ head.T + (bias[0] if bias else 0.0)
    logits = rule.scale * logits
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    return F.cross_entropy(logits, labels_T, reduction="sum", ignore_index=IGNORED_LABEL)


@pytest.mark.parametrize(("name", "with_bias", "num_tokens"), CASES)
def test_value_and_all_gradients(name: str, with_bias: bool, num_tokens: int) -> None:
    tensors, labels_T = inputs(num_tokens, with_bias)
    bias_V = tensors[2] if with_bias else None
    found = 0.3 * token_loss_sum(*tensors[:2], labels_T, bias_V=bias_V, rule=RULES[name])
    expected = 0.3 * in_float64(tensors, labels_T, RULES[name])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(loss, tensors) for loss in (found, expected))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.shape == wanted.shape and mine.dtype is torch.float32
        assert (mine - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("name", "with_bias", "num_tokens"), CASES)
def test_the_same_value_without_gradients(
    name: str, with_bias: bool, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none are wanted none are made: the products with the head are most of the work."""
    tensors, labels_T = inputs(num_tokens, with_bias)
    given = {"bias_V": tensors[2] if with_bias else None, "rule": RULES[name]}
    with_gradients = token_loss_sum(*tensors[:2], labels_T, **given)
    monkeypatch.setattr(Tensor, "scatter_add_", None)
    with torch.no_grad():
        found = token_loss_sum(*tensors[:2], labels_T, **given)
    assert torch.equal(found, with_gradients) and not found.requires_grad


@pytest.mark.parametrize("name", list(RULES))
def test_no_target_means_zero_gradients_of_the_bias_too(name: str) -> None:
    tensors, labels_T = inputs(9, with_bias=True)
    labels_T.fill_(IGNORED_LABEL)
    loss = token_loss_sum(*tensors[:2], labels_T, bias_V=tensors[2], rule=RULES[name])
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("name", ["scale", "cap"])
def test_bf16_sums_in_float32(name: str) -> None:
    tensors, labels_T = inputs(3 * CHUNK_TOKENS, with_bias=True)
    small = [(0.3 * t.detach()).bfloat16().requires_grad_() for t in tensors]
    found = token_loss_sum(*small[:2], labels_T, bias_V=small[2], rule=RULES[name])
    expected = in_float64(small, labels_T, RULES[name])
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=0)
    for mine, wanted in zip(
        torch.autograd.grad(found, small), torch.autograd.grad(expected, small), strict=True
    ):
        assert mine.dtype is torch.bfloat16
        assert (mine.double() - wanted.double()).norm() < 2e-2 * wanted.double().norm()


def test_the_slope_is_the_derivative_of_the_rule() -> None:
    logits = torch.linspace(-9, 9, 41, dtype=torch.float64, requires_grad=True)
    for rule in RULES.values():
        given = rule.apply(logits)
        (wanted,) = torch.autograd.grad(given.sum(), [logits])
        slope = rule.slope(given.detach())
        found = torch.ones_like(wanted) if slope is None else slope * torch.ones_like(wanted)
        torch.testing.assert_close(found, wanted)


def test_one_chunks_logits_are_held_at_once() -> None:
    """Of a chunk: float32 logits, their softmax, which becomes the gradient, and that in bf16.

    10 bytes a logit; 0.2 more are the sums and gradients of this small head. 16 if those of the
    chunk before were still there.
    """
    tokens, vocabulary, hidden = 4 * CHUNK_TOKENS, 4096, 16
    hidden_TH = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    head_VH = torch.randn(vocabulary, hidden, dtype=torch.bfloat16, requires_grad=True)
    labels_T = torch.randint(0, vocabulary, (tokens,))
    with LiveStorages() as live:
        token_loss_sum(hidden_TH, head_VH, labels_T)
    assert live.peak / (CHUNK_TOKENS * vocabulary) == pytest.approx(10.2, abs=0.1)
