"""Loss of some tokens of a text, without computing what those losses do not need.

Only the positions that predict a scored token pass the LM head. In the last layer only they need
queries and the MLP: keys and values of the earlier positions are still computed, everything else
there is left out. That is exact: no other layer reads the last one's output.

Rows that begin alike, as several questions to one text do, need their common beginning read once:
its keys and values are kept, and every row goes on from there.

Shape legend: B = rows, T = tokens, H = hidden size, S = scored tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from longrope2.attention.layout import CausalRows
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


@torch.no_grad()
def logits_of_alike(
    model: WindowedModel, tokens_BT: Tensor, window: Window, first_scored_B: Sequence[int]
) -> Iterator[Tensor]:
    """Logits that predict the scored tokens of each row, the rows' common beginning read once.

    Equal to reading every row alone but for rounding (a cached beginning is multiplied in other
    shapes). One row after the other goes on from the cache, so memory is that of one.

    Args:
        model: Model with the factors to judge.
        tokens_BT: Token ids; the last of each row is only predicted, never fed.
        window: Which RoPE table to apply.
        first_scored_B: Index of each row's first scored token, >= 1.

    Returns:
        For each row in order [T - its first_scored, V], float32.
    """
    is_alike_T = (tokens_BT == tokens_BT[:1]).all(dim=0).int()
    # The token in front of the first scored one is always read with its row.
    common = min(int(is_alike_T.cumprod(0).sum()), min(first_scored_B) - 1)
    cache = DynamicCache()
    if common > 0:
        with _last_layer_from(model, common - 1):
            _read(model, tokens_BT[:1, :common], cache, window, first_needed=common - 1)
    for row_T, first_scored in zip(tokens_BT, first_scored_B, strict=True):
        hidden_1TH = _read(model, row_T[None, common:-1], cache, window)
        yield model.head_logits(hidden_1TH[0, first_scored - 1 - common :])
        if common > 0:
            cache.crop(common - cache.get_seq_length())
        else:
            cache = DynamicCache()


def _read(
    model: WindowedModel,
    tokens_BT: Tensor,
    cache: DynamicCache,
    window: Window,
    first_needed: int = 0,
) -> Tensor:
    """Final hidden states of tokens that follow what is cached; adds them to the cache."""
    model.use_window(window)
    outputs = model.hf.base_model(
        input_ids=tokens_BT, past_key_values=cache, use_cache=True, layout=CausalRows(first_needed)
    )
    return outputs.last_hidden_state


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
