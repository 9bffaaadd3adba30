"""Measures without generating: one suite at one length on fixed data, the same for every subject.

Suites: ``needle`` (exact match and likelihood of a hidden value), ``perplexity`` (the same text
tokens after more and more context), ``retention`` (text inside the original window). Lengths up to
L0 are read in the short window, longer ones in the long window, as in generation. Only the
positions that are scored pass through the LM head.

A document is its token ids with BOS in front (nothing, if the model's documents start so) and EOS
behind; windows that start inside a document get a BOS of their own. A window of T tokens is a
document of T tokens without its closing EOS: the last place stays empty, because a model whose
training documents all end inside the window has seen nothing but EOS there. Needle samples are cut
the same way.

Shape legend: B = rows, T = tokens of a row, K = scored tokens of a row, V = vocabulary.
"""

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longrope2.corpora.corpus import HOLD_OUT_MORE
from longrope2.errors import DataError
from longrope2.evaluation.results import Measurement, ResultsLog
from longrope2.evaluation.subjects import Subject, SubjectModels
from longrope2.inference.generation import window_for_length
from longrope2.model.scoring import logits_of_alike, token_nll
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import Window
from longrope2.segments.needle_set import NeedleSet

Item = TypeVar("Item")


@dataclass(frozen=True)
class WindowScore:
    """How likely the model finds the scored tokens of one text window, or of one needle's value."""

    nll: float
    """Sum of their negative log-likelihoods, natural logarithm."""
    num_tokens: int


@dataclass(frozen=True)
class ValueScore(WindowScore):
    """How the model did on the value of one needle sample."""

    exact: bool
    """Greedy decoding after the prompt would give exactly the value's tokens."""


@torch.inference_mode()
def score_values(
    model: WindowedModel, needle_set: NeedleSet, batch_tokens: int
) -> list[ValueScore]:
    """Exact match and likelihood of every sample's value, one teacher-forced forward per batch.

    Of needles that share a haystack, the haystack is read once.

    Greedy decoding reproduces the value exactly when the argmax at every teacher-forced position is
    the value's next token, so none is generated (tests/reference compares the two). They agree as
    long as prompt and value are read in the same window, which is checked.

    Raises:
        DataError: the window changes inside the value of a sample.
    """
    original_len = model.factors.geometry.original_len
    window = window_for_length(needle_set.length, original_len)
    for sample in needle_set.samples:
        if window_for_length(sample.value_start, original_len) is not window:
            raise DataError(
                f"evaluation.lengths: a needle sample of {needle_set.length} tokens has its value "
                f"across the end of the original window ({original_len} tokens); use {original_len}"
                " or a length well above it"
            )
    shares = needle_set.needles_per_haystack > 1
    batches = (
        needle_set.haystacks
        if shares
        else _batches(needle_set.samples, needle_set.length, batch_tokens)
    )
    scores = []
    for batch in batches:
        stacked_BT = np.stack([sample.through_value for sample in batch])
        tokens_BT = torch.from_numpy(stacked_BT).to(model.hf.device)
        starts = [sample.value_start for sample in batch]
        if shares:
            logits_by_row = logits_of_alike(model, tokens_BT, window, starts)
        else:
            logits_BKV = model.logits(tokens_BT, window, keep=slice(min(starts) - 1, -1))
            skipped = (start - min(starts) for start in starts)
            logits_by_row = (
                logits_KV[n:] for logits_KV, n in zip(logits_BKV, skipped, strict=True)
            )
        for row_T, start, logits_KV in zip(tokens_BT, starts, logits_by_row, strict=True):
            scores.append(_value_score(logits_KV, row_T[start:]))
    return scores


def _value_score(logits_KV: Tensor, value_K: Tensor) -> ValueScore:
    exact = bool((logits_KV.argmax(-1) == value_K).all())
    nll = F.cross_entropy(logits_KV, value_K, reduction="sum")
    return ValueScore(float(nll), len(value_K), exact)


