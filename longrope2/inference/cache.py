"""transformers' key/value cache: filled chunk by chunk, joined, and re-rotated at the switch.

All chunks of a sequence are read with one window: a cache never holds keys of two RoPEs.

Shape legend: B = rows, T = tokens, K = key/value heads, C = cached tokens, D = head dim, I = rotary
dim / 2, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from longrope2.attention.layout import CausalRows
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window


class _FilledLayer(Protocol):
    """A cache layer's tensors, which transformers declares as possibly missing."""

    keys: Tensor
    values: Tensor


@torch.inference_mode()
def next_logits(
    model: WindowedModel,
    tokens_BT: Tensor,
    cache: DynamicCache,
    window: Window,
    positions_BT: Tensor | None = None,
    first_key_B: Tensor | None = None,
) -> Tensor:
    """Read the tokens that follow what is cached.

    ``positions_BT`` None continues after the cached ones; ``first_key_B`` is each row's first
    cached key that is no padding (only with T = 1), None where there is none.

    Returns:
        Logits after the last token of each row, [B, V], float32, on the model's device.
    """
    # At every call: between two steps the caller may have used the model for something else.
    model.use_window(window)
    output = model.hf(
        input_ids=tokens_BT.to(model.hf.device),
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        layout=CausalRows(first_key_B=first_key_B),
    )
    return output.logits[:, -1].float()


def prefill(
    model: WindowedModel, ids: Sequence[int], window: Window, chunk_tokens: int | None
) -> tuple[Tensor, DynamicCache]:
    """Read one sequence into a fresh cache; logits after the last token, [V], and the cache.

    ``chunk_tokens`` at a time bound the memory of activations; None reads all at once.
    """
    cache, logits_BV = DynamicCache(), torch.empty(0)
    for chunk_BT in torch.tensor([ids]).split(chunk_tokens or len(ids), dim=1):
        logits_BV = next_logits(model, chunk_BT, cache, window)
    return logits_BV[0], cache


def join_caches(caches: Sequence[DynamicCache]) -> tuple[DynamicCache, Tensor]:
    """One cache of several rows, shorter ones padded with zeros on the left; the given are emptied.

    Also returns the index of each row's first key that is no padding, [B].
    """
    lengths = [cache.get_seq_length() for cache in caches]
    paddings = [max(lengths) - length for length in lengths]

    def padded_rows(parts: list[Tensor]) -> Tensor:
        padded = zip(parts, paddings, strict=True)
        return torch.cat([F.pad(part, (0, 0, padding, 0)) for part, padding in padded])

    def joined_layers() -> Iterator[tuple[Tensor, Tensor]]:
        # Layer by layer, so that at most one layer stands in memory twice.
        for layers in zip(*map(_layers, caches), strict=True):
            keys_BKCD = padded_rows([layer.keys for layer in layers])
            values_BKCD = padded_rows([layer.values for layer in layers])
            # Not reset(): in transformers 5.17 it zeroes in place and frees nothing.
            for layer in layers:
                layer.keys = layer.values = torch.empty(0)
            yield keys_BKCD, values_BKCD

    return DynamicCache(joined_layers()), torch.tensor(paddings)


def single_row(cache: DynamicCache, row: int, first_key: int) -> DynamicCache:
    """A copy of one row of a joined cache, without its padding."""
    rows, kept = slice(row, row + 1), slice(first_key, None)
    return DynamicCache(
        (layer.keys[rows, :, kept].clone(), layer.values[rows, :, kept].clone())
        for layer in _layers(cache)
    )


@torch.inference_mode()
def rerotate_keys(cache: DynamicCache, factors: RescaleFactors) -> None:
    """Turn the keys of a sequence read with the original RoPE to the rescaled one, in place.

    k' = R(p theta_long - p theta_short) k at position p, times the ratio of the attention scales.
    Exact in layer 0; see ``KvPolicy.rerotate``.
    """
    positions_C1 = torch.arange(cache.get_seq_length(), dtype=torch.float32)[:, None]
    # In float32 as the rotary module computes them: their difference undoes exactly those angles.
    long_CI, short_CI = (
        (positions_C1 * factors.inverse_frequencies(window)).double()
        for window in (Window.LONG, Window.SHORT)
    )
    turn_CI = long_CI - short_CI
    scale = factors.long_attention_scale / factors.short_attention_scale
    cos_CI, sin_CI = (turn_CI.cos() * scale).float(), (turn_CI.sin() * scale).float()
    half = factors.geometry.num_frequencies
    for layer in _layers(cache):
        cos, sin = cos_CI.to(layer.keys.device), sin_CI.to(layer.keys.device)
        first, second = layer.keys[..., :half].float(), layer.keys[..., half : 2 * half].float()
        # Both halves before either is written: in float32 they are views of the keys.
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        layer.keys[..., : 2 * half] = turned.to(layer.keys.dtype)


def _layers(cache: DynamicCache) -> list[_FilledLayer]:
    """The layers of a cache that has been read into; each keeps every token."""
    assert all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    return cast(list[_FilledLayer], cache.layers)
