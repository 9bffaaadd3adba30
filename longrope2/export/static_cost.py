"""What it costs to read short texts with the rescaled RoPE, as an engine without a switch must."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrope2.model import WindowedModel, token_nll
from longrope2.rope import Window

__all__ = ["StaticCost", "measure_static_cost"]


@dataclass(frozen=True)
class StaticCost:
    """Perplexity of the same short texts under either RoPE."""

    short_perplexity: float
    long_perplexity: float
    num_windows: int
    max_tokens: int
    text: str
    """What the texts were."""

    @property
    def ratio(self) -> float:
        """Above 1: what a static choice of the rescaled RoPE loses on short texts."""
        return self.long_perplexity / self.short_perplexity


def measure_static_cost(model: WindowedModel, windows: Sequence[Tensor], text: str) -> StaticCost:
    """Perplexity of every token but the first.

    Args:
        model: The trained model.
        windows: Token ids of texts within L0, BOS first, each [T].
        text: What they are, for the record.
    """
    perplexities = {}
    for window in Window:
        nats = [token_nll(model, tokens_T[None].to(model.hf.device), window).flatten() for tokens_T in windows]
        perplexities[window] = math.exp(torch.cat(nats).double().mean())
    longest = max(len(tokens_T) for tokens_T in windows)
    return StaticCost(perplexities[Window.SHORT], perplexities[Window.LONG], len(windows), longest, text)
