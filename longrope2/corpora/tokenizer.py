"""Two changes to a private copy of a tokenizer's backend; neither changes the ids of ordinary text.

``flag_markers``: added tokens that look like markers (``<|assistant|>``, ``[INST]``) but are not
flagged special are matched in text even when special tokens are not; flagged, such text becomes
ordinary pieces. Added tokens of plain text (runs of spaces, for example) stay what they are.

``split_at_space_markers``: LLaMA-2-family tokenizers (Llama 2, Phi-3, Mistral) hand a whole
document to the merge loop as one word, which makes them slow, and slower still on long documents
(tokenizers issue 1449). A piece is made by merges, and every merge makes a piece of the vocabulary.
If no piece holds the space marker behind another character, no merge ever joins the two sides of
the place in front of a run of markers: documents can be split there, and words, now short, are
found in the backend's cache. The condition is checked on the vocabulary, and a test compares ids.

Text to token ids with the model's own tokenizer; text can never produce a control id.

Fast tokenizers turn a literal ``</s>`` in a page into the real end-of-document id unless told
otherwise; here they are told otherwise, and every id is checked. BOS and EOS are added as ids,
never as text. A Hugging Face ``tokenizer.json`` and a SentencePiece ``tokenizer.model`` are read
alike (transformers converts the latter).

The backend is a private copy, prepared by ``fast_backend``: markers are flagged special, and
LLaMA-2-family tokenizers get a provably harmless split at spaces that makes them fast.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from longrope2.errors import DataError
from longrope2.files.artifacts import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
SPACE_MARKER = "▁"
WORDS = Regex(f"{SPACE_MARKER}+[^{SPACE_MARKER}]*|[^{SPACE_MARKER}]+")
BATCH_CHARACTERS = 1_000_000


def flag_markers(backend: Tokenizer) -> Tokenizer:
    """Flag added tokens that look like markers as special; changes and returns ``backend``."""
    added = backend.get_added_tokens_decoder().values()
    markers = [
        token for token in added if not token.special and MARKER.fullmatch(token.content.strip())
    ]
    if markers:
        backend.add_special_tokens([_special(token) for token in markers])
    return backend


def split_at_space_markers(backend: Tokenizer) -> Tokenizer:
    """Let a LLaMA-2-family backend split words at spaces, where that provably keeps all ids; otherwise do nothing."""
    fields = json.loads(backend.to_str())
    if _marks_spaces_without_splitting(fields) and _no_piece_crosses(fields["model"]):
        split = pre_tokenizers.Split(WORDS, "isolated")
        first = backend.pre_tokenizer
        backend.pre_tokenizer = (
            pre_tokenizers.Sequence([first, split]) if first is not None else split
        )
    return backend


def _special(token: AddedToken) -> AddedToken:
    """The same token, flagged."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _marks_spaces_without_splitting(fields: dict) -> bool:
    """Whether spaces become the marker and the merge loop then sees whole documents."""
    before = fields["pre_tokenizer"]
    if before is None:
        normalizer = fields["normalizer"] or {}
        steps = normalizer.get("normalizers", [normalizer])
        return any(s.get("type") == "Replace" and s.get("content") == SPACE_MARKER for s in steps)
    return (
        before["type"] == "Metaspace"
        and before["replacement"] == SPACE_MARKER
        and not before["split"]
    )


def _no_piece_crosses(model: dict) -> bool:
    """Whether merges alone make the pieces and none of them has the marker behind another character."""
    if (
        model["type"] != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        return False
    # With ignore_merges a whole word of the vocabulary is taken without merging: splitting could
    # make such words.
    if model.get("ignore_merges") or model.get("dropout") or SPACE_MARKER not in model["vocab"]:
        return False
    return not any(SPACE_MARKER in piece.lstrip(SPACE_MARKER) for piece in model["vocab"])


class DocumentTokenizer:
    """Encodes document text with a private copy of a Hugging Face tokenizer's backend.

    Attributes:
        bos_id: Id put in front of every document.
        eos_id: Id put behind every document.
        vocab_size: Number of ids, added tokens included.
        control_ids: Sorted ids that text never produces: BOS, EOS and all other special tokens but
            the unknown one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json); convert it first"
            )
        if not isinstance(tokenizer.bos_token_id, int) or not isinstance(
            tokenizer.eos_token_id, int
        ):
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path} names no BOS or no EOS token; both are needed"
            )
        own = split_at_space_markers(flag_markers(Tokenizer.from_str(backend.to_str())))
        special = {
            number for number, token in own.get_added_tokens_decoder().items() if token.special
        }
        # Tokenizers without byte fallback give the unknown id for characters they do not have: that
        # is ordinary text.
        bos_id, eos_id, unknown_id = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.unk_token_id,
        )
        ordinary = {unknown_id} if isinstance(unknown_id, int) else set()
        self._prepare(
            own, bos_id, eos_id, len(tokenizer), sorted((special - ordinary) | {bos_id, eos_id})
        )

    def _prepare(
        self, backend: Tokenizer, bos_id: int, eos_id: int, vocab_size: int, control_ids: list[int]
    ) -> None:
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
            DataError: text produced a control id (a tokenizer whose control tokens are not marked
                special).
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
            DataError: text produced a control id (a tokenizer whose control tokens are not marked
                special).
        """
        bos, eos = np.asarray([self.bos_id], self.dtype), np.asarray([self.eos_id], self.dtype)
        return [np.concatenate([bos, ids, eos]) for ids in self.encode_contents(texts)]

    def token_spans(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Character span [start, end) of every token of every text, each of shape [num_tokens, 2]."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(e.offsets, dtype=np.int64).reshape(-1, 2) for e in encodings]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of every text, without BOS and EOS."""
        return [
            len(e) for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

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
        raise DataError(
            f"model.path={folder} holds no tokenizer that can be loaded: {error}"
        ) from None
    return DocumentTokenizer(tokenizer)


def save_prepared_tokenizer(encoder: DocumentTokenizer, path: Path) -> None:
    """Write a tokenizer down for worker processes, which then need neither transformers nor the model folder."""
    fields = {
        "bos_id": encoder.bos_id,
        "eos_id": encoder.eos_id,
        "vocab_size": encoder.vocab_size,
        "control_ids": list(encoder.control_ids),
        "backend": encoder._backend.to_str(),
    }
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
