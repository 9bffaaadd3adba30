"""Token ids to text, piece by piece, without ever printing half a character."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
MOST_BYTES = 4  # of a character in UTF-8


class TextStream:
    """Decodes a growing sequence and hands out each piece of text once.

    A token's text depends on its left neighbour (word-start marks) and a character may need several byte tokens. So
    every piece is decoded together with the tokens of the piece before it, and text that ends in an unfinished
    character waits for the next token.
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
        """The last token, or as many as its character has bytes: half a character would spoil the bytes that follow it."""
        ends = [list(ids[-number:]) for number in range(1, min(len(ids), MOST_BYTES) + 1)]
        return next((end for end in ends if UNFINISHED not in self._decode(end)), list(ids[-1:]))

    def _pending_text(self) -> str:
        """Text of the pending tokens, given the tokens before them."""
        context = self._decode(self._context_ids)
        return self._decode(self._context_ids + self._pending_ids)[len(context) :]

    def _decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
