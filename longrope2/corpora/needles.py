"""Needle samples: a short fact hidden in a long text, then asked for.

The wording of the needle and of the answer prefix is that of method section 6 (LongRoPE2, arXiv
2502.20082, sec. 3.2); instruction and question are our own and short, so that a whole sample fits
in a window of 128 tokens. All parts are tokenized separately and joined as ids, so a sample is
exact to the token, holds one BOS (none where documents start without), and nothing of the question
or the value is ever cut:

    [BOS] instruction | haystack ... needle ... haystack | question | answer prefix | value [EOS]

The closing EOS stands there because a model whose documents all end inside the window has only ever
seen EOS at its last position. Every sample is drawn from its own seed, so sample 7 is the same
whether 8 or 800 are asked for. The space in front of the value counts as part of it, as tokenizers
join the two. What every sample was made of is recorded with it.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longrope2.config import DocumentStart
from longrope2.corpora.corpus import Document
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError
from longrope2.files.artifacts import sha256_of_bytes
from longrope2.segments.needle_set import NeedleSample, NeedleSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys are ``adjective-noun``: common words, lower case.
ADJECTIVES = """
    amber blue bold brave brief bright broad calm cheap clean clear clever cold cool cosy crisp
    curly damp dark deep dry dusty eager early fair fast fine firm flat fresh gentle giant glad
    gold grand green grey happy heavy hollow humble jolly kind lazy light little lively loud
    lucky mild narrow neat noble odd orange pale plain proud purple quick quiet rapid rare red
    rich round rusty sharp
""".split()
NOUNS = """
    anchor apple arrow basket beach bell bird boat book bottle bridge brush candle castle chair
    cherry cloud coat coin corn crown desert door dragon drum eagle engine farm feather field
    fish flower forest garden glass hammer harbor hat hill horse house island jacket kettle
    ladder lake lamp lemon lion market mirror moon mountain needle ocean orchid owl paper pepper
    piano pillow planet pocket river rocket ship shoe spoon
""".split()
INSTRUCTION = "Remember the magic numbers in this text.\n"
VALUE_DIGITS = 7


@dataclass(frozen=True)
class NeedleWording:
    """The texts of one needle; joined as they stand, no spaces are added between them."""

    needle: str
    question: str
    answer_prefix: str
    answer: str


def needle_wording(key: str, value: str) -> NeedleWording:
    """Texts for one key and value."""
    return NeedleWording(
        needle=f"\nOne of the special magic numbers for {key} is: {value}.\n",
        question=f"\nWhich number belongs to {key}?\n",
        answer_prefix=f"The special magic number for {key} mentioned in the provided text is",
        answer=f" {value}",
    )


def draw_key(rng: random.Random) -> str:
    """An adjective-noun key."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def draw_value(rng: random.Random) -> str:
    """A value of seven digits, the first not zero."""
    return str(rng.randrange(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS))


def build_needle_sample(
    encoder: DocumentTokenizer,
    haystack_ids: np.ndarray,
    *,
    length: int,
    depth: float,
    key: str,
    value: str,
    with_needle: bool = True,
) -> NeedleSample:
    """One sample of exactly ``length`` tokens, BOS, value and EOS included.

    Args:
        encoder: Tokenizer of the model.
        haystack_ids: Ids to hide the needle in; the first are used, as many as the sample needs.
        length: Tokens of the sample.
        depth: Where the needle stands in the haystack: 0 at its start (the paper), 1 at its end.
        key: Adjective-noun key.
        value: Digits to retrieve.
        with_needle: False builds the control sample, with haystack in place of the needle.

    Raises:
        DataError: ``depth`` outside [0, 1], ``length`` too small for the fixed parts, or too little
            haystack.
    """
    if not 0.0 <= depth <= 1.0:
        raise DataError(f"depth={depth} is outside [0, 1]")
    wording = needle_wording(key, value)
    head = [*encoder.start_ids, *encoder.encode(INSTRUCTION)]
    needle = encoder.encode(wording.needle) if with_needle else []
    tail = encoder.encode(wording.question) + encoder.encode(wording.answer_prefix)
    answer = encoder.encode(wording.answer)
    num_haystack = length - len(head) - len(needle) - len(tail) - len(answer) - 1
    if num_haystack < 0:
        short = f"length={length} tokens is too short for a needle sample"
        raise DataError(f"{short}; at least {length - num_haystack}")
    if len(haystack_ids) < num_haystack:
        given = f"only {len(haystack_ids)} were given"
        raise DataError(f"length={length} needs {num_haystack} haystack tokens, {given}")
    used = np.asarray(haystack_ids[:num_haystack])
    cut = round(depth * num_haystack)
    parts = [head, used[:cut], needle, used[cut:], tail, answer, [encoder.eos_id]]
    tokens = np.concatenate(parts).astype(np.int64)
    record = {
        "instruction": INSTRUCTION,
        "needle": wording.needle if with_needle else "",
        "question": wording.question,
        "answer_prefix": wording.answer_prefix,
        "answer": wording.answer,
        "needle_start": len(head) + cut,
        "num_needle_tokens": len(needle),
        "num_haystack_tokens": num_haystack,
        "haystack_sha256": hashlib.sha256(used.astype("<u4").tobytes()).hexdigest(),
    }
    start = length - len(answer) - 1
    return NeedleSample(tokens, start, key=key, value=value, depth=depth, record=record)


