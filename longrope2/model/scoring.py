"""Loss of some tokens of a text, without computing what those losses do not need.

Only the positions that predict a scored token pass the LM head. In the last layer only they need
queries and the MLP: keys and values of the earlier positions are still computed, everything else
there is left out. That is exact: no other layer reads the last one's output.

Shape legend: B = rows, T = tokens, H = hidden size, S = scored tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window

# Scored positions that pass the LM head together; bounds the memory of plain perplexity.
HEAD_CHUNK_TOKENS = 1024
# Above, the mask of "last queries, all keys" costs more memory than the cut saves.
CUT_BELOW_SCORED = 1024


@torch.no_grad()
def token_nll(
    model: WindowedModel, tokens_BT: Tensor, window: Window, first_scored: int = 1
) -> Tensor:
    """Negative log-likelihood of the tokens from ``first_scored`` on, each row plain causal.

    Rows start at position 0; the last token is only predicted, never fed.

    Args:
        model: Model with the factors to judge.
        tokens_BT: Token ids.
        window: Which RoPE table to apply.
        first_scored: Index of the first scored token, >= 1.

    Returns:
        [B, T - first_scored], float32, nats.
    """
    num_scored = tokens_BT.shape[1] - first_scored
    first_needed = first_scored - 1 if num_scored < CUT_BELOW_SCORED else 0
    with _last_layer_from(model, first_needed):
        hidden_BTH = model.hidden_states(tokens_BT[:, :-1], window, first_needed=first_needed)
    return head_nll(model, hidden_BTH[:, first_scored - 1 :], tokens_BT[:, first_scored:])


@torch.no_grad()
def head_nll(model: WindowedModel, hidden_BSH: Tensor, labels_BS: Tensor) -> Tensor:
    """Negative log-likelihood of labels under final hidden states, [B, S], float32, nats."""
    chunks = (x.split(HEAD_CHUNK_TOKENS, dim=1) for x in (hidden_BSH, labels_BS))
    losses_BS = [
        F.cross_entropy(model.head_logits(hidden).transpose(1, 2), labels, reduction="none")
        for hidden, labels in zip(*chunks, strict=True)
    ]
    return torch.cat(losses_BS, dim=1)


@contextmanager
def _last_layer_from(model: WindowedModel, first: int) -> Iterator[None]:
    """Confine the last layer's MLP to the positions from ``first`` on; other rows are zero, unread.

    A model whose last layer has no ``mlp`` (a mixture of experts, say) computes it for all
    positions.
    """
    mlp = getattr(model.hf.base_model.layers[-1], "mlp", None)
    if not isinstance(mlp, nn.Module):
        yield
        return

    def cut(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][:, first:], *inputs[1:])

    def pad(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return F.pad(output, (0, 0, first, 0))

    hooks = [mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(pad)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
