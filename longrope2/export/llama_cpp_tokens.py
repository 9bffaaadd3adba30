"""Tokens that llama.cpp makes of a text, from the keys of a GGUF file alone.

The rules are those of its public source (``src/llama-vocab.cpp``, September 2026), for the two
kinds of tokenizer that Llama classes have; ``tests/reference/test_engine_llama_cpp.py`` compares
them with the program. What a file leaves out gets llama.cpp's default here too: a SentencePiece
text then begins with a space, so a file that forgets ``add_space_prefix`` reads back wrong.

``llama``: pairs of neighbouring pieces are joined, the highest score of the joined piece first, the
leftmost of equal ones; characters that are no piece become their bytes. ``gpt2``: the text is split
by the patterns that ``tokenizer.ggml.pre`` names, and merged by rank inside each part.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

SPACE_MARKER = "▁"
_BYTE = "<0x{:02X}>"
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Splitting:
    """What a name of ``tokenizer.ggml.pre`` stands for."""

    patterns: tuple[str, ...]
    takes_whole_words: bool = False
    """A part that is a token is taken without merging."""
    adds_bos: bool = False
    """Where the file does not say."""


SPLITTINGS = {
    "llama-bpe": Splitting(
        (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS_AND_BLANKS}",), True, True
    ),
    "qwen2": Splitting((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS_AND_BLANKS}",)),
    "tekken": Splitting((_TEKKEN,), True, True),
    "smollm": Splitting((r"\p{N}", _GPT2)),
    "gpt-2": Splitting((_GPT2,)),
}
"""Splitting rules of byte-level BPE tokenizers that are known here, by llama.cpp's names."""


class LlamaCppTokenizer:
    """Encodes text by the ``tokenizer.ggml.*`` keys of a GGUF file, given as plain values."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        keys = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
        tokens, kinds = keys["tokens"], keys["token_type"]
        self._ids = {token: number for number, token in enumerate(tokens)}
        self._scores = keys.get("scores") or [0.0] * len(tokens)
        is_sentencepiece = keys["model"] == "llama"
        splitting = None if is_sentencepiece else SPLITTINGS[keys["pre"]]
        self._bpe = None if splitting is None else _merger(self._ids, keys["merges"], splitting)
        self._space_first = is_sentencepiece and keys.get("add_space_prefix", True)
        adds_bos = is_sentencepiece if splitting is None else splitting.adds_bos
        bos, eos = (1, 2) if is_sentencepiece else (11, 11)
        self._start = [keys.get("bos_token_id", bos)] * keys.get("add_bos_token", adds_bos)
        self._end = [keys.get("eos_token_id", eos)] * keys.get("add_eos_token", False)
        # The longest first; those that text may never become only where they are asked for.
        marked = {TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED}
        found = [number for number, kind in enumerate(kinds) if kind in marked]
        found.sort(key=lambda number: -len(tokens[number].encode()))
        self._marked = [
            (tokens[number], number, kinds[number] == TokenKind.USER_DEFINED) for number in found
        ]

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list:
        """Ids of ``text``.

        Args:
            text: Any text.
            add_special: Put BOS in front and EOS behind, where the file says so.
            parse_special: Control tokens spelled out in the text become their ids.
        """
        ids, after_special = list(self._start) if add_special else [], True
        for part in self._parts(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            elif self._bpe is not None:
                ids += self._bpe.encode(part, add_special_tokens=False).ids
            else:
                space = " " if self._space_first and after_special else ""
                ids += self._joined((space + part).replace(" ", SPACE_MARKER))
            after_special = isinstance(part, int)
        return ids + self._end if add_special else ids

    def _parts(self, text: str, parse_special: bool) -> list[str | int]:
        """Text between the added tokens that are found in it, and their ids."""
        parts: list[str | int] = [text] if text else []
        for token, number, always in self._marked:
            if always or parse_special:
                parts = [new for old in parts for new in _split(old, token, number)]
        return parts

    def _joined(self, text: str) -> Iterator[int]:
        """Ids of a SentencePiece text, its spaces already marked."""
        pieces: list[str] = list(text)
        before, after = list(range(-1, len(pieces) - 1)), [*range(1, len(pieces)), -1]
        queue: list[tuple[float, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                number = self._ids.get(pieces[left] + pieces[right])
                if number is not None:
                    length = len(pieces[left]) + len(pieces[right])
                    heapq.heappush(queue, (-self._scores[number], left, length))

        for place in range(1, len(pieces)):
            consider(place - 1, place)
        while queue:
            _, left, length = heapq.heappop(queue)
            right = after[left]
            if not pieces[left] or right < 0 or len(pieces[left]) + len(pieces[right]) != length:
                continue  # one of the two has been joined with another since
            pieces[left], pieces[right] = pieces[left] + pieces[right], ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        for piece in filter(None, pieces):
            number = self._ids.get(piece)
            if number is not None:
                yield number
            else:
                yield from (self._ids[_BYTE.format(byte)] for byte in piece.encode())


def _split(part: str | int, token: str, number: int) -> Iterator[str | int]:
    """A part of a text, cut at every occurrence of a token."""
    if isinstance(part, int):
        yield part
        return
    for place, piece in enumerate(part.split(token)):
        if place:
            yield number
        if piece:
            yield piece


def _merger(ids: dict[str, int], merges: Sequence[str], splitting: Splitting) -> Tokenizer:
    """Byte-level BPE with a file's vocabulary and merges."""
    pairs = []
    for merge in merges:
        left, _, right = merge[1:].partition(" ")  # a piece may begin with a space
        pairs.append((merge[0] + left, right))
    bpe = models.BPE(ids, pairs, ignore_merges=splitting.takes_whole_words)
    merger = Tokenizer(bpe)
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in splitting.patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merger.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    return merger
