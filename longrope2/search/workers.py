"""Candidates spread over workers by work-stealing, without a coordinator.

A worker is one process, or a group of processes that hold every sample together. All run
the same deterministic search; within a round each takes the next open task from a counter in
torch's key-value store, and publishes its result in a log there: nothing depends on who computed
what. A worker that dies ends the others through torchrun; the same command goes on from the
journals.
"""

import json
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store

from longrope2.parallel.processes import Processes

_POLL_SECONDS = 0.02
_GIVE_UP_AFTER = timedelta(days=7)  # a dead worker ends its fellows through torchrun long before


class Workers:
    """This process among the workers of a search.

    Attributes:
        worker: Its number.
        is_leader: Whether this process speaks for its worker: the only one of it that writes.
        processes: The process grid; None for a search in one process.
        segment_group: The processes that hold every sample together; None: each holds whole ones.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.processes = processes
        self.worker = processes.dims.data_rank if processes else 0
        self.is_leader = processes is None or processes.dims.segment_rank == 0
        self.segment_group = processes.segment_group if processes else None
        # The store behind the default process group has no public accessor.
        default_store = dist.distributed_c10d._get_default_store
        self._store: Store = default_store() if processes else HashStore()
        self._store.set_timeout(_GIVE_UP_AFTER)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the product."""
        return self.worker == 0 and self.is_leader

    def queue(self, label: str, num_tasks: int) -> "TaskQueue":
        """The tasks 0 .. ``num_tasks`` - 1 under a label that no other queue has."""
        return TaskQueue(self, PrefixStore(f"search/{label}", self._store), num_tasks)

    def agreed(self, value: list[float]) -> list[float]:
        """The leader's numbers, on every process of the worker."""
        if self.segment_group is None:
            return value
        device = self.processes.device if self.processes else torch.device("cpu")
        length = torch.tensor([len(value)], device=device)
        dist.broadcast(length, group=self.segment_group, group_src=0)
        value = value if self.is_leader else [0.0] * int(length)
        numbers = torch.tensor(value, dtype=torch.float64, device=device)
        dist.broadcast(numbers, group=self.segment_group, group_src=0)
        return numbers.tolist()

    def wait_for_all(self, label: str) -> None:
        """Return once every process has come here."""
        if self.processes is None:
            return
        store = PrefixStore(f"search/{label}", self._store)
        if store.add("arrived", 1) == self.processes.dims.world_size:
            store.set("all", "1")
        store.wait(["all"], _GIVE_UP_AFTER)


class TaskQueue:
    """Tasks of one round. All processes of a worker must make the same calls in the same order."""

    def __init__(self, workers: Workers, store: Store, num_tasks: int) -> None:
        self._workers, self._store = workers, store
        self._num_tasks, self._num_read = num_tasks, 0

    def claim(self) -> int | None:
        """The next open task, for this worker alone; None when all are taken."""
        taken = self._store.add("taken", 1) if self._workers.is_leader else 0
        task = int(self._workers.agreed([taken])[0]) - 1
        return task if task < self._num_tasks else None

    def publish(self, task: int, numbers: list[float]) -> None:
        """Tell all workers the result of a claimed task."""
        if self._workers.is_leader:
            place = self._store.add("published", 1)
            self._store.set(f"log/{place}", json.dumps([task, *numbers]))

    def news(self) -> list[tuple[int, list[float]]]:
        """Results published by anyone since the last call, in the order of publication."""
        entries = list(self._unread()) if self._workers.is_leader else []
        num_entries = int(self._workers.agreed([len(entries)])[0])
        if not self._workers.is_leader:
            self._num_read += num_entries
            entries = [[] for _ in range(num_entries)]
        entries = [self._workers.agreed(entry) for entry in entries]
        return [(int(entry[0]), entry[1:]) for entry in entries]

    def remaining(self) -> Iterator[tuple[int, list[float]]]:
        """What has not been seen yet, waiting for the workers that still compute."""
        while self._num_read < self._num_tasks:
            fresh = self.news()
            yield from fresh
            if not fresh:
                time.sleep(_POLL_SECONDS)

    def _unread(self) -> Iterator[list[float]]:
        """Log entries after the last one read."""
        while self._num_read < self._num_tasks and self._store.check([f"log/{self._num_read + 1}"]):
            self._num_read += 1
            yield json.loads(self._store.get(f"log/{self._num_read}"))