class _Piece(NamedTuple):
    """Consecutive tokens of one book."""

    book: int
    start: int
    ids: np.ndarray


def build_needle_set(
    tokenizer: "PreTrainedTokenizerBase",
    books: Sequence[Document | str],
    *,
    length: int,
    depths: Sequence[float],
    num_samples: int,
    seed: int,
    num_keys: int | None = None,
    with_needle: bool = True,
    document_start: DocumentStart = DocumentStart.auto,
) -> NeedleSet:
    """``num_samples`` samples of exactly ``length`` tokens; depths are used in turn.

    Books are taken in an order drawn from ``seed``, each sample starting with another one (the
    released code drew all its samples from one book). A book that is too short is joined with the
    following ones; ``record["books"]`` lists those that were used, with id, SHA-256 of the text,
    and the range of their tokens. The control set (``with_needle=False``) has the same keys, values
    and haystacks.

    Args:
        tokenizer: Tokenizer of the model.
        books: Documents to hide needles in; a plain text is recorded under its index.
        length: Tokens of every sample.
        depths: As in ``build_needle_sample``.
        num_samples: Number of samples.
        seed: Seed of everything drawn.
        num_keys: Distinct keys in the set, used in turn; None gives every sample a key of its own.
        with_needle: False builds the control set.
        document_start: The model's.

    Raises:
        DataError: no depths, no books, books too short in all, a length that cannot hold a sample,
            or more keys than there are.
    """
    if not depths or not books or num_samples < 1:
        got = f"{len(depths)}, {len(books)} and num_samples={num_samples}"
        raise DataError(f"a needle set needs depths, books and samples; got {got}")
    encoder = DocumentTokenizer(tokenizer, document_start)
    order = list(range(len(books)))
    random.Random(f"order/{seed}").shuffle(order)
    keys = _draw_keys(seed, num_samples if num_keys is None else num_keys)

    @lru_cache(maxsize=256)
    def ids_of(index: int) -> np.ndarray:
        return np.asarray(encoder.encode(_name_and_text(books, index)[1]), dtype=np.int64)

    samples = []
    for number in range(num_samples):
        rng = random.Random(f"needle/{seed}/{number}")
        draw_key(rng)  # the first draw is the key's, see _draw_keys
        value, start = draw_value(rng), rng.random()
        pieces = _joined_haystack(ids_of, order=order, first=number, length=length, start=start)
        sample = build_needle_sample(
            encoder,
            np.concatenate([piece.ids for piece in pieces]),
            length=length,
            depth=depths[number % len(depths)],
            key=keys[number % len(keys)],
            value=value,
            with_needle=with_needle,
        )
        num_haystack = int(sample.record["num_haystack_tokens"])
        sample.record["books"] = _used_books(books, pieces, num_haystack)
        samples.append(sample)
    return NeedleSet(samples=samples, length=length)


def _draw_keys(seed: int, num_keys: int) -> list[str]:
    """``num_keys`` distinct keys; the first n of them are the same for every larger number."""
    most = len(ADJECTIVES) * len(NOUNS)
    if not 1 <= num_keys <= most:
        given = f"num_keys={num_keys} (by default one per sample)"
        raise DataError(f"{given} must be from 1 to {most}, the keys there are")
    keys: dict[str, None] = {}
    for number in range(num_keys):
        rng = random.Random(f"needle/{seed}/{number}")
        key = draw_key(rng)
        while key in keys:
            key = draw_key(rng)
        keys[key] = None
    return list(keys)


def _joined_haystack(
    ids_of: Callable[[int], np.ndarray], order: list[int], first: int, length: int, start: float
) -> list[_Piece]:
    """At least ``length`` ids: from a random place of one book, or several short books in a row."""
    pieces: list[_Piece] = []
    total = 0
    for step in range(len(order)):
        book = order[(first + step) % len(order)]
        ids, begin = ids_of(book), 0
        if not pieces and len(ids) > length:
            begin = int(start * (len(ids) - length))
            ids = ids[begin : begin + length]
        pieces.append(_Piece(book, begin, ids))
        total += len(ids)
        if total >= length:
            break
    return pieces


def _name_and_text(books: Sequence[Document | str], index: int) -> tuple[str, str]:
    """A book's id, or its index where it is a plain text, and its text."""
    book = books[index]
    return (str(index), book) if isinstance(book, str) else (book.doc_id, book.text)


def _used_books(
    books: Sequence[Document | str], pieces: list[_Piece], num_tokens: int
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
