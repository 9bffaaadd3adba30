"""Summed token loss straight from hidden states: the logits of a segment are never held at once.

Shape legend: T = tokens, H = hidden size, V = vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORED_LABEL", "token_loss_sum"]

IGNORED_LABEL = -100
CHUNK_TOKENS = 1024


def token_loss_sum(hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor) -> Tensor:
    """Sum over tokens of -log p(label), float32 scalar; labels of ``IGNORED_LABEL`` count nothing.

    A sum, not a mean: the caller divides by the targets of the whole optimizer step, over ranks and micro-steps. If no
    label counts the result is an exact zero that still carries (zero) gradients, so that a rank without targets keeps
    in step with the others.

    Args:
        hidden_TH: Final hidden states.
        head_VH: Output embedding.
        labels_T: Next-token ids, int64.
    """
    if hasattr(F, "linear_cross_entropy") and hidden_TH.shape[0] >= hidden_TH.shape[1]:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS, acc_dtype=torch.float32)
        return F.linear_cross_entropy(
            hidden_TH, head_VH, labels_T, reduction="sum", ignore_index=IGNORED_LABEL, options=options
        ).float()
    losses = [
        checkpoint(_chunk_loss_sum, hidden, head_VH, labels, use_reentrant=False)
        for hidden, labels in zip(hidden_TH.split(CHUNK_TOKENS), labels_T.split(CHUNK_TOKENS), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss_sum(hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor) -> Tensor:
    """Loss of one chunk; its logits are recomputed in the backward pass."""
    logits_TV = F.linear(hidden_TH, head_VH).float()
    return F.cross_entropy(logits_TV, labels_T, reduction="sum", ignore_index=IGNORED_LABEL)