def score_windows(
    model: WindowedModel,
    windows: Sequence[np.ndarray],
    *,
    num_scored: int | None,
    batch_tokens: int,
) -> list[WindowScore]:
    """Negative log-likelihood of the last ``num_scored`` tokens of every text window, in order.

    None scores all but the first. The RoPE follows from each window's length; windows of equal
    length share forward passes of ``batch_tokens``.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(windows):
        by_length[len(ids)].append(index)
    scores: dict[int, WindowScore] = {}
    for length, indices in by_length.items():
        window = window_for_length(length, model.factors.geometry.original_len)
        num_targets = length - 1 if num_scored is None else min(num_scored, length - 1)
        for batch in _batches(indices, length, batch_tokens):
            stacked_BT = np.stack([windows[index] for index in batch]).astype(np.int64)
            tokens_BT = torch.from_numpy(stacked_BT).to(model.hf.device)
            nll_BK = token_nll(model, tokens_BT, window, first_scored=length - num_targets)
            for index, nll in zip(batch, nll_BK.double().sum(dim=1).tolist(), strict=True):
                scores[index] = WindowScore(nll, num_targets)
    return [scores[index] for index in range(len(windows))]


def _batches(items: Sequence[Item], length: int, batch_tokens: int) -> Iterator[Sequence[Item]]:
    """Consecutive groups of items of ``length`` tokens each that fit one forward pass."""
    size = max(batch_tokens // length, 1)
    for first in range(0, len(items), size):
        yield items[first : first + size]


@dataclass(frozen=True)
class Measure:
    """One suite at one length: the same data for every subject."""

    suite: str
    length: int
    window: Window
    data_sha256: str
    values: Callable[[WindowedModel], dict[str, Any]]
    """Raw numbers of one model; plain JSON values."""


def needle_measures(needle_set: NeedleSet, original_len: int, batch_tokens: int) -> list[Measure]:
    """Retrieval at the length of ``needle_set``, in parts where a sample goes alone.

    Samples longer than ``batch_tokens`` share no forward pass, and each may take minutes: every
    haystack is a measure of its own, so that a killed evaluation goes on behind the last one.
    """
    if needle_set.length <= batch_tokens:
        parts = [needle_set]
    else:
        size = needle_set.needles_per_haystack
        parts = [NeedleSet(part, needle_set.length, size) for part in needle_set.haystacks]
    return [_needle_measure(part, original_len, batch_tokens) for part in parts]


def _needle_measure(needle_set: NeedleSet, original_len: int, batch_tokens: int) -> Measure:
    """One entry per sample and list; needles that share a haystack count as one sample in it."""
    shared = needle_set.needles_per_haystack
    sizes = {"needles_per_haystack": [shared] * len(needle_set.samples)} if shared > 1 else {}

    def values(model: WindowedModel) -> dict[str, Any]:
        scores = score_values(model, needle_set, batch_tokens)
        return {
            **sizes,
            "depths": [sample.depth for sample in needle_set.samples],
            "exact": [int(score.exact) for score in scores],
            "nll": [score.nll for score in scores],
            "num_tokens": [score.num_tokens for score in scores],
        }

    data = [np.append(sample.tokens, sample.value_start) for sample in needle_set.samples]
    window = window_for_length(needle_set.length, original_len)
    return Measure(
        "needle", needle_set.length, window, data_sha256=_data_sha256(data), values=values
    )


def perplexity_measures(
    windows: Sequence[np.ndarray], num_scored: int, original_len: int, batch_tokens: int
) -> list[Measure]:
    """Likelihood of the last ``num_scored`` tokens of windows of one length.

    In parts as ``needle_measures``.
    """
    parts = [windows] if len(windows[0]) < batch_tokens else [[window] for window in windows]
    return [_perplexity_measure(part, num_scored, original_len, batch_tokens) for part in parts]


def _perplexity_measure(
    windows: Sequence[np.ndarray], num_scored: int, original_len: int, batch_tokens: int
) -> Measure:
    length = len(windows[0]) + 1  # a window leaves the place of a closing EOS empty
    digest = _data_sha256([*windows, np.array([num_scored])])
    values = partial(_text_values, windows, num_scored, batch_tokens)
    window = window_for_length(length, original_len)
    return Measure("perplexity", length, window, data_sha256=digest, values=values)


def retention_measure(
    windows: Sequence[np.ndarray], original_len: int, batch_tokens: int
) -> Measure:
    """Likelihood of all tokens (but the first) of windows of at most L0 tokens."""
    values = partial(_text_values, windows, None, batch_tokens)
    digest, window = _data_sha256(windows), Window.SHORT
    return Measure("retention", original_len, window, data_sha256=digest, values=values)


def _text_values(
    windows: Sequence[np.ndarray], num_scored: int | None, batch_tokens: int, model: WindowedModel
) -> dict[str, Any]:
    scores = score_windows(model, windows, num_scored=num_scored, batch_tokens=batch_tokens)
    return {"nll": [s.nll for s in scores], "num_tokens": [s.num_tokens for s in scores]}


def measure_all(
    subjects: Iterable[Subject],
    measures: Sequence[Measure],
    results: ResultsLog,
    models: SubjectModels,
) -> Iterator[Measurement]:
    """Every measure of every subject; what ``results`` holds already is not measured again."""
    for subject in subjects:
        for measure in measures:
            table, data = subject.table_identity(measure.window), measure.data_sha256
            parts = [subject.weights_sha256, table, str(models.dtype), measure.suite, data]
            fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            make = partial(lambda of, subject: of.values(models.of(subject)), measure, subject)
            place = subject.name, measure.suite, measure.length
            yield results.measured(*place, fingerprint=fingerprint, measure=make)


def joined(parts: Iterable[Measurement]) -> Iterator[Measurement]:
    """Consecutive measurements of one subject, suite and length as one: their lists end to end."""
    for _, same in groupby(parts, key=lambda part: (part.subject, part.suite, part.length)):
        first, *others = same
        values = {
            name: [*chain(numbers, *(other.values[name] for other in others))]
            for name, numbers in first.values.items()
        }
        yield replace(first, values=values)


def _data_sha256(arrays: Iterable[np.ndarray]) -> str:
    """Hash over token arrays, their borders included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return digest.hexdigest()


