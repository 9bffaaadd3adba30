"""Text to token ids with the model's own tokenizer; text can never produce a special id.

Fast tokenizers turn a literal ``</s>`` in a page into the real end-of-document id unless told otherwise; here they are
told otherwise, and every id is checked. BOS and EOS are added as ids, never as text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from longrope2.errors import DataError

__all__ = ["DocumentTokenizer", "batches_by_characters", "load_document_tokenizer"]

BATCH_CHARACTERS = 1_000_000


class DocumentTokenizer:
    """Encodes document text with a private copy of a Hugging Face tokenizer's backend.

    Attributes:
        bos_id: Id put in front of every document.
        eos_id: Id put behind every document.
        vocab_size: Number of ids, added tokens included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json); convert it first")
        if not isinstance(tokenizer.bos_token_id, int) or not isinstance(tokenizer.eos_token_id, int):
            raise DataError(f"the tokenizer of {tokenizer.name_or_path} names no BOS or no EOS token; both are needed")
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size: int = len(tokenizer)
        self._control_ids = np.asarray(sorted({self.bos_id, self.eos_id}))

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Smallest unsigned type that segments store these ids in."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS and EOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as ids with BOS in front and EOS behind.

        Raises:
            DataError: text produced a BOS or EOS id (a tokenizer whose control tokens are not marked special).
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = [np.asarray([self.bos_id, *e.ids, self.eos_id], dtype=self.dtype) for e in encodings]
        for text, ids in zip(texts, documents, strict=True):
            if np.isin(ids[1:-1], self._control_ids).any():
                raise DataError(f"text {text[:60]!r}... produced a BOS or EOS id; mark those tokens as special")
        return documents

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
