"""Needle samples: a short fact hidden in a long text, then asked for.

They are those of method section 6 (LongRoPE2, arXiv 2502.20082, sec. 3.2), in one of two wordings:
the paper's prompt (its Appendix C), or a short one whose instruction and question are our own, so
that a whole sample fits in a window of 128 tokens. The parts are tokenized apart and joined as ids,
so a sample is exact to the token, holds one BOS (none where documents start without), and nothing
of the question or the value is ever cut:

    [BOS] instruction | haystack ... needle ... haystack | question | answer prefix | value [EOS]

The closing EOS stands there because a model whose documents all end inside the window has only ever
seen EOS at its last position. Every sample is drawn from its own seed, so sample 7 is the same
whether 8 or 800 are asked for. The space in front of the value counts as part of it, as tokenizers
join the two. What every sample was made of is recorded with it.

Differs from the paper: the needle is a line of its own, as the text around it may break anywhere
(the paper's stands at the start of a book, and the book goes on behind it in the same line).
"""

import hashlib
import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longrope2.config import DocumentStart
from longrope2.corpora.corpus import HOLD_OUT_MORE, Document
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
PAPER_INSTRUCTION = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\n"
)
# RULER's haystack without meaning (arXiv 2404.06654), repeated as often as it takes.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
VALUE_DIGITS = 7
# Windows that hold the paper's prompt with ease; a model of a shorter one is our miniature.
PAPER_WORDING_FROM = 2048
# How far from the middle a document may be cut, in characters.
_NEAR = 2000


class Wording(StrEnum):
    """How a needle is announced and asked for."""

    auto = "auto"
    """``paper`` for models with an original window of at least 2,048 tokens, else ``short``."""
    paper = "paper"
    """The prompt of the paper's Appendix C."""
    short = "short"
    """Short instruction and question; the retrieval documents of the training mix have it too."""


class Haystack(StrEnum):
    """What needles are hidden in."""

    books = "books"
    """Held-out documents (the paper)."""
    noise = "noise"
    """RULER's five sentences, repeated: retrieval alone, with nothing to be mistaken for it."""


@dataclass(frozen=True)
class NeedleWording:
    """The texts of one needle; joined as they stand, no spaces are added between them."""

    instruction: str
    needle: str
    question: str
    answer_prefix: str
    answer: str


def choose_wording(wording: Wording, original_len: int) -> Wording:
    """The wording that is meant, ``auto`` decided by the model's original window in tokens."""
    if wording is not Wording.auto:
        return wording
    return Wording.paper if original_len >= PAPER_WORDING_FROM else Wording.short