def context_windows(
    documents: Sequence[np.ndarray],
    lengths: Sequence[int],
    *,
    num_windows: int,
    num_scored: int,
    seed: int,
    num_start: int = 1,
) -> dict[int, list[np.ndarray]]:
    """Windows of every length that end at the same places: all lengths score the same tokens.

    The window of length T shows the model the tokens up to a place, behind a BOS, T - 1 with it:
    perplexity differs between lengths only by what more context does. ``num_start`` ids at the
    front of every document are its BOS: 1, or 0 where documents start without. Places are spread
    over the documents in turn and the scored tokens never overlap. A length has windows of one
    token less.

    Raises:
        DataError: the documents that are long enough hold too few places.
    """
    longest = max(lengths)
    rng = random.Random(f"context windows/{seed}")
    ends_by_document = []
    for number, document in enumerate(documents):
        # The document's own BOS, at index 0, is not part of its text.
        ends = list(range(longest - 1, len(document) + 1, num_scored))
        rng.shuffle(ends)
        ends_by_document.append([(number, end) for end in ends])
    rng.shuffle(ends_by_document)
    in_turn = [place for turn in zip_longest(*ends_by_document) for place in turn if place]
    if len(in_turn) < num_windows:
        raise DataError(
            f"evaluation.perplexity.num_windows={num_windows}: the held-out documents of at least "
            f"{longest - 1} tokens have room for {len(in_turn)} windows (the longest has "
            f"{max(map(len, documents), default=0)} tokens); use fewer windows, shorter "
            f"evaluation.lengths, or a corpus with longer documents, or {HOLD_OUT_MORE}"
        )
    windows: dict[int, list[np.ndarray]] = {length: [] for length in lengths}
    for length, found in windows.items():
        for number, end in in_turn[:num_windows]:
            text = documents[number][end - length + 1 + num_start : end]
            found.append(np.concatenate([documents[number][:num_start], text]))
    return windows


def short_windows(
    documents: Sequence[np.ndarray],
    original_len: int,
    *,
    num_windows: int,
    seed: int,
    num_start: int = 1,
) -> list[np.ndarray]:
    """Pieces of held-out documents, each behind a BOS and below ``original_len`` tokens.

    Every document is cut into consecutive pieces (a short one is one piece), and a seeded choice of
    them is taken. ``num_start`` as in ``context_windows``; a single token has nothing to score.

    Raises:
        DataError: fewer pieces than asked for.
    """
    pieces, room = [], original_len - 1 - num_start
    for document in documents:
        bos, body = document[:num_start], document[num_start:]
        firsts = range(0, len(body), room)
        pieces += [np.concatenate([bos, body[first : first + room]]) for first in firsts]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if len(pieces) < num_windows:
        raise DataError(
            f"evaluation.retention.num_windows={num_windows}: the held-out text has {len(pieces)} "
            f"windows of {original_len} tokens; use fewer, or a larger corpus, or {HOLD_OUT_MORE}"
        )
    return random.Random(f"short windows/{seed}").sample(pieces, num_windows)
