"""Text to token ids with the model's own tokenizer; text can never produce a control id.

Fast tokenizers turn a literal ``</s>`` in a page into the real end-of-document id unless told
otherwise; here they are told otherwise, and every id is checked. BOS and EOS are added as ids,
never as text; ``start_ids`` alone decides whether a document starts with BOS. A Hugging Face
``tokenizer.json`` and a SentencePiece ``tokenizer.model`` are read alike (transformers converts the
latter).

The backend is a private copy with two changes, neither of which changes the ids of ordinary text.

``flag_markers``: added tokens that look like markers (``<|assistant|>``, ``[INST]``) but are not
flagged special are matched in text even when special tokens are not; flagged, such text becomes
ordinary pieces. Added tokens of plain text (runs of spaces, for example) stay what they are.

``split_at_space_markers``: LLaMA-2-family tokenizers (Llama 2, Phi-3, Mistral) hand a whole
document to the merge loop as one word, which is slow (tokenizers issue 1449). Every merge makes a
piece of the vocabulary, so if no piece holds the space marker behind another character, no merge
joins the two sides of the place in front of a run of markers: documents can be split there, and
short words are found in the backend's cache. The condition is checked on the vocabulary.

Loading a tokenizer takes transformers, and with it torch: seconds, and several readings of a file
of megabytes. The prepared backend is therefore kept in the cache of conversions
(``model/folder.py``), under a hash of everything it depends on; later commands read it once.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from longrope2.config import DocumentStart
from longrope2.corpora.cuts import SPACE_MARKER, WORDS_AT_MARKERS, cuts_of, state_of
from longrope2.errors import ArtifactError, DataError
from longrope2.files.artifacts import sha256_of_bytes, sha256_of_file, write_text
from longrope2.model.folder import cache_folder
from longrope2.model.shape import ModelShape
from longrope2.segments.format import SegmentRules, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
WORDS = Regex(WORDS_AT_MARKERS)
BATCH_CHARACTERS = 1_000_000
# Of a text that cannot be cut (``cuts.py``): the most that is encoded whole.
MOST_WHOLE_CHARACTERS = 2**25
BYTES_A_CHARACTER = 120  # while a text is encoded; measured
# Of files that a tokenizer may be told by.
ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe")
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
    if _marks_spaces_without_splitting(backend) and _no_piece_crosses(backend):
        split, first = pre_tokenizers.Split(WORDS, "isolated"), backend.pre_tokenizer
        both = split if first is None else pre_tokenizers.Sequence([first, split])
        backend.pre_tokenizer = both
    return backend


def _marks_spaces_without_splitting(backend: Tokenizer) -> bool:
    """Whether spaces become the marker and the merge loop then sees whole documents."""
    before = state_of(backend.pre_tokenizer)
    if before is None:
        normalizer = state_of(backend.normalizer) or {}
        steps = normalizer.get("normalizers", [normalizer])
        return any(s.get("type") == "Replace" and s.get("content") == SPACE_MARKER for s in steps)
    is_metaspace = before["type"] == "Metaspace" and before["replacement"] == SPACE_MARKER
    return is_metaspace and not before["split"]


def _no_piece_crosses(backend: Tokenizer) -> bool:
    """Whether merges alone make the pieces, and none has the marker behind another character."""
    model, vocabulary = backend.model, backend.get_vocab(with_added_tokens=False)
    if not isinstance(model, BPE) or SPACE_MARKER not in vocabulary:
        return False
    # With ignore_merges a whole word of the vocabulary is taken without merging: splitting could
    # make such words.
    others = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout")
    if any(getattr(model, name) for name in others):
        return False
    return not any(SPACE_MARKER in piece.lstrip(SPACE_MARKER) for piece in vocabulary)


def start_ids(tokenizer: "PreTrainedTokenizerBase", document_start: DocumentStart) -> list[int]:
    """What stands in front of every document and prompt: the BOS id, or nothing.

    ``auto`` asks the tokenizer: BOS where its own call puts one in front of a text. SmolLM2 names a
    BOS (``<|im_start|>``) that it does not add; Qwen names none.

    Raises:
        DataError: ``bos`` is wanted and the tokenizer names none.
    """
    bos_id = tokenizer.bos_token_id
    if not isinstance(bos_id, int):
        if document_start is DocumentStart.bos:
            raise DataError(
                f"model.document_start=bos: the tokenizer of {tokenizer.name_or_path} names no BOS "
                "token; use model.document_start=auto (documents are then separated by EOS alone)"
            )
        return []
    if document_start is DocumentStart.auto:
        adds_bos = tokenizer("a text", add_special_tokens=True).input_ids[:1] == [bos_id]
        return [bos_id] if adds_bos else []
    return [bos_id] if document_start is DocumentStart.bos else []


class DocumentTokenizer:
    """Encodes document text with a private copy of a Hugging Face tokenizer's backend.

    ``bos_id`` is what starts a document, None where nothing does; ``vocab_size`` is one above the
    highest id, added tokens included. ``control_ids``, sorted, are the ids that text never
    produces: BOS, EOS and all other special tokens but the unknown one.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        document_start: DocumentStart = DocumentStart.auto,
        *,
        takes_over: bool = False,
    ) -> None:
        """From a tokenizer of transformers, whose backend is copied unless it ``takes_over``."""
        name, backend = tokenizer.name_or_path, getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(f"{name} has no fast tokenizer (tokenizer.json); convert it first")
        eos_id = tokenizer.eos_token_id
        if not isinstance(eos_id, int):
            fault = f"the tokenizer of {name} names no EOS token, which ends every document"
            raise DataError(f"{fault}; set eos_token in its tokenizer_config.json")
        backend = backend if takes_over else Tokenizer.from_str(backend.to_str())
        own = split_at_space_markers(flag_markers(backend))
        added = own.get_added_tokens_decoder().items()
        # Tokenizers without byte fallback give the unknown id for characters they do not have: that
        # is ordinary text.
        special = {n for n, token in added if token.special and n != tokenizer.unk_token_id}
        named = {tokenizer.bos_token_id} if isinstance(tokenizer.bos_token_id, int) else set()
        starts = start_ids(tokenizer, document_start)
        self._prepare(
            own,
            bos_id=starts[0] if starts else None,
            eos_id=eos_id,
            vocab_size=max(len(tokenizer), 1 + max([eos_id, *tokenizer.get_vocab().values()])),
            control_ids=sorted(special | named | {eos_id}),
        )

    def _prepare(
        self,
        backend: Tokenizer,
        bos_id: int | None,
        eos_id: int,
        vocab_size: int,
        control_ids: list[int],
    ) -> None:
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._cuts = cuts_of(backend)
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, vocab_size
        self.start_ids = [] if bos_id is None else [bos_id]
        self.control_ids = tuple(control_ids)
        self._is_control = np.zeros(max(vocab_size, control_ids[-1] + 1), dtype=bool)
        self._is_control[control_ids] = True

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Type of stored ids."""
        return token_dtype(self.vocab_size)

    @property
    def num_boundary_tokens(self) -> int:
        """What a document has beyond its text: its start and EOS."""
        return len(self.start_ids) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS and EOS."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_contents(
        self, texts: Sequence[str], names: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Each text as ids, without BOS and EOS; ``names`` of the texts, for errors.

        A long text is encoded piece by piece, where it can be cut without changing its ids.

        Raises:
            DataError: text produced a control id (a tokenizer whose control tokens are not marked
                special), or is too long to be encoded whole and cannot be cut.
        """
        names = names or [f"text {text[:60]!r}..." for text in texts]
        if max(map(len, texts), default=0) <= BATCH_CHARACTERS:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            contents = [np.asarray(encoding.ids, dtype=self.dtype) for encoding in encodings]
        else:
            pairs = zip(texts, names, strict=True)
            contents = [self._encode_long(text, name) for text, name in pairs]
        for name, ids in zip(names, contents, strict=True):
            if self._is_control[ids].any():
                number = int(ids[self._is_control[ids]][0])
                produced = f"{name} produced the control id {number}"
                raise DataError(f"{produced}; mark control tokens as special in the tokenizer")
        return contents

    def _encode_long(self, text: str, name: str) -> np.ndarray:
        pieces = iter([text]) if self._cuts is None else self._cuts.pieces(text, BATCH_CHARACTERS)
        contents = [np.zeros(0, self.dtype)]
        for piece in pieces:
            if len(piece) > MOST_WHOLE_CHARACTERS:
                room = len(piece) * BYTES_A_CHARACTER / 2**30
                raise DataError(
                    f"{name} has {len(piece):,} characters in one piece, which this tokenizer "
                    f"cannot be shown to split anywhere, and encoding them takes {room:.0f} GiB; "
                    "the most is "
                    f"{MOST_WHOLE_CHARACTERS:,}; split the record, or name it in documents.exclude"
                )
            encoding = self._backend.encode_batch_fast([piece], add_special_tokens=False)[0]
            contents.append(np.asarray(encoding.ids, dtype=self.dtype))
        return np.concatenate(contents)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text as ids with what starts a document in front and EOS behind.

        Raises as ``encode_contents``.
        """
        start, end = np.asarray(self.start_ids, self.dtype), np.asarray([self.eos_id], self.dtype)
        return [np.concatenate([start, ids, end]) for ids in self.encode_contents(texts)]

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


def load_document_tokenizer(
    folder: Path, document_start: DocumentStart = DocumentStart.auto
) -> DocumentTokenizer:
    """Tokenizer of a model folder, every id of which the model embeds.

    Raises:
        DataError: the folder holds no tokenizer that can be loaded, one without EOS, without the
            BOS that is wanted, or with ids that the model does not have.
    """
    kept = _kept_file(folder, document_start)
    if kept.is_file():
        encoder = prepared_tokenizer(kept)
    else:
        encoder = _from_transformers(folder, document_start)
        with suppress(OSError):  # then the next command takes as long
            save_prepared_tokenizer(encoder, kept)
    embedded = ModelShape.from_folder(folder).vocabulary
    if encoder.vocab_size > embedded:
        highest = encoder.vocab_size - 1
        raise DataError(
            f"model.path={folder}: the tokenizer's highest id is {highest} "
            f"({encoder.decode([highest])!r}), the model embeds {embedded} ids (vocab_size of "
            f"config.json), 0 to {embedded - 1}; resize the model's embeddings, or give the "
            "tokenizer that it was trained with"
        )
    return encoder


def _from_transformers(folder: Path, document_start: DocumentStart) -> DocumentTokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        fault = f"model.path={folder} holds no tokenizer that can be loaded: {error}"
        raise DataError(fault) from None
    return DocumentTokenizer(tokenizer, document_start, takes_over=True)


def _kept_file(folder: Path, document_start: DocumentStart) -> Path:
    """Where the prepared tokenizer of a model folder is kept, once it has been made."""
    files = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS)
    told = {path.name: sha256_of_file(path) for path in files if path.is_file()}
    makers = [version(name) for name in ("transformers", "tokenizers")]
    own = sha256_of_file(Path(__file__))
    key = json.dumps([told, makers, own, document_start.value])
    return cache_folder() / "tokenizers" / f"{sha256_of_bytes(key.encode())[:16]}.json"


def require_packed_alike(
    folder: Path, rules: SegmentRules, encoder: DocumentTokenizer, document_start: DocumentStart
) -> None:
    """Refuse segments whose documents start or end with something else than the run's do.

    Raises:
        ArtifactError: says what they have, what the run has, and the way out.
    """
    for verb, packed, wanted in (
        ("start", rules.bos_id, encoder.bos_id),
        ("end", rules.eos_id, encoder.eos_id),
    ):
        if packed != wanted:
            found, now = ("nothing" if n is None else f"id {n}" for n in (packed, wanted))
            raise ArtifactError(
                f"{folder}: its documents {verb} with {found}, with model.document_start="
                f"{document_start.value} and this tokenizer they {verb} with {now}; pack again, "
                "or set model.document_start as it was"
            )


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
