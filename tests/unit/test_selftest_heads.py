"""The self-test's tiny model keeps the relation between heads and sequence-parallel size."""

import pytest

from longrope2.parallel.dims import head_faults
from longrope2.training.selftest import tiny_heads


@pytest.mark.parametrize(
    ("sequence", "heads", "kv_heads", "expected"),
    [
        (8, 32, 8, (16, 8)),  # LLaMA3-8B: one key/value head per rank, several query heads each
        (4, 32, 8, (16, 8)),  # two per rank
        (16, 32, 8, (32, 8)),  # replicated
        (8, 32, 32, (16, 16)),  # Phi3-mini: as many key/value as query heads
        (32, 32, 32, (32, 32)),
        (3, 9, 3, (6, 3)),  # SmolLM2
        (1, 4, 1, (2, 1)),
    ],
)
def test_heads(sequence: int, heads: int, kv_heads: int, expected: tuple[int, int]) -> None:
    found = tiny_heads(sequence, heads, kv_heads)
    assert found == expected
    assert head_faults(sequence, *found) == []
    assert (found[0] == found[1]) == (heads == kv_heads)
    assert (found[1] < sequence) == (kv_heads < sequence)
