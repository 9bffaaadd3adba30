"""Angles that documents have met, against a count pair by pair and closed forms."""

import math
from collections import Counter

import numpy as np
import pytest

from longrope2.rope.frequencies import RopeGeometry, theoretical_critical_index
from longrope2.rope.turns import turns_of

GEOMETRY = RopeGeometry(rotary_dim=8, rope_base=100.0, original_len=40)


def test_every_pair_is_counted_once() -> None:
    """Three documents, one longer than the window, pair by pair."""
    lengths, parts = [7, 40, 90], 12
    expected = np.zeros((4, parts))
    for index in range(4):
        theta = 100.0 ** (-index / 4)
        found: Counter[int] = Counter()
        for length in lengths:
            inside = min(length, 40)
            for query in range(inside):
                for key in range(query + 1):
                    angle = math.fmod((query - key) * theta, 2 * math.pi)
                    found[int(angle / (2 * math.pi) * parts)] += 1
        for part, count in found.items():
            expected[index, part] = count
    turns = turns_of(lengths, GEOMETRY, parts)
    assert turns.longest == 40
    np.testing.assert_allclose(turns.shares_IP, expected / expected.sum(axis=1, keepdims=True))


def test_what_was_never_met_begins_at_the_theoretical_critical_dimension() -> None:
    """LLaMA3-8B, full windows: dimension 35 is the first without a whole turn [sec. 2].

    It makes 0.9967 of one, and so meets the last of 32 parts, hardly ever; 36 makes 0.81.
    """
    llama3 = RopeGeometry(128, 500_000.0, 8192)
    turns = turns_of([8192] * 3, llama3)
    assert theoretical_critical_index(llama3) == 35 == turns.first_uneven
    assert turns.first_with_unseen == 36
    assert (turns.shares_IP[36] > 0).sum() == math.ceil(0.81197 * 32)
    # The lowest frequency turns by 8191 / T of a whole, T = 2 pi b^(126/128).
    seen = 8191 / (2 * math.pi * 500_000 ** (126 / 128))
    assert turns.seen_of_last == pytest.approx(math.ceil(32 * seen) / 32)


def test_short_documents_leave_more_unseen() -> None:
    """Documents of 1,024 tokens: the first period above 1,024 is that of dimension 25."""
    llama3 = RopeGeometry(128, 500_000.0, 8192)
    first = math.ceil(64 * math.log(1024 / (2 * math.pi)) / math.log(500_000))
    assert turns_of([1024], llama3).first_with_unseen == first == 25


def test_evenly_met_and_hardly_met_parts() -> None:
    """Many short documents: long distances are few, and dimensions with whole turns suffer."""
    llama3 = RopeGeometry(128, 500_000.0, 8192)
    full, mixed = turns_of([8192], llama3), turns_of([8192, *[512] * 5000], llama3)
    assert (full.first_uneven, mixed.first_uneven) == (35, 22)
    assert mixed.first_with_unseen == full.first_with_unseen == 36


def test_every_part_of_every_dimension_can_be_met() -> None:
    fast = RopeGeometry(4, 2.0, 262_144)
    turns = turns_of([262_144], fast)
    assert turns.first_with_unseen is None and turns.first_uneven is None
    np.testing.assert_allclose(turns.shares_IP, 1 / 32, rtol=0.01)
