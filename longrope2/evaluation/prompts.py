"""Prompts put together from pieces with known token ids: nothing long is tokenized twice.

A prompt is a list of pieces of text. Pieces are cut where tokenizers cut too: behind a newline, or
in front of a space. There the ids of a text are the ids of its pieces joined, for byte-level BPE
(GPT-2, Llama 3, SmolLM2) and for SentencePiece tokenizers whose pieces do not span words. That is a
claim about a tokenizer, so it is checked on real prompts (``ruler.tasks``), never assumed.

Shape legend: T = tokens of a piece or prompt.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from longrope2.config import DocumentStart
from longrope2.corpora.tokenizer import start_ids
from longrope2.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands in front of a piece while it is tokenized: a piece inside a prompt never opens a text.
_ANCHOR = "\n"
_REMEMBERED_PIECES = 300_000
# Added tokens that text in a prompt must not turn into.
_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")


@dataclass(frozen=True)
class Block:
    """A long piece with its ids; the text is made on demand."""

    ids_T: np.ndarray
    text: Callable[[], str]
    num_characters: int


Piece = str | Block


@dataclass
class Draft:
    """A prompt before it is a sample, its text cut behind newlines or in front of spaces."""

    pieces: list[Piece]
    answers: tuple[str, ...]
    facts: dict[str, Any]


def text_of(pieces: Sequence[Piece]) -> str:
    """The text of a prompt."""
    return "".join(piece if isinstance(piece, str) else piece.text() for piece in pieces)


def too_short(task: str, room: int, what: str) -> DataError:
    """The error of a generator that ``room`` tokens do not suffice for."""
    fault = f"the length is too short for {task}: {room} tokens are left for {what}"
    return DataError(f"{fault}; use a longer one")


class PieceTable:
    """Pieces that are used again and again, tokenized once, and joined by index without a loop."""

    def __init__(self, pieces: Sequence[str], encoder: "PromptEncoder") -> None:
        self.pieces = list(pieces)
        encoded = encoder.encode_once(self.pieces)
        self.sizes = _lengths(encoded)
        self._ids = np.fromiter((i for ids in encoded for i in ids), dtype=np.int32)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._characters = _lengths(self.pieces)

    def block(self, indices: np.ndarray) -> Block:
        """The pieces ``indices`` [any length], joined."""
        sizes = self.sizes[indices]
        ends = np.cumsum(sizes)
        starts = np.repeat(self._starts[indices] - (ends - sizes), sizes)
        ids = self._ids[starts + np.arange(len(starts))]
        characters = int(self._characters[indices].sum())
        return Block(ids, lambda: "".join(self.pieces[index] for index in indices), characters)


class PromptEncoder:
    """Tokenizes pieces of prompts with a private copy of a tokenizer; text gives no control id.

    Attributes:
        bos_ids: The id in front of every prompt; empty where documents start without.
        fingerprint: SHA-256 of all that its ids depend on.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        document_start: DocumentStart = DocumentStart.auto,
    ) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            fault = f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json)"
            raise DataError(f"{fault}; convert it first")
        self._backend = Tokenizer.from_str(backend.to_str())
        added = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        markers = (name for name in added if _MARKER.fullmatch(name.strip()))
        special = [AddedToken(name, normalized=False, special=True) for name in markers]
        self._backend.add_special_tokens(special)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_ids = start_ids(tokenizer, document_start)
        identity = json.dumps([self._backend.to_str(), self.bos_ids])
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._anchor = self.encode_text(_ANCHOR)
        self._known: dict[str, list[int]] = {}

    def encode_text(self, text: str) -> list[int]:
        """Ids of a whole text, without BOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[str]) -> list[list[int]]:
        """Ids of each piece as it stands inside a prompt, without BOS."""
        known = self._known
        missing = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        if missing:
            if len(known) + len(missing) > _REMEMBERED_PIECES:
                known.clear()
                missing = list(dict.fromkeys(pieces))
            known.update(zip(missing, self.encode_once(missing), strict=True))
        return [known[piece] for piece in pieces]

    def encode_once(self, pieces: Sequence[str]) -> list[list[int]]:
        """The same for pieces that do not come again."""
        anchored = [_ANCHOR + piece for piece in pieces]
        encoded = self._backend.encode_batch_fast(anchored, add_special_tokens=False)
        return [encoding.ids[len(self._anchor) :] for encoding in encoded]

    def count(self, pieces: Sequence[str]) -> np.ndarray:
        """Tokens of each piece inside a prompt, int64 [number of pieces]."""
        return _lengths(self.encode_pieces(pieces))

    def total(self, pieces: Sequence[str]) -> int:
        """Tokens of all pieces together."""
        return int(self.count(pieces).sum())

    def fixed_total(self, pieces: Sequence[str]) -> int:
        """Tokens of the fixed pieces of a prompt, of which the first opens it."""
        return len(self.encode_text(pieces[0])) + self.total(pieces[1:])

    def join(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Ids of a prompt without BOS, int32 [T]. Its first piece must be a string."""
        head = pieces[0]
        assert isinstance(head, str), "a prompt starts with its instruction"
        strings = [piece for piece in pieces[1:] if isinstance(piece, str)]
        encoded = iter(self.encode_pieces(strings))
        parts: list[np.ndarray] = []
        pending = self.encode_text(head)
        for piece in pieces[1:]:
            if isinstance(piece, str):
                pending.extend(next(encoded))
            else:
                parts += [np.asarray(pending, dtype=np.int32), piece.ids_T]
                pending = []
        return np.concatenate([*parts, np.asarray(pending, dtype=np.int32)])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def _lengths(items: Iterable[Any]) -> np.ndarray:
    return np.fromiter(map(len, items), dtype=np.int64)
