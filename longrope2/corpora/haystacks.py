"""The long texts that needles are hidden in: books, or noise that repeats itself.

Books are taken in an order drawn from a seed, each sample starting with another one (the code that
the authors released drew all its samples from one book).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longrope2.config import DocumentStart
from longrope2.corpora.corpus import HOLD_OUT_MORE, Document
from longrope2.corpora.needle_wording import draw_value_and_start
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError
from longrope2.files.artifacts import sha256_of_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# RULER's haystack without meaning (arXiv 2404.06654), repeated as often as it takes.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# How far from the middle a document may be cut, in characters.
_NEAR = 2000


class Haystack(StrEnum):
    """What needles are hidden in."""

    books = "books"
    """Held-out documents (the paper)."""
    noise = "noise"
    """RULER's five sentences, repeated: retrieval alone, with nothing to be mistaken for it."""


class Piece(NamedTuple):
    """Consecutive tokens of one book."""

    book: int
    start: int
    ids: np.ndarray


class Hay(NamedTuple):
    """Ids to hide a needle in, where it may stand (None: anywhere), and the books they are of."""

    ids: np.ndarray
    places: np.ndarray | None
    pieces: list[Piece]


def book_haystack(
    encoder: DocumentTokenizer, books: Sequence[Document | str], length: int, seed: int
) -> Callable[[int, float], Hay]:
    """Text of books for a sample, by its number and where in a long book it starts (0 to 1)."""
    order = list(range(len(books)))
    random.Random(f"order/{seed}").shuffle(order)

    @lru_cache(maxsize=256)
    def ids_of(index: int) -> np.ndarray:
        return np.asarray(encoder.encode(_name_and_text(books, index)[1]), dtype=np.int64)

    def hay_of(number: int, start: float) -> Hay:
        pieces = _joined_haystack(ids_of, order=order, first=number, length=length, start=start)
        return Hay(np.concatenate([piece.ids for piece in pieces]), None, pieces)

    return hay_of


def noise_haystack(encoder: DocumentTokenizer, length: int) -> Callable[[int, float], Hay]:
    """The same noise for every sample; a needle may stand at its start or behind a sentence.

    Raises:
        DataError: the tokenizer has tokens that reach from one sentence into the next.
    """
    text = NOISE
    while encoder.count_tokens([text])[0] < length:
        text = f"{text} {text}"
    ends_N = encoder.token_spans([text])[0][:, 1]
    sentence_ends = np.flatnonzero(np.frombuffer(text.encode(), dtype=np.uint8) == ord(".")) + 1
    is_end_N = np.isin(ends_N, sentence_ends)
    if np.count_nonzero(is_end_N) < len(sentence_ends):
        raise DataError(
            "this tokenizer joins the end of a sentence with the start of the next in one token, "
            "so that no needle can stand between them; use haystack=books"
        )
    places = np.concatenate([[0], np.flatnonzero(is_end_N) + 1])
    hay = Hay(np.asarray(encoder.encode(text), dtype=np.int64), places, [])
    return lambda number, start: hay


def _joined_haystack(
    ids_of: Callable[[int], np.ndarray], order: list[int], first: int, length: int, start: float
) -> list[Piece]:
    """At least ``length`` ids: from a random place of one book, or several short books in a row."""
    pieces: list[Piece] = []
    total = 0
    for step in range(len(order)):
        book = order[(first + step) % len(order)]
        ids, begin = ids_of(book), 0
        if not pieces and len(ids) > length:
            begin = int(start * (len(ids) - length))
            ids = ids[begin : begin + length]
        pieces.append(Piece(book, begin, ids))
        total += len(ids)
        if total >= length:
            break
    return pieces


def _name_and_text(books: Sequence[Document | str], index: int) -> tuple[str, str]:
    """A book's id, or its index where it is a plain text, and its text."""
    book = books[index]
    return (str(index), book) if isinstance(book, str) else (book.doc_id, book.text)


def used_books(
    books: Sequence[Document | str], pieces: list[Piece], num_tokens: int
) -> list[dict[str, Any]]:
    """Record of the books that the first ``num_tokens`` tokens of ``pieces`` come from."""
    records = []
    for piece in pieces:
        used = min(len(piece.ids), num_tokens)
        num_tokens -= used
        if used:
            name, text = _name_and_text(books, piece.book)
            tokens = {"first_token": piece.start, "num_tokens": used}
            sha256 = sha256_of_bytes(text.encode())
            records.append({"id": name, "text_sha256": sha256, **tokens})
    return records


def build_texts(
    tokenizer: "PreTrainedTokenizerBase",
    books: Sequence[Document | str],
    *,
    length: int,
    num_samples: int,
    seed: int,
    document_start: DocumentStart = DocumentStart.auto,
) -> list[np.ndarray]:
    """The book texts that the samples of ``build_needle_set`` are made of, without needles.

    The same books from the same places, ``length`` ids each, what starts a document first: the
    paper's plain-perplexity ablation uses the documents of its needle data [sec. 4.3, Table 6].

    Raises:
        DataError: too little text.
    """
    encoder = DocumentTokenizer(tokenizer, document_start)
    hay_of = book_haystack(encoder, books, length, seed)
    texts = []
    for number in range(num_samples):
        ids = hay_of(number, draw_value_and_start(seed, number)[1]).ids
        text = np.concatenate([encoder.start_ids, ids])[:length].astype(np.int64)
        if len(text) < length:
            given = f"the held-out text has {len(text)} in all"
            wanted = f"samples of {length} tokens are wanted, {given}"
            raise DataError(f"{wanted}; use a larger corpus, or {HOLD_OUT_MORE}")
        texts.append(text)
    return texts


def halve_documents(
    documents: Sequence[Document], seed: int
) -> tuple[list[Document], list[Document]]:
    """Two parts without common text, each of about half the characters, in an order from ``seed``.

    The document in the middle is cut in two (``part 1 of 2``, ``part 2 of 2`` in its id): behind
    the line break that is nearest to the middle, or else behind the nearest space, or else in the
    middle. The first two are looked for within 2,000 characters and within a twentieth of the text.

    Raises:
        DataError: fewer than two characters in all.
    """
    total = sum(len(document.text) for document in documents)
    if total < 2:
        given = f"{len(documents)} documents of {total} characters in all"
        raise DataError(f"{given} cannot be halved; use a larger corpus, or {HOLD_OUT_MORE}")
    drawn = list(documents)
    random.Random(f"halves/{seed}").shuffle(drawn)
    first: list[Document] = []
    room = total // 2
    while len(drawn[len(first)].text) <= room:
        room -= len(drawn[len(first)].text)
        first.append(drawn[len(first)])
    second = drawn[len(first) :]
    if room:
        whole = second[0]
        cut = _place_near(second[0].text, room, min(_NEAR, total // 20))
        name = whole.doc_id
        first.append(replace(whole, doc_id=f"{name} part 1 of 2", text=whole.text[:cut]))
        second[0] = replace(whole, doc_id=f"{name} part 2 of 2", text=whole.text[cut:])
    return first, second


def _place_near(text: str, middle: int, most: int) -> int:
    """Where to cut a text: at most ``most`` characters from ``middle``, inside of both ends."""
    # The break itself goes with what stands before it.
    low, high = max(0, middle - 1 - most), min(len(text) - 1, middle + most)
    for mark in ("\n", " "):
        before, behind = text.rfind(mark, low, middle), text.find(mark, middle, high)
        found = [place + 1 for place in (before, behind) if place >= 0]
        if found:
            return min(found, key=lambda place: abs(place - middle))
    return middle
