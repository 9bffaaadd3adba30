"""What a search costs: counted, measured, and projected to other hardware."""

from dataclasses import dataclass

from longrope2.model import ForwardCost
from longrope2.search.config import SearchConfig

__all__ = ["SearchBudget", "most_candidates", "projected_hours"]

SECONDS_PER_HOUR = 3600.0


def most_candidates(config: SearchConfig) -> int:
    """Candidates of a search that finds a new one in every draw."""
    mutations = config.parents if config.mutations is None else config.mutations
    return config.population + config.iterations * (mutations + config.crossovers)


def projected_hours(cost: ForwardCost, target_len: int, num_forwards: int, config: SearchConfig) -> float:
    """Hours on ``search.projected_gpus`` GPUs, each sustaining ``search.projected_tflops``; loading not included."""
    rate = config.projected_gpus * config.projected_tflops * 1e12
    return cost.flops(target_len) * num_forwards / rate / SECONDS_PER_HOUR


@dataclass(frozen=True)
class SearchBudget:
    """Account of a finished search.

    Attributes:
        num_candidates: Distinct candidates evaluated.
        num_terminated: Those of them stopped early.
        num_forwards: Forward passes of one sample that the search and the closed forms cost, over all processes and
            resumptions: as many as the journals hold.
        num_forwards_saved: Those that early termination saved.
        forward_tokens: ``num_forwards`` times the target length.
        seconds: Wall time of this run of the command; less than the search took if it was resumed.
        device_hours: The same times the number of processes.
        sustained_tflops: TFLOP/s of one process in this run; None when all was known already.
        projected_hours: The forward passes on the hardware that ``search.projected_*`` describe.
    """

    num_candidates: int
    num_terminated: int
    num_forwards: int
    num_forwards_saved: int
    forward_tokens: int
    seconds: float
    device_hours: float
    sustained_tflops: float | None
    projected_hours: float
