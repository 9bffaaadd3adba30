"""Text to token ids with the model's own tokenizer; text can never produce a control id.

Fast tokenizers turn a literal ``</s>`` in a page into the real end-of-document id unless told
otherwise; here they are told otherwise, and every id is checked. BOS and EOS are added as ids,
never as text. A Hugging Face ``tokenizer.json`` and a SentencePiece ``tokenizer.model`` are read
alike (transformers converts the latter).

The backend is a private copy with two changes, neither of which changes the ids of ordinary text.

``flag_markers``: added tokens that look like markers (``<|assistant|>``, ``[INST]``) but are not
flagged special are matched in text even when special tokens are not; flagged, such text becomes
ordinary pieces. Added tokens of plain text (runs of spaces, for example) stay what they are.

``split_at_space_markers``: LLaMA-2-family tokenizers (Llama 2, Phi-3, Mistral) hand a whole
document to the merge loop as one word, which is slow (tokenizers issue 1449). Every merge makes a
piece of the vocabulary, so if no piece holds the space marker behind another character, no merge
joins the two sides of the place in front of a run of markers: documents can be split there, and
short words are found in the backend's cache. The condition is checked on the vocabulary.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from longrope2.errors import DataError
from longrope2.files.artifacts import write_text
from longrope2.segments.format import token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
SPACE_MARKER = "▁"
WORDS = Regex(f"{SPACE_MARKER}+[^{SPACE_MARKER}]*|[^{SPACE_MARKER}]+")
BATCH_CHARACTERS = 1_000_000
Item = TypeVar("Item")


def flag_markers(backend: Tokenizer) -> Tokenizer:
    """Flag added tokens that look like markers as special; changes and returns ``backend``."""
    markers = []
    for token in backend.get_added_tokens_decoder().values():
        if not token.special and MARKER.fullmatch(token.content.strip()):
            kept = ("single_word", "lstrip", "rstrip", "normalized")
            settings = {name: getattr(token, name) for name in kept}
            markers.append(AddedToken(token.content, special=True, **settings))
    if markers:
        backend.add_special_tokens(markers)
    return backend


def split_at_space_markers(backend: Tokenizer) -> Tokenizer:
    """Let a LLaMA-2-family backend split words at spaces, where that provably keeps all ids."""
    fields = json.loads(backend.to_str())
    if _marks_spaces_without_splitting(fields) and _no_piece_crosses(fields["model"]):
        split, first = pre_tokenizers.Split(WORDS, "isolated"), backend.pre_tokenizer
        both = split if first is None else pre_tokenizers.Sequence([first, split])
        backend.pre_tokenizer = both
    return backend


def _marks_spaces_without_splitting(fields: dict) -> bool:
    """Whether spaces become the marker and the merge loop then sees whole documents."""
    before = fields["pre_tokenizer"]
    if before is None:
        normalizer = fields["normalizer"] or {}
        steps = normalizer.get("normalizers", [normalizer])
        return any(s.get("type") == "Replace" and s.get("content") == SPACE_MARKER for s in steps)
    is_metaspace = before["type"] == "Metaspace" and before["replacement"] == SPACE_MARKER
    return is_metaspace and not before["split"]


def _no_piece_crosses(model: dict) -> bool:
    """Whether merges alone make the pieces, and none has the marker behind another character."""
    if model["type"] != "BPE" or SPACE_MARKER not in model["vocab"]:
        return False
    # With ignore_merges a whole word of the vocabulary is taken without merging: splitting could
    # make such words.
    others = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout")
    if any(model.get(name) for name in others):
        return False
    return not any(SPACE_MARKER in piece.lstrip(SPACE_MARKER) for piece in model["vocab"])


class DocumentTokenizer:
    """Encodes document text with a private copy of a Hugging Face tokenizer's backend.

    ``vocab_size`` counts added tokens too. ``control_ids``, sorted, are the ids that text never
    produces: BOS, EOS and all other special tokens but the unknown one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        name, backend = tokenizer.name_or_path, getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"{name} has no fast tokenizer (tokenizer.json); convert it first")
        bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if not isinstance(bos_id, int) or not isinstance(eos_id, int):
            needed = "names no BOS or no EOS token; both are needed"
            raise DataError(f"the tokenizer of {name} {needed}")
        own = split_at_space_markers(flag_markers(Tokenizer.from_str(backend.to_str())))
        added = own.get_added_tokens_decoder().items()
        # Tokenizers without byte fallback give the unknown id for characters they do not have: that
        # is ordinary text.
        special = {n for n, token in added if token.special and n != tokenizer.unk_token_id}
        control_ids = sorted(special | {bos_id, eos_id})
        self._prepare(
            own, bos_id=bos_id, eos_id=eos_id, vocab_size=len(tokenizer), control_ids=control_ids
        )

    def _prepare(
        self, backend: Tokenizer, bos_id: int, eos_id: int, vocab_size: int, control_ids: list[int]
    ) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, vocab_size
        self.control_ids = tuple(control_ids)
        self._is_control = np.zeros(max(vocab_size, control_ids[-1] + 1), dtype=bool)
        self._is_control[control_ids] = True

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Type of stored ids."""
        return token_dtype(self.vocab_size)

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
                produced = f"text {text[:60]!r}... produced the control id {number}"
                raise DataError(f"{produced}; mark control tokens as special in the tokenizer")
        return contents

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as ids with BOS in front and EOS behind; raises as ``encode_contents``."""
        bos, eos = np.asarray([self.bos_id], self.dtype), np.asarray([self.eos_id], self.dtype)
        return [np.concatenate([bos, ids, eos]) for ids in self.encode_contents(texts)]

    def token_spans(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Character span [start, end) of every token of every text, of shape [num_tokens, 2]."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(e.offsets, dtype=np.int64).reshape(-1, 2) for e in encodings]

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of every text, without BOS and EOS."""
        counts = []
        for batch in batches_by_characters(texts, len):
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            counts += map(len, encodings)
        return counts

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
        fault = f"model.path={folder} holds no tokenizer that can be loaded: {error}"
        raise DataError(fault) from None
    return DocumentTokenizer(tokenizer)


def save_prepared_tokenizer(encoder: DocumentTokenizer, path: Path) -> None:
    """Write a tokenizer down for workers, which then need neither transformers nor the model."""
    names = ("bos_id", "eos_id", "vocab_size", "control_ids")
    fields = {name: getattr(encoder, name) for name in names}
    write_text(path, json.dumps({**fields, "backend": encoder._backend.to_str()}))


@lru_cache(maxsize=1)
def prepared_tokenizer(path: Path) -> DocumentTokenizer:
    """A tokenizer that ``save_prepared_tokenizer`` wrote, made once per process."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    encoder = DocumentTokenizer.__new__(DocumentTokenizer)
    encoder._prepare(**{**fields, "backend": Tokenizer.from_str(fields["backend"])})
    return encoder


def batches_by_characters(
    items: Iterable[Item], characters: Callable[[Item], int], limit: int = BATCH_CHARACTERS
) -> Iterator[list[Item]]:
    """Runs of about ``limit`` characters, one at a time: books must not fill the memory."""
    batch, size = [], 0
    for item in items:
        if batch and size + characters(item) > limit:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += characters(item)
    if batch:
        yield batch
