"""Packing: documents into segments of exactly L tokens, deterministic, every token accounted for.

Short segments hold whole documents of at most L0 tokens, best-fit-decreasing, in chunks of L/k
tokens so that no document crosses a chunk (k sequence-parallel ranks then attend locally); room
that no document fits is padding. The emptiest chunks that make up no whole segment at the end are
left out where filling it up would cost more padding than MAX_FILLING of all short tokens.

Long segments are never padded. Departure from the paper, which concatenates documents and cuts
every L tokens: documents that fit in L are kept whole (best-fit-decreasing, after "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830), and documents longer than L, which must
be cut anyway, fill the remaining gaps exactly: their slices continue in other segments without a
new BOS. When no such document is left, the documents of the emptiest segments are cut instead.

Whatever is left out at the end is returned and counted.
"""

import random
from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Protocol, TypeVar

import numpy as np

from longrope2.rope.window import Window

MAX_FILLING = 0.005


class PackedDocument(Protocol):
    """A document with BOS and EOS; packing looks at its length only, writing reads its tokens."""

    @property
    def doc_id(self) -> str:
        """Unique among the documents packed together."""
        ...

    @property
    def source(self) -> str:
        """Its source."""
        ...

    @property
    def tokens(self) -> np.ndarray:
        """All ids, shape [len(self)]."""
        ...

    def __len__(self) -> int: ...


