"""Generation with the factor switch of LongRoPE2 inference: settings, one sequence, and its text.

A sequence of at most L0 tokens (prompt plus generated) is read with the original RoPE. The forward
pass that reads the first token beyond L0 reads the whole sequence again, with the rescaled RoPE,
into a fresh cache (arXiv 2502.20082, section 3.3); ``KvPolicy.rerotate`` turns the cached keys
instead. The choice belongs to the sequence, never to a batch (see ``batch``).

Shape legend: V = vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from longrope2.errors import DataError
from longrope2.inference.cache import next_logits, prefill, rerotate_keys
from longrope2.inference.config import KvPolicy
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Of a character in UTF-8.
MOST_BYTES = 4


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token and the RoPE of the forward pass that predicted it."""

    token_id: int
    window: Window


def window_for_length(num_tokens: int, original_len: int) -> Window:
    """Which RoPE reads a sequence of ``num_tokens``: the original one up to and including L0."""
    return Window.SHORT if num_tokens <= original_len else Window.LONG


def check_request(
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    target_len: int,
    prefill_chunk: int | None,
    *,
    name: str,
) -> None:
    """Refuse a sequence that cannot be generated.

    Raises:
        DataError: an empty prompt, more tokens than the target length, or a chunk below 1.
    """
    if not prompt_ids:
        raise DataError(f"{name} has no tokens; give at least one (BOS counts)")
    if len(prompt_ids) + max_new_tokens > target_len:
        room = target_len - len(prompt_ids)
        fewer = f" or set generate.max_new_tokens to at most {room}" if room > 0 else ""
        raise DataError(
            f"{name}'s {len(prompt_ids)} tokens and generate.max_new_tokens={max_new_tokens} "
            f"exceed the extended window of {target_len} tokens; shorten the prompt{fewer}"
        )
    if prefill_chunk is not None and prefill_chunk < 1:
        fault = f"generate.prefill_chunk={prefill_chunk} must be at least 1"
        raise DataError(f"{fault}, or null to read a prompt at once")


def generate_tokens(
    model: WindowedModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    temperature: float = 0.0,
    seed: int = 0,
    prefill_chunk: int | None = None,
    kv_policy: KvPolicy = KvPolicy.reprefill,
) -> Iterator[GeneratedToken]:
    """Continue one sequence, token by token; every step computes exactly one.

    Args:
        model: Model with both RoPE tables; its factors say where L0 and L are.
        prompt_ids: Token ids, BOS included if the model wants one.
        max_new_tokens: Upper bound on the tokens yielded.
        stop_ids: Ids that end the generation; the one that does is yielded last.
        temperature: 0 is greedy; above, softmax(logits / temperature) is sampled from by ``seed``.
        seed: Seed of the sampling.
        prefill_chunk: Tokens of the prompt read at a time; None reads it at once.
        kv_policy: What becomes of the cache when the sequence outgrows L0.

    Raises:
        DataError: a request that ``check_request`` refuses, or a temperature below 0.
    """
    target_len = model.factors.target_len
    check_request(prompt_ids, max_new_tokens, target_len, prefill_chunk, name="the prompt")
    if temperature < 0:
        fault = f"generate.temperature={temperature} is below 0; 0 is greedy, above 0 samples"
        raise DataError(fault)
    return _generate(
        model,
        list(prompt_ids),
        max_new_tokens,
        stop_ids=stop_ids,
        choose=partial(_choose, temperature, torch.Generator().manual_seed(seed)),
        prefill_chunk=prefill_chunk,
        kv_policy=kv_policy,
    )


def _generate(
    model: WindowedModel,
    ids: list[int],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int],
    choose: Callable[[Tensor], int],
    prefill_chunk: int | None,
    kv_policy: KvPolicy,
) -> Iterator[GeneratedToken]:
    """The steps of ``generate_tokens``, apart from its checks, which run at the call."""
    cache, cache_window = None, None
    for _ in range(max_new_tokens):
        window = window_for_length(len(ids), model.factors.geometry.original_len)
        if cache is None or window is not cache_window:
            logits_V, cache = switch_window(
                model, ids, cache, prefill_chunk=prefill_chunk, kv_policy=kv_policy
            )
            cache_window = window
        else:
            logits_V = next_logits(model, torch.tensor([ids[-1:]]), cache, window)[0]
        ids.append(choose(logits_V.cpu()))
        yield GeneratedToken(ids[-1], window)
        if ids[-1] in stop_ids:
            return


def _choose(temperature: float, generator: torch.Generator, logits_V: Tensor) -> int:
    """The most likely token, or one drawn from the tempered distribution."""
    if temperature == 0:
        return int(logits_V.argmax())
    # Relative to the largest, so that a low temperature overflows to probability 0, not to NaN.
    relative_V = (logits_V - logits_V.max()) / temperature
    return int(torch.multinomial(torch.softmax(relative_V, dim=-1), 1, generator=generator))


def switch_window(
    model: WindowedModel,
    ids: Sequence[int],
    cache: DynamicCache | None,
    prefill_chunk: int | None,
    kv_policy: KvPolicy,
) -> tuple[Tensor, DynamicCache]:
    """Read a sequence for the first time in the window that its length asks for.

    ``cache`` holds all of it but the last token, as read in the short window; None at the start of
    a generation. Returns the logits after the last token, [V], and the cache in this window.
    """
    window = window_for_length(len(ids), model.factors.geometry.original_len)
    if cache is None or kv_policy is KvPolicy.reprefill:
        return prefill(model, ids, window, prefill_chunk)
    rerotate_keys(cache, model.factors)
    return next_logits(model, torch.tensor([ids[-1:]]), cache, window)[0], cache


class TextStream:
    """Decodes a growing sequence and hands out each piece of text once.

    A token's text depends on its left neighbour (word-start marks) and a character may need several
    byte tokens. So every piece is decoded together with the tokens of the piece before it, and text
    that ends in an unfinished character waits for the next token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context_ids = self._whole_end(prompt_ids)
        self._pending_ids: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that ``token_id`` completes; empty while a character is unfinished."""
        self._pending_ids.append(token_id)
        text = self._pending_text()
        if text.endswith(UNFINISHED):
            return ""
        self._context_ids, self._pending_ids = self._pending_ids, []
        return text

    def finish(self) -> str:
        """What still waits, replacement characters included."""
        text = self._pending_text()
        self._pending_ids = []
        return text

    def _whole_end(self, ids: Sequence[int]) -> list[int]:
        """The last tokens, as many as make a whole character: half of one would spoil the next."""
        ends = [list(ids[-number:]) for number in range(1, min(len(ids), MOST_BYTES) + 1)]
        return next((end for end in ends if UNFINISHED not in self._decode(end)), list(ids[-1:]))

    def _pending_text(self) -> str:
        """Text of the pending tokens, given the tokens before them."""
        context = self._decode(self._context_ids)
        return self._decode(self._context_ids + self._pending_ids)[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = self._tokenizer.decode(ids, **options)
        assert isinstance(text, str)
        return text
