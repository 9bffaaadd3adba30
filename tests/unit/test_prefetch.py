"""Reading ahead: the same batches, no more than asked for, and only the rank's slice."""

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from longrope2.parallel.dims import ParallelDims
from longrope2.rope.factors import Window
from longrope2.segments.format import Segment
from longrope2.segments.schedule import MicroStep, StepSchedule
from longrope2.training.batch import RankBatch, load_rank_batch, next_token_labels, step_batches

LENGTH = 24
SCHEDULE = StepSchedule(
    tuple(range(0, 8)), tuple(range(8, 20)), segments_per_step=4, group_size=2, seed=3
)


class WatchedTokens:
    """Tokens of a segment that remember which of them were read."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, key: slice) -> np.ndarray:
        self.read |= set(range(*key.indices(len(self))))
        return self._tokens[key]


class Segments:
    """Stands in for the store on disk.

    Random documents, some of them padding; remembers who read what.
    """

    def __init__(self) -> None:
        self.loaded: list[tuple[int, str]] = []
        self.tokens: dict[int, WatchedTokens] = {}

    def segment(self, index: int) -> Segment:
        self.loaded.append((index, threading.current_thread().name))
        random = np.random.default_rng(index)
        ends = np.unique([*random.integers(1, LENGTH, 4), LENGTH]).astype(np.int32)
        self.tokens[index] = WatchedTokens(random.integers(0, 100, LENGTH).astype(np.uint16))
        names = tuple(map(str, range(len(ends))))
        padding = tuple(bool(p) for p in random.integers(0, 3, len(ends)) == 0)
        window = Window.SHORT if index < 8 else Window.LONG
        return Segment(index, window, self.tokens[index], ends, names, names, padding, False, 0)  # type: ignore[arg-type]


def batches(ahead: int, steps: range, dims: ParallelDims) -> tuple[list[list[RankBatch]], Segments]:
    store = Segments()

    def load(step: int) -> list[RankBatch]:
        return [
            load_rank_batch(store, m, dims, None) for m in SCHEDULE.micro_steps(step, dims.data)
        ]  # type: ignore[arg-type]

    return list(step_batches(load, steps, ahead=ahead, device="cpu")), store


def numbers(batch: RankBatch) -> list:
    tensors = (batch.tokens_BT, batch.labels_BT, batch.layout.positions_BT)
    documents = batch.layout.documents
    return [
        *(x.tolist() for x in tensors),
        batch.window,
        type(documents),
        getattr(documents, "spans", None),
        batch.num_targets,
        batch.squared_lengths,
    ]


@pytest.mark.parametrize("ahead", [1, 2, 10])
@pytest.mark.parametrize("dims", [ParallelDims(1, 1), ParallelDims(2, 2, 3)])
def test_identical_batches_with_and_without(ahead: int, dims: ParallelDims) -> None:
    steps = range(2, 8)  # into the second pass over the segments
    direct, store = batches(0, steps, dims)
    assert {thread for _, thread in store.loaded} == {threading.current_thread().name}
    read_ahead, watched = batches(ahead, steps, dims)
    assert [[numbers(b) for b in step] for step in read_ahead] == [
        [numbers(b) for b in step] for step in direct
    ]
    assert [index for index, _ in watched.loaded] == [index for index, _ in store.loaded]
    assert all(thread.startswith("segment-reader") for _, thread in watched.loaded)


def test_no_further_ahead_than_asked() -> None:
    loaded: list[int] = []

    def load(step: int) -> list[RankBatch]:
        loaded.append(step)
        return []

    with closing(step_batches(load, range(100), ahead=2, device="cpu")) as steps:
        for _ in range(3):
            next(steps)
    assert loaded[:3] == [0, 1, 2] and len(loaded) <= 5


def test_a_fault_in_the_thread_reaches_the_step_it_belongs_to() -> None:
    def load(step: int) -> list[RankBatch]:
        if step == 2:
            raise OSError("segment file vanished")
        return []

    steps = step_batches(load, range(5), ahead=2, device="cpu")
    assert [next(steps), next(steps)] == [[], []]
    with pytest.raises(OSError, match="segment file vanished"):
        next(steps)


@pytest.mark.parametrize("index", range(20))
def test_a_rank_reads_its_slice_and_the_token_after(index: int) -> None:
    for rank in range(4):
        store = Segments()
        window = Window.SHORT if index < 8 else Window.LONG
        load_rank_batch(store, MicroStep(window, (index,)), ParallelDims(1, 4, rank), None)  # type: ignore[arg-type]
        assert store.tokens[index].read == set(range(rank * 6, min(rank * 6 + 7, LENGTH)))


@pytest.mark.parametrize("index", range(20))
@pytest.mark.parametrize("window", list(Window))
def test_labels_of_slices_are_slices_of_the_labels(index: int, window: Window) -> None:
    segment = replace(Segments().segment(index), window=window)
    whole = next_token_labels(segment, window)
    for size in (1, 5, LENGTH):
        parts = [
            next_token_labels(segment, window, a, min(a + size, LENGTH))
            for a in range(0, LENGTH, size)
        ]
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_a_batch_moves_as_a_whole() -> None:
    (step,), _ = batches(0, range(1), ParallelDims(2, 1))
    moved = step[0].to("meta")
    assert {x.device for x in (moved.tokens_BT, moved.labels_BT, moved.layout.positions_BT)} == {
        torch.device("meta")
    }
