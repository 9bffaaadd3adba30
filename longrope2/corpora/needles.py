"""Needle samples: a short fact hidden in a long text, then asked for.

The parts (``needle_wording``) are tokenized apart and joined as ids, so a sample is exact to the
token, holds one BOS (none where documents start without), and nothing of the question or the value
is ever cut:

    [BOS] instruction | haystack ... needle ... haystack | question | answer prefix | value [EOS]

The closing EOS stands there because a model whose documents all end inside the window has only ever
seen EOS at its last position. The space in front of the value counts as part of it, as tokenizers
join the two. What every sample was made of is recorded with it.

Differs from the paper: the needle is a line of its own, as the text around it may break anywhere
(the paper's stands at the start of a book, and the book goes on behind it in the same line).
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from longrope2.config import DocumentStart
from longrope2.corpora.corpus import HOLD_OUT_MORE, Document
from longrope2.corpora.haystacks import Haystack, book_haystack, noise_haystack, used_books
from longrope2.corpora.needle_wording import (
    VALUE_DIGITS,
    NeedleWording,
    Wording,
    draw_keys,
    draw_value_and_start,
    needle_wording,
)
from longrope2.corpora.tokenizer import DocumentTokenizer
from longrope2.errors import DataError
from longrope2.segments.needle_set import NeedleSample, NeedleSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    A book that is too short is joined with the following ones; ``record["books"]`` lists those
    that were used, with id, SHA-256 of the text, and the range of their tokens. The control set
    (``with_needle=False``) has the same keys, values and haystacks. In noise, which needs no books,
    a needle stands between two sentences; keys and values are those that it would have in books.

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
    keys = draw_keys(seed, num_samples if num_keys is None else num_keys, set(excluded_keys))
    per_haystack = needles_per_haystack
    if per_haystack < 1 or num_samples % per_haystack or len(keys) < per_haystack:
        raise DataError(
            f"needles_per_haystack={per_haystack} must be at least 1, divide num_samples="
            f"{num_samples}, and be at most num_keys={len(keys)}"
        )
    hay_of = (
        noise_haystack(encoder, length) if is_noise else book_haystack(encoder, books, length, seed)
    )
    samples: list[NeedleSample] = []
    for first in range(0, num_samples, per_haystack):
        ids, places, pieces = hay_of(first // per_haystack, draw_value_and_start(seed, first)[1])
        hidden = [
            Needle(keys[n % len(keys)], draw_value_and_start(seed, n)[0], depths[n % len(depths)])
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
            sample.record["books"] = used_books(books, pieces, num_haystack)
        samples += found
    return NeedleSet(samples, length, per_haystack)


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
