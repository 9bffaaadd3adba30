"""The batches of coming steps, read while the present step computes.

One thread reads ahead: it touches only this rank's slice of each segment, and builds labels and layouts on the CPU. Moving a
batch to the device stays with the training thread, just before the step. What is read is a pure function of the step, so
reading ahead changes when a batch is made and nothing else.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from longrope2.training.batch import RankBatch

__all__ = ["step_batches"]


def step_batches(
    load: Callable[[int], list[RankBatch]], steps: range, *, ahead: int, device: torch.device | str
) -> Generator[list[RankBatch], None, None]:
    """This rank's micro-steps of each step, in order; close the generator when it is not read to its end.

    Args:
        load: Makes the batches of one step on the CPU.
        steps: Steps to come, 0-based.
        ahead: Steps read ahead at most; 0 reads each step when it is asked for.
        device: Where the batches are handed over.
    """
    if ahead == 0:
        yield from ([batch.to(device) for batch in load(step)] for step in steps)
        return
    waiting: deque[Future[list[RankBatch]]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="segment-reader") as reader:
        waiting.extend(reader.submit(load, step) for step in steps[:ahead])
        for position in range(len(steps)):
            batches = waiting.popleft().result()
            if position + ahead < len(steps):
                waiting.append(reader.submit(load, steps[position + ahead]))
            yield [batch.to(device) for batch in batches]
