"""Windows of held-out text: the same ones for every subject, drawn from a seed.

A document is its token ids with BOS in front and EOS behind. Windows that start inside a document get a BOS of their
own, so every window begins the way the model expects. A window of T tokens is a document of T tokens without its
closing EOS: the last place stays empty, because a model whose training documents all end inside the window has seen
nothing but EOS there. Needle samples are cut the same way.
"""

import random
from collections.abc import Sequence

import numpy as np

from longrope2.errors import DataError

__all__ = ["context_windows", "short_windows"]


def context_windows(
    documents: Sequence[np.ndarray], lengths: Sequence[int], *, num_windows: int, num_scored: int, seed: int
) -> dict[int, list[np.ndarray]]:
    """Windows of every length that end at the same places, so that all lengths score the same tokens.

    A place is the end of ``num_scored`` tokens of a document; the window of length T shows the model the T - 2 tokens
    up to there behind a BOS. Perplexity then differs between lengths only by what more context does. Places are spread
    over the documents in turn and the scored tokens never overlap.

    Args:
        documents: Ids of each held-out document.
        lengths: Window lengths in tokens.
        num_windows: Places.
        num_scored: Tokens scored at each place.
        seed: Seed of the choice of places.

    Returns:
        Length -> ``num_windows`` windows of one token less.

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
    deepest = max((len(ends) for ends in ends_by_document), default=0)
    in_turn = [ends[turn] for turn in range(deepest) for ends in ends_by_document if turn < len(ends)]
    if len(in_turn) < num_windows:
        raise DataError(
            f"evaluation.perplexity.num_windows={num_windows}: the held-out documents of at least {longest - 1} tokens "
            f"have room for {len(in_turn)} windows (the longest has {max(map(len, documents), default=0)} tokens); use "
            "fewer windows, shorter evaluation.lengths, or a corpus with longer documents"
        )
    places = in_turn[:num_windows]
    return {length: [_window(documents[number], end, length) for number, end in places] for length in lengths}


def short_windows(
    documents: Sequence[np.ndarray], original_len: int, *, num_windows: int, seed: int
) -> list[np.ndarray]:
    """Pieces of held-out documents that fit the original window, each behind a BOS, below ``original_len`` tokens.

    Every document is cut into consecutive pieces (a short one is one piece), and a seeded choice of them is taken.

    Raises:
        DataError: fewer pieces than asked for.
    """
    pieces = []
    for document in documents:
        bos, body = document[:1], document[1:]
        pieces += [
            np.concatenate([bos, body[first : first + original_len - 2]])
            for first in range(0, len(body), original_len - 2)
        ]
    if len(pieces) < num_windows:
        raise DataError(
            f"evaluation.retention.num_windows={num_windows}: the held-out text has {len(pieces)} windows of "
            f"{original_len} tokens; use fewer, or a larger corpus"
        )
    return random.Random(f"short windows/{seed}").sample(pieces, num_windows)


def _window(document: np.ndarray, end: int, length: int) -> np.ndarray:
    """BOS and the ``length`` - 2 tokens before ``end``."""
    return np.concatenate([document[:1], document[end - length + 2 : end]])
