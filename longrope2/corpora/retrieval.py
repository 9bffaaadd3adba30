"""Synthetic retrieval documents for training: needles in natural text, each asked for at the end.

They are built in tokens, so that they fill the short window or the target window, and handed on as
text through the same interface as any document. Their haystack comes from the train split only. The
paper trains on natural text alone; a miniature does not learn to retrieve over a long window from
that (`facts.md`), so reports must say these are there.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longrope2.corpora.corpus import RETRIEVAL_SOURCE, Document
from longrope2.corpora.needle_wording import (
    INSTRUCTION,
    NeedleWording,
    draw_key,
    draw_value,
    needle_wording,
)
from longrope2.corpora.tokenizer import DocumentTokenizer, batches_by_characters
from longrope2.errors import DataError

MAX_REPAIRS = 8


@dataclass
class RetrievalConfig:
    """Shape of the synthetic retrieval documents."""

    full_length_share: float = 0.7
    """Share of documents that fill their window (L0 or L) as exactly as their text allows, in
    [0, 1]; the others are spread evenly over the lengths below."""
    start_share: float = 0.5
    """Share of documents whose first needle stands in the first 5 % of the text, in [0, 1], so
    that the distance to its question covers the window."""
    single_needle_share: float = 0.25
    """Share of documents with one needle only, in [0, 1]; the others draw 2 .. ``max_needles``
    of them. Copying is learned from single needles first, choosing among several by key
    afterwards."""
    max_needles: int = 4
    """Most needles (and questions) in a document, at least 1; fewer where they do not fit."""

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        found = []
        for name in ("full_length_share", "start_share", "single_needle_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                found.append(f"retrieval.{name}={getattr(self, name)} is outside [0, 1]")
        if self.max_needles < 1:
            found.append(f"retrieval.max_needles={self.max_needles} must be at least 1")
        return found


class _Haystack:
    """Text with the place of every token, so that any run of tokens is a run of characters."""

    def __init__(self, encoder: DocumentTokenizer, texts: Sequence[str]) -> None:
        starts = [np.zeros(0, dtype=np.int64)]
        offset = 0
        for batch in batches_by_characters(texts, len):
            spans = encoder.token_spans(batch)
            for text, span_of_tokens in zip(batch, spans, strict=True):
                starts.append(span_of_tokens[:, 0] + offset)
                offset += len(text)
        self._text = "".join(texts)
        self._starts = np.concatenate(starts)
        self.num_tokens = len(self._starts)

    def pieces(self, start: int, lengths: Sequence[int]) -> list[str]:
        """Consecutive pieces of text of about ``lengths`` tokens, from token ``start`` on."""
        bounds = start + np.cumsum([0, *lengths])
        places = [int(self._starts[b]) if b < self.num_tokens else len(self._text) for b in bounds]
        return [self._text[first:end] for first, end in pairwise(places)]


@dataclass
class _Draft:
    """A document that is being fitted to its length."""

    parts: list[str]  # the needle texts, in order of position
    tail: str
    gaps: list[float]  # share of the haystack in front of each needle; the rest follows the last
    start: float  # where in the haystack, in [0, 1)
    target: int  # tokens, BOS and EOS included
    num_haystack: int


class RetrievalDocuments:
    """Generates retrieval documents from haystack ``texts`` of the train split."""

    def __init__(
        self, encoder: DocumentTokenizer, texts: list[str], config: RetrievalConfig, *, seed: int
    ) -> None:
        self._encoder, self._config, self._seed = encoder, config, seed
        self._haystack = _Haystack(encoder, texts)
        wording = needle_wording("amber-anchor", "1234567")
        head, needle, asked = encoder.count_tokens([INSTRUCTION, wording.needle, _asked(wording)])
        self._head_tokens = head + encoder.num_boundary_tokens
        self._tokens_per_needle = needle + asked
        self.shortest = self._head_tokens + self._tokens_per_needle

    def documents(self, bucket: str, tokens: int, *, above: int, up_to: int) -> Iterator[Document]:
        """Documents of more than ``above`` and at most ``up_to`` tokens, ``tokens`` in all.

        BOS and EOS are included.

        Raises:
            DataError: ``up_to`` cannot hold a needle and its question, or the haystack is too
                small.
        """
        lowest = max(above + 1, self.shortest)
        if lowest > up_to:
            window = f"the {bucket} window has {up_to}"
            raise DataError(f"retrieval documents need at least {lowest} tokens, {window}")
        if self._haystack.num_tokens < up_to:
            raise DataError(
                f"retrieval documents of {up_to} tokens need as much haystack; the corpus gave "
                f"{self._haystack.num_tokens} tokens: use a larger corpus or set "
                f"quotas.{RETRIEVAL_SOURCE}.{bucket}=0"
            )
        rng = random.Random(f"retrieval/{bucket}/{self._seed}")
        drafts, total = [], 0
        while total < tokens:
            drafts.append(self._draft(rng, lowest, up_to))
            total += drafts[-1].target
        for number, text in enumerate(self._fitted(drafts, above, up_to)):
            doc_id = f"{RETRIEVAL_SOURCE}/{bucket}/{number:07d}"
            yield Document(doc_id, text, RETRIEVAL_SOURCE, bucket)

    def _draft(self, rng: random.Random, lowest: int, up_to: int) -> _Draft:
        full = rng.random() < self._config.full_length_share
        target = up_to if full else rng.randint(lowest, up_to)
        room = (target - self._head_tokens) // self._tokens_per_needle
        most = max(1, min(room, self._config.max_needles))
        is_single = most == 1 or rng.random() < self._config.single_needle_share
        count = 1 if is_single else rng.randint(2, most)
        keys: list[str] = []
        while len(keys) < count:
            key = draw_key(rng)
            if key not in keys:
                keys.append(key)
        wordings = [needle_wording(key, draw_value(rng)) for key in keys]
        depths = sorted(rng.random() for _ in range(count))
        if rng.random() < self._config.start_share:
            depths[0] = min(depths[0], 0.05 * rng.random())
        gaps = [b - a for a, b in zip([0.0, *depths], depths, strict=False)]
        parts, tail = (
            [w.needle for w in wordings],
            "".join(map(_asked, rng.sample(wordings, count))),
        )
        num_haystack = target - self._head_tokens - count * self._tokens_per_needle
        start = rng.random()
        return _Draft(parts, tail, gaps, start, target=target, num_haystack=num_haystack)

    def _fitted(self, drafts: list[_Draft], above: int, up_to: int) -> list[str]:
        """Texts whose token counts hit their targets.

        Tokens can merge differently where pieces meet, so counts are measured and the haystack is
        trimmed or grown by the difference until the count is right; after a few rounds it only has
        to fit the window. A draft that does not even do that (none has been seen) is not generated;
        the quota report would show the shortfall.
        """
        texts = [self._text(draft) for draft in drafts]
        open_numbers = list(range(len(drafts)))
        for round_number in range(MAX_REPAIRS):
            counts = self._encoder.count_tokens([texts[number] for number in open_numbers])
            exact = round_number < MAX_REPAIRS // 2
            misses = []
            for number, count in zip(open_numbers, counts, strict=True):
                count += self._encoder.num_boundary_tokens
                difference = drafts[number].target - count
                if difference == 0 or (not exact and above < count <= up_to):
                    continue
                wanted = drafts[number].num_haystack + difference - (not exact)
                drafts[number].num_haystack = max(0, wanted)
                texts[number] = self._text(drafts[number])
                misses.append(number)
            open_numbers = misses
            if not open_numbers:
                return texts
        kept = set(range(len(texts))) - set(open_numbers)
        return [texts[number] for number in sorted(kept)]

    def _text(self, draft: _Draft) -> str:
        lengths = [round(gap * draft.num_haystack) for gap in draft.gaps]
        lengths.append(draft.num_haystack - sum(lengths))
        start = int(draft.start * (self._haystack.num_tokens - draft.num_haystack))
        pieces = self._haystack.pieces(start, [max(0, n) for n in lengths])
        body = "".join(piece + needle for piece, needle in zip(pieces, draft.parts, strict=False))
        return INSTRUCTION + body + pieces[-1] + draft.tail


def _asked(wording: NeedleWording) -> str:
    """Question and answer of one needle, as training text."""
    return wording.question + wording.answer_prefix + wording.answer