Document = TypeVar("Document", bound=PackedDocument)


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document; ``document=None`` is padding of that many tokens."""

    document: PackedDocument | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class DraftSegment:
    """A segment before it is written: its pieces in order, L tokens together."""

    window: Window
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Packing:
    """Result of packing short or long documents."""

    segments: list[DraftSegment]  # full ones, padding included
    # What was left out at the end: whole documents of a short packing, pieces that fill no segment
    # of a long one.
    rest: list[Piece]
    # Documents of at most L tokens that stand in more than one piece; none in a short packing.
    num_cut_documents: int = 0


def best_fit_decreasing(
    documents: Iterable[Document], capacity: int
) -> list[tuple[int, list[Document]]]:
    """Put documents into bins: longest first, each into the fullest bin that still has room.

    Documents of equal length keep their order, and of equally full bins the oldest is taken. Each
    has at most ``capacity`` tokens, as a bin has.

    Returns:
        (room left, documents) of every bin, in the order in which the bins were opened.
    """
    rooms: list[int] = []  # distinct rooms left, ascending
    bins_by_room: dict[int, deque[int]] = defaultdict(deque)
    bins: list[list[Document]] = []
    room_of: list[int] = []
    for document in sorted(documents, key=len, reverse=True):
        assert len(document) <= capacity
        place = bisect_left(rooms, len(document))
        if place < len(rooms):
            room = rooms[place]
            index = bins_by_room[room].popleft()
            if not bins_by_room[room]:
                rooms.pop(place)
        else:
            room, index = capacity, len(bins)
            bins.append([])
            room_of.append(capacity)
        bins[index].append(document)
        room_of[index] = left = room - len(document)
        if not bins_by_room[left]:
            insort(rooms, left)
        bins_by_room[left].append(index)
    return list(zip(room_of, bins, strict=True))


def pack_short(
    documents: Sequence[PackedDocument], *, target_len: int, alignment: int, seed: int
) -> Packing:
    """Pack whole documents so that none crosses a multiple of ``target_len / alignment``.

    Args:
        documents: Each at most ``target_len / alignment`` tokens.
        target_len: L in tokens, divisible by ``alignment``.
        alignment: Chunks per segment.
        seed: Seed of the order of chunks, and of documents inside a chunk.
    """
    capacity = target_len // alignment
    rng = random.Random(f"short/{seed}")
    bins = best_fit_decreasing(documents, capacity)
    num_odd = len(bins) % alignment
    missing = (alignment - num_odd) % alignment * capacity
    too_empty = len(bins) > alignment and missing > MAX_FILLING * sum(map(len, documents))
    by_room = sorted(range(len(bins)), key=lambda index: bins[index][0])
    left_out = set(by_room[len(bins) - num_odd :]) if too_empty else set()
    chunks, rest = [], []
    for index, (room, members) in enumerate(bins):
        if index in left_out:
            rest += map(_whole, members)
            continue
        rng.shuffle(members)
        chunks.append([*map(_whole, members), *_padding(room)])
    rng.shuffle(chunks)
    while len(chunks) % alignment:
        chunks.append(_padding(capacity))
    segments = []
    for first in range(0, len(chunks), alignment):
        pieces = chain.from_iterable(chunks[first : first + alignment])
        segments.append(DraftSegment(Window.SHORT, tuple(pieces)))
    return Packing(segments, rest)


def pack_long(documents: Sequence[PackedDocument], *, target_len: int, seed: int) -> Packing:
    """Pack documents into full segments without padding, cutting as few as possible.

    Args:
        documents: Documents of any length, in the order in which they are to be used.
        target_len: L in tokens.
        seed: Seed of the order of segments.
    """
    fillers = _Stream(document for document in documents if len(document) > target_len)
    bins = best_fit_decreasing((d for d in documents if len(d) <= target_len), target_len)
    waiting = deque(sorted(bins, key=itemgetter(0)))  # fullest first
    packed: list[tuple[Piece, ...]] = []
    while waiting:
        room, members = waiting[0]
        while fillers.num_tokens < room:
            # The emptiest; in the end it is the one to be filled itself.
            _, dissolved = waiting.pop()
            fillers.extend(dissolved)
            if not waiting:
                break
        else:
            waiting.popleft()
            packed.append(_arranged(members, fillers.take(room)))
    while fillers.num_tokens >= target_len:
        packed.append(_arranged([], fillers.take(target_len)))
    rest = fillers.take(fillers.num_tokens)
    random.Random(f"long/{seed}").shuffle(packed)
    segments = [DraftSegment(Window.LONG, pieces) for pieces in packed]
    return Packing(segments, rest, _num_cut(packed, target_len))


class _Stream:
    """Documents end to end, handed out in slices."""

    def __init__(self, documents: Iterable[PackedDocument]) -> None:
        self._queue: deque[Piece] = deque()
        self.num_tokens = 0
        self.extend(documents)

    def extend(self, documents: Iterable[PackedDocument]) -> None:
        """Append documents."""
        for document in documents:
            self._queue.append(_whole(document))
            self.num_tokens += len(document)

    def take(self, num_tokens: int) -> list[Piece]:
        """The next ``num_tokens`` tokens as pieces; the last document may be cut."""
        assert num_tokens <= self.num_tokens
        taken = []
        self.num_tokens -= num_tokens
        while num_tokens:
            piece = self._queue.popleft()
            cut = min(piece.stop, piece.start + num_tokens)
            taken.append(Piece(piece.document, piece.start, cut))
            if cut < piece.stop:
                self._queue.appendleft(Piece(piece.document, cut, piece.stop))
            num_tokens -= cut - piece.start
        return taken


def _arranged(members: list[PackedDocument], slices: list[Piece]) -> tuple[Piece, ...]:
    """Order in a segment: a continued slice first (it has no BOS), a slice that is cut off last."""
    continued = [piece for piece in slices if piece.start > 0]
    begun = [piece for piece in slices if piece.start == 0]
    assert len(continued) <= 1
    return (*continued, *map(_whole, members), *begun)


def _whole(document: PackedDocument) -> Piece:
    return Piece(document, 0, len(document))


def _padding(num_tokens: int) -> list[Piece]:
    return [Piece(None, 0, num_tokens)] if num_tokens else []


def _num_cut(segments: Iterable[tuple[Piece, ...]], target_len: int) -> int:
    """Documents that would fit in a segment but were cut."""
    cut = set()
    for piece in chain.from_iterable(segments):
        if piece.document is not None and len(piece) < len(piece.document) <= target_len:
            cut.add(piece.document.doc_id)
    return len(cut)
