"""Which angles a model's RoPE dimensions have met: the under-training hypothesis, looked at.

A query sees a key at a distance of d tokens through a rotation by d theta_i in dimension i
[LongRoPE2, arXiv 2502.20082, sec. 2]. The paper says that the high dimension indices (low
frequencies) are too rarely turned to be trained, and that even some which complete a turn inside
the window are; its authors' blog speaks of high frequencies. Counting the distances of real
documents tells for each dimension how often each part of its turn was met.

Shape letters: I = cosine indices, P = parts of a turn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longrope2.rope.frequencies import RopeGeometry

NUM_PARTS = 32
# A part that has less than this share of what an even turn would give it counts as hardly met.
_HARDLY_MET = 0.1


@dataclass(frozen=True)
class Turns:
    """How often each part of a turn was met, by dimension.

    Attributes:
        shares_IP: Shares of all pairs of a query and a key that it attends to, float64, each row
            adds up to 1. Part p holds angles from 2 pi p / P to 2 pi (p + 1) / P.
        longest: Tokens of the longest document, the pre-trained window at most.
        num_documents: How many were counted.
    """

    shares_IP: np.ndarray
    longest: int
    num_documents: int

    @cached_property
    def _never_I(self) -> np.ndarray:
        return (self.shares_IP == 0).any(axis=1)

    @property
    def first_with_unseen(self) -> int | None:
        """First dimension of which some part was never met, as in all after it; None if all were.

        A dimension that the document lengths and the frequency skip by chance does not count.
        """
        last_whole = np.flatnonzero(~self._never_I)
        first = int(last_whole[-1]) + 1 if len(last_whole) else 0
        return first if first < len(self.shares_IP) else None

    @property
    def first_uneven(self) -> int | None:
        """First dimension of which some part had under a tenth of an even share, as all after."""
        even = self.shares_IP.shape[1]
        is_met_I = (self.shares_IP * even >= _HARDLY_MET).all(axis=1)
        last_even = np.flatnonzero(is_met_I)
        first = int(last_even[-1]) + 1 if len(last_even) else 0
        return first if first < len(self.shares_IP) else None

    @property
    def seen_of_last(self) -> float:
        """Share of the turn of the lowest frequency that was met."""
        return float((self.shares_IP[-1] > 0).mean())


def turns_of(
    document_lengths: Sequence[int], geometry: RopeGeometry, num_parts: int = NUM_PARTS
) -> Turns:
    """Angles that attention inside documents of these lengths has met, before any rescaling.

    A document of n tokens has n - d pairs at distance d, from 0 to n - 1. Distances count up to
    the pre-trained window: longer documents are read in the long window, with other frequencies.

    Args:
        document_lengths: Tokens, each at least 1.
        geometry: The model's.
        num_parts: P.
    """
    lengths = np.minimum(np.asarray(document_lengths, np.int64), geometry.original_len)
    assert lengths.size and lengths.min() >= 1
    longest = int(lengths.max())
    counts = np.bincount(lengths, minlength=longest + 1)
    at_least = counts[::-1].cumsum()[::-1]  # documents of at least n tokens
    pairs = at_least[1:][::-1].cumsum()[::-1].astype(np.float64)  # at distances 0 .. longest - 1
    exponents_I = np.arange(0, geometry.rotary_dim, 2) / geometry.rotary_dim
    turns_a_token_I = geometry.rope_base**-exponents_I / (2 * math.pi)
    distances = np.arange(longest, dtype=np.float64)
    shares_IP = np.empty((geometry.num_frequencies, num_parts))
    for index, turns_a_token in enumerate(turns_a_token_I):
        parts = ((distances * turns_a_token) % 1.0 * num_parts).astype(np.int64)
        parts = np.minimum(parts, num_parts - 1)
        shares_IP[index] = np.bincount(parts, weights=pairs, minlength=num_parts)
    return Turns(shares_IP / pairs.sum(), longest, lengths.size)
