"""Text to token ids with the model's own tokenizer; text can never produce a control id.

Fast tokenizers turn a literal ``</s>`` in a page into the real end-of-document id unless told otherwise; here they are
told otherwise, and every id is checked. BOS and EOS are added as ids, never as text. A Hugging Face ``tokenizer.json``
and a SentencePiece ``tokenizer.model`` are read alike (transformers converts the latter).

The backend is a private copy, prepared by ``fast_backend``: markers are flagged special, and LLaMA-2-family tokenizers
get a provably harmless split at spaces that makes them fast.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from data_prep.fast_backend import flag_markers, split_at_space_markers
from longrope2.artifacts import write_text
from longrope2.errors import DataError

if TYPE_CHECKING:  # transformers brings torch along, which worker processes do not need
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DocumentTokenizer",
    "batches_by_characters",
    "load_document_tokenizer",
    "prepared_tokenizer",
    "save_prepared_tokenizer",
]

BATCH_CHARACTERS = 1_000_000


class DocumentTokenizer:
    """Encodes document text with a private copy of a Hugging Face tokenizer's backend.

    Attributes:
        bos_id: Id put in front of every document.
        eos_id: Id put behind every document.
        vocab_size: Number of ids, added tokens included.
        control_ids: Sorted ids that text never produces: BOS, EOS and all other special tokens but the unknown one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json); convert it first")
        if not isinstance(tokenizer.bos_token_id, int) or not isinstance(tokenizer.eos_token_id, int):
            raise DataError(f"the tokenizer of {tokenizer.name_or_path} names no BOS or no EOS token; both are needed")
        own = split_at_space_markers(flag_markers(Tokenizer.from_str(backend.to_str())))
        special = {number for number, token in own.get_added_tokens_decoder().items() if token.special}
        # Tokenizers without byte fallback give the unknown id for characters they do not have: that is ordinary text.
        bos_id, eos_id, unknown_id = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
        ordinary = {unknown_id} if isinstance(unknown_id, int) else set()
        self._prepare(own, bos_id, eos_id, len(tokenizer), sorted((special - ordinary) | {bos_id, eos_id}))

    def _prepare(self, backend: Tokenizer, bos_id: int, eos_id: int, vocab_size: int, control_ids: list[int]) -> None:
        """Take the parts over."""
        self._backend = backend
        self._backend.encode_special_tokens = True
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, vocab_size
        self.control_ids = tuple(control_ids)
        self._is_control = np.zeros(max(vocab_size, control_ids[-1] + 1), dtype=bool)
        self._is_control[control_ids] = True

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Smallest unsigned type that segments store these ids in."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS and EOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_contents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as ids, without BOS and EOS.

        Raises:
            DataError: text produced a control id (a tokenizer whose control tokens are not marked special).
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        contents = [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]
        for text, ids in zip(texts, contents, strict=True):
            if self._is_control[ids].any():
                number = int(ids[self._is_control[ids]][0])
                raise DataError(
                    f"text {text[:60]!r}... produced the control id {number}; mark control tokens as special in "
                    "the tokenizer"
                )
        return contents

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as ids with BOS in front and EOS behind.

        Raises:
            DataError: text produced a control id (a tokenizer whose control tokens are not marked special).
        """
        bos, eos = np.asarray([self.bos_id], self.dtype), np.asarray([self.eos_id], self.dtype)
        return [np.concatenate([bos, ids, eos]) for ids in self.encode_contents(texts)]

    def token_spans(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Character span [start, end) of every token of every text, each of shape [num_tokens, 2]."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(e.offsets, dtype=np.int64).reshape(-1, 2) for e in encodings]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text, without BOS and EOS."""
        return [len(e) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; BOS and EOS come out as text too."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def load_document_tokenizer(folder: Path) -> DocumentTokenizer:
    """Tokenizer of a model folder.

    Raises:
        DataError: the folder holds no tokenizer that can be loaded, or one without BOS or EOS.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"model.path={folder} holds no tokenizer that can be loaded: {error}") from None
    return DocumentTokenizer(tokenizer)


def save_prepared_tokenizer(encoder: DocumentTokenizer, path: Path) -> None:
    """Write a tokenizer down for worker processes, which then need neither transformers nor the model folder."""
    fields = {
        "bos_id": encoder.bos_id, "eos_id": encoder.eos_id, "vocab_size": encoder.vocab_size,
        "control_ids": list(encoder.control_ids), "backend": encoder._backend.to_str(),
    }  # fmt: skip
    write_text(path, json.dumps(fields))


@lru_cache(maxsize=1)
def prepared_tokenizer(path: Path) -> DocumentTokenizer:
    """A tokenizer that ``save_prepared_tokenizer`` wrote, made once per process."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    encoder = DocumentTokenizer.__new__(DocumentTokenizer)
    encoder._prepare(**{**fields, "backend": Tokenizer.from_str(fields["backend"])})
    return encoder


def batches_by_characters(texts: Sequence[str], limit: int = BATCH_CHARACTERS) -> Iterator[slice]:
    """Consecutive slices of ``texts`` of about ``limit`` characters: a batch of books must not fill the memory."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > limit:
            yield slice(start, index)
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield slice(start, len(texts))