def needle_wording(key: str, value: str, wording: Wording = Wording.short) -> NeedleWording:
    """Texts for one key and value; ``wording`` is a chosen one, not ``auto``."""
    assert wording is not Wording.auto, "choose_wording decides what auto is"
    asked = f"special magic number for {key} mentioned in the provided text"
    is_short = wording is Wording.short
    return NeedleWording(
        instruction=INSTRUCTION if is_short else PAPER_INSTRUCTION,
        needle=f"\nOne of the special magic numbers for {key} is: {value}.\n",
        question=f"\nWhich number belongs to {key}?\n" if is_short else f"\nWhat is the {asked}?",
        answer_prefix=f"The {asked} is" if is_short else f" The {asked} is",
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
    wording: Wording = Wording.short,
    places: np.ndarray | None = None,
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
        wording: ``paper`` or ``short``.
        places: Indices into ``haystack_ids``, ascending from 0, that the needle may stand in front
            of; the one nearest to ``depth`` is taken. None allows all.

    Raises:
        DataError: ``depth`` outside [0, 1], ``length`` too small for the fixed parts, too little
            haystack, or a value that is no token of its own (wording ``paper``).
    """
    needle = Needle(key, value, depth)
    return build_haystack_samples(
        encoder,
        haystack_ids,
        length=length,
        needles=[needle],
        with_needles=with_needle,
        wording=wording,
        places=places,
    )[0]


class Needle(NamedTuple):
    """A key, its value, and where it stands in a haystack, 0 to 1."""

    key: str
    value: str
    depth: float


def build_haystack_samples(
    encoder: DocumentTokenizer,
    haystack_ids: np.ndarray,
    *,
    length: int,
    needles: Sequence[Needle],
    with_needles: bool = True,
    wording: Wording = Wording.short,
    places: np.ndarray | None = None,
) -> list[NeedleSample]:
    """A sample for every needle of one haystack, which holds them all; each asks for its own.

    The samples begin alike, up to the questions: where a question is shorter than another, a few
    more tokens of haystack stand before it, so that every sample has exactly ``length`` tokens.
    Arguments and errors are those of ``build_needle_sample``; needles of one depth stand one behind
    the other. The instruction is that of a single needle.
    """
    for needle in needles:
        if not 0.0 <= needle.depth <= 1.0:
            raise DataError(f"depth={needle.depth} is outside [0, 1]")
    texts = [needle_wording(needle.key, needle.value, wording) for needle in needles]
    head = [*encoder.start_ids, *encoder.encode(texts[0].instruction)]
    hidden = [encoder.encode(text.needle) if with_needles else [] for text in texts]
    ends = [_tail_and_answer(encoder, text, wording) for text in texts]
    fixed = len(head) + sum(map(len, hidden)) + 1
    room = [length - fixed - len(tail) - len(answer) for tail, answer in ends]
    _refuse_room(room, haystack_ids, length=length, num_needles=len(needles), wording=wording)
    cuts = [_cut(needle.depth, min(room), places) for needle in needles]
    order = sorted(range(len(needles)), key=lambda number: (cuts[number], number))
    parts, starts, done = [head], {}, 0
    for number in order:
        parts += [haystack_ids[done : cuts[number]], hidden[number]]
        starts[number] = sum(map(len, parts)) - len(hidden[number])
        done = cuts[number]
    samples = []
    for number, (needle, (tail, answer)) in enumerate(zip(needles, ends, strict=True)):
        used = np.asarray(haystack_ids[: room[number]])
        tokens = np.concatenate([*parts, used[done:], tail, answer, [encoder.eos_id]])
        record = {
            "wording": wording.value,
            "instruction": texts[number].instruction,
            "needle": texts[number].needle if with_needles else "",
            "question": texts[number].question,
            "answer_prefix": texts[number].answer_prefix,
            "answer": texts[number].answer,
            "needle_start": starts[number],
            "num_needle_tokens": len(hidden[number]),
            "num_haystack_tokens": room[number],
            "haystack_sha256": hashlib.sha256(used.astype("<u4").tobytes()).hexdigest(),
        }
        sample = NeedleSample(
            tokens.astype(np.int64), length - len(answer) - 1, **needle._asdict(), record=record
        )
        samples.append(sample)
    return samples


def _refuse_room(
    room: Sequence[int],
    haystack_ids: np.ndarray,
    *,
    length: int,
    num_needles: int,
    wording: Wording,
) -> None:
    """DataError where the fixed parts do not fit, or the haystack does not fill the room."""
    if min(room) < 0:
        what = "a needle sample" if num_needles == 1 else f"{num_needles} needles in one haystack"
        ways_out = [] if wording is Wording.short else ["wording=short"]
        ways_out += [] if num_needles == 1 else ["fewer needles per haystack"]
        way_out = f", or less with {' or '.join(ways_out)}" if ways_out else ""
        short = f"length={length} tokens is too short for {what}"
        raise DataError(f"{short}; at least {length - min(room)}{way_out}")
    if len(haystack_ids) < max(room):
        given = f"only {len(haystack_ids)} were given"
        fault = f"length={length} needs {max(room)} haystack tokens, {given}"
        raise DataError(f"{fault}; use a larger corpus, or {HOLD_OUT_MORE}")


def _cut(depth: float, num_haystack: int, places: np.ndarray | None) -> int:
    """Haystack tokens in front of a needle."""
    cut = round(depth * num_haystack)
    if places is None:
        return cut
    inside = places[places <= num_haystack]
    return int(inside[np.abs(inside - cut).argmin()])


def _tail_and_answer(
    encoder: DocumentTokenizer, texts: NeedleWording, wording: Wording
) -> tuple[list[int], list[int]]:
    """Ids of question and answer prefix, and of the answer.

    The paper's are one running text and tokenized as one: some tokenizers put a space in front of
    whatever they are given, which would double those between the parts. The short wording's are
    apart, as in all samples that the miniature has been searched and evaluated on.
    """
    if wording is Wording.short:
        tail = encoder.encode(texts.question) + encoder.encode(texts.answer_prefix)
        return tail, encoder.encode(texts.answer)
    tail = encoder.encode(texts.question + texts.answer_prefix)
    whole = encoder.encode(texts.question + texts.answer_prefix + texts.answer)
    if whole[: len(tail)] != tail:
        raise DataError(
            f"this tokenizer joins {texts.answer_prefix[-3:]!r} and {texts.answer!r} in a token, "
            "so that the value cannot be scored alone; use wording=short"
        )
    return tail, whole[len(tail) :]


class _Piece(NamedTuple):
    """Consecutive tokens of one book."""

    book: int
    start: int
    ids: np.ndarray


class _Hay(NamedTuple):
    """Ids to hide a needle in, where it may stand (None: anywhere), and the books they are of."""

    ids: np.ndarray
    places: np.ndarray | None
    pieces: list[_Piece]


def build_needle_set(
    tokenizer: "PreTrainedTokenizerBase",
    books: Sequence[Document | str],
    *,
    length: int,
    depths: Sequence[float],
    num_samples: int,
    seed: int,
    num_keys: int | None = None,
    needles_per_haystack: int = 1,
    with_needle: bool = True,
    document_start: DocumentStart = DocumentStart.auto,
    wording: Wording = Wording.short,
    haystack: Haystack = Haystack.books,
    excluded_keys: Collection[str] = (),
) -> NeedleSet:
    """``num_samples`` samples of exactly ``length`` tokens; depths are used in turn.

    Books are taken in an order drawn from ``seed``, each sample starting with another one (the
    released code drew all its samples from one book). A book that is too short is joined with the
    following ones; ``record["books"]`` lists those that were used, with id, SHA-256 of the text,
    and the range of their tokens. The control set (``with_needle=False``) has the same keys, values
    and haystacks. In noise, which needs no books, a needle stands between two sentences; keys and
    values are those that it would have in books.

    With several ``needles_per_haystack`` (our own: the paper hides one), so many samples in a row
    share one haystack, which holds the needles of all of them and can be read once; keys are
    distinct within it. Samples of a haystack are not independent of each other.

    Args:
        tokenizer: Tokenizer of the model.
        books: Documents to hide needles in; a plain text is recorded under its index. Noise takes
            none of them.
        length: Tokens of every sample.
        depths: As in ``build_needle_sample``.
        num_samples: Number of samples.
        seed: Seed of everything drawn.
        num_keys: Distinct keys in the set, used in turn; None gives every sample a key of its own.
        needles_per_haystack: Samples that share a haystack; must divide ``num_samples``.
        with_needle: False builds the control set.
        document_start: The model's.
        wording: ``paper`` or ``short``; ``choose_wording`` decides what ``auto`` is.
        haystack: ``books`` or ``noise``.
        excluded_keys: Keys that must not occur, so that a set for checking shares none with the
            set that something was chosen by. Its ``seed`` must be another one, or values agree.

    Raises:
        DataError: no depths, no books, books too short in all, a length that cannot hold a sample,
            samples that do not fill their haystacks, more keys than there are, fewer than needles
            in a haystack, or a tokenizer that cannot tell a sentence of noise from the
            next, or (wording ``paper``) the value from what stands before it.
    """
    is_noise = haystack is Haystack.noise
    if not depths or not (books or is_noise) or num_samples < 1:
        got = f"{len(depths)}, {len(books)} and num_samples={num_samples}"
        raise DataError(f"a needle set needs depths, books and samples; got {got}")
    encoder = DocumentTokenizer(tokenizer, document_start)
    keys = _draw_keys(seed, num_samples if num_keys is None else num_keys, set(excluded_keys))
    per_haystack = needles_per_haystack
    if per_haystack < 1 or num_samples % per_haystack or len(keys) < per_haystack:
        raise DataError(
            f"needles_per_haystack={per_haystack} must be at least 1, divide num_samples="
            f"{num_samples}, and be at most num_keys={len(keys)}"
        )
    hay_of = (
        _noise_haystack(encoder, length)
        if is_noise
        else _book_haystack(encoder, books, length, seed)
    )
    samples: list[NeedleSample] = []
    for first in range(0, num_samples, per_haystack):
        ids, places, pieces = hay_of(first // per_haystack, _draws(seed, first)[1])
        hidden = [
            Needle(keys[n % len(keys)], _draws(seed, n)[0], depths[n % len(depths)])
            for n in range(first, first + per_haystack)
        ]
        found = build_haystack_samples(
            encoder,
            ids,
            length=length,
            needles=hidden,
            with_needles=with_needle,
            wording=wording,
            places=places,
        )
        for sample in found:
            sample.record["haystack"] = haystack.value
            num_haystack = int(sample.record["num_haystack_tokens"])
            sample.record["books"] = _used_books(books, pieces, num_haystack)
        samples += found
    return NeedleSet(samples, length, per_haystack)


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
    hay_of = _book_haystack(encoder, books, length, seed)
    texts = []
    for number in range(num_samples):
        ids = hay_of(number, _draws(seed, number)[1]).ids
        text = np.concatenate([encoder.start_ids, ids])[:length].astype(np.int64)
        if len(text) < length:
            given = f"the held-out text has {len(text)} in all"
            wanted = f"samples of {length} tokens are wanted, {given}"
            raise DataError(f"{wanted}; use a larger corpus, or {HOLD_OUT_MORE}")
        texts.append(text)
    return texts


def _draws(seed: int, number: int) -> tuple[str, float]:
    """Value of a sample, and where in a long book it starts (0 to 1)."""
    rng = random.Random(f"needle/{seed}/{number}")
    draw_key(rng)  # the first draw is the key's, see _draw_keys
    return draw_value(rng), rng.random()


def guess_perplexity(needle_set: NeedleSet) -> float:
    """Perplexity of the values for who knows their form alone: seven digits, the first not zero.

    exp(total ln / total tokens), with ln(9e6) for every sample and all tokens that are scored: also
    the one of the space in front, where a tokenizer makes it one of its own. 9e6^(1/8) = 7.4 then,
    where every digit is a token; 54.8 where three are (LLaMA 3: space, 3, 3 and 1 digits).

    Raises:
        DataError: the set has no samples.
    """
    samples = needle_set.samples
    if not samples:
        raise DataError("a needle set without samples has no perplexity of guessing")
    num_tokens = sum(len(sample.through_value) - sample.value_start for sample in samples)
    num_values = 9 * 10 ** (VALUE_DIGITS - 1)
    return math.exp(len(samples) * math.log(num_values) / num_tokens)


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


def _draw_keys(seed: int, num_keys: int, excluded: set[str]) -> list[str]:
    """``num_keys`` distinct keys; the first n of them are the same for every larger number."""
    every = {f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS}
    most = len(every - excluded)
    if not 1 <= num_keys <= most:
        given = f"num_keys={num_keys} (by default one per sample)"
        left = f"the keys there are without {len(every) - most} excluded ones"
        there = left if most < len(every) else "the keys there are"
        raise DataError(f"{given} must be from 1 to {most}, {there}")
    keys: dict[str, None] = {}
    for number in range(num_keys):
        rng = random.Random(f"needle/{seed}/{number}")
        key = draw_key(rng)
        while key in keys or key in excluded:
            key = draw_key(rng)
        keys[key] = None
    return list(keys)


def _book_haystack(
    encoder: DocumentTokenizer, books: Sequence[Document | str], length: int, seed: int
) -> Callable[[int, float], _Hay]:
    """Text of books for a sample, by its number and where in a long book it starts (0 to 1)."""
    order = list(range(len(books)))
    random.Random(f"order/{seed}").shuffle(order)

    @lru_cache(maxsize=256)
    def ids_of(index: int) -> np.ndarray:
        return np.asarray(encoder.encode(_name_and_text(books, index)[1]), dtype=np.int64)

    def hay_of(number: int, start: float) -> _Hay:
        pieces = _joined_haystack(ids_of, order=order, first=number, length=length, start=start)
        return _Hay(np.concatenate([piece.ids for piece in pieces]), None, pieces)

    return hay_of


def _noise_haystack(encoder: DocumentTokenizer, length: int) -> Callable[[int, float], _Hay]:
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
    hay = _Hay(np.asarray(encoder.encode(text), dtype=np.int64), places, [])
    return lambda number, start: hay


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
