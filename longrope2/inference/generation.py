"""Generation with the factor switch of LongRoPE2 inference.

A sequence of at most L0 tokens (prompt plus generated) is read with the original RoPE. The forward pass that reads the
first token beyond L0 reads the whole sequence again, with the rescaled RoPE, into a fresh cache; cached decoding then
goes on. Length exactly L0 is still short (arXiv 2502.20082, section 3.3).

Re-rotating the cached keys instead would be exact in layer 0 only: deeper keys depend on hidden states that were
computed under the other factors. The choice belongs to the sequence, never to a batch: one sequence at a time here.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from longrope2.errors import DataError
from longrope2.model.windowed import WindowedModel
from longrope2.rope import Window

__all__ = ["GeneratedToken", "generate_tokens", "window_for_length"]


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token and the RoPE of the forward pass that predicted it."""

    token_id: int
    window: Window


def window_for_length(num_tokens: int, original_len: int) -> Window:
    """Which RoPE reads a sequence of ``num_tokens``: the original one up to and including L0."""
    return Window.SHORT if num_tokens <= original_len else Window.LONG


def generate_tokens(
    model: WindowedModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[GeneratedToken]:
    """Continue one sequence, token by token.

    Args:
        model: Model with both RoPE tables; its factors say where L0 and L are.
        prompt_ids: Token ids, BOS included if the model wants one.
        max_new_tokens: Upper bound on the tokens yielded.
        stop_ids: Ids that end the generation; the one that does is yielded last.
        temperature: 0 is greedy; above, softmax(logits / temperature) is sampled from.
        seed: Seed of the sampling.

    Returns:
        Iterator over the new tokens; every step computes exactly one.

    Raises:
        DataError: empty prompt, or prompt plus new tokens beyond the target length, or temperature below 0.
    """
    target_len = model.factors.target_len
    if not prompt_ids:
        raise DataError("the prompt has no tokens; give at least one (BOS counts)")
    if len(prompt_ids) + max_new_tokens > target_len:
        raise DataError(
            f"the prompt's {len(prompt_ids)} tokens and generate.max_new_tokens={max_new_tokens} exceed the extended "
            f"window of {target_len} tokens; shorten the prompt or set generate.max_new_tokens to at most "
            f"{max(target_len - len(prompt_ids), 0)}"
        )
    if temperature < 0:
        raise DataError(f"generate.temperature={temperature} is below 0; 0 is greedy, above 0 samples")
    # The checks run at the call, not at the first step: hence a generator of its own below.
    return _generate(model, list(prompt_ids), max_new_tokens, frozenset(stop_ids), temperature, seed)


def _generate(
    model: WindowedModel, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int], temperature: float, seed: int
) -> Iterator[GeneratedToken]:
    """Decode with a cache that is thrown away once, when the sequence outgrows L0."""
    original_len = model.factors.geometry.original_len
    sampler = torch.Generator().manual_seed(seed)
    cache, cache_window = DynamicCache(), None
    for _ in range(max_new_tokens):
        window = window_for_length(len(ids), original_len)
        if window is not cache_window:
            cache, cache_window = DynamicCache(), window
        logits_V = _last_logits(model, ids[cache.get_seq_length() :], cache, window)
        token_id = _choose(logits_V, temperature, sampler)
        ids.append(token_id)
        yield GeneratedToken(token_id, window)
        if token_id in stop_ids:
            return


@torch.inference_mode()
def _last_logits(model: WindowedModel, new_ids: list[int], cache: DynamicCache, window: Window) -> Tensor:
    """Logits after the last token; reads ``new_ids`` into the cache."""
    # Every call names the window: between two steps the caller may have used the model for something else.
    model.use_window(window)
    tokens_BT = torch.tensor([new_ids], device=model.hf.device)
    output = model.hf(input_ids=tokens_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].float().cpu()


def _choose(logits_V: Tensor, temperature: float, sampler: torch.Generator) -> int:
    """The most likely token, or one drawn from the tempered distribution."""
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(torch.softmax(logits_V / temperature, dim=-1), 1, generator=sampler))
