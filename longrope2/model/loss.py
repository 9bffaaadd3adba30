"""Summed token loss straight from hidden states: the logits of a segment are never held at once.

Shape legend: T = tokens, C = tokens of a chunk, H = hidden size, V = vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from longrope2.model.given import HeadRule

IGNORED_LABEL = -100
PLAIN_HEAD = HeadRule()
CHUNK_TOKENS = 1024


def token_loss_sum(
    hidden_TH: Tensor,
    head_VH: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    rule: HeadRule = PLAIN_HEAD,
) -> Tensor:
    """Sum over tokens of -log p(label), float32 scalar; labels of ``IGNORED_LABEL`` count nothing.

    A sum, not a mean: the caller divides by the targets of the whole optimizer step, over ranks and
    micro-steps. If no label counts the result is an exact zero that still carries (zero) gradients,
    so that a rank without targets keeps in step with the others.

    Args:
        hidden_TH: Final hidden states.
        head_VH: Output embedding.
        labels_T: Next-token ids, int64.
        bias_V: Of the LM head, where it has one.
        rule: What the model does to its logits.
    """
    # torch's own sums bf16 losses and, on a GPU, the weight gradient in bf16: only float32 is left
    # to it.
    has_own = hasattr(F, "linear_cross_entropy") and hidden_TH.dtype is torch.float32
    is_plain = bias_V is None and rule == PLAIN_HEAD
    if has_own and is_plain and hidden_TH.shape[0] >= hidden_TH.shape[1]:
        chunks = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=CHUNK_TOKENS, acc_dtype=torch.float32
        )
        return F.linear_cross_entropy(
            hidden_TH,
            head_VH,
            labels_T,
            reduction="sum",
            ignore_index=IGNORED_LABEL,
            options=chunks,
        )
    gradients = torch.is_grad_enabled()
    loss_sum = _LossSum.apply(hidden_TH, head_VH, labels_T, bias_V, rule, gradients)
    assert isinstance(loss_sum, Tensor)
    return loss_sum


class _LossSum(torch.autograd.Function):
    """Gradients are made together with the loss, chunk by chunk; sums over chunks are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        head_VH: Tensor,
        labels_T: Tensor,
        bias_V: Tensor | None,
        rule: HeadRule,
        gradients: bool,
    ) -> Tensor:
        """The loss; keeps the gradients, where asked, for an upstream gradient of 1."""
        loss_sum = torch.zeros((), device=hidden_TH.device)
        ctx.hidden_gradient_TH = torch.empty_like(hidden_TH)
        if gradients:
            ctx.head_gradient_VH = torch.zeros_like(head_VH, dtype=torch.float32)
        ctx.bias_gradient_V = None
        if bias_V is not None:
            ctx.bias_gradient_V = torch.zeros_like(bias_V, dtype=torch.float32)
        chunks = (x.split(CHUNK_TOKENS) for x in (hidden_TH, labels_T, ctx.hidden_gradient_TH))
        for hidden_CH, labels_C, gradient_CH in zip(*chunks, strict=True):
            is_ignored_C1 = (labels_C == IGNORED_LABEL)[:, None]
            labels_C1 = labels_C[:, None].masked_fill(is_ignored_C1, 0)
            logits_CV = rule.apply(F.linear(hidden_CH, head_VH, bias_V).float())
            slope = rule.slope(logits_CV)
            log_probs_CV = logits_CV.log_softmax(dim=-1)
            loss_sum -= log_probs_CV.gather(1, labels_C1).masked_fill(is_ignored_C1, 0.0).sum()
            if not gradients:
                continue
            gradient_CV = log_probs_CV.exp_()
            minus_one_C1 = torch.full_like(labels_C1, -1.0, dtype=torch.float32)
            gradient_CV.scatter_add_(1, labels_C1, minus_one_C1)
            gradient_CV = gradient_CV.masked_fill_(is_ignored_C1, 0.0)
            if slope is not None:
                gradient_CV *= slope
            if ctx.bias_gradient_V is not None:
                ctx.bias_gradient_V += gradient_CV.sum(dim=0)
            gradient_CV = gradient_CV.to(head_VH.dtype)
            gradient_CH.copy_(gradient_CV @ head_VH)
            ctx.head_gradient_VH += gradient_CV.T @ hidden_CH
            del logits_CV, log_probs_CV, gradient_CV  # before those of the next chunk are made
        return loss_sum

    @staticmethod
    @once_differentiable  # whose type makes ctx positional
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, Tensor, None, Tensor | None, None, None]:
        """The gradients, scaled in float32 before rounding; once: the kept ones are used up."""
        dtype = ctx.hidden_gradient_TH.dtype
        hidden_gradient_TH = (ctx.hidden_gradient_TH.float() * upstream).to(dtype)
        head_gradient_VH = ctx.head_gradient_VH.mul_(upstream).to(dtype)
        bias_gradient_V = ctx.bias_gradient_V
        if bias_gradient_V is not None:
            bias_gradient_V = bias_gradient_V.mul_(upstream).to(dtype)
        del ctx.hidden_gradient_TH, ctx.head_gradient_VH, ctx.bias_gradient_V
        return hidden_gradient_TH, head_gradient_VH, None, bias_gradient_V, None, None
