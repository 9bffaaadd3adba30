"""All ranks must work on what the schedule says: checked every step, inside an all-reduce the step needs anyway.

Ranks decide alone which segments they read, from the same schedule. If one of them has another code version, another
copy of the segments or another configuration, attention mixes different texts, or ranks wait for each other for ever.
Every step therefore sums a few fingerprints over all ranks: of the window kinds, which must be the same everywhere, and,
in a slot per data-parallel group, of the segment ids, which must be the same within the group. Of n equal numbers h the
sums S of h and Q of h * h obey n * Q = S * S; of n unequal ones they do not (Cauchy-Schwarz). The numbers are integers
below 2 ** 20, so float64 sums are exact, and two different contents pass with a probability of one in a million.
"""

import zlib
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist

from longrope2.errors import DataError
from longrope2.parallel import ParallelDims
from longrope2.training.batch import RankBatch

__all__ = ["check_agreement", "fingerprints"]

FINGERPRINT_BITS = 20


def fingerprints(batches: Sequence[RankBatch], dims: ParallelDims) -> list[float]:
    """This rank's numbers to be summed over all ranks: 2 + 2 * data-parallel size of them."""
    values = [0.0] * (2 + 2 * dims.data)
    values[:2] = _with_square(_windows(batches))
    place = 2 + 2 * dims.data_rank
    values[place : place + 2] = _with_square(_segments(batches))
    return values


def check_agreement(sums: Sequence[float], batches: Sequence[RankBatch], dims: ParallelDims, step: int) -> None:
    """Compare the sums of all ranks' ``fingerprints``; no communication unless ranks disagree.

    Args:
        sums: Sums over all ranks.
        batches: This rank's micro-steps, to say what it works on.
        dims: The process grid.
        step: Number of the step, 1-based, for the message.

    Raises:
        DataError: on every rank, naming the ranks that differ from the others and the step.
    """
    sizes = [dims.world_size] + [dims.sequence] * dims.data
    pairs = zip(sizes, sums[::2], sums[1::2], strict=True)
    if all(size * int(squares) == int(total) ** 2 for size, total, squares in pairs):
        return
    mine = (_windows(batches), _segments(batches))
    everyone: list[tuple[str, str]] = [mine] * dims.world_size
    dist.all_gather_object(everyone, mine)
    raise DataError(
        f"step {step}: {_who_differs(everyone, dims)}; do all nodes see the same segments, code and config?"
    )


def _who_differs(everyone: Sequence[tuple[str, str]], dims: ParallelDims) -> str:
    """The ranks whose window kinds, or segments, are not those of most ranks they must agree with."""
    most_common = Counter(windows for windows, _ in everyone).most_common(1)[0][0]
    odd = [rank for rank, (windows, _) in enumerate(everyone) if windows != most_common]
    if odd:
        return f"rank {odd[0]} works on windows {everyone[odd[0]][0]}, the others on {most_common}" + _more(odd)
    for first in range(0, dims.world_size, dims.sequence):
        group = range(first, first + dims.sequence)
        most_common = Counter(everyone[rank][1] for rank in group).most_common(1)[0][0]
        odd = [rank for rank in group if everyone[rank][1] != most_common]
        if odd:
            text = (
                f"rank {odd[0]} works on segments {everyone[odd[0]][1]}, its sequence-parallel group on {most_common}"
            )
            return text + _more(odd)
    return "ranks disagree about windows or segments, but no longer when asked"


def _more(odd: Sequence[int]) -> str:
    """The other ranks that differ."""
    return f" (so do ranks {', '.join(map(str, odd[1:]))})" if len(odd) > 1 else ""


def _windows(batches: Sequence[RankBatch]) -> str:
    """Window kinds of the micro-steps."""
    return " ".join(batch.window.value for batch in batches)


def _segments(batches: Sequence[RankBatch]) -> str:
    """Segment ids of the micro-steps."""
    return " ".join(str(batch.segment_id) for batch in batches)


def _with_square(text: str) -> tuple[float, float]:
    """Fingerprint of a text and its square."""
    value = zlib.crc32(text.encode()) >> (32 - FINGERPRINT_BITS)
    return float(value), float(value * value)
